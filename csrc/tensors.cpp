#include "tensors.h"

#include <ATen/EmptyTensor.h>
#include <ATen/core/grad_mode.h>
#include <c10/util/StringUtil.h>
#include <torch/csrc/autograd/python_variable.h>

#include <algorithm>
#include <utility>

namespace py = pybind11;

namespace gam {
namespace {

const char* type_of(py::handle object) { return Py_TYPE(object.ptr())->tp_name; }

py::tuple tuple_of(const std::string& name, py::handle list, const char* what) {
  if (!PyList_Check(list.ptr()) && !PyTuple_Check(list.ptr())) {
    throw py::type_error(c10::str(name, " must be a list of ", what, ", got ", type_of(list)));
  }
  PyObject* tuple = PySequence_Tuple(list.ptr());
  if (!tuple) throw py::error_already_set();
  return py::reinterpret_steal<py::tuple>(tuple);
}

// Converts the entries by `convert`, which sets a Python error if it cannot.
template <class Number, class Convert>
std::vector<Number> unpack(const std::string& name, py::handle list, const char* what, Convert convert) {
  const py::tuple entries = tuple_of(name, list, what);
  std::vector<Number> result;
  result.reserve(entries.size());
  for (size_t i = 0; i < entries.size(); ++i) {
    PyObject* entry = PyTuple_GET_ITEM(entries.ptr(), static_cast<Py_ssize_t>(i));
    result.push_back(convert(entry));
    if (PyErr_Occurred()) {
      if (!PyErr_ExceptionMatches(PyExc_TypeError) && !PyErr_ExceptionMatches(PyExc_OverflowError)) {
        throw py::error_already_set();
      }
      PyErr_Clear();
      throw py::type_error(c10::str(name, "[", i, "] must be one of the ", what, ", got ", type_of(entry)));
    }
  }
  return result;
}

size_t needed_bytes(const at::Tensor& tensor) {
  return static_cast<size_t>(tensor.storage_offset() + tensor.numel()) * tensor.element_size();
}

}  // namespace

void release(std::vector<at::Tensor>& tensors) {
  const auto ahead = [&](size_t i) { return i < tensors.size() ? &tensors[i] : nullptr; };
  for (size_t i = 0; i < tensors.size(); ++i) {
    if (const auto* later = ahead(i + 2 * kAhead)) prefetch(later->unsafeGetTensorImpl(), 3);
    if (const auto* soon = ahead(i + kAhead); soon && soon->has_storage()) {
      prefetch(soon->storage().unsafeGetStorageImpl(), 2);
    }
    tensors[i].reset();
  }
}

Tensors::~Tensors() { release(tensors_); }

std::shared_ptr<Found> Tensors::known(const std::shared_ptr<const Shapes>& shapes, bool written) const {
  const bool fits = shapes == (others_ ? others_->shapes_ : shapes_);
  if (!fits || !found_ || (written && (!found_->writable || at::GradMode::is_enabled()))) return nullptr;
  if (owned_) return found_;
  // other code may have given a tensor new memory, or a lazy copy
  for (size_t i = 0; i < tensors_.size(); ++i) {
    if (i + 2 * kAhead < tensors_.size()) prefetch(tensors_[i + 2 * kAhead].unsafeGetTensorImpl(), 3);
    if (i + kAhead < tensors_.size()) prefetch(tensors_[i + kAhead].storage().unsafeGetStorageImpl(), 1);
    const void* data = written ? tensors_[i].mutable_data_ptr() : tensors_[i].const_data_ptr();
    if (data != found_->arrays[i]) return nullptr;
  }
  return found_;
}

void Tensors::remember(std::shared_ptr<const Shapes> shapes, std::shared_ptr<Found> found) {
  shapes_ = std::move(shapes);
  found_ = std::move(found);
  others_ = nullptr;
  recorded_.reset();  // some may have new memory
}

const at::Tensor& Tensors::make(size_t i) const {
  const at::Tensor& like = (*others_)[i];
  const auto place = static_cast<const char*>(found_->arrays[i]) - static_cast<const char*>(memory_.const_data_ptr());
  tensors_[i] =
      at::detail::make_tensor<at::TensorImpl>(c10::Storage(memory_.storage()), memory_.key_set(), like.dtype());
  tensors_[i].unsafeGetTensorImpl()->set_sizes_and_strides(like.sizes(), like.strides(), place / like.element_size());
  return tensors_[i];
}

TensorList::TensorList(std::string name, py::handle list, bool optional) : name_(std::move(name)) {
  if (py::isinstance<Tensors>(list)) {
    held_ = list.cast<std::shared_ptr<Tensors>>();
    return;
  }
  owner_ = tuple_of(name_, list, "tensors");
  tensors_.reserve(owner_.size());
  for (size_t i = 0; i < owner_.size(); ++i) {
    PyObject* item = PyTuple_GET_ITEM(owner_.ptr(), static_cast<Py_ssize_t>(i));
    if (optional && item == Py_None) {
      tensors_.push_back(nullptr);
    } else if (THPVariable_Check(item)) {
      tensors_.push_back(&THPVariable_Unpack(item));
    } else {
      throw py::type_error(
          c10::str(name_of(i), " must be a tensor", optional ? " or None" : "", ", got ", type_of(item)));
    }
  }
}

std::string TensorList::name_of(size_t i) const { return c10::str(name_, "[", i, "]"); }

std::vector<double> unpack_numbers(const std::string& name, py::handle list) {
  return unpack<double>(name, list, "numbers", [](PyObject* entry) { return PyFloat_AsDouble(entry); });
}

std::vector<int64_t> unpack_integers(const std::string& name, py::handle list) {
  return unpack<int64_t>(name, list, "integers", [](PyObject* entry) { return PyLong_AsLongLong(entry); });
}

std::vector<py::object> unpack_entries(const std::string& name, py::handle list, const char* what) {
  std::vector<py::object> result;
  for (const py::handle entry : tuple_of(name, list, what)) result.push_back(py::reinterpret_borrow<py::object>(entry));
  return result;
}

at::Tensor tensor_of(const Numbers& values, at::IntArrayRef sizes) {
  at::Tensor result = at::detail::empty_cpu(sizes, at::TensorOptions().dtype(at::kDouble));
  std::copy(values.begin(), values.end(), result.mutable_data_ptr<double>());
  return result;
}

void refuse_value(const std::string& message) { throw py::value_error(message); }
void refuse_type(const std::string& message) { throw py::type_error(message); }

std::optional<Dtype> known_dtype(at::ScalarType dtype) {
  switch (dtype) {
    case at::kDouble:
      return Dtype::kDouble;
    case at::kFloat:
      return Dtype::kFloat;
    case at::kBFloat16:
      return Dtype::kBFloat16;
    case at::kHalf:
      return Dtype::kHalf;
    default:
      return std::nullopt;
  }
}

bool is_plain(const at::Tensor& tensor) {
  return tensor.layout() == at::kStrided && !tensor.unsafeGetTensorImpl()->is_python_dispatch() &&
         tensor.has_storage() && !tensor.is_neg() && !tensor._is_zerotensor() && known_dtype(tensor.scalar_type()) &&
         tensor.is_non_overlapping_and_dense() &&
         (tensor.numel() == 0 || tensor.storage().nbytes() >= needed_bytes(tensor));
}

void check_plain(const TensorList& list, size_t i, at::Device device) {
  const at::Tensor& tensor = *list[i];
  if (!tensor.defined()) refuse_type(list.name_of(i) + " must be a tensor, got an undefined one");
  if (tensor.device() == device && is_plain(tensor)) return;
  const bool has_strides = tensor.layout() == at::kStrided;
  refuse_value(c10::str(list.name_of(i), " must be a plain tensor on ", device, " of float64, float32, bfloat16 or ",
                        "float16, with its own elements, dense in memory; got ", tensor.toString(), " on ",
                        tensor.device(), " of shape ", tensor.sizes(), " and strides ",
                        has_strides ? tensor.strides() : at::IntArrayRef()));
}

bool lies_as(const at::Tensor& tensor, at::IntArrayRef sizes, at::IntArrayRef strides) {
  if (tensor.strides() == strides) return true;
  for (size_t d = 0; d < sizes.size(); ++d) {
    if (sizes[d] != 1 && tensor.strides()[d] != strides[d]) return tensor.numel() == 0;
  }
  return true;
}

}  // namespace gam
