// The read-only primitives: norms and inner products.

// Adds up, over the elements of a piece, the `Count` numbers that `value(x...)` computes from the elements x of `Lists`
// arrays. There are kLanes accumulators at any vector width, so every processor makes the same additions: in the
// working precision over one tile (32 numbers per lane), and in fp64 over tiles and lanes.
template <class T, int Count, int Lists, class Value>
class Summation {
  using O = opmath_t<T>;
  static constexpr int kLanes = 16;
  // One stream of reads does not keep the memory busy, so a sum over one array reads four places at once.
  static constexpr int kPlaces = Lists == 1 ? 4 : Lists == 2 ? 2 : 1;

 public:
  Summation(const Tuple<void*, Lists>& arrays, Value value) : value_(value) {
    for (auto& place : readers_)
      for (int k = 0; k < Lists; ++k) place[k] = Reader<T>(arrays.values[k]);
  }

  void operator()(const Piece& piece, double* sums) {
    const int64_t place = piece.length / (kPlaces * kTile) * kTile;
    each_tile(0, place, [&](int64_t i, int n) { add<kPlaces>(piece.begin + i, place, n); });
    each_tile(kPlaces * place, piece.length - kPlaces * place,
              [&](int64_t i, int n) { add<1>(piece.begin + i, 0, n); });
    for (int s = 0; s < Count; ++s) {
      sums[s] = 0;
      for (int lane = 0; lane < kLanes; ++lane) sums[s] += lanes_[s][lane];
    }
  }

 private:
  // One tile at each place; places are `distance` apart.
  template <int Places>
  void add(int64_t i, int64_t distance, int n) {
    const seen_t<T>* x[Places][Lists];
    for (int p = 0; p < Places; ++p)
      for (int k = 0; k < Lists; ++k) x[p][k] = readers_[p][k].tile(i + p * distance, n);
    O part[Places][Count][kLanes] = {};
    const Value value = value_;
    const auto add_one = [&x, &part, value](int p, int j, int lane) {
      Tuple<O, Count> added;
      if constexpr (Lists == 1) added = value(value_of(x[p][0][j]));
      if constexpr (Lists == 2) added = value(value_of(x[p][0][j]), value_of(x[p][1][j]));
      if constexpr (Lists == 3) {
        added = value(value_of(x[p][0][j]), value_of(x[p][1][j]), value_of(x[p][2][j]));
      }
      for (int s = 0; s < Count; ++s) part[p][s][lane] += added.values[s];
    };
    const int whole = n / kLanes * kLanes;
    for (int j = 0; j < whole; j += kLanes)
      for (int p = 0; p < Places; ++p)
        for (int lane = 0; lane < kLanes; ++lane) add_one(p, j + lane, lane);
    for (int p = 0; p < Places; ++p)
      for (int j = whole; j < n; ++j) add_one(p, j, j - whole);
    for (int p = 0; p < Places; ++p)
      for (int s = 0; s < Count; ++s)
        for (int lane = 0; lane < kLanes; ++lane) lanes_[s][lane] += static_cast<double>(part[p][s][lane]);
  }

  Value value_;
  Reader<T> readers_[kPlaces][Lists];
  double lanes_[Count][kLanes] = {};
};

template <class T, int Count, int Lists, class Value>
void add_up(const Tuple<void*, Lists>& arrays, const Piece& piece, double* sums, Value value) {
  Summation<T, Count, Lists, Value>(arrays, value)(piece, sums);
}

// Writes sums[kSums k …] for the k-th piece of the range.
void sums(const Work& work, const Sums& arguments, Range range, double* sums) {
  each_piece(work, range, [&](auto element, const Piece& piece, const Leaf& leaf, auto array_of) {
    using T = decltype(element);
    using O = opmath_t<T>;
    const GroupTerms& terms = arguments.u[leaf.group];
    with_terms(terms, [&](auto count) {
      constexpr int kTerms = count.value;
      const Combine<O> of_u(terms.p);
      Tuple<void*, kTerms> x;
      for (int t = 0; t < kTerms; ++t) x.values[t] = array_of(Sums::kTerms + terms.index[t]);
      if (arguments.m) {
        const Combine<O> of_m(arguments.m[leaf.group].p);
        add_up<T, kSums>(x, piece, sums, [of_u, of_m](auto... terms) {
          const O a = of_u(terms...), b = of_m(terms...);
          return Tuple<O, kSums>{{a * a, b * a, b * b}};
        });
      } else if (!arguments.eta) {
        add_up<T, 1>(x, piece, sums, [of_u](auto... terms) {
          const O a = of_u(terms...);
          return Tuple<O, 1>{{a * a}};
        });
      } else if constexpr (kTerms < kMaxTerms) {
        const Weigh<O> weigh{of_group<O>(arguments.eta, leaf)};
        Tuple<void*, kTerms + 1> with_theta{{array_of(Sums::kTheta)}};
        for (int t = 0; t < kTerms; ++t) with_theta.values[t + 1] = x.values[t];
        add_up<T, 1>(with_theta, piece, sums, [of_u, weigh](O theta, auto... terms) {
          const O a = weigh(of_u(terms...), theta);
          return Tuple<O, 1>{{a * a}};
        });
      }
    });
    sums += kSums;
  });
}
