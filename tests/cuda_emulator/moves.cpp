#include "../../csrc/cuda/moves.cu"
