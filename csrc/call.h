// The lists of one call: checked, and what it does with them run.
#pragma once

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

// The lists of one call, checked as they are added. Where a list may have None for a leaf, that has no array.
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
        found = look(list, access);
        held->remember(plan_.shared_shapes(), found);
      }
    } else {
      found = look(list, access);
    }
    slots_.push_back({&list, access, std::move(found)});
    return slots_.back().found->arrays.data();
  }

  // Checks a list against the leaves.
  std::shared_ptr<Found> look(const TensorList& list, Access access) const;

  // Raises TypeError, ValueError or RuntimeError unless it fits its leaf.
  void check(const TensorList& list, size_t i, Access access) const;

  std::vector<const at::Tensor*> used_last() const;
  void bump_versions();

  Plan& plan_;
  std::deque<Slot> slots_;
};

}  // namespace gam
