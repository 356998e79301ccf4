// The primitives that move parameters: tiles in, a formula of math.h on every element, tiles out.
//
// All inputs of a tile are read before anything is written. So an input may be the same array as an output, but must
// not overlap it otherwise.

#if defined(__clang__)
#define GAM_INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#elif defined(__GNUC__)
#define GAM_INDEPENDENT _Pragma("GCC ivdep")
#else
#define GAM_INDEPENDENT
#endif

// A formula on the n elements of a tile; v is a function of the element's index. Inputs of the loop are passed by
// value: through a reference, any store might change them, and the loop would not be vectorized.
template <class V, class Formula, class D>
void map_tile(int n, V* out, Formula formula, const V* x, D v) {
  GAM_INDEPENDENT
  for (int j = 0; j < n; ++j) put(formula(value_of(x[j]), v(j)), out[j]);
}

void perturb(const Work& work, const Perturbation& arguments, Range range) {
  using Lists = Perturbation;
  each_piece(work, range, [&](auto element, const Piece& piece, const Leaf& leaf, auto array_of) {
    using T = decltype(element);
    using O = opmath_t<T>;
    using V = seen_t<T>;
    const bool weighted = arguments.eta != nullptr;
    const Perturb<O> formula{of_group<O>(arguments.radius, leaf)};
    const Weigh<O> weigh{weighted ? of_group<O>(arguments.eta, leaf) : O(0)};
    const int start = arguments.save ? Lists::kParams : Lists::kBackup;
    Reader<T> origin(array_of(arguments.from_start ? start : Lists::kParams)), a(array_of(Lists::kA));
    Reader<T> b(array_of(Lists::kB)), theta(array_of(start)), params(array_of(Lists::kParams));
    Writer<T> out(array_of(Lists::kParams), arguments.stream && arguments.from_start && !arguments.save);
    Writer<T> backup(array_of(Lists::kBackup), arguments.stream);
    each_tile(piece.begin, piece.length, [&](int64_t i, int n) {
      if (arguments.save) backup.raw(params.raw(i), i, n);
      const V* x = origin.tile(i, n);
      const V* p = a.tile(i, n);
      const V* q = work.lists[Lists::kB] ? b.tile(i, n) : nullptr;
      const V* t = weighted ? theta.tile(i, n) : nullptr;
      V* moved = out.tile(i);
      const auto along = [&](auto v) { map_tile(n, moved, formula, x, v); };
      if (q && t) {
        along([p, q, t, weigh](int j) {
          const O w = value_of(t[j]);
          return weigh(weigh(value_of(p[j]) - value_of(q[j]), w), w);
        });
      } else if (t) {
        along([p, t, weigh](int j) {
          const O w = value_of(t[j]);
          return weigh(weigh(value_of(p[j]), w), w);
        });
      } else if (q) {
        along([p, q](int j) { return value_of(p[j]) - value_of(q[j]); });
      } else {
        along([p](int j) { return value_of(p[j]); });
      }
      out.store(i, n);
      if (arguments.k) {
        const Fold<O> fold{of_group<O>(arguments.k, leaf), of_group<O>(arguments.l, leaf)};
        Reader<T> into(array_of(Lists::kInto)), other(array_of(Lists::kOther));
        Writer<T> result(array_of(Lists::kInto), false);
        const V* y = into.tile(i, n);
        const V* z = other.tile(i, n);
        map_tile(n, result.tile(i), fold, y, [z](int j) { return value_of(z[j]); });
        result.store(i, n);
      }
    });
  });
  end_of_streaming();
}

void copy(const Work& work, const Copy& arguments, Range range) {
  each_piece(work, range, [&](auto element, const Piece& piece, const Leaf&, auto array_of) {
    using T = decltype(element);
    Reader<T> from(array_of(Copy::kFrom));
    Writer<T> to(array_of(Copy::kTo), arguments.stream);
    each_tile(piece.begin, piece.length, [&](int64_t i, int n) { to.raw(from.raw(i), i, n); });
  });
  end_of_streaming();
}
