// The core without its loops and kernels, as one source: torch's headers, which take most of the time to compile, are
// read once.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wsubobject-linkage"  // an anonymous namespace in an included file
#endif

#include "bindings.cpp"
#include "draws.cpp"
#include "gradients.cpp"
#include "ops.cpp"
#include "plan.cpp"
#include "tensors.cpp"

#if defined(GAM_CUDA)
#include "cuda/executor.cpp"
#include "cuda/tables.cpp"
#endif

#if !defined(GAM_EMULATED)  // the emulator has its own device
#include "cpu/executor.cpp"
#if defined(GAM_CUDA)
#include "cuda/device.cpp"
#endif
#endif
