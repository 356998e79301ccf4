// The primitives that only read: norms and inner products.

// Sums, over the elements of a piece, of the `Sums` numbers that `value(x...)` makes of the elements x of `Lists`
// arrays. They are kept in as many lanes as kLanes, whatever the width of the vectors, so every processor makes the
// same additions: in the working precision over one tile, 32 numbers a lane, and in fp64 over tiles and lanes.
template <class T, int Sums, int Lists, class Value>
class Summation {
  using O = opmath_t<T>;
  static constexpr int kLanes = 16;
  // One stream of reads does not keep the memory busy: a sum over one array reads four places at once.
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
    for (int s = 0; s < Sums; ++s) {
      sums[s] = 0;
      for (int lane = 0; lane < kLanes; ++lane) sums[s] += lanes_[s][lane];
    }
  }

 private:
  // One tile of each place; places lie `distance` apart.
  template <int Places>
  void add(int64_t i, int64_t distance, int n) {
    const seen_t<T>* x[Places][Lists];
    for (int p = 0; p < Places; ++p)
      for (int k = 0; k < Lists; ++k) x[p][k] = readers_[p][k].tile(i + p * distance, n);
    O part[Places][Sums][kLanes] = {};
    const Value value = value_;
    const auto add_one = [&x, &part, value](int p, int j, int lane) {
      Tuple<O, Sums> added;
      if constexpr (Lists == 1) added = value(value_of(x[p][0][j]));
      if constexpr (Lists == 2) added = value(value_of(x[p][0][j]), value_of(x[p][1][j]));
      if constexpr (Lists == 3) {
        added = value(value_of(x[p][0][j]), value_of(x[p][1][j]), value_of(x[p][2][j]));
      }
      for (int s = 0; s < Sums; ++s) part[p][s][lane] += added.values[s];
    };
    const int whole = n / kLanes * kLanes;
    for (int j = 0; j < whole; j += kLanes)
      for (int p = 0; p < Places; ++p)
        for (int lane = 0; lane < kLanes; ++lane) add_one(p, j + lane, lane);
    for (int p = 0; p < Places; ++p)
      for (int j = whole; j < n; ++j) add_one(p, j, j - whole);
    for (int p = 0; p < Places; ++p)
      for (int s = 0; s < Sums; ++s)
        for (int lane = 0; lane < kLanes; ++lane) lanes_[s][lane] += static_cast<double>(part[p][s][lane]);
  }

  Value value_;
  Reader<T> readers_[kPlaces][Lists];
  double lanes_[Sums][kLanes] = {};
};

template <class T, int Sums, int Lists, class Value>
void add_up(const Tuple<void*, Lists>& arrays, const Piece& piece, double* sums, Value value) {
  Summation<T, Sums, Lists, Value>(arrays, value)(piece, sums);
}

// sums[k] for the k-th piece of the range
void square_norm(const Work& work, const SquareNorm& arguments, Range range, double* sums) {
  const List a = arguments.a, b = arguments.b, theta = arguments.theta;
  each_piece(work, range, [&](auto type, const Piece& piece, const Leaf& leaf, auto array_of) {
    using T = decltype(type);
    using O = opmath_t<T>;
    const Weigh<O> weigh{theta ? of_group<O>(arguments.eta, leaf) : O(0)};
    const auto add_squares = [&](const auto& arrays, auto value) {
      add_up<T, 1>(arrays, piece, sums++, [value](auto... x) { return Tuple<O, 1>{{value(x...) * value(x...)}}; });
    };
    if (b && theta) {
      add_squares(Tuple<void*, 3>{{array_of(a), array_of(b), array_of(theta)}},
                  [weigh](O x, O y, O t) { return weigh(x - y, t); });
    } else if (theta) {
      add_squares(Tuple<void*, 2>{{array_of(a), array_of(theta)}}, [weigh](O x, O t) { return weigh(x, t); });
    } else if (b) {
      add_squares(Tuple<void*, 2>{{array_of(a), array_of(b)}}, [](O x, O y) { return x - y; });
    } else {
      add_squares(Tuple<void*, 1>{{array_of(a)}}, [](O x) { return x; });
    }
  });
}

// sums[kSums k + 0 … 2] for the k-th piece of the range
void inner_products(const Work& work, const InnerProducts& arguments, Range range, double* sums) {
  const Combination &u = arguments.u, &m = arguments.m;
  each_piece(work, range, [&](auto type, const Piece& piece, const Leaf& leaf, auto array_of) {
    using T = decltype(type);
    using O = opmath_t<T>;
    with_terms(u, leaf, [&](auto terms) {
      const Combine<O> of_u = combine_of<O>(u, leaf);
      const Combine<O> of_m = !m.groups ? Combine<O>() : combine_of<O>(m, leaf);
      Tuple<void*, terms.value> arrays;
      for (int t = 0; t < terms.value; ++t) arrays.values[t] = array_of(list_of(u, leaf, t));
      if (!m.groups) {
        add_up<T, 1>(arrays, piece, sums, [of_u](auto... x) { return Tuple<O, 1>{{of_u(x...) * of_u(x...)}}; });
      } else {
        add_up<T, kSums>(arrays, piece, sums, [of_u, of_m](auto... x) {
          const O a = of_u(x...), b = of_m(x...);
          return Tuple<O, kSums>{{a * a, b * a, b * b}};
        });
      }
      sums += kSums;
    });
  });
}
