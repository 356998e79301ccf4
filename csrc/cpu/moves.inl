// The primitives that move parameters, or write a combination: tiles in, a formula of math.h on every element, tiles
// out.
//
// Of each tile everything is read before anything is written, so an argument may be the very array that is written; it
// may not overlap it otherwise.

#if defined(__clang__)
#define GAM_INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#elif defined(__GNUC__)
#define GAM_INDEPENDENT _Pragma("GCC ivdep")
#else
#define GAM_INDEPENDENT
#endif

// Formulas on the n elements of a tile; d and v are functions of the element's index. What a loop reads comes by value:
// behind a reference any store might change it, and the loop would not be vectorized.

template <class V, class D>
void fill_tile(int n, V* out, D d) {
  GAM_INDEPENDENT
  for (int j = 0; j < n; ++j) put(d(j), out[j]);
}

template <class V, class Formula, class D>
void map_tile(int n, V* out, Formula formula, const V* x, D v) {
  GAM_INDEPENDENT
  for (int j = 0; j < n; ++j) put(formula(value_of(x[j]), v(j)), out[j]);
}

void perturb(const Work& work, const Perturbation& arguments, Range range) {
  each_piece(work, range, [&](auto type, const Piece& piece, const Leaf& leaf, auto array_of) {
    using T = decltype(type);
    using O = opmath_t<T>;
    using V = seen_t<T>;
    const bool weighted = arguments.eta != nullptr;
    const Perturb<O> formula{of_group<O>(arguments.radius, leaf)};
    const Weigh<O> weigh{weighted ? of_group<O>(arguments.eta, leaf) : O(0)};
    const List start = arguments.save ? arguments.params : arguments.backup;
    Reader<T> origin(array_of(arguments.from_start ? start : arguments.params)), a(array_of(arguments.a));
    Reader<T> b(array_of(arguments.b)), theta(array_of(start)), params(array_of(arguments.params));
    Writer<T> out(array_of(arguments.params), arguments.stream && arguments.from_start && !arguments.save);
    Writer<T> backup(array_of(arguments.backup), arguments.stream);
    each_tile(piece.begin, piece.length, [&](int64_t i, int n) {
      if (arguments.save) backup.raw(params.raw(i), i, n);
      const V* x = origin.tile(i, n);
      const V* p = a.tile(i, n);
      const V* q = arguments.b ? b.tile(i, n) : nullptr;
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
      const Folding& fold = arguments.fold;
      if (fold.into) {
        const Fold<O> folded{of_group<O>(fold.k, leaf), of_group<O>(fold.l, leaf)};
        Reader<T> into(array_of(fold.into)), other(array_of(fold.other));
        Writer<T> result(array_of(fold.into), false);
        const V* y = into.tile(i, n);
        const V* z = other.tile(i, n);
        V* w = result.tile(i);
        map_tile(n, w, folded, y, [z](int j) { return value_of(z[j]); });
        result.store(i, n);
      }
    });
  });
  end_of_streaming();
}

template <class T>
void copy_piece(const Copy& arguments, const Piece& piece) {
  Reader<T> from(arguments.from[piece.leaf]);
  Writer<T> to(arguments.to[piece.leaf], arguments.stream);
  each_tile(piece.begin, piece.length, [&](int64_t i, int n) { to.raw(from.raw(i), i, n); });
}

void copy(const Work& work, const Copy& arguments, Range range) {
  each_piece(work, range,
             [&](auto type, const Piece& piece, const Leaf&, auto) { copy_piece<decltype(type)>(arguments, piece); });
  end_of_streaming();
}

void materialise(const Work& work, const Materialise& arguments, Range range) {
  each_piece(work, range, [&](auto type, const Piece& piece, const Leaf& leaf, auto array_of) {
    using T = decltype(type);
    with_terms(arguments.d, leaf, [&](auto terms) {
      Combined<T, terms.value> combined(arguments.d, piece, leaf);
      Writer<T> out(array_of(arguments.out), false);
      each_tile(piece.begin, piece.length, [&](int64_t i, int n) {
        fill_tile(n, out.tile(i), combined.tile(i, n));
        out.store(i, n);
      });
      if (arguments.restore.from) copy_piece<T>(arguments.restore, piece);
    });
  });
  end_of_streaming();
}
