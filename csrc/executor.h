// What carries the primitives out, on the memory of one device.
#pragma once

#include <memory>

#include "shapes.h"
#include "tensors.h"

namespace gam {

// Arguments have been checked. Everything runs without the GIL. Results are float64 tensors of the device.
class Executor {
 public:
  virtual ~Executor() = default;

  // By group and kSums; for no group ‖u‖² of all leaves, 0-dim.
  virtual at::Tensor sums(const Sums& arguments, int64_t groups) = 0;
  virtual void perturb(const Perturbation& arguments) = 0;
  virtual void copy(const Copy& arguments) = 0;
  virtual void update(const Update& arguments) = 0;

  // True if sums are read where they lie, in memory of the device; the loops of the host take factors.
  virtual bool on_device() const { return false; }

  // Tells the device of memory that may come from another stream, and be freed soon.
  virtual void record_use(const at::Tensor&) {}
};

}  // namespace gam
