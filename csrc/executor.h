// Interface that executes the primitives on one device.
#pragma once

#include <memory>

#include "shapes.h"
#include "tensors.h"

namespace gam {

// Arguments have been checked. All functions run without the GIL. Results are float64 tensors on the device.
class Executor {
 public:
  virtual ~Executor() = default;

  // Shape (groups, kSums); with groups = 0, ‖u‖² over all leaves, 0-dim.
  virtual at::Tensor sums(const Sums& arguments, int64_t groups) = 0;
  virtual void perturb(const Perturbation& arguments) = 0;
  virtual void copy(const Copy& arguments) = 0;
  virtual void update(const Update& arguments) = 0;

  // True if kernels read sums from device memory; host loops take factors instead.
  virtual bool on_device() const { return false; }

  // A number of the device's current stream.
  virtual int64_t stream() const { return 0; }

  // Tells the device that its current stream uses memory that may belong to another stream and be freed soon.
  virtual void record_use(const at::Tensor&) {}
};

}  // namespace gam
