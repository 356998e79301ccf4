// The arguments of the kernels. They travel by value, 4 KiB at most: what devices without larger argument space take.
// The lists of a table are those of the primitive, in the order of its enumeration.
#pragma once

#include "table.h"

namespace gam::cuda {

struct SumsArguments {
  Table table;
  double* parts = nullptr;  // one number a block, or kSums with m
  Numbers<double> eta;
  Numbers<GroupTerms> u, m;  // the same terms
};

struct TotalsArguments {
  const double* parts;
  const int64_t* starts;  // of each group's chunks, and the end; without it, all chunks are of one group
  int groups;             // that have chunks; the rest of the grid writes zeros
  int64_t chunks;
  double* totals;
};

struct PerturbArguments {
  Table table;
  const double* square = nullptr;
  bool save = false, from_start = false;
  bool by_group = false;    // one square per group
  bool multiplied = false;  // whether there are multiples: of many groups, no number is read that is not there
  Numbers<double> radius, eta, k, l, multiple;
};

struct CopyArguments {
  Table table;
};

struct UpdateArguments {
  Table table;
  Formula formula = {};
  Scaling scaling;
  Numbers<double> gamma;  // by row of the products
  Numbers<GroupTerms> d;
  Numbers<OfGroup> groups;
  Numbers<OfLeaf> options;  // by the option of a row
};

}  // namespace gam::cuda
