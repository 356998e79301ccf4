// Arrays in tiles: elements of any dtype, in the working precision and in the first-level cache.
//
// Included once for each instruction set, inside namespace gam::cpu::GAM_ISA (see isa.inl).

// Elements of a tile. The loops over formulas only see tiles. So they do not depend on dtypes, and the arrays of one
// tile (at most eight of 2 KiB in fp32) fit the first-level cache.
constexpr int kTile = 512;

template <class T, class U>
inline constexpr bool kSame = false;
template <class T>
inline constexpr bool kSame<T, T> = true;

// The type of an element in the loops. It is the stored type if widening and rounding can overlap with reads of memory.
// For a half it is the value, because compilers do not find the conversion instructions.
template <class T>
struct Seen {
  using type = T;
};
template <>
struct Seen<Half> {
  using type = float;
};
template <class T>
using seen_t = typename Seen<T>::type;

inline void widen(const Half* from, float* to, int n) {
  int j = 0;
#if defined(GAM_F16C)
  for (; j + 8 <= n; j += 8)
    _mm256_storeu_ps(to + j, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + j))));
#endif
  for (; j < n; ++j) to[j] = value_of(from[j]);
}

inline void narrow(const float* from, Half* to, int n) {
  int j = 0;
#if defined(GAM_F16C)
  for (; j + 8 <= n; j += 8)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + j),
                     _mm256_cvtps_ph(_mm256_loadu_ps(from + j), _MM_FROUND_TO_NEAREST_INT));
#endif
  for (; j < n; ++j) put(from[j], to[j]);
}

// Copies past the caches; `to` starts on a cache line.
inline void stream(const void* from, void* to, size_t bytes) {
  size_t done = 0;
#if defined(GAM_X86)
  const char* source = static_cast<const char*>(from);
  char* target = static_cast<char*>(to);
  for (; done + 64 <= bytes; done += 64) {
#if defined(GAM_AVX512)
    _mm512_stream_si512(reinterpret_cast<__m512i*>(target + done), _mm512_loadu_si512(source + done));
#elif defined(GAM_AVX2)
    for (int k = 0; k < 64; k += 32)
      _mm256_stream_si256(reinterpret_cast<__m256i*>(target + done + k),
                          _mm256_loadu_si256(reinterpret_cast<const __m256i*>(source + done + k)));
#else
    for (int k = 0; k < 64; k += 16)
      _mm_stream_si128(reinterpret_cast<__m128i*>(target + done + k),
                       _mm_loadu_si128(reinterpret_cast<const __m128i*>(source + done + k)));
#endif
  }
#endif
  std::memcpy(static_cast<char*>(to) + done, static_cast<const char*>(from) + done, bytes - done);
}

// Orders the streaming stores; nothing else does.
inline void end_of_streaming() {
#if defined(GAM_X86)
  _mm_sfence();
#endif
}

// Memory for a tile. The array as a whole is aligned. (alignas on the array would align each element beyond its size,
// and GCC does not vectorize such elements.)
template <class T, bool Used = true>
struct alignas(64) Room {
  T values[Used ? kTile : 1];
};

template <class T>
class Reader {
  using Value = seen_t<T>;

 public:
  Reader() = default;
  explicit Reader(const void* array) : data_(static_cast<const T*>(array)) {}

  // Elements from the i-th on, in their stored type.
  const T* raw(int64_t i) const { return data_ + i; }

  // Elements [i, i + n) in the type of the loops; valid until the next call.
  const Value* tile(int64_t i, [[maybe_unused]] int n) {
    if constexpr (kSame<T, Value>) {
      return raw(i);
    } else {
      widen(raw(i), tile_.values, n);
      return tile_.values;
    }
  }

 private:
  const T* data_ = nullptr;
  Room<Value, !kSame<T, Value>> tile_;
};

// Without an array, stores are discarded.
template <class T>
class Writer {
  using Value = seen_t<T>;

 public:
  Writer() = default;
  Writer(void* array, bool streaming)
      : data_(static_cast<T*>(array)), stream_(streaming && reinterpret_cast<uintptr_t>(array) % 64 == 0) {}

  // Memory for elements [i, i + n) before store(): the array itself if possible.
  Value* tile(int64_t i) {
    if constexpr (kSame<T, Value>) {
      if (data_ && !stream_) return data_ + i;
    }
    return tile_.values;
  }

  void store(int64_t i, int n) {
    if (!data_) return;
    if constexpr (kSame<T, Value>) {
      if (stream_) raw(tile_.values, i, n);
    } else {
      narrow(tile_.values, raw_.values, n);
      raw(raw_.values, i, n);
    }
  }

  // Stores elements in their stored type.
  void raw(const T* stored, int64_t i, int n) {
    const size_t bytes = static_cast<size_t>(n) * sizeof(T);
    if (stream_) {
      stream(stored, data_ + i, bytes);
    } else {
      std::memcpy(data_ + i, stored, bytes);
    }
  }

 private:
  T* data_ = nullptr;
  bool stream_ = false;
  Room<Value> tile_;
  Room<T, !kSame<T, Value>> raw_;
};

// Calls f(i, n) for the tiles of elements [begin, begin + length).
template <class F>
void each_tile(int64_t begin, int64_t length, F f) {
  for (int64_t i = 0; i < length; i += kTile) {
    f(begin + i, static_cast<int>(length - i < kTile ? length - i : kTile));
  }
}
