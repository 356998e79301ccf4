// The primitives on CPU tensors: each is one parallel region over the chunks.
#pragma once

#include "../executor.h"
#include "plan.h"

namespace gam::cpu {

class Executor final : public gam::Executor {
 public:
  explicit Executor(std::shared_ptr<const Shapes> shapes) : shapes_(std::move(shapes)), plan_(*shapes_) {}

  at::Tensor sums(const Sums& arguments, int64_t groups) override;
  void perturb(const Perturbation& arguments) override;
  void copy(const Copy& arguments) override;
  void update(const Update& arguments) override;

 private:
  // Calls loop(work, arguments, range) for ranges that cover all pieces of the plan.
  template <class Arguments, class Loop>
  void run(const Arguments& arguments, const Loop& loop) const;

  std::shared_ptr<const Shapes> shapes_;
  Plan plan_;
};

}  // namespace gam::cpu
