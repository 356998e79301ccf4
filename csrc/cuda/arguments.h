// The arguments of the kernels. They travel by value, 4 KiB at most: what devices without larger argument space take.
#pragma once

#include "table.h"

namespace gam::cuda {

// The terms of a group, with the coefficients of their factors s (p + κ q).
using GroupTerms = Combination::Group;

// What κ and s follow from.
struct Sums {
  const double* products = nullptr;  // by row: ‖u‖², ⟨m,u⟩, ‖m‖²
  int rows = 0;
  bool project = false, clip = false;
  double limit = 0;
  Numbers<double> gamma;  // by row
};

struct SquareNormArguments {
  enum List { kA, kB, kTheta, kLists };

  Table table;
  double* parts;  // one number a block
  Numbers<double> eta;
};

struct InnerProductsArguments {
  enum List { kTerms, kLists = kTerms + kMaxTerms };

  Table table;
  double* parts;             // kSums numbers a block
  Numbers<GroupTerms> u, m;  // the same terms
};

struct TotalsArguments {
  const double* parts;
  const int64_t* starts;  // of each group's chunks, and the end; without it, all chunks are of one group
  int groups;             // that have chunks; the rest of the grid writes zeros
  int64_t chunks;
  double* totals;
};

struct PerturbGroup {
  double radius, eta, k, l;
};

struct PerturbArguments {
  enum List { kParams, kBackup, kA, kB, kInto, kOther, kLists };

  Table table;
  const double* square;  // null: the radius is the factor
  bool save, from_start, fold;
  Numbers<PerturbGroup> groups;
};

struct CopyArguments {
  enum List { kFrom, kTo, kLists };

  Table table;
};

struct MaterialiseArguments {
  enum List { kOut, kFrom, kTo, kTerms, kLists = kTerms + kMaxTerms };

  Table table;
  Sums sums;
  bool restore;
  Numbers<GroupTerms> d;
};

struct UpdateGroup {
  GroupTerms d;
  OfGroup numbers;
};

struct UpdateArguments {
  enum List { kParams, kTheta, kState, kTerms = kState + kMaxState, kLists = kTerms + kMaxTerms };

  Table table;
  Formula formula;
  Sums sums;
  Numbers<UpdateGroup> groups;
  Numbers<OfLeaf> options;  // by the option of a row
};

static_assert(sizeof(SquareNormArguments) <= 4096, "arguments of a kernel");
static_assert(sizeof(InnerProductsArguments) <= 4096, "arguments of a kernel");
static_assert(sizeof(TotalsArguments) <= 4096, "arguments of a kernel");
static_assert(sizeof(PerturbArguments) <= 4096, "arguments of a kernel");
static_assert(sizeof(CopyArguments) <= 4096, "arguments of a kernel");
static_assert(sizeof(MaterialiseArguments) <= 4096, "arguments of a kernel");
static_assert(sizeof(UpdateArguments) <= 4096, "arguments of a kernel");

}  // namespace gam::cuda
