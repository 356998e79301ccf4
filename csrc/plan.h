// The plan of one optimizer's parameters, as Python keeps it.
#pragma once

#include <cstdint>
#include <map>
#include <vector>

#include "cpu/plan.h"
#include "lists.h"

namespace gam {

inline constexpr int64_t kMaxGroups = 1 << 20;

// The shapes, dtypes and groups of the parameters, and how their elements are shared out. It may be kept between steps:
// addresses are taken anew in every call.
class Plan {
 public:
  Plan(const TensorList& params, const std::vector<int64_t>& group);

  // Whether these parameters are, in everything the plan depends on, those it was made for.
  bool fits(const TensorList& params, const std::vector<int64_t>& group) const;

  const cpu::Plan& cpu() const { return cpu_; }

  // Whether the last call with this pattern of accesses had the same fingerprint (addresses and layouts) and was found
  // free of overlaps. To find that out takes a sort, and addresses mostly stay. The GIL guards both functions.
  bool known(uint64_t accesses, const std::vector<uintptr_t>& fingerprint) const;
  void remember(uint64_t accesses, std::vector<uintptr_t> fingerprint);

 private:
  cpu::Plan cpu_;
  std::map<uint64_t, std::vector<uintptr_t>> known_;
};

}  // namespace gam
