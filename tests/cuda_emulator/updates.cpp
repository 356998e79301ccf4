#include "../../csrc/cuda/updates.cu"
