// Gradients of parameters between two passes: found, taken over, cleared. Only metadata of tensors is read, so this
// works for any device. If a gradient must be copied, torch does it.
#pragma once

#include <cstdint>
#include <memory>
#include <tuple>
#include <utility>
#include <vector>

#include "tensors.h"

namespace gam {

// Call this at import: later, a thread that holds the GIL could wait for one that needs it to learn the counts.
void learn_counts();

// The autograd versions of tensors at some point in time.
class Versions {
 public:
  explicit Versions(const Tensors& tensors);

  // The position of the first tensor written to since then, or -1.
  int64_t first_changed(const Tensors& tensors) const;

  size_t size() const { return values_.size(); }
  uint32_t operator[](size_t i) const { return values_[i]; }

 private:
  std::vector<uint32_t> values_;
};

// The positions of parameters with a gradient and no flag; whether any parameter has a gradient; and the position of
// the first gradient whose layout is not strided, such as a sparse one, or -1.
std::tuple<std::vector<int64_t>, bool, int64_t> survey_gradients(const Tensors& params,
                                                                 const std::vector<unsigned char>& flags);

// Removes all gradients, except, with `keep_parts`, parts of a buffer that other code holds: these stay and are zeroed.
// Returns, with their positions, the removed CPU gradients of at least `recycle` bytes that no other code can reach and
// that have their parameter's memory layout.
std::vector<std::pair<int64_t, at::Tensor>> clear_gradients(const Tensors& params, int64_t recycle, bool keep_parts);

// Fast path of take_gradients. It applies if no tensor was written to since, all flags are equal, and each parameter
// has a dense gradient of no more bits than itself. Otherwise it returns null and does nothing. It visits each tensor
// once instead of three times: the metadata of many small tensors exceed the caches.
std::shared_ptr<Tensors> take_all_gradients(const std::shared_ptr<Tensors>& params, const Versions& versions,
                                            const std::vector<unsigned char>& flags, bool keep);

// Counters of steps, each plus 1; with `write` also stored in them. Torch takes microseconds for each.
std::vector<double> count_steps(const TensorList& steps, bool write);

// The gradients in their parameters' dtypes and, if these are dense, memory order, and zeros for missing gradients.
// With `keep` the caller may overwrite them, and the parameters' gradients are removed. A gradient that other code
// could see change is copied; if it may be part of a buffer, it stays in place until clear_gradients() finds out.
std::shared_ptr<Tensors> take_gradients(const Tensors& params, bool keep);

}  // namespace gam
