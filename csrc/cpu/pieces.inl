// Pieces of a plan, and the combination of terms that most primitives use.
//
// Included once for each instruction set, inside namespace gam::cpu::GAM_ISA (see isa.inl), as are the other .inl
// files.

// The number for the leaf's group.
template <class T>
T of_group(PerGroup values, const Leaf& leaf) {
  return static_cast<T>(values[leaf.group]);
}

template <class T, int N>
struct Tuple {
  T values[N];
};

// Prefetches the beginning of a piece in all arrays. The processor prefetches what follows by itself, but cannot
// predict where the next of many small tensors lies.
inline void prefetch(const Work& work, const Piece& piece) {
#if defined(__GNUC__)
  constexpr int64_t kLine = 64, kMost = 512;
  const int64_t size = size_of(work.dtype);
  const int64_t bytes = piece.length * size < kMost ? piece.length * size : kMost;
  for (int k = 0; k < work.count; ++k) {
    if (!work.lists[k] || !work.lists[k][piece.leaf]) continue;
    const char* begin = static_cast<const char*>(work.lists[k][piece.leaf]) + piece.begin * size;
    for (int64_t at = 0; at < bytes; at += kLine) __builtin_prefetch(begin + at);
  }
#endif
}

// Calls f(element, piece, leaf, array_of) for the pieces of a range. `element` is a value of the dtype, and array_of(k)
// the array of the leaf in list k, or null if it has none.
template <class F>
void each_piece(const Work& work, Range range, F f) {
  constexpr int64_t kPiecesAhead = 3;
  with_dtype(work.dtype, [&](auto element) {
    for (int64_t p = range.begin; p < range.end; ++p) {
      if (p + kPiecesAhead < range.end) prefetch(work, work.pieces[p + kPiecesAhead]);
      const Piece& piece = work.pieces[p];
      f(element, piece, work.leaves[piece.leaf],
        [&](int k) { return work.lists[k] ? work.lists[k][piece.leaf] : nullptr; });
    }
  });
}

// The combination Σ factor x of a leaf, tile by tile. The lists of terms start at index `first`.
template <class T, int Terms>
class Combined {
 public:
  template <class ArrayOf>
  Combined(const GroupTerms& terms, int first, ArrayOf array_of) : combine_(terms.p) {
    for (int t = 0; t < Terms; ++t) readers_[t] = Reader<T>(array_of(first + terms.index[t]));
  }

  // Returns a function of j that gives element i + j.
  auto tile(int64_t i, int n) {
    const auto* x = readers_[0].tile(i, n);
    if constexpr (Terms == 1) {
      return [combine = combine_, x](int j) { return combine(value_of(x[j])); };
    } else {
      const auto* y = readers_[1].tile(i, n);
      if constexpr (Terms == 2) {
        return [combine = combine_, x, y](int j) { return combine(value_of(x[j]), value_of(y[j])); };
      } else {
        const auto* z = readers_[2].tile(i, n);
        return [combine = combine_, x, y, z](int j) { return combine(value_of(x[j]), value_of(y[j]), value_of(z[j])); };
      }
    }
  }

 private:
  Reader<T> readers_[Terms];
  Combine<opmath_t<T>> combine_;
};

// Calls f with the number of terms as a constant.
template <class F>
void with_terms(const GroupTerms& terms, F f) {
  switch (terms.terms) {
    case 1:
      return f(Constant<1>());
    case 2:
      return f(Constant<2>());
    default:
      return f(Constant<3>());
  }
}
