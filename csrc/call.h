// The lists of one call: checked, laid out for the loops, and run.
#pragma once

#include <c10/util/StringUtil.h>

#include <deque>
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
    return add(list, Access::kWrite, uses, plan_.executor().takes_wider_state());
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
    {
      const pybind11::gil_scoped_release release;
      f(plan_.executor());
      for (const Slot& slot : slots_) {
        for (size_t i = 0; slot.last && i < slot.arrays.size(); ++i) plan_.executor().record_use(*(*slot.list)[i]);
      }
    }
    for (const Slot& slot : slots_) {
      if (slot.access != Access::kWrite) continue;
      for (size_t i = 0; i < slot.arrays.size(); ++i) {
        if (slot.arrays[i].data && !(*slot.list)[i]->is_inference()) {
          (*slot.list)[i]->unsafeGetTensorImpl()->bump_version();
        }
      }
    }
  }

 private:
  struct Slot {
    const TensorList* list;
    Access access;
    std::vector<Array> arrays;
    bool last = false;
  };

  List add(const TensorList& list, Access access) {
    return add(list, access, [](size_t) { return true; }, false);
  }

  template <class Uses>
  List add(const TensorList& list, Access access, Uses uses, bool may_be_wider) {
    const auto& leaves = plan_.shapes();
    if (list.size() != leaves.size()) {
      refuse_value(
          c10::str(list.name(), " must have one tensor a parameter, that is ", leaves.size(), ", got ", list.size()));
    }
    Slot slot{&list, access, std::vector<Array>(leaves.size())};
    for (size_t i = 0; i < leaves.size(); ++i) {
      if (!uses(i)) continue;
      if (!list[i]) refuse_type(list.name_of(i) + " must be a tensor, got None");
      slot.arrays[i].dtype = check(list, i, access, may_be_wider);
      slot.arrays[i].data =
          access == Access::kWrite ? list[i]->mutable_data_ptr() : const_cast<void*>(list[i]->const_data_ptr());
    }
    slots_.push_back(std::move(slot));
    return slots_.back().arrays.data();
  }

  // Raises TypeError, ValueError or RuntimeError unless it fits its leaf; its dtype.
  Dtype check(const TensorList& list, size_t i, Access access, bool may_be_wider) const;

  void choose_layouts();

  struct Extent {
    uintptr_t begin, end;
    size_t slot, leaf;
    bool written;
  };

  const at::Tensor& tensor_of(const Extent& extent) const { return *(*slots_[extent.slot].list)[extent.leaf]; }

  void check_overlaps();

  // Two extents that meet, one of them written: the same array if only one is, or arrays in each other's gaps.
  void check_pair(const Extent& a, const Extent& b) const;

  Plan& plan_;
  std::deque<Slot> slots_;
};

}  // namespace gam
