// The primitives on CUDA tensors: one launch each, and one more to add up sums.
#pragma once

#include "../executor.h"
#include "tables.h"

namespace gam::cuda {

class Executor final : public gam::Executor {
 public:
  Executor(at::Device device, std::shared_ptr<const Shapes> shapes)
      : device_(device), shapes_(std::move(shapes)), tables_(*shapes_) {}

  at::Tensor square_norm(const SquareNorm& arguments) override;
  at::Tensor inner_products(const InnerProducts& arguments, int64_t groups) override;
  void perturb(const Perturbation& arguments) override;
  void copy(const Copy& arguments) override;
  void materialise(const Materialise& arguments) override;
  void update(const Update& arguments) override;

  bool takes_sums() const override { return true; }
  bool records_use() const override { return true; }
  void record_use(const at::Tensor& tensor) override;

 private:
  bool is_empty() const { return tables_.chunks() == 0; }
  Grid grid(int64_t blocks) const { return {blocks, current_stream().handle}; }
  at::Tensor add_up(const double* parts, const int64_t* starts, int columns, int64_t groups, at::IntArrayRef sizes);

  at::Device device_;
  std::shared_ptr<const Shapes> shapes_;
  Tables tables_;
};

}  // namespace gam::cuda
