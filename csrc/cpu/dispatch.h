// Selects which of the compiled loops run.
#pragma once

#include <string>
#include <vector>

#include "kernels.h"

namespace gam::cpu {

// The loops in use: the best compiled instruction set that this processor supports, unless another was chosen.
const Kernels& kernels();

// Names of the compiled instruction sets that this processor supports, best first.
std::vector<std::string> instruction_sets();

// Chooses one of them for the whole process. Returns false, without a change, for any other name.
bool use_instruction_set(const std::string& name);

}  // namespace gam::cpu
