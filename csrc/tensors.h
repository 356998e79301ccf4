// What the operations take: tensors and lists of them, checked, and numbers.
#pragma once

#include <ATen/core/Tensor.h>
#include <pybind11/pybind11.h>

#include <cstring>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "shapes.h"

namespace gam {

// The arrays of a list that fits the leaves of a plan.
struct Found {
  std::vector<void*> arrays;  // by leaf
  bool writable = false;      // looked at as something that is written
};

// Lets go of tensors.
void release(std::vector<at::Tensor>& tensors);

// Tensors that go into several operations of a step: gam_fast._C.Tensors. What was found out about them is kept.
class Tensors {
 public:
  // `owned`: nobody but the engine can get at their memory.
  Tensors(std::vector<at::Tensor> tensors, bool owned) : tensors_(std::move(tensors)), owned_(owned) {}
  ~Tensors();

  size_t size() const { return tensors_.size(); }
  const at::Tensor& operator[](size_t i) const { return tensors_[i].defined() ? tensors_[i] : make(i); }
  bool owned() const { return owned_; }

  // What was found for these leaves, where it still holds; null otherwise. The GIL guards all of these functions.
  std::shared_ptr<Found> known(const std::shared_ptr<const Shapes>& shapes, bool written) const;
  void remember(std::shared_ptr<const Shapes> shapes, std::shared_ptr<Found> found);

  // They are plain tensors of these shapes.
  void fit(std::shared_ptr<const Shapes> shapes) { shapes_ = std::move(shapes); }

  // They are plain tensors, each of the dtype and device of that of `others`, and lies in memory as it does; so they
  // fit whatever those fit.
  void resemble(std::shared_ptr<Tensors> others, std::shared_ptr<Found> found) {
    others_ = std::move(others);
    found_ = std::move(found);
  }

  // Lets go of the tensors, and holds others in their place: mostly the same again, of which what was found still
  // holds. (While the core has a hold on a parameter, torch does not swap its tensor for another.)
  void let_go() {
    release(tensors_);
    tensors_.clear();
  }
  void take(std::vector<at::Tensor> tensors) { tensors_ = std::move(tensors); }

  // Undefined ones lie in this memory, of bytes, at the addresses that were found. Each is made when somebody asks for
  // it: the loops need addresses only.
  void share(at::Tensor memory) { memory_ = std::move(memory); }

 private:
  const at::Tensor& make(size_t i) const;

  mutable std::vector<at::Tensor> tensors_;
  bool owned_;
  std::shared_ptr<const Shapes> shapes_;
  std::shared_ptr<Tensors> others_;
  std::shared_ptr<Found> found_;
  at::Tensor memory_;
};

// Asks for lines of memory that are soon to be read.
inline void prefetch([[maybe_unused]] const void* address, [[maybe_unused]] int lines) {
#if defined(__GNUC__)
  for (int line = 0; line < lines; ++line) __builtin_prefetch(static_cast<const char*>(address) + 64 * line);
#endif
}

// Asks for the number of changes of a tensor, which autograd keeps in memory of its own. VariableVersion holds nothing
// but the address, and does not give it away; a hint that is wrong does no harm.
inline void prefetch_version(const c10::TensorImpl* impl) {
  const c10::VariableVersion& counter = impl->version_counter();
  const void* address = nullptr;
  static_assert(sizeof(counter) >= sizeof(address));
  std::memcpy(&address, static_cast<const void*>(&counter), sizeof(address));
  prefetch(address, 1);
}

// Rounds of a loop over tensors from a prefetch to the use of what it brings.
inline constexpr size_t kAhead = 8;

// The tensors of a list, a tuple or Tensors, null for None. They stay alive, whatever other threads do to the list.
class TensorList {
 public:
  TensorList() = default;

  // Raises TypeError unless `list` holds tensors only (or, with `optional`, tensors and None).
  TensorList(std::string name, pybind11::handle list, bool optional = false);

  const std::string& name() const { return name_; }
  size_t size() const { return held_ ? held_->size() : tensors_.size(); }
  const at::Tensor* operator[](size_t i) const { return held_ ? &(*held_)[i] : tensors_[i]; }
  std::string name_of(size_t i) const;

  // What it was made of, if that was Tensors.
  const std::shared_ptr<Tensors>& held() const { return held_; }

 private:
  std::string name_;
  pybind11::tuple owner_;
  std::vector<const at::Tensor*> tensors_;
  std::shared_ptr<Tensors> held_;
};

using Numbers = std::vector<double>;  // by parameter group

// A list or tuple of numbers; 0-dim tensors count as numbers. Raises TypeError.
Numbers unpack_numbers(const std::string& name, pybind11::handle list);
std::vector<int64_t> unpack_integers(const std::string& name, pybind11::handle list);

// The entries of a list or tuple. Raises TypeError unless it is one.
std::vector<pybind11::object> unpack_entries(const std::string& name, pybind11::handle list, const char* what);

// Numbers as a float64 tensor of the CPU.
at::Tensor tensor_of(const Numbers& values, at::IntArrayRef sizes);

[[noreturn]] void refuse_value(const std::string& message);
[[noreturn]] void refuse_type(const std::string& message);

// The dtype as the loops know it, if they do.
std::optional<Dtype> known_dtype(at::ScalarType dtype);

// Tells a tensor that the loops can take by its address: of a dtype that they know, strided, with all of its elements
// in memory, without gaps.
bool is_plain(const at::Tensor& tensor);

// Raises ValueError unless it is that, on the device.
void check_plain(const TensorList& list, size_t i, at::Device device);

// Tells whether the elements of a tensor lie in memory in this order. The stride of a dimension of one element is of no
// account.
bool lies_as(const at::Tensor& tensor, at::IntArrayRef sizes, at::IntArrayRef strides);

}  // namespace gam
