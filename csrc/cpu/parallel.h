// One parallel region over the chunks of a plan.
#pragma once

#include <ATen/Parallel.h>

#include "plan.h"

namespace gam::cpu {

// Whether this process was forked off one that had loaded the core. The threads of libgomp do not survive a fork, and a
// region that needs them would wait for ever; such a process (a worker of a DataLoader) works with one thread.
bool in_forked_child();

// Calls f(range) for ranges that make up all pieces of the plan, from torch's intra-op threads.
template <class F>
void parallel_over_chunks(const Plan& plan, F&& f) {
  if (in_forked_child()) {
    f(plan.pieces_of(0, plan.chunks()));
  } else {
    at::parallel_for(0, plan.chunks(), 1, [&](int64_t first, int64_t last) { f(plan.pieces_of(first, last)); });
  }
}

}  // namespace gam::cpu
