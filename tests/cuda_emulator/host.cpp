// The core, with the emulator in place of a device.

#include "../../csrc/core.cpp"
#include "controls.cpp"
#include "device.cpp"
