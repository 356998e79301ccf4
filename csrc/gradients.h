// Gradients of parameters between two passes: found, taken over, cleared. Only what tensors say of themselves is looked
// at, so this serves those of any device; elements are touched by torch, where a gradient has to be copied.
#pragma once

#include <cstdint>
#include <memory>
#include <tuple>
#include <utility>
#include <vector>

#include "tensors.h"

namespace gam {

// To be called at import, when no other thread can wait, with the GIL, for what one that needs the GIL is finding out.
void learn_counts();

// What autograd counts the changes of tensors by, as it was.
class Versions {
 public:
  explicit Versions(const Tensors& tensors);

  // The position of the first tensor that was written to since; -1 without one.
  int64_t first_changed(const Tensors& tensors) const;

  size_t size() const { return values_.size(); }
  uint32_t operator[](size_t i) const { return values_[i]; }

 private:
  std::vector<uint32_t> values_;
};

// The positions of those with a gradient whose flag is not set; true if there is a gradient at all; and the first whose
// gradient is sparse, or of another layout that is not strided, or -1.
std::tuple<std::vector<int64_t>, bool, int64_t> survey_gradients(const Tensors& params,
                                                                 const std::vector<unsigned char>& flags);

// No parameter has a gradient after it; those that are parts of a buffer which somebody else holds stay, with
// `keep_parts`, and are zeroed. Those of `recycle` bytes and more on a CPU that nobody else has a hold on, and that are
// like their parameters in memory, are handed out with their positions.
std::vector<std::pair<int64_t, at::Tensor>> clear_gradients(const Tensors& params, int64_t recycle, bool keep_parts);

// take_gradients where all is as it mostly is: no tensor was written to since, all flags are the same, and each
// parameter has a dense gradient, of no more bits than it. Null, and nothing done, where it is not. One look at each
// tensor instead of three: with many small ones, what they say of themselves is more than the caches hold.
std::shared_ptr<Tensors> take_all_gradients(const std::shared_ptr<Tensors>& params, const Versions& versions,
                                            const std::vector<unsigned char>& flags, bool keep);

// The gradients in the dtypes of their parameters and, where these are dense, in their order in memory; zeros where
// there is none. With `keep` they are the caller's to overwrite, and the parameters have none: a gradient that somebody
// else could see change is copied, and stays where it is if it may be part of a buffer, until clear_gradients() finds
// out.
std::shared_ptr<Tensors> take_gradients(const Tensors& params, bool keep);

}  // namespace gam
