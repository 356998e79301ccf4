// The primitives on lists of tensors: check, guard, dispatch. No arithmetic on elements.
//
// gam_fast/backends/base.py states what each computes. All check their arguments before anything is written, raise
// ValueError or TypeError with the name of the argument, and run without the GIL.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "plan.h"

namespace gam {

struct Block {
  TensorList params, backup;
  bool saved = false;

  const TensorList& theta() const { return saved ? backup : params; }
};

// d = s Σ_t (p_t + κ q_t) x_t, as Direction of gam_fast/backends/base.py.
struct Direction {
  std::vector<TensorList> terms;
  std::vector<Numbers> p;  // by term
  std::optional<std::vector<Numbers>> q;
  at::Tensor products;
  Numbers gamma;  // by row of products
  std::optional<double> limit;
};

struct FoldInto {
  TensorList into, other;
  Numbers k, l;
};

at::Tensor square_norm(Plan& plan, const Block& leaves, const TensorList& a, const std::optional<TensorList>& b,
                       const std::optional<Numbers>& eta);

void perturb(Plan& plan, const Block& leaves, const TensorList& a, const std::optional<TensorList>& b,
             const Numbers& radius, const at::Tensor& square, bool from_start, const std::optional<Numbers>& eta,
             const std::optional<FoldInto>& fold, const std::optional<Numbers>& multiple);

// `m`: the coefficients of m, by term, over the terms of u.
at::Tensor inner_products(Plan& plan, const Direction& u, const std::optional<std::vector<Numbers>>& m, int64_t groups);

void restore(Plan& plan, const Block& leaves);

void direction(Plan& plan, const Block& leaves, const Direction& d, const TensorList& out);

// `state`: the lists of the formula, with None for a leaf that has none; the last lists may be missing. `option`: for
// each leaf, its index among `options`.
void update(Plan& plan, const Block& leaves, const Direction& d, const std::string& formula,
            const std::vector<TensorList>& state, const std::vector<Numbers>& groups,
            const std::vector<Numbers>& options, const std::vector<int64_t>& option);

// Returns an uninitialised tensor like each; all are on one device.
std::shared_ptr<Tensors> empty_like(const TensorList& tensors);

}  // namespace gam
