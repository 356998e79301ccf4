// The primitives on CUDA tensors: each is one launch, and sums take one more.
#pragma once

#include "../executor.h"
#include "tables.h"

namespace gam::cuda {

class Executor final : public gam::Executor {
 public:
  Executor(at::Device device, std::shared_ptr<const Shapes> shapes)
      : device_(device), shapes_(std::move(shapes)), tables_(*shapes_) {}

  at::Tensor sums(const Sums& arguments, int64_t groups) override;
  void perturb(const Perturbation& arguments) override;
  void copy(const Copy& arguments) override;
  void update(const Update& arguments) override;

  bool on_device() const override { return true; }
  int64_t stream() const override {
    const Guard guard(device_);
    return current_stream().id;
  }
  void record_use(const at::Tensor& tensor) override { cuda::record_use(tensor); }

 private:
  bool is_empty() const { return tables_.chunks() == 0; }
  Grid grid(int64_t blocks) const { return {blocks, current_stream().handle}; }

  at::Device device_;
  std::shared_ptr<const Shapes> shapes_;
  Tables tables_;
};

}  // namespace gam::cuda
