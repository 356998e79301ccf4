// Which of the compiled loops run.
#pragma once

#include <string>
#include <vector>

#include "kernels.h"

namespace gam::cpu {

// The loops in use: the best of those compiled in that this processor runs, unless another was chosen.
const Kernels& kernels();

// Names of the instruction sets compiled in that this processor runs, best first.
std::vector<std::string> instruction_sets();

// Chooses one of them, for the whole process; false, and no change, for another name.
bool use_instruction_set(const std::string& name);

}  // namespace gam::cpu
