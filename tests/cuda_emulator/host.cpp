// All that is no kernel as one source: torch's headers, which take most of the time to compile, are read once.

#include "../../csrc/bindings.cpp"
#include "../../csrc/cuda/executor.cpp"
#include "../../csrc/cuda/tables.cpp"
#include "../../csrc/draws.cpp"
#include "../../csrc/gradients.cpp"
#include "../../csrc/ops.cpp"
#include "../../csrc/plan.cpp"
#include "../../csrc/tensors.cpp"
#include "controls.cpp"
#include "device.cpp"
