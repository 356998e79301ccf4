// The steps of the base optimizers. All inputs of a tile are read before anything is written.

template <class V>
const V* zeros() {
  static const Room<V> room{};
  return room.values;
}

template <int State, class V, class F, class D>
void update_tile(int n, F formula, D d, const V* theta, Tuple<const V*, State> state, Tuple<V*, State> advanced,
                 V* params) {
  using O = decltype(value_of(*theta));
  GAM_INDEPENDENT
  for (int j = 0; j < n; ++j) {
    O s[State];
    for (int k = 0; k < State; ++k) s[k] = value_of(state.values[k][j]);
    put(formula(d(j), value_of(theta[j]), s), params[j]);
    for (int k = 0; k < State; ++k) put(s[k], advanced.values[k][j]);
  }
}

template <template <class> class Functor>
void update_by(const Work& work, const Update& arguments, Range range) {
  using Lists = Update;
  each_piece(work, range, [&](auto element, const Piece& piece, const Leaf& leaf, auto array_of) {
    using T = decltype(element);
    using F = Functor<opmath_t<T>>;
    using V = seen_t<T>;
    constexpr int kState = F::kState;
    const F formula(arguments.groups[leaf.group].numbers, arguments.options[arguments.option[piece.leaf]].numbers);
    Reader<T> readers[kState];
    Writer<T> writers[kState];
    for (int k = 0; k < kState; ++k) {
      readers[k] = Reader<T>(array_of(Lists::kState + k));
      writers[k] = Writer<T>(array_of(Lists::kState + k), false);
    }
    with_terms(arguments.d[leaf.group], [&](auto terms) {
      Combined<T, terms.value> combined(arguments.d[leaf.group], Lists::kTerms, array_of);
      Reader<T> theta(array_of(Lists::kTheta));
      Writer<T> params(array_of(Lists::kParams), arguments.stream);
      each_tile(piece.begin, piece.length, [&](int64_t i, int n) {
        Tuple<const V*, kState> state;
        Tuple<V*, kState> advanced;
        for (int k = 0; k < kState; ++k) {
          state.values[k] = array_of(Lists::kState + k) ? readers[k].tile(i, n) : zeros<V>();
          advanced.values[k] = writers[k].tile(i);
        }
        update_tile<kState>(n, formula, combined.tile(i, n), theta.tile(i, n), state, advanced, params.tile(i));
        for (int k = 0; k < kState; ++k) writers[k].store(i, n);
        params.store(i, n);
      });
    });
  });
  end_of_streaming();
}

void update(const Work& work, const Update& arguments, Range range) {
  switch (arguments.formula) {
#define GAM_UPDATE_BY(functor, name) \
  case Formula::k##functor:          \
    return update_by<functor>(work, arguments, range);
    GAM_UPDATES(GAM_UPDATE_BY)
#undef GAM_UPDATE_BY
  }
}
