#include "lists.h"

#include <c10/util/StringUtil.h>
#include <torch/csrc/autograd/python_variable.h>

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

// The numbers that `convert` makes of the entries; it sets a Python error where it cannot.
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

}  // namespace

TensorList::TensorList(std::string name, py::handle list, bool optional) : name_(std::move(name)) {
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

}  // namespace gam
