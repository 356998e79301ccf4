// The steps of the base optimizers. Of each tile everything is read before anything is written.

template <class V>
const V* zeros() {
  static const Room<V> room{};
  return room.values;
}

template <class V, class O, class D>
void sgd_tile(int n, Sgd<O> formula, D d, const V* theta, const V* decayed, V* params) {
  GAM_INDEPENDENT
  for (int j = 0; j < n; ++j) put(formula(d(j), value_of(theta[j]), value_of(decayed[j])), params[j]);
}

template <bool Nesterov, class V, class O, class D>
void momentum_tile(int n, Sgd<O> formula, D d, const V* theta, const V* decayed, const V* buffer, V* new_buffer,
                   V* params) {
  GAM_INDEPENDENT
  for (int j = 0; j < n; ++j) {
    O b = value_of(buffer[j]);
    put(formula.template with_momentum<Nesterov>(d(j), value_of(theta[j]), value_of(decayed[j]), b), params[j]);
    put(b, new_buffer[j]);
  }
}

template <class V, class O, class D>
void adam_tile(int n, Adam<O> formula, D d, const V* theta, const V* decayed, const V* average, const V* square,
               V* new_average, V* new_square, V* params) {
  GAM_INDEPENDENT
  for (int j = 0; j < n; ++j) {
    O m = value_of(average[j]), v = value_of(square[j]);
    put(formula(d(j), value_of(theta[j]), value_of(decayed[j]), m, v), params[j]);
    put(m, new_average[j]);
    put(v, new_square[j]);
  }
}

template <class V, class O, class D>
void adam_tile(int n, Adam<O> formula, D d, const V* theta, const V* decayed, const V* average, const V* square,
               const V* largest, V* new_average, V* new_square, V* new_largest, V* params) {
  GAM_INDEPENDENT
  for (int j = 0; j < n; ++j) {
    O m = value_of(average[j]), v = value_of(square[j]), top = value_of(largest[j]);
    put(formula(d(j), value_of(theta[j]), value_of(decayed[j]), m, v, top), params[j]);
    put(m, new_average[j]);
    put(v, new_square[j]);
    put(top, new_largest[j]);
  }
}

void sgd(const Work& work, const SgdStep& arguments, Range range) {
  each_piece(work, range, [&](auto type, const Piece& piece, const Leaf& leaf, auto array_of) {
    using T = decltype(type);
    using O = opmath_t<T>;
    using V = seen_t<T>;
    const SgdGroup& group = arguments.groups[leaf.group];
    const bool first = arguments.first[piece.leaf] != 0;
    const Sgd<O> formula(group.lr, group.momentum, group.dampening, group.weight_decay, group.maximize, first);
    const Array buffer = array_of(arguments.buffer);
    with_terms(arguments.d, leaf, [&](auto terms) {
      Combined<T, terms.value> combined(arguments.d, piece, leaf);
      Reader<T> theta(array_of(arguments.theta), leaf), old(buffer, leaf);
      Writer<T> params(array_of(arguments.params), leaf, arguments.stream), advanced(buffer, leaf, false);
      each_tile(piece.begin, piece.length, [&](int64_t i, int n) {
        const auto d = combined.tile(i, n);
        const V* x = theta.tile(i, n);
        const V* decayed = formula.weight_decay != O(0) ? x : zeros<V>();
        V* y = params.tile(i);
        if (buffer.data) {
          const V* b = first ? zeros<V>() : old.tile(i, n);
          V* c = advanced.tile(i);
          if (group.nesterov) {
            momentum_tile<true>(n, formula, d, x, decayed, b, c, y);
          } else {
            momentum_tile<false>(n, formula, d, x, decayed, b, c, y);
          }
          advanced.store(i, n);
        } else {
          sgd_tile(n, formula, d, x, decayed, y);
        }
        params.store(i, n);
      });
    });
  });
  end_of_streaming();
}

void adam(const Work& work, const AdamStep& arguments, Range range) {
  each_piece(work, range, [&](auto type, const Piece& piece, const Leaf& leaf, auto array_of) {
    using T = decltype(type);
    using O = opmath_t<T>;
    using V = seen_t<T>;
    const AdamGroup& group = arguments.groups[leaf.group];
    const Adam<O> formula(group.lr, group.beta1, group.beta2, group.eps, group.weight_decay, group.decoupled,
                          group.maximize, arguments.step_size[piece.leaf], arguments.root_correction[piece.leaf]);
    with_terms(arguments.d, leaf, [&](auto terms) {
      Combined<T, terms.value> combined(arguments.d, piece, leaf);
      Reader<T> theta(array_of(arguments.theta), leaf), average(array_of(arguments.average), leaf);
      Reader<T> square(array_of(arguments.square), leaf), largest(array_of(arguments.largest), leaf);
      Writer<T> params(array_of(arguments.params), leaf, arguments.stream);
      Writer<T> new_average(array_of(arguments.average), leaf, false),
          new_square(array_of(arguments.square), leaf, false);
      Writer<T> new_largest(array_of(arguments.largest), leaf, false);
      each_tile(piece.begin, piece.length, [&](int64_t i, int n) {
        const auto d = combined.tile(i, n);
        const V* x = theta.tile(i, n);
        const V* decayed = formula.weight_decay != O(0) ? x : zeros<V>();
        const V* m = average.tile(i, n);
        const V* v = square.tile(i, n);
        V* y = params.tile(i);
        V* next_m = new_average.tile(i);
        V* next_v = new_square.tile(i);
        if (group.amsgrad) {
          const V* top = largest.tile(i, n);
          V* next_top = new_largest.tile(i);
          adam_tile(n, formula, d, x, decayed, m, v, top, next_m, next_v, next_top, y);
          new_largest.store(i, n);
        } else {
          adam_tile(n, formula, d, x, decayed, m, v, next_m, next_v, y);
        }
        new_average.store(i, n);
        new_square.store(i, n);
        params.store(i, n);
      });
    });
  });
  end_of_streaming();
}
