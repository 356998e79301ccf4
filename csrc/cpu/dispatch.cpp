#include "dispatch.h"

#include <atomic>

namespace gam::cpu {
namespace {

std::vector<const Kernels*> supported() {
  std::vector<const Kernels*> found;
#if defined(__x86_64__) && defined(__GNUC__)
  __builtin_cpu_init();
  // Conversions of halves use F16C. Every processor with AVX2 and FMA has it, and some compilers cannot test for it.
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool has_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (has_avx2 && has_avx512) found.push_back(&avx512::kKernels);
  if (has_avx2) found.push_back(&avx2::kKernels);
#endif
  found.push_back(&baseline::kKernels);
  return found;
}

std::atomic<const Kernels*>& chosen() {
  static std::atomic<const Kernels*> kernels{supported().front()};
  return kernels;
}

}  // namespace

const Kernels& kernels() { return *chosen().load(std::memory_order_relaxed); }

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (const Kernels* kernels : supported()) names.emplace_back(kernels->isa);
  return names;
}

bool use_instruction_set(const std::string& name) {
  for (const Kernels* kernels : supported()) {
    if (kernels->isa == name) {
      chosen().store(kernels, std::memory_order_relaxed);
      return true;
    }
  }
  return false;
}

}  // namespace gam::cpu
