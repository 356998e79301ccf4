// Python lists of tensors as the operations see them.
#pragma once

#include <ATen/core/Tensor.h>
#include <pybind11/pybind11.h>

#include <string>
#include <vector>

namespace gam {

// The tensors of a list or tuple, null for None. They stay alive, whatever other threads do to the list.
class TensorList {
 public:
  TensorList() = default;

  // Raises TypeError unless `list` is a list or tuple of tensors (or, with `optional`, of tensors and None).
  TensorList(std::string name, pybind11::handle list, bool optional = false);

  const std::string& name() const { return name_; }
  size_t size() const { return tensors_.size(); }
  const at::Tensor* operator[](size_t i) const { return tensors_[i]; }
  std::string name_of(size_t i) const;

 private:
  std::string name_;
  pybind11::tuple owner_;
  std::vector<const at::Tensor*> tensors_;
};

// A list or tuple of numbers; 0-dim tensors count as numbers. Raises TypeError.
std::vector<double> unpack_numbers(const std::string& name, pybind11::handle list);
std::vector<int64_t> unpack_integers(const std::string& name, pybind11::handle list);

// The entries of a list or tuple. Raises TypeError unless it is one.
std::vector<pybind11::object> unpack_entries(const std::string& name, pybind11::handle list, const char* what);

}  // namespace gam
