#include "plan.h"

#include <c10/util/StringUtil.h>

#include <utility>

#include "checks.h"

namespace gam {

Plan::Plan(const TensorList& params, const std::vector<int64_t>& group)
    : cpu_([&] {
        if (group.size() != params.size()) {
          refuse_value(
              c10::str("group must have one index a parameter, that is ", params.size(), ", got ", group.size()));
        }
        std::vector<cpu::Plan::Shape> leaves;
        leaves.reserve(params.size());
        for (size_t i = 0; i < params.size(); ++i) {
          check_plain(params, i);
          const cpu::Dtype dtype = dtype_of(params, i);
          if (group[i] < 0 || group[i] >= kMaxGroups) {
            refuse_value(c10::str("group[", i, "] must be the index of a parameter group, got ", group[i]));
          }
          if (!is_free_of_self_overlap(*params[i])) {
            refuse_value(params.name_of(i) + " must not overlap itself in memory: give it memory of its own");
          }
          leaves.push_back({dtype, static_cast<int>(group[i]), params[i]->sizes().vec()});
        }
        return leaves;
      }()) {}

bool Plan::fits(const TensorList& params, const std::vector<int64_t>& group) const {
  const auto& leaves = cpu_.shapes();
  if (params.size() != leaves.size() || group.size() != leaves.size()) return false;
  for (size_t i = 0; i < leaves.size(); ++i) {
    check_plain(params, i);
    if (group[i] != leaves[i].group || params[i]->sizes() != at::IntArrayRef(leaves[i].sizes) ||
        dtype_of(params, i) != leaves[i].dtype) {
      return false;
    }
  }
  return true;
}

bool Plan::known(uint64_t accesses, const std::vector<uintptr_t>& fingerprint) const {
  const auto found = known_.find(accesses);
  return found != known_.end() && found->second == fingerprint;
}

void Plan::remember(uint64_t accesses, std::vector<uintptr_t> fingerprint) {
  known_[accesses] = std::move(fingerprint);
}

}  // namespace gam
