#include "../../csrc/cuda/sums.cu"
