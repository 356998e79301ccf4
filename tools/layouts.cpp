// Prints the arguments of the CUDA kernels as JSON: the size of each structure, and the offset of each field. Use it to
// execute the kernels' PTX by other means than CUDA (see tools/ptx.py).

#include <cstddef>
#include <cstdio>

#include "../csrc/cuda/arguments.h"

using namespace gam;
using namespace gam::cuda;

namespace {

bool first_struct = true, first_field = true;

void begin(const char* name, size_t size) {
  std::printf("%s\"%s\": {\"bytes\": %zu, \"fields\": {", first_struct ? "{\n" : ",\n", name, size);
  first_struct = false, first_field = true;
}

void field(const char* name, size_t offset, size_t size) {
  std::printf("%s\"%s\": [%zu, %zu]", first_field ? "" : ", ", name, offset, size);
  first_field = false;
}

}  // namespace

#define STRUCT(type) begin(#type, sizeof(type))
#define FIELD(type, name) field(#name, offsetof(type, name), sizeof(type::name))
#define END() std::printf("}}")

int main() {
  using GroupNumbers = Numbers<double>;
  STRUCT(Piece);
  FIELD(Piece, begin), FIELD(Piece, leaf), FIELD(Piece, length);
  END();
  STRUCT(Row);
  FIELD(Row, group), FIELD(Row, option), FIELD(Row, packed);
  END();
  STRUCT(Table);
  FIELD(Table, pieces), FIELD(Table, rows), FIELD(Table, row_bytes);
  END();
  STRUCT(GroupNumbers);
  FIELD(GroupNumbers, many), FIELD(GroupNumbers, few);
  END();
  STRUCT(GroupTerms);
  FIELD(GroupTerms, terms), FIELD(GroupTerms, index), FIELD(GroupTerms, p), FIELD(GroupTerms, q);
  END();
  STRUCT(Scaling);
  FIELD(Scaling, products), FIELD(Scaling, rows), FIELD(Scaling, project), FIELD(Scaling, clip);
  FIELD(Scaling, limit);
  END();
  STRUCT(OfGroup);
  FIELD(OfGroup, numbers);
  END();
  STRUCT(OfLeaf);
  FIELD(OfLeaf, numbers);
  END();
  STRUCT(SumsArguments);
  FIELD(SumsArguments, table), FIELD(SumsArguments, parts), FIELD(SumsArguments, eta);
  FIELD(SumsArguments, u), FIELD(SumsArguments, m);
  END();
  STRUCT(TotalsArguments);
  FIELD(TotalsArguments, parts), FIELD(TotalsArguments, starts), FIELD(TotalsArguments, groups);
  FIELD(TotalsArguments, chunks), FIELD(TotalsArguments, totals);
  END();
  STRUCT(PerturbArguments);
  FIELD(PerturbArguments, table), FIELD(PerturbArguments, square), FIELD(PerturbArguments, save);
  FIELD(PerturbArguments, from_start), FIELD(PerturbArguments, radius), FIELD(PerturbArguments, eta);
  FIELD(PerturbArguments, k), FIELD(PerturbArguments, l);
  END();
  STRUCT(CopyArguments);
  FIELD(CopyArguments, table);
  END();
  STRUCT(UpdateArguments);
  FIELD(UpdateArguments, table), FIELD(UpdateArguments, formula), FIELD(UpdateArguments, scaling);
  FIELD(UpdateArguments, gamma), FIELD(UpdateArguments, d), FIELD(UpdateArguments, groups);
  FIELD(UpdateArguments, options);
  END();
  std::printf("\n}\n");
  return 0;
}
