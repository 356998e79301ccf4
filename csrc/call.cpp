#include "call.h"

#include <ATen/core/grad_mode.h>

#include <algorithm>

namespace gam {

Dtype Call::check(const TensorList& list, size_t i, Access access, bool may_be_wider) const {
  const at::Tensor& tensor = *list[i];
  const Shapes::Shape& leaf = plan_.shapes()[i];
  check_plain(list, i, plan_.device());
  const Dtype dtype = dtype_of(list, i);
  if (dtype != leaf.dtype && !(may_be_wider && dtype == Dtype::kFloat && size_of(leaf.dtype) == 2)) {
    refuse_type(c10::str(list.name_of(i), " must have the dtype of its parameter, got ", tensor.dtype()));
  }
  if (tensor.sizes() != at::IntArrayRef(leaf.sizes)) {
    refuse_value(c10::str(list.name_of(i), " must have the shape of its parameter, ", at::IntArrayRef(leaf.sizes),
                          ", got ", tensor.sizes()));
  }
  if (access == Access::kRead) return dtype;
  if (tensor.requires_grad() && at::GradMode::is_enabled()) {
    throw std::runtime_error(list.name_of(i) + " requires grad and would be written: call under torch.no_grad()");
  }
  if (!is_free_of_self_overlap(tensor)) {
    refuse_value(list.name_of(i) + " must not overlap itself in memory: give it memory of its own with clone()");
  }
  return dtype;
}

void Call::choose_layouts() {
  for (size_t i = 0; i < plan_.shapes().size(); ++i) {
    const at::Tensor* like = nullptr;
    bool same = true, contiguous = true;
    for (const Slot& slot : slots_) {
      if (!slot.arrays[i].data) continue;
      const at::Tensor& tensor = *(*slot.list)[i];
      if (!like) like = &tensor;
      contiguous = contiguous && tensor.is_contiguous();
      same = same && tensor.is_non_overlapping_and_dense() && tensor.strides() == like->strides();
    }
    if (same || contiguous) continue;
    for (Slot& slot : slots_) {
      const at::Tensor* tensor = slot.arrays[i].data ? (*slot.list)[i] : nullptr;
      if (tensor && !tensor->is_contiguous()) slot.arrays[i].strides = tensor->strides().data();
    }
  }
}

void Call::check_overlaps() {
  uint64_t accesses = 1;
  std::vector<uintptr_t> fingerprint;  // everything that the answer depends on
  std::vector<Extent> sorted;
  for (size_t s = 0; s < slots_.size(); ++s) {
    const Slot& slot = slots_[s];
    accesses = 2 * accesses + (slot.access == Access::kWrite);
    for (size_t i = 0; i < slot.arrays.size(); ++i) {
      const at::Tensor* tensor = slot.arrays[i].data ? (*slot.list)[i] : nullptr;
      const auto [begin, end] = tensor ? extent(*tensor) : std::pair<uintptr_t, uintptr_t>(0, 0);
      fingerprint.push_back(begin);
      fingerprint.push_back(end);
      if (tensor && !tensor->is_contiguous()) {
        for (const int64_t stride : tensor->strides()) fingerprint.push_back(static_cast<uintptr_t>(stride));
      }
      if (begin < end) sorted.push_back({begin, end, s, i, slot.access == Access::kWrite});
    }
  }
  if (plan_.known(accesses, fingerprint)) return;
  std::sort(sorted.begin(), sorted.end(), [](const Extent& a, const Extent& b) { return a.begin < b.begin; });
  std::vector<const Extent*> open;  // those that reach beyond the one at hand
  for (const Extent& next : sorted) {
    open.erase(std::remove_if(open.begin(), open.end(), [&](const Extent* e) { return e->end <= next.begin; }),
               open.end());
    for (const Extent* before : open) {
      if (before->written || next.written) check_pair(*before, next);
    }
    open.push_back(&next);
  }
  plan_.remember(accesses, std::move(fingerprint));
}

void Call::check_pair(const Extent& a, const Extent& b) const {
  const at::Tensor &x = tensor_of(a), &y = tensor_of(b);
  const bool same = a.leaf == b.leaf && a.begin == b.begin && (x.strides() == y.strides() || x.numel() == 1);
  if ((same && !(a.written && b.written)) || are_interleaved(x, y)) return;
  refuse_value(c10::str(slots_[a.slot].list->name_of(a.leaf), " and ", slots_[b.slot].list->name_of(b.leaf),
                        " must not overlap in memory: give one of them memory of its own with clone()"));
}

}  // namespace gam
