// The primitives on lists of tensors: check, guard, dispatch. No arithmetic on elements.
//
// What each computes is stated in gam_fast/backends/base.py. All of them check their arguments before anything is
// written, raise ValueError or TypeError with the name of the argument, and run without the GIL.
#pragma once

#include <optional>
#include <vector>

#include "lists.h"
#include "plan.h"

namespace gam {

using Numbers = std::vector<double>;  // by parameter group

struct Leaves {
  TensorList params, backup;
  bool saved = false;

  const TensorList& theta() const { return saved ? backup : params; }
};

struct Direction {
  std::vector<TensorList> terms;
  std::vector<Numbers> factors;  // by term
};

struct Fold {
  TensorList into, other;
  Numbers k, l;
};

at::Tensor square_norm(Plan& plan, const Leaves& leaves, const TensorList& a, const std::optional<TensorList>& b,
                       const std::optional<Numbers>& eta);

// `factor` is radius · scale.
void perturb(Plan& plan, const Leaves& leaves, const TensorList& a, const std::optional<TensorList>& b,
             const Numbers& factor, bool from_start, const std::optional<Numbers>& eta, const std::vector<Fold>& folds);

// `m`: the factors of m, by term, over the terms of u.
at::Tensor inner_products(Plan& plan, const Direction& u, const std::optional<std::vector<Numbers>>& m, int64_t groups);

void restore(Plan& plan, const Leaves& leaves);

void direction(Plan& plan, const Leaves& leaves, const Direction& d, const TensorList& out);

void sgd(Plan& plan, const Leaves& leaves, const Direction& d, const TensorList& buffers,
         const std::vector<unsigned char>& first, const std::vector<cpu::SgdGroup>& groups);

void adam(Plan& plan, const Leaves& leaves, const Direction& d, const TensorList& average, const TensorList& square,
          const TensorList& largest, const Numbers& step, const std::vector<cpu::AdamGroup>& groups);

// An uninitialised dense tensor like each.
std::vector<at::Tensor> empty_like(const TensorList& tensors);

}  // namespace gam
