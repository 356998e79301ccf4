// A few kernels against plain loops, in a program without torch. It prints "wrong: ..." where they differ, or what the
// emulator finds; tests/test_cuda.py compiles it with mistakes planted in copies of the kernels.

#include <cmath>
#include <cstdio>
#include <cstring>
#include <exception>
#include <vector>

#include "cuda/moves.cu"
#include "cuda/sums.cu"
#include "cuemu.h"

namespace {

using namespace gam;
using namespace gam::cuda;

// Block of one list, cut into chunks, and their table.
struct Model {
  explicit Model(const std::vector<int64_t>& sizes, int lists) : lists(lists), sizes(sizes) {
    for (size_t i = 0; i < sizes.size(); ++i) {
      for (int64_t begin = 0; begin < sizes[i]; begin += kChunk) {
        const int64_t rest = sizes[i] - begin;
        pieces.push_back({begin, static_cast<int32_t>(i), static_cast<int32_t>(rest < kChunk ? rest : kChunk)});
      }
    }
    rows.resize(sizes.size() * static_cast<size_t>(row_bytes(lists)));
  }

  Table table(const std::vector<std::vector<std::vector<float>>*>& data) {
    for (size_t i = 0; i < sizes.size(); ++i) {
      unsigned char* at = rows.data() + i * static_cast<size_t>(row_bytes(lists));
      Row row{0, 0, true};
      for (int k = 0; k < lists; ++k) {
        float* const address = k < static_cast<int>(data.size()) && data[static_cast<size_t>(k)]
                                   ? (*data[static_cast<size_t>(k)])[i].data()
                                   : nullptr;
        row.packed = row.packed && reinterpret_cast<uintptr_t>(address) % 16 == 0;
        std::memcpy(at + row_bytes(k), &address, sizeof address);
      }
      std::memcpy(at, &row, sizeof row);
    }
    return {pieces.data(), rows.data(), static_cast<int32_t>(row_bytes(lists))};
  }

  int lists;
  std::vector<int64_t> sizes;
  std::vector<Piece> pieces;
  std::vector<unsigned char> rows;
};

// With one number beyond the end, which must stay.
std::vector<std::vector<float>> values(const std::vector<int64_t>& sizes, float start) {
  std::vector<std::vector<float>> result;
  for (const int64_t size : sizes) {
    std::vector<float> list(static_cast<size_t>(size) + 1);
    for (size_t i = 0; i < list.size(); ++i) list[i] = start + static_cast<float>(i % 97) * 0.125f;
    result.push_back(list);
  }
  return result;
}

void check() {
  const std::vector<int64_t> sizes = {3, 1001, 8192, 20003};
  auto params = values(sizes, 1.0f), backup = values(sizes, 0.0f), a = values(sizes, -2.0f);
  double expected = 0;
  for (size_t i = 0; i < sizes.size(); ++i) {
    for (size_t j = 0; j < static_cast<size_t>(sizes[i]); ++j) expected += static_cast<double>(a[i][j]) * a[i][j];
  }
  Model sums(sizes, Sums::kLists);
  std::vector<double> parts(sums.pieces.size());
  double total = 0;
  const Grid grid{static_cast<int64_t>(parts.size()), nullptr};
  SumsArguments norm;
  norm.table = sums.table({nullptr, &a});
  norm.parts = parts.data();
  square_norm(grid, Dtype::kFloat, false, false, norm);
  totals({1, nullptr}, 1, {parts.data(), nullptr, 1, grid.blocks, &total});
  if (!(std::fabs(total / expected - 1.0) < 1e-6)) std::printf("wrong: norm %g, not %g\n", total, expected);

  Model moves(sizes, Perturbation::kLists);
  const double square = 4.0;
  PerturbArguments arguments;
  arguments.table = moves.table({&params, &backup, &a});
  arguments.square = &square;
  arguments.save = true;
  arguments.radius.few[0] = 1.0;
  perturb(grid, Dtype::kFloat, false, false, false, arguments);
  const auto before = values(sizes, 1.0f), old = values(sizes, 0.0f);
  for (size_t i = 0; i < sizes.size(); ++i) {
    const auto end = static_cast<size_t>(sizes[i]);
    for (size_t j = 0; j < end; ++j) {
      if (params[i][j] != before[i][j] + 0.5f * a[i][j] || backup[i][j] != before[i][j]) {
        std::printf("wrong: moved element %zu of leaf %zu\n", j, i);
        return;
      }
    }
    if (params[i][end] != before[i][end] || backup[i][end] != old[i][end]) {
      std::printf("wrong: moved what lies beyond leaf %zu\n", i);
      return;
    }
  }
}

}  // namespace

int main(int, char** arguments) {
  cuemu::block().set_order(arguments[1]);
  try {
    check();
  } catch (const std::exception& error) {
    std::printf("wrong: %s\n", error.what());
  }
  return 0;
}
