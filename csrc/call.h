// The lists of one call: checked, laid out for the loops, and run.
#pragma once

#include <c10/util/StringUtil.h>

#include <deque>
#include <memory>
#include <utility>
#include <vector>

#include "checks.h"
#include "plan.h"

namespace gam {

// Streaming stores of a CPU save the read of the line that is overwritten, and take it out of the caches. They pay when
// a call touches more than the last-level cache holds. What the system reports of that is no guide (a virtual machine
// shows the whole socket's, of which it has a share), so this is the share of a few cores on today's servers.
inline constexpr int64_t kStreamBytes = 32 << 20;

enum class Access : uint8_t { kRead, kWrite };

// The lists of one call: checked one by one as they are added, and together by ready().
class Call {
 public:
  explicit Call(Plan& plan) : plan_(plan) {}

  List read(const TensorList& list) { return add(list, Access::kRead); }
  List write(const TensorList& list) { return add(list, Access::kWrite); }

  // Reads what others allocated, perhaps for another stream, and free soon: gradients, and the backup in the last call.
  List read_last(const TensorList& list) {
    const List result = read(list);
    slots_.back().last = true;
    return result;
  }

  // The state of a base optimizer; `uses` says for which leaves there is any.
  template <class Uses>
  List state(const TensorList& list, Uses uses) {
    return take(list, Access::kWrite, look(list, Access::kWrite, uses));
  }

  // Sets how the arrays are walked. Raises ValueError where written memory overlaps other memory of the call.
  void ready() {
    choose_layouts();
    check_overlaps();
  }

  // Whether the arrays of the call are more than the caches hold.
  bool exceeds_caches() const { return plan_.shapes().bytes() * static_cast<int64_t>(slots_.size()) > kStreamBytes; }

  // Calls f(executor) without the GIL, and lets autograd know what was written.
  template <class F>
  void run(F&& f) {
    std::vector<const at::Tensor*> used;
    if (plan_.executor().records_use()) used = used_last();
    {
      const pybind11::gil_scoped_release no_gil;
      f(plan_.executor());
      for (const at::Tensor* tensor : used) plan_.executor().record_use(*tensor);
    }
    bump_versions();
  }

 private:
  struct Slot {
    const TensorList* list;
    Access access;
    std::shared_ptr<Found> found;
    bool last = false;
  };

  List add(const TensorList& list, Access access) {
    std::shared_ptr<Found> found;
    if (const auto& held = list.held()) {
      found = held->known(plan_.shared_shapes(), access == Access::kWrite);
      if (!found) {
        found = look(list, access, [](size_t) { return true; });
        held->remember(plan_.shared_shapes(), found);
      }
      if (!found->contiguous) found = std::make_shared<Found>(*found);  // its strides are a matter of the whole call
    } else {
      found = look(list, access, [](size_t) { return true; });
    }
    return take(list, access, std::move(found));
  }

  List take(const TensorList& list, Access access, std::shared_ptr<Found> found) {
    slots_.push_back({&list, access, std::move(found)});
    return slots_.back().found->arrays.data();
  }

  // Checks what is in a list against the leaves, where `uses` says that a leaf has any.
  template <class Uses>
  std::shared_ptr<Found> look(const TensorList& list, Access access, Uses uses) const {
    const auto& leaves = plan_.shapes();
    if (list.size() != leaves.size()) {
      refuse_value(
          c10::str(list.name(), " must have one tensor a parameter, that is ", leaves.size(), ", got ", list.size()));
    }
    auto found = std::make_shared<Found>();
    found->arrays.resize(leaves.size());
    found->writable = access == Access::kWrite;
    for (size_t i = 0; i < leaves.size(); ++i) {
      if (!uses(i)) continue;
      if (!list[i]) refuse_type(list.name_of(i) + " must be a tensor, got None");
      check(list, i, access);
      found->arrays[i].data =
          access == Access::kWrite ? list[i]->mutable_data_ptr() : const_cast<void*>(list[i]->const_data_ptr());
      found->contiguous = found->contiguous && list[i]->is_contiguous();
    }
    return found;
  }

  // Raises TypeError, ValueError or RuntimeError unless it fits its leaf.
  void check(const TensorList& list, size_t i, Access access) const;

  void choose_layouts();

  std::vector<const at::Tensor*> used_last() const;
  void bump_versions();

  struct Extent {
    uintptr_t begin, end;
    size_t slot, leaf;
    bool written;
  };

  const at::Tensor& tensor_of(const Extent& extent) const { return *(*slots_[extent.slot].list)[extent.leaf]; }

  void check_overlaps();

  // Whether it takes a look to know that a slot's tensors do not meet those of another.
  bool may_overlap(size_t s) const;

  // Two extents that meet, one of them written: the same array if only one is, or arrays in each other's gaps.
  void check_pair(const Extent& a, const Extent& b) const;

  Plan& plan_;
  std::deque<Slot> slots_;
};

}  // namespace gam
