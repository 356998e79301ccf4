// The primitives on CPU tensors: one parallel region over the chunks each.
#pragma once

#include <initializer_list>

#include "../executor.h"
#include "plan.h"

namespace gam::cpu {

class Executor final : public gam::Executor {
 public:
  explicit Executor(std::shared_ptr<const Shapes> shapes) : shapes_(std::move(shapes)), plan_(*shapes_) {}

  at::Tensor square_norm(const SquareNorm& arguments) override;
  at::Tensor inner_products(const InnerProducts& arguments, int64_t groups) override;
  void perturb(const Perturbation& arguments) override;
  void copy(const Copy& arguments) override;
  void materialise(const Materialise& arguments) override;
  void update(const Update& arguments) override;

  bool takes_sums() const override { return false; }

 private:
  Work work(std::initializer_list<List> lists) const;

  std::shared_ptr<const Shapes> shapes_;
  Plan plan_;
};

}  // namespace gam::cpu
