#include "call.h"

#include <ATen/core/grad_mode.h>

#include <algorithm>

namespace gam {

void Call::check(const TensorList& list, size_t i, Access access) const {
  const at::Tensor& tensor = *list[i];
  const Shapes::Shape& leaf = plan_.shapes()[i];
  check_plain(list, i, plan_.device());
  if (dtype_of(list, i) != leaf.dtype) {
    refuse_type(c10::str(list.name_of(i), " must have the dtype of its parameter, got ", tensor.dtype()));
  }
  if (tensor.sizes() != at::IntArrayRef(leaf.sizes)) {
    refuse_value(c10::str(list.name_of(i), " must have the shape of its parameter, ", at::IntArrayRef(leaf.sizes),
                          ", got ", tensor.sizes()));
  }
  if (access == Access::kRead) return;
  if (tensor.requires_grad() && at::GradMode::is_enabled()) {
    throw std::runtime_error(list.name_of(i) + " requires grad and would be written: call under torch.no_grad()");
  }
  if (!is_free_of_self_overlap(tensor)) {
    refuse_value(list.name_of(i) + " must not overlap itself in memory: give it memory of its own with clone()");
  }
}

void Call::choose_layouts() {
  const auto is_contiguous = [](const Slot& slot) { return slot.found->contiguous; };
  if (std::all_of(slots_.begin(), slots_.end(), is_contiguous)) return;
  for (size_t i = 0; i < plan_.shapes().size(); ++i) {
    const at::Tensor* like = nullptr;
    bool same = true, contiguous = true;
    for (const Slot& slot : slots_) {
      if (!slot.found->arrays[i].data) continue;
      const at::Tensor& tensor = *(*slot.list)[i];
      if (!like) like = &tensor;
      contiguous = contiguous && tensor.is_contiguous();
      same = same && tensor.is_non_overlapping_and_dense() && tensor.strides() == like->strides();
    }
    if (same || contiguous) continue;
    for (Slot& slot : slots_) {
      const at::Tensor* tensor = slot.found->arrays[i].data ? (*slot.list)[i] : nullptr;
      if (tensor && !tensor->is_contiguous()) slot.found->arrays[i].strides = tensor->strides().data();
    }
  }
}

std::vector<const at::Tensor*> Call::used_last() const {
  std::vector<const at::Tensor*> result;
  for (const Slot& slot : slots_) {
    for (size_t i = 0; slot.last && i < slot.list->size(); ++i) result.push_back((*slot.list)[i]);
  }
  return result;
}

void Call::bump_versions() {
  for (const Slot& slot : slots_) {
    const bool seen = !slot.list->held() || slot.list->held()->hold() != Hold::kOwned;  // by somebody else
    if (slot.access != Access::kWrite || !seen) continue;
    const size_t size = slot.list->size();
    for (size_t i = 0; i < size; ++i) {
      const at::Tensor* later = i + 2 * kAhead < size ? (*slot.list)[i + 2 * kAhead] : nullptr;
      const at::Tensor* soon = i + kAhead < size ? (*slot.list)[i + kAhead] : nullptr;
      if (later) prefetch(later->unsafeGetTensorImpl(), 3);
      if (soon) prefetch_version(soon->unsafeGetTensorImpl());
      if (slot.found->arrays[i].data && !(*slot.list)[i]->is_inference()) {
        (*slot.list)[i]->unsafeGetTensorImpl()->bump_version();
      }
    }
  }
}

bool Call::may_overlap(size_t s) const {
  const Slot& slot = slots_[s];
  const auto& held = slot.list->held();
  if (!held) return true;
  // The same tensors in two slots are the same arrays, leaf by leaf, which is allowed where only one of them is
  // written; one of the slots then stands for both.
  bool twice_written = false, covered = false;
  for (size_t other = 0; other < slots_.size(); ++other) {
    if (other == s || slots_[other].list->held() != held) continue;
    const bool written = slots_[other].access == Access::kWrite;
    twice_written = twice_written || (written && slot.access == Access::kWrite);
    covered = covered || (slot.access == Access::kRead && (written || other < s));
  }
  return twice_written || !(covered || held->hold() != Hold::kShared);
}

void Call::check_overlaps() {
  std::vector<size_t> chosen;
  uint64_t accesses = 1;
  bool written = false;
  for (size_t s = 0; s < slots_.size(); ++s) {
    const bool is_written = slots_[s].access == Access::kWrite, is_chosen = may_overlap(s);
    accesses = 3 * accesses + (is_chosen ? is_written : 2);
    if (!is_chosen) continue;
    chosen.push_back(s);
    written = written || is_written;
  }
  if (!written) return;
  std::vector<uintptr_t> fingerprint;  // everything that the answer depends on
  for (const size_t s : chosen) {
    const Slot& slot = slots_[s];
    auto& bytes = slot.found->bytes;
    for (size_t i = bytes.size(); i < slot.list->size(); ++i) {
      const bool used = slot.found->arrays[i].data != nullptr;
      bytes.push_back(used ? extent(*(*slot.list)[i]) : std::pair<uintptr_t, uintptr_t>(0, 0));
    }
    for (const auto& [begin, end] : bytes) {
      fingerprint.push_back(begin);
      fingerprint.push_back(end);
    }
    for (size_t i = 0; !slot.found->contiguous && i < slot.list->size(); ++i) {
      const at::Tensor* tensor = slot.found->arrays[i].data ? (*slot.list)[i] : nullptr;
      if (!tensor || tensor->is_contiguous()) continue;
      for (const int64_t stride : tensor->strides()) fingerprint.push_back(static_cast<uintptr_t>(stride));
    }
  }
  if (plan_.known(accesses, fingerprint)) return;
  std::vector<Extent> sorted;
  for (const size_t s : chosen) {
    const auto& bytes = slots_[s].found->bytes;
    for (size_t i = 0; i < bytes.size(); ++i) {
      const auto [begin, end] = bytes[i];
      if (begin < end) sorted.push_back({begin, end, s, i, slots_[s].access == Access::kWrite});
    }
  }
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
