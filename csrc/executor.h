// What carries the primitives out, on the memory of one device.
#pragma once

#include <ATen/core/Tensor.h>

#include <memory>

#include "shapes.h"

namespace gam {

// Arguments have been checked. Everything runs without the GIL. Results are float64 tensors of the device.
class Executor {
 public:
  virtual ~Executor() = default;

  virtual at::Tensor square_norm(const SquareNorm& arguments) = 0;
  virtual at::Tensor inner_products(const InnerProducts& arguments, int64_t groups) = 0;
  virtual void perturb(const Perturbation& arguments) = 0;
  virtual void copy(const Copy& arguments) = 0;
  virtual void materialise(const Materialise& arguments) = 0;
  virtual void update(const Update& arguments) = 0;

  // Whether it wants to be told of memory that may come from another stream of the device, and be freed soon.
  virtual bool records_use() const { return false; }
  virtual void record_use(const at::Tensor&) {}

  // Whether norms and products are read by the device; the others take numbers.
  virtual bool takes_sums() const = 0;
};

}  // namespace gam
