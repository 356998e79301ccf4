#include "gradients.h"

#include <ATen/EmptyTensor.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/_foreach_zero.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros_like.h>
#include <c10/util/StringUtil.h>
#include <torch/csrc/DynamicTypes.h>
#include <torch/csrc/autograd/python_variable.h>

#include <map>
#include <set>
#include <utility>

namespace py = pybind11;

namespace gam {
namespace {

uint32_t version_of(const at::Tensor& tensor) {
  return tensor.is_inference() ? 0 : tensor.unsafeGetTensorImpl()->version_counter().current_version();
}

const at::Tensor& gradient_of(const at::Tensor& param) { return param.unsafeGetTensorImpl()->grad(); }

// The Python object of a tensor, or null. Its slot has another name in older releases of torch.
template <class Slot>
auto object_in(const Slot& slot, int) -> decltype(slot.load_pyobj()) {
  return slot.load_pyobj();
}
template <class Slot>
auto object_in(const Slot& slot, long) -> decltype(slot._unchecked_untagged_pyobj()) {
  return slot._unchecked_untagged_pyobj();
}

PyObject* object_of(const at::Tensor& tensor) {
  return object_in(*const_cast<at::Tensor&>(tensor).unsafeGetTensorImpl()->pyobj_slot(), 0);
}

// Reference count of a tensor with one owner in C++ and a Python object to which no Python code refers: in newer
// releases of torch the object counts.
size_t sole_count_with_object() {
  static const size_t count = [] {
    const at::Tensor tensor = at::detail::empty_cpu({0}, at::TensorOptions().dtype(at::kFloat));
    Py_DECREF(THPVariable_Wrap(tensor));
    return tensor.use_count();
  }();
  return count;
}

// The same for a storage.
size_t sole_count_of_storage_with_object() {
  static const size_t count = [] {
    const at::Storage storage = at::detail::empty_cpu({0}, at::TensorOptions().dtype(at::kFloat)).storage();
    Py_DECREF(torch::createPyObject(storage));
    return storage.use_count();
  }();
  return count;
}

// References to a storage, except that of a Python object to which no Python code refers.
size_t uses_of(const at::Storage& storage) {
  PyObject* object = object_in(*storage.unsafeGetStorageImpl()->pyobj_slot(), 0);
  const bool seen = object && Py_REFCNT(object) == 1;
  return storage.use_count() - (seen ? sole_count_of_storage_with_object() - 1 : 0);
}

// True if only param.grad refers to a gradient, and the gradient alone fills and owns its memory.
bool is_sole(const at::Tensor& grad) {
  if (!grad.has_storage()) return false;
  PyObject* object = object_of(grad);
  if (grad.use_count() != (object ? sole_count_with_object() : 1) || (object && Py_REFCNT(object) != 1)) return false;
  const at::Storage& storage = grad.storage();
  // memory of NumPy or of another process (not resizable) has owners that torch does not count
  if (storage.use_count() != 1 || !storage.resizable() || storage.nbytes() != grad.nbytes()) return false;
  // torch's CUDA graphs keep weak references to memory of a warm-up pass, and reclaim that memory
  return c10::intrusive_ptr<c10::StorageImpl>::reclaim_copy(storage.unsafeGetStorageImpl()).weak_use_count() == 1;
}

// True if a gradient may be part of a buffer that other code holds; parts_of_buffers() decides. Autograd makes no
// gradient that is a view in this sense, but some that share one storage.
bool may_be_part(const at::Tensor& grad) {
  if (!grad.has_storage() || grad.is_inference() || grad.unsafeGetTensorImpl()->is_python_dispatch()) return false;
  const at::Storage& storage = grad.storage();
  return storage.use_count() > 1 && (storage.nbytes() > grad.nbytes() || grad.is_view());
}

// For gradients that may be parts of buffers, whether each is one: its memory has an owner besides these gradients and
// tensors of which only these are views.
std::vector<bool> parts_of_buffers(const std::vector<at::Tensor>& grads) {
  std::set<const at::TensorImpl*> tensors;
  std::map<at::TensorImpl*, size_t> views;  // number of views by base
  std::map<const c10::StorageImpl*, size_t> owners;
  const auto storage_of = [](const at::Tensor& tensor) { return tensor.storage().unsafeGetStorageImpl(); };
  std::map<at::TensorImpl*, at::Tensor> bases;
  for (const at::Tensor& grad : grads) {
    if (!tensors.insert(grad.unsafeGetTensorImpl()).second) continue;
    ++owners[storage_of(grad)];
    if (!grad.is_view()) continue;
    const at::Tensor base(grad._base());
    ++views[base.unsafeGetTensorImpl()];
    bases.try_emplace(base.unsafeGetTensorImpl(), base);
  }
  for (const auto& [impl, base] : bases) {
    // the views, and `bases` itself; in newer releases an object counts only while Python code refers to it
    PyObject* object = object_of(base);
    const size_t others = views[impl] + (object ? sole_count_with_object() : 1);
    if (base.use_count() == others && (!object || Py_REFCNT(object) == 1)) ++owners[storage_of(base)];
  }
  std::vector<bool> result;
  result.reserve(grads.size());
  for (const at::Tensor& grad : grads) result.push_back(uses_of(grad.storage()) > owners[storage_of(grad)]);
  return result;
}

// True if the engine can take a gradient as it is: with the dtype of its parameter, and with the same memory order if
// the parameter is dense.
bool fits(const at::Tensor& grad, const at::Tensor& param) {
  return grad.scalar_type() == param.scalar_type() && grad.sizes() == param.sizes() &&
         (!param.is_non_overlapping_and_dense() || lies_as(grad, param.sizes(), param.strides()));
}

// True if a gradient's dtype has more bits than its parameter's.
bool is_wider(const at::Tensor& grad, const at::Tensor& param) {
  return grad.scalar_type() != param.scalar_type() && grad.is_floating_point() &&
         grad.element_size() > param.element_size();
}

bool is_alike(const at::Tensor& a, const at::Tensor& b) {
  return a.scalar_type() == b.scalar_type() && a.device() == b.device() && a.sizes() == b.sizes() &&
         a.strides() == b.strides();
}

// Prefetches the metadata of the next parameters and their gradients, each level of indirection some rounds ahead.
void prefetch_gradients(const Tensors& params, size_t i) {
  const auto param = [&](size_t steps) -> c10::TensorImpl* {
    const size_t next = i + steps * kAhead;
    return next < params.size() ? params[next].unsafeGetTensorImpl() : nullptr;
  };
  if (const auto* impl = param(4)) prefetch(impl, 3);
  if (const auto* impl = param(3)) {
    prefetch(impl->autograd_meta(), 2);
    prefetch_version(impl);
  }
  if (const auto* impl = param(2)) {
    if (impl->grad().defined()) prefetch(impl->grad().unsafeGetTensorImpl(), 3);
  }
  if (const auto* impl = param(1)) {
    if (impl->grad().has_storage()) prefetch(impl->grad().storage().unsafeGetStorageImpl(), 2);
  }
}

void check_same_count(size_t count, const Tensors& tensors, const char* name) {
  if (count != tensors.size()) {
    refuse_value(c10::str(name, " must have one entry per tensor, that is ", tensors.size(), ", got ", count));
  }
}

}  // namespace

void learn_counts() {
  sole_count_with_object();
  sole_count_of_storage_with_object();
}

Versions::Versions(const Tensors& tensors) {
  values_.reserve(tensors.size());
  for (size_t i = 0; i < tensors.size(); ++i) {
    if (i + 2 * kAhead < tensors.size()) prefetch(tensors[i + 2 * kAhead].unsafeGetTensorImpl(), 3);
    if (i + kAhead < tensors.size()) prefetch_version(tensors[i + kAhead].unsafeGetTensorImpl());
    values_.push_back(version_of(tensors[i]));
  }
}

int64_t Versions::first_changed(const Tensors& tensors) const {
  check_same_count(values_.size(), tensors, "versions");
  for (size_t i = 0; i < values_.size(); ++i) {
    if (version_of(tensors[i]) != values_[i]) return static_cast<int64_t>(i);
  }
  return -1;
}

std::vector<double> count_steps(const TensorList& steps, bool write) {
  std::vector<double> result;
  result.reserve(steps.size());
  const at::NoGradGuard no_grad;
  for (size_t i = 0; i < steps.size(); ++i) {
    const at::Tensor& step = *steps[i];
    if (step.scalar_type() == at::kFloat && step.is_cpu() && step.numel() == 1 && is_plain(step) &&
        !step.is_inference()) {
      const float next = *step.const_data_ptr<float>() + 1.0f;
      result.push_back(next);
      if (!write) continue;
      *step.mutable_data_ptr<float>() = next;
      step.unsafeGetTensorImpl()->bump_version();
    } else {
      result.push_back(step.item().toDouble() + 1.0);
      if (write) at::Tensor(step).add_(1.0);
    }
  }
  return result;
}

std::tuple<std::vector<int64_t>, bool, int64_t> survey_gradients(const Tensors& params,
                                                                 const std::vector<unsigned char>& flags) {
  check_same_count(flags.size(), params, "flags");
  std::vector<int64_t> unflagged;
  bool any = false;
  int64_t sparse = -1;
  for (size_t i = 0; i < params.size(); ++i) {
    const at::Tensor& grad = gradient_of(params[i]);
    if (!grad.defined()) continue;
    any = true;
    if (grad.layout() != at::kStrided && sparse < 0) sparse = static_cast<int64_t>(i);
    if (!flags[i]) unflagged.push_back(static_cast<int64_t>(i));
  }
  return {std::move(unflagged), any, sparse};
}

std::vector<std::pair<int64_t, at::Tensor>> clear_gradients(const Tensors& params, int64_t recycle, bool keep_parts) {
  std::vector<std::pair<int64_t, at::Tensor>> result;
  std::vector<at::Tensor> gone, parts;
  std::vector<size_t> places;  // positions of the parts
  gone.reserve(params.size());
  for (size_t i = 0; i < params.size(); ++i) {
    prefetch_gradients(params, i);
    const at::Tensor &param = params[i], &grad = gradient_of(param);
    if (!grad.defined()) continue;
    if (keep_parts && may_be_part(grad)) {
      parts.push_back(grad);
      places.push_back(i);
      continue;
    }
    const bool large = param.is_cpu() && static_cast<int64_t>(param.nbytes()) >= recycle;
    const bool spare = large && is_sole(grad) && is_alike(grad, param);
    at::Tensor taken = std::move(param.mutable_grad());
    if (spare) {
      result.emplace_back(static_cast<int64_t>(i), std::move(taken));
    } else {
      gone.push_back(std::move(taken));
    }
  }
  if (!parts.empty()) {
    const std::vector<bool> of_others = parts_of_buffers(parts);
    std::vector<at::Tensor> zeroed;
    for (size_t k = 0; k < parts.size(); ++k) {
      if (of_others[k]) {
        zeroed.push_back(parts[k]);
      } else {
        gone.push_back(std::move(params[places[k]].mutable_grad()));
      }
    }
    const at::NoGradGuard no_grad;
    const py::gil_scoped_release no_gil;
    if (!zeroed.empty()) at::_foreach_zero_(zeroed);
  }
  release(gone);
  return result;
}

namespace {

// Gradients on their way from the parameters to the engine.
class Taking {
 public:
  Taking(const Tensors& params, bool keep) : params_(params), keep_(keep), taken_(params.size()) {}

  void take(size_t i) {
    const at::Tensor &param = params_[i], &grad = gradient_of(param);
    if (!grad.defined()) {
      rest_.push_back(i);
      return;
    }
    const bool sole = is_sole(grad);
    if ((keep_ && !sole) || !fits(grad, param)) rest_.push_back(i);
    taken_[i] = grad;
    if (keep_ && (sole || !may_be_part(grad))) param.mutable_grad().reset();
  }

  // Gives all gradients back.
  void undo() {
    for (size_t i = 0; keep_ && i < taken_.size(); ++i) {
      if (taken_[i].defined()) params_[i].mutable_grad() = taken_[i];
    }
  }

  bool took_all() const { return rest_.empty(); }

  // Lets torch make the rest: zeros, copies, other dtypes and memory orders.
  std::shared_ptr<Tensors> finish() {
    if (!rest_.empty()) {
      std::vector<at::Tensor> made;
      {
        const py::gil_scoped_release no_gil;
        for (const size_t i : rest_) made.push_back(make(params_[i], taken_[i]));
      }
      for (size_t k = 0; k < rest_.size(); ++k) taken_[rest_[k]] = std::move(made[k]);  // releases the old tensor
    }
    return std::make_shared<Tensors>(std::move(taken_), keep_);
  }

 private:
  static at::Tensor make(const at::Tensor& param, const at::Tensor& grad) {
    if (!grad.defined()) return at::zeros_like(param);
    if (fits(grad, param)) return grad.clone(at::MemoryFormat::Preserve);
    const at::NoGradGuard no_grad;
    return at::empty_like(param).copy_(grad);
  }

  const Tensors& params_;
  bool keep_;
  std::vector<at::Tensor> taken_;
  std::vector<size_t> rest_;
};

}  // namespace

std::shared_ptr<Tensors> take_all_gradients(const std::shared_ptr<Tensors>& shared, const Versions& versions,
                                            const std::vector<unsigned char>& flags, bool keep) {
  const Tensors& params = *shared;
  check_same_count(versions.size(), params, "versions");
  check_same_count(flags.size(), params, "flags");
  Taking taking(params, keep);
  auto found = std::make_shared<Found>();
  bool plain = true;
  for (size_t i = 0; i < params.size(); ++i) {
    prefetch_gradients(params, i);
    const at::Tensor& grad = gradient_of(params[i]);
    const bool usual = grad.defined() && grad.layout() == at::kStrided && !is_wider(grad, params[i]) &&
                       version_of(params[i]) == versions[i];
    if (!usual || flags[i] != flags[0]) {
      taking.undo();
      return nullptr;
    }
    plain = plain && fits(grad, params[i]) && grad.device() == params[i].device() && is_plain(grad);
    if (plain) {
      found->arrays.push_back(keep ? grad.mutable_data_ptr() : const_cast<void*>(grad.const_data_ptr()));
    }
    taking.take(i);
  }
  found->writable = keep;
  auto taken = taking.finish();
  if (plain && taking.took_all()) taken->resemble(shared, std::move(found));
  return taken;
}

std::shared_ptr<Tensors> take_gradients(const Tensors& params, bool keep) {
  Taking taking(params, keep);
  for (size_t i = 0; i < params.size(); ++i) taking.take(i);
  return taking.finish();
}

}  // namespace gam
