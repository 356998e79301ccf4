#include "call.h"

#include <ATen/core/grad_mode.h>
#include <c10/util/StringUtil.h>

namespace gam {

std::shared_ptr<Found> Call::look(const TensorList& list, Access access) const {
  const Shapes& shapes = plan_.shapes();
  if (list.size() != shapes.size()) {
    refuse_value(
        c10::str(list.name(), " must have one tensor a parameter, that is ", shapes.size(), ", got ", list.size()));
  }
  auto found = std::make_shared<Found>();
  found->arrays.resize(shapes.size());
  found->writable = access == Access::kWrite;
  for (size_t i = 0; i < shapes.size(); ++i) {
    if (!list[i]) continue;
    check(list, i, access);
    found->arrays[i] =
        access == Access::kWrite ? list[i]->mutable_data_ptr() : const_cast<void*>(list[i]->const_data_ptr());
  }
  return found;
}

void Call::check(const TensorList& list, size_t i, Access access) const {
  const at::Tensor& tensor = *list[i];
  const Shapes::Shape& leaf = plan_.shapes()[i];
  check_plain(list, i, plan_.device());
  if (dtype_of(list, i) != plan_.shapes().dtype()) {
    refuse_type(c10::str(list.name_of(i), " must have the dtype of its parameter, got ", tensor.dtype()));
  }
  if (tensor.sizes() != at::IntArrayRef(leaf.sizes)) {
    refuse_value(c10::str(list.name_of(i), " must have the shape of its parameter, ", at::IntArrayRef(leaf.sizes),
                          ", got ", tensor.sizes()));
  }
  if (!lies_as(tensor, leaf.sizes, leaf.strides)) {
    refuse_value(c10::str(list.name_of(i), " must have the strides of its parameter, ", at::IntArrayRef(leaf.strides),
                          ", got ", tensor.strides()));
  }
  if (access == Access::kWrite && tensor.requires_grad() && at::GradMode::is_enabled()) {
    throw std::runtime_error(list.name_of(i) + " requires grad and would be written: call under torch.no_grad()");
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
    const bool seen = !slot.list->held() || !slot.list->held()->owned();  // by somebody else
    if (slot.access != Access::kWrite || !seen) continue;
    const size_t size = slot.list->size();
    for (size_t i = 0; i < size; ++i) {
      const at::Tensor* later = i + 2 * kAhead < size ? (*slot.list)[i + 2 * kAhead] : nullptr;
      const at::Tensor* soon = i + kAhead < size ? (*slot.list)[i + kAhead] : nullptr;
      if (later) prefetch(later->unsafeGetTensorImpl(), 3);
      if (soon) prefetch_version(soon->unsafeGetTensorImpl());
      if (slot.found->arrays[i] && !(*slot.list)[i]->is_inference()) {
        (*slot.list)[i]->unsafeGetTensorImpl()->bump_version();
      }
    }
  }
}

}  // namespace gam
