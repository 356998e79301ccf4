// Arguments of the operations: tensors, lists of tensors and numbers, with their checks.
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

// The arrays of a list whose tensors fit the leaves of a plan.
struct Found {
  std::vector<void*> arrays;  // one per leaf
  bool writable = false;      // checked for writing
};

// Releases tensors.
void release(std::vector<at::Tensor>& tensors);

// A list of tensors for several operations of a step (gam_fast._C.Tensors), which keeps the results of checks.
class Tensors {
 public:
  // `owned`: no code outside the engine can reach their memory.
  Tensors(std::vector<at::Tensor> tensors, bool owned) : tensors_(std::move(tensors)), owned_(owned) {}
  ~Tensors();

  size_t size() const { return tensors_.size(); }
  const at::Tensor& operator[](size_t i) const { return tensors_[i].defined() ? tensors_[i] : make(i); }
  bool owned() const { return owned_; }

  // The result of a check for these leaves if it is still valid, or null. The GIL guards all of these functions.
  std::shared_ptr<Found> known(const std::shared_ptr<const Shapes>& shapes, bool written) const;
  void remember(std::shared_ptr<const Shapes> shapes, std::shared_ptr<Found> found);

  // Records that they are plain tensors of these shapes.
  void fit(std::shared_ptr<const Shapes> shapes) { shapes_ = std::move(shapes); }

  // Records that they are plain tensors, each with the dtype, device and memory layout of its counterpart in `others`.
  // So they fit any plan that `others` fit.
  void resemble(std::shared_ptr<Tensors> others, std::shared_ptr<Found> found) {
    others_ = std::move(others);
    found_ = std::move(found);
  }

  // Releases the tensors until others take their place. Those are mostly the same again, so that the results of checks
  // still hold. (While the core holds a parameter, torch does not swap its tensor for another.)
  void let_go() {
    release(tensors_);
    tensors_.clear();
  }
  void take(std::vector<at::Tensor> tensors) {
    tensors_ = std::move(tensors);
    recorded_.reset();
  }

  // Undefined tensors lie in this block of memory, at the addresses that were found. Each is made only on request: the
  // loops need addresses only.
  void share(at::Tensor memory) { memory_ = std::move(memory); }

  // The device hears once of each stream that uses the memory (recording 161 tensors takes 30 µs or so). Adds the
  // tensors that have memory of their own, and the one whose memory the rest shares, unless this stream was the last to
  // be heard of.
  void add_unrecorded(int64_t stream, std::vector<const at::Tensor*>& to) const {
    if (recorded_ == stream) return;
    for (const at::Tensor& tensor : tensors_) {
      if (tensor.defined()) to.push_back(&tensor);
    }
    if (memory_.defined()) to.push_back(&memory_);
  }
  void set_recorded(int64_t stream) { recorded_ = stream; }

 private:
  const at::Tensor& make(size_t i) const;

  mutable std::vector<at::Tensor> tensors_;
  bool owned_;
  std::shared_ptr<const Shapes> shapes_;
  std::shared_ptr<Tensors> others_;
  std::shared_ptr<Found> found_;
  at::Tensor memory_;
  std::optional<int64_t> recorded_;
};

// Prefetches cache lines that are read soon.
inline void prefetch([[maybe_unused]] const void* address, [[maybe_unused]] int lines) {
#if defined(__GNUC__)
  for (int line = 0; line < lines; ++line) __builtin_prefetch(static_cast<const char*>(address) + 64 * line);
#endif
}

// Prefetches the version counter of a tensor, which autograd allocates separately. VariableVersion contains only its
// address, and does not expose it. A wrong prefetch does no harm.
inline void prefetch_version(const c10::TensorImpl* impl) {
  const c10::VariableVersion& counter = impl->version_counter();
  const void* address = nullptr;
  static_assert(sizeof(counter) >= sizeof(address));
  std::memcpy(&address, static_cast<const void*>(&counter), sizeof(address));
  prefetch(address, 1);
}

// Iterations of a loop over tensors from a prefetch to its use.
inline constexpr size_t kAhead = 8;

// The tensors of a list, a tuple or Tensors, null for None. They stay alive even if other threads change the list.
class TensorList {
 public:
  TensorList() = default;

  // Raises TypeError unless `list` holds tensors only (or, with `optional`, tensors and None).
  TensorList(std::string name, pybind11::handle list, bool optional = false);

  const std::string& name() const { return name_; }
  size_t size() const { return held_ ? held_->size() : tensors_.size(); }
  const at::Tensor* operator[](size_t i) const { return held_ ? &(*held_)[i] : tensors_[i]; }
  std::string name_of(size_t i) const;

  // The Tensors that it was made from, or null.
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

// Returns numbers as a float64 tensor on the CPU.
at::Tensor tensor_of(const Numbers& values, at::IntArrayRef sizes);

[[noreturn]] void refuse_value(const std::string& message);
[[noreturn]] void refuse_type(const std::string& message);

// The dtype in the loops' terms, if they support it.
std::optional<Dtype> known_dtype(at::ScalarType dtype);

// True for a tensor that the loops can use by its address: of a supported dtype, strided, with all of its elements in
// memory, without gaps.
bool is_plain(const at::Tensor& tensor);

// Raises ValueError unless the tensor is plain and on the device.
void check_plain(const TensorList& list, size_t i, at::Device device);

// True if the elements of a tensor have this order in memory. The stride of a dimension of size 1 does not matter.
bool lies_as(const at::Tensor& tensor, at::IntArrayRef sizes, at::IntArrayRef strides);

}  // namespace gam
