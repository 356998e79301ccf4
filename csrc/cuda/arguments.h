// The arguments of the kernels. They are passed by value and are limited to 4 KiB, which every device supports. The
// lists of a table are those of the primitive, in the order of its enumeration.
#pragma once

#include "table.h"

namespace gam::cuda {

struct SumsArguments {
  Table table;
  double* parts = nullptr;  // one number per block, or kSums with m
  Numbers<double> eta;
  Numbers<GroupTerms> u, m;  // over the same terms
};

struct TotalsArguments {
  const double* parts;
  const int64_t* starts;  // first chunk of each group, and the end; null if there is one group
  int groups;             // groups with chunks; the rest of the grid writes zeros
  int64_t chunks;
  double* totals;
};

struct PerturbArguments {
  Table table;
  const double* square = nullptr;
  bool save = false, from_start = false;
  bool by_group = false;    // one square per group
  bool multiplied = false;  // whether there are multiples; otherwise none are read
  Numbers<double> radius, eta, k, l, multiple;
};

struct CopyArguments {
  Table table;
};

struct UpdateArguments {
  Table table;
  Formula formula = {};
  Scaling scaling;
  Numbers<double> gamma;  // by row of products
  Numbers<GroupTerms> d;
  Numbers<OfGroup> groups;
  Numbers<OfLeaf> options;  // by the option of a row
};

}  // namespace gam::cuda
