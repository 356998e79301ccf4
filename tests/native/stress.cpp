// The loops of the core under the thread sanitizer, without Python and OpenMP (whose runtime it does not know).
//
// Every primitive is run by several std::threads over the chunks of one plan, as at::parallel_for does, and its result
// compared bit for bit with that of one thread. Built and run by `make sanitize`.

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <string>
#include <thread>
#include <type_traits>
#include <vector>

#include "../../csrc/cpu/dispatch.h"
#include "../../csrc/cpu/plan.h"
#include "../../csrc/math.h"

namespace {

using namespace gam;
using namespace gam::cpu;

void require(bool condition, const std::string& what) {
  if (condition) return;
  std::fprintf(stderr, "failed: %s\n", what.c_str());
  std::exit(1);
}

// One tensor a leaf, of random values; a list of arrays over them.
class Tensors {
 public:
  Tensors(const Shapes& shapes, unsigned seed) {
    std::minstd_rand random(seed);
    for (const Leaf& leaf : shapes.leaves()) {
      // Small positive numbers in every dtype: the exponent bits stay in the middle of the range.
      std::vector<unsigned char> bytes(static_cast<size_t>(leaf.numel * size_of(shapes.dtype())) + 1);
      for (size_t i = 0; i + 1 < bytes.size(); ++i) bytes[i] = static_cast<unsigned char>(random() & 0x3f);
      memory_.push_back(std::move(bytes));
    }
    for (auto& bytes : memory_) arrays_.push_back(bytes.data());
  }

  List list() const { return arrays_.data(); }
  bool operator==(const Tensors& other) const { return memory_ == other.memory_; }

 private:
  std::vector<std::vector<unsigned char>> memory_;
  std::vector<void*> arrays_;
};

void parallel(const Plan& plan, int threads, const std::function<void(Range)>& f) {
  std::vector<std::thread> pool;
  for (int t = 0; t < threads; ++t) {
    const int64_t first = plan.chunks() * t / threads, last = plan.chunks() * (t + 1) / threads;
    pool.emplace_back([&f, range = plan.pieces_of(first, last)] { f(range); });
  }
  for (auto& thread : pool) thread.join();
}

// Everything that one round of all primitives writes.
struct Round {
  Round(const Shapes& shapes, const Plan& plan)
      : params(shapes, 1),
        backup(shapes, 2),
        a(shapes, 3),
        b(shapes, 4),
        c(shapes, 5),
        momentum(shapes, 6),
        square(shapes, 7),
        out(shapes, 8),
        norms(plan.pieces().size() * kSums),
        products(plan.pieces().size() * kSums) {}

  void run(const Shapes& shapes, const Plan& plan, int threads) {
    const Kernels& loops = kernels();
    const auto run = [&](const auto& arguments, auto loop) {
      using Arguments = std::decay_t<decltype(arguments)>;
      const Work work{shapes.dtype(), shapes.leaves().data(), plan.pieces().data(), arguments.lists, Arguments::kLists};
      parallel(plan, threads, [&](Range range) { loop(work, arguments, range); });
    };
    const double numbers[] = {0.5, 0.25};
    std::vector<GroupTerms> groups(2);
    for (auto& group : groups) group = {3, {0, 1, 2}, {0.5, 0.25, 0.125}, {}};
    const List terms[] = {a.list(), b.list(), c.list()};

    Sums sums;
    std::copy_n(terms, kMaxTerms, sums.lists + Sums::kTerms);
    sums.u = groups.data();
    const auto sums_into = [&](std::vector<double>& found) {
      return [&](const Work& work, const Sums& arguments, Range range) {
        loops.sums(work, arguments, range, found.data() + kSums * range.begin);
      };
    };
    run(sums, sums_into(norms));

    Perturbation move;
    move.lists[Perturbation::kParams] = params.list();
    move.lists[Perturbation::kBackup] = backup.list();
    move.lists[Perturbation::kA] = a.list();
    move.radius = numbers;
    move.save = move.stream = true;
    run(move, loops.perturb);
    move.lists[Perturbation::kB] = b.list();
    move.lists[Perturbation::kInto] = c.list();
    move.lists[Perturbation::kOther] = b.list();
    move.eta = move.k = move.l = numbers;
    move.save = false, move.from_start = true;
    run(move, loops.perturb);

    sums.m = groups.data();
    run(sums, sums_into(products));

    const OfGroup of_group{{0.5, 0.5, 0.5, 0.5, 0.5, 0.5}};
    const std::vector<OfGroup> of_groups(2, of_group);
    const OfLeaf of_leaf{{0.5, 0.5}};
    const std::vector<int32_t> option(shapes.size(), 0);
    Update update;
    const List own[] = {params.list(), backup.list(), momentum.list(), square.list(), out.list()};
    std::copy_n(own, Update::kTerms, update.lists);
    std::copy_n(terms, kMaxTerms, update.lists + Update::kTerms);
    update.d = groups.data(), update.stream = true;
    update.groups = of_groups.data(), update.options = &of_leaf, update.count = 1, update.option = option.data();
#define GAM_RUN(functor, name)          \
  update.formula = Formula::k##functor; \
  run(update, loops.update);
    GAM_UPDATES(GAM_RUN)
#undef GAM_RUN

    Copy restore;
    restore.lists[Copy::kFrom] = backup.list();
    restore.lists[Copy::kTo] = params.list();
    restore.stream = true;
    run(restore, loops.copy);
  }

  bool operator==(const Round& other) const {
    return params == other.params && backup == other.backup && c == other.c && momentum == other.momentum &&
           square == other.square && out == other.out && norms == other.norms && products == other.products;
  }

  Tensors params, backup, a, b, c, momentum, square, out;
  std::vector<double> norms, products;
};

Shapes shapes(Dtype dtype, int64_t large) {
  std::vector<Shapes::Shape> result;
  std::vector<int64_t> group;
  for (int i = 0; i < 100; ++i) result.push_back({{1 + i % 37}, {1}}), group.push_back(i % 2);
  for (const std::vector<int64_t>& sizes : {std::vector<int64_t>{3, large}, {0}, {}}) {
    result.push_back({sizes, {}}), group.push_back(1);
  }
  return {dtype, std::move(result), group};
}

// Chunks hold kChunkBytes each, but for the last and for what a cut may not divide, and all elements once.
void check_plan(const Shapes& shapes, const Plan& plan) {
  std::vector<int64_t> covered(shapes.size());
  for (int64_t chunk = 0; chunk < plan.chunks(); ++chunk) {
    const Range range = plan.pieces_of(chunk, chunk + 1);
    int64_t bytes = 0;
    for (int64_t p = range.begin; p < range.end; ++p) {
      const Piece& piece = plan.pieces()[static_cast<size_t>(p)];
      const auto leaf = static_cast<size_t>(piece.leaf);
      require(piece.begin == covered[leaf] && piece.length > 0, "pieces follow each other");
      covered[leaf] += piece.length;
      bytes += piece.length * size_of(shapes.dtype());
    }
    require(bytes <= kChunkBytes + kCut * 8, "no chunk is too large");
    require(bytes > kChunkBytes - kCut * 8 || chunk == plan.chunks() - 1, "no chunk is too small");
  }
  for (size_t i = 0; i < covered.size(); ++i) {
    int64_t numel = 1;
    for (const int64_t size : shapes[i].sizes) numel *= size;
    require(covered[i] == numel, "every element is covered once");
  }
}

}  // namespace

int main() {
  std::vector<Shapes::Shape> uneven(1000, {{64}, {1}});
  uneven[500] = {{100'000'000}, {1}};
  const Shapes skewed(Dtype::kFloat, uneven, std::vector<int64_t>(uneven.size(), 0));
  check_plan(skewed, Plan(skewed));
  for (const std::string& name : instruction_sets()) {
    require(use_instruction_set(name), "chooses " + name);
    for (const Dtype dtype : {Dtype::kFloat, Dtype::kDouble, Dtype::kBFloat16, Dtype::kHalf}) {
      const Shapes all = shapes(dtype, 210'001);
      const Plan plan(all);
      check_plan(all, plan);
      Round alone(all, plan);
      alone.run(all, plan, 1);
      for (const int threads : {2, 3, 7}) {
        Round together(all, plan);
        together.run(all, plan, threads);
        require(alone == together, name + " with " + std::to_string(threads) + " threads");
      }
    }
    std::printf("%s: the same bits with 1, 2, 3 and 7 threads\n", name.c_str());
  }
  return 0;
}
