// One vector of accumulation elements, and its conversions from and to storage. Included once per
// instruction set, inside that set's namespace, so that no two sets share a symbol.

#define DA_INLINE inline __attribute__((always_inline))
#define DA_LAMBDA_INLINE __attribute__((always_inline))

template <class A>
struct Vector {
  typedef A type __attribute__((vector_size(DA_VECTOR_BYTES)));
  static constexpr int64_t lanes = DA_VECTOR_BYTES / sizeof(A);
};
template <class A>
using vec = typename Vector<A>::type;

template <class A>
struct Integer {
  using type = int32_t;
};
template <>
struct Integer<double> {
  using type = int64_t;
};
template <class A>
using ivec = vec<typename Integer<A>::type>;

typedef uint16_t u16vec __attribute__((vector_size(DA_VECTOR_BYTES / 2)));
typedef uint32_t u32vec __attribute__((vector_size(DA_VECTOR_BYTES)));

template <class To, class From>
DA_INLINE To bits(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "only the type changes");
  To to;
  __builtin_memcpy(&to, &from, sizeof to);
  return to;
}

template <class V, class T>
DA_INLINE V load_raw(const T* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

template <class A>
DA_INLINE vec<A> splat(A value) {
  return value - vec<A>{};  // exact, and no instruction
}

DA_INLINE vec<float> load(const float* p) { return load_raw<vec<float>>(p); }
DA_INLINE vec<double> load(const double* p) { return load_raw<vec<double>>(p); }
DA_INLINE void store(float* p, vec<float> v) { __builtin_memcpy(p, &v, sizeof v); }
DA_INLINE void store(double* p, vec<double> v) { __builtin_memcpy(p, &v, sizeof v); }

// bfloat16 is the upper half of a float; rounding is to nearest even, and a NaN stays one.
DA_INLINE vec<float> load(const bfloat16* p) {
  return bits<vec<float>>(__builtin_convertvector(load_raw<u16vec>(p), u32vec) << 16);
}
DA_INLINE void store(bfloat16* p, vec<float> v) {
  const u32vec b = bits<u32vec>(v);
  const u32vec rounded = (b + 0x7fff + ((b >> 16) & 1)) >> 16;
  const u32vec nan = (b >> 16) | 0x40;
  const u16vec narrow =
      __builtin_convertvector((b & 0x7fffffff) > 0x7f800000 ? nan : rounded, u16vec);
  __builtin_memcpy(p, &narrow, sizeof narrow);
}

#if DA_VECTOR_BYTES == 64
DA_INLINE vec<float> load(const float16* p) {
  return (vec<float>)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
}
DA_INLINE void store(float16* p, vec<float> v) {
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
}
#elif DA_VECTOR_BYTES == 32
DA_INLINE vec<float> load(const float16* p) {
  return (vec<float>)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
}
DA_INLINE void store(float16* p, vec<float> v) {
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
}
#else
// Without conversion instructions: rebias the exponent; a subnormal is its mantissa times 2^-24,
// and adding one half to a small float leaves exactly its multiple of 2^-24 in the low bits.
DA_INLINE vec<float> load(const float16* p) {
  const u32vec h = __builtin_convertvector(load_raw<u16vec>(p), u32vec);
  const u32vec magnitude = h & 0x7fff;
  const u32vec normal = (magnitude << 13) + (112u << 23);
  const u32vec special = (magnitude << 13) | 0x7f800000;
  const vec<float> tiny = __builtin_convertvector(magnitude, vec<float>) * 0x1p-24f;
  u32vec r = magnitude < 0x0400 ? bits<u32vec>(tiny) : normal;
  r = magnitude >= 0x7c00 ? special : r;
  return bits<vec<float>>(r | (h & 0x8000) << 16);
}
DA_INLINE void store(float16* p, vec<float> v) {
  const u32vec b = bits<u32vec>(v), magnitude = b & 0x7fffffff;
  const u32vec normal = (magnitude + 0xfff + ((magnitude >> 13) & 1) - (112u << 23)) >> 13;
  const u32vec tiny = bits<u32vec>(bits<vec<float>>(magnitude) + 0.5f) - 0x3f000000;
  u32vec r = magnitude < 0x38800000 ? tiny : normal;
  r = magnitude >= 0x47800000 ? (u32vec{} + 0x7c00) : r;
  r = magnitude > 0x7f800000 ? (u32vec{} + 0x7e00) : r;
  const u16vec narrow = __builtin_convertvector(r | (b & 0x80000000) >> 16, u16vec);
  __builtin_memcpy(p, &narrow, sizeof narrow);
}
#endif

// Stores a vector past the caches, to an aligned place that nobody reads soon.
constexpr bool kStreams = DA_VECTOR_BYTES > 16;
template <class T>
DA_INLINE void stream(T* to, const T* from) {
  constexpr int64_t bytes = Vector<accumulate_t<T>>::lanes * sizeof(T);
#if DA_VECTOR_BYTES == 64
  if constexpr (bytes == 64)
    _mm512_stream_si512((__m512i*)to, load_raw<__m512i>(from));
  else
    _mm256_stream_si256((__m256i*)to, load_raw<__m256i>(from));
#elif DA_VECTOR_BYTES == 32
  if constexpr (bytes == 32)
    _mm256_stream_si256((__m256i*)to, load_raw<__m256i>(from));
  else
    _mm_stream_si128((__m128i*)to, load_raw<__m128i>(from));
#else
  __builtin_memcpy(to, from, bytes);
#endif
}
template <class T>
DA_INLINE void stream(T* to, vec<accumulate_t<T>> v) {
  T from[Vector<accumulate_t<T>>::lanes];
  store(from, v);
  stream(to, from);
}

// Who sees what is stored after this sees what was streamed before it.
DA_INLINE void finish_streams() {
#if DA_VECTOR_BYTES > 16
  _mm_sfence();
#endif
}

template <class A>
DA_INLINE ivec<A> lane_numbers() {
  ivec<A> lane;
  for (int64_t i = 0; i < Vector<A>::lanes; i++) lane[i] = i;
  return lane;
}

template <class T>
struct Part {
  T elements[Vector<accumulate_t<T>>::lanes];
};

// The first n <= lanes elements, zeros after them.
template <class T>
DA_INLINE vec<accumulate_t<T>> load_part(const T* p, int64_t n) {
#if DA_VECTOR_BYTES == 64
  const auto first = static_cast<__mmask16>((1u << n) - 1);
  if constexpr (sizeof(T) == 8)
    return (vec<double>)_mm512_maskz_loadu_pd(static_cast<__mmask8>(first), p);
  else if constexpr (sizeof(T) == 4)
    return (vec<float>)_mm512_maskz_loadu_ps(first, p);
  else
    return load(bits<Part<T>>(_mm256_maskz_loadu_epi16(first, p)).elements);
#else
#if DA_VECTOR_BYTES == 32
  // A vector of what was just stored by element would wait for all stores before it.
  using A = accumulate_t<T>;
  const ivec<A> first = lane_numbers<A>() < typename Integer<A>::type(n);
  if constexpr (sizeof(T) == 8)
    return (vec<double>)_mm256_maskload_pd(p, (__m256i)first);
  else if constexpr (sizeof(T) == 4)
    return (vec<float>)_mm256_maskload_ps(p, (__m256i)first);
#endif
  Part<T> t = {};
  for (int64_t i = 0; i < n; i++) t.elements[i] = p[i];
  return load(t.elements);
#endif
}
template <class T>
DA_INLINE void store_part(T* p, vec<accumulate_t<T>> v, int64_t n) {
#if DA_VECTOR_BYTES == 64
  const auto first = static_cast<__mmask16>((1u << n) - 1);
  if constexpr (sizeof(T) == 8) {
    _mm512_mask_storeu_pd(p, static_cast<__mmask8>(first), (__m512d)v);
  } else if constexpr (sizeof(T) == 4) {
    _mm512_mask_storeu_ps(p, first, (__m512)v);
  } else {
    Part<T> t;
    store(t.elements, v);
    _mm256_mask_storeu_epi16(p, first, bits<__m256i>(t));
  }
#else
  Part<T> t;
  store(t.elements, v);
  for (int64_t i = 0; i < n; i++) p[i] = t.elements[i];
#endif
}

// The lanes of a vector by number, where the machine has an instruction for that.
constexpr bool kPicks = DA_VECTOR_BYTES > 16;
DA_INLINE vec<float> pick(vec<float> v, ivec<float> lane) {
#if DA_VECTOR_BYTES == 64
  return (vec<float>)_mm512_permutexvar_ps((__m512i)lane, (__m512)v);
#elif DA_VECTOR_BYTES == 32
  return (vec<float>)_mm256_permutevar8x32_ps((__m256)v, (__m256i)lane);
#else
  return v;
#endif
}
DA_INLINE vec<double> pick(vec<double> v, ivec<double> lane) {
#if DA_VECTOR_BYTES == 64
  return (vec<double>)_mm512_permutexvar_pd((__m512i)lane, (__m512d)v);
#elif DA_VECTOR_BYTES == 32
  const ivec<double> halves = (lane << 33) + (int64_t(1) << 32) + (lane << 1);
  return (vec<double>)_mm256_permutevar8x32_ps((__m256)v, (__m256i)halves);
#else
  return v;
#endif
}

// `row` in the first n lanes, the next one in the others.
template <class A>
DA_INLINE ivec<A> rows_from(int64_t row, int64_t n) {
  using I = typename Integer<A>::type;
  return (lane_numbers<A>() < I(n) ? ivec<A>{} : ivec<A>{} + 1) + I(row);
}

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define DA_SHUFFLEVECTOR
#endif
#endif

// The lanes of a, which are numbered from 0 on, and of b after them, that these numbers name.
template <class A, int64_t... kLanes>
DA_INLINE vec<A> shuffle(vec<A> a, vec<A> b) {
#ifdef DA_SHUFFLEVECTOR
  return __builtin_shufflevector(a, b, kLanes...);
#else
  return __builtin_shuffle(a, b, ivec<A>{kLanes...});
#endif
}

constexpr int64_t kGroup = 16;  // bytes, within which an instruction moves lanes at the least cost

// Sums of neighbouring lanes, group by group: those of a, then those of b.
template <class A, int64_t... I>
DA_INLINE vec<A> fold(vec<A> a, vec<A> b, std::integer_sequence<int64_t, I...>) {
  constexpr int64_t lanes = Vector<A>::lanes, group = kGroup / sizeof(A), half = group / 2;
  constexpr auto first = [](int64_t i) {
    const int64_t pair = i / group * group + 2 * (i % half);
    return i % group < half ? pair : lanes + pair;
  };
  return shuffle<A, first(I)...>(a, b) + shuffle<A, first(I) + 1 ...>(a, b);
}
template <class A>
DA_INLINE vec<A> fold(vec<A> a, vec<A> b) {
  return fold<A>(a, b, std::make_integer_sequence<int64_t, Vector<A>::lanes>());
}

// Sums of all groups, in the first.
template <int64_t kApart, class A, int64_t... I>
DA_INLINE vec<A> sum_groups(vec<A> v, std::integer_sequence<int64_t, I...> lanes) {
  if constexpr (kApart * sizeof(A) < kGroup)
    return v;
  else
    return sum_groups<kApart / 2, A>(v + shuffle<A, (I ^ kApart)...>(v, v), lanes);
}
template <class A>
DA_INLINE vec<A> sum_groups(vec<A> v) {
  constexpr int64_t lanes = Vector<A>::lanes;
  return sum_groups<lanes / 2, A>(v, std::make_integer_sequence<int64_t, lanes>());
}

// out[i] = the sum of all lanes of v[i], i < n, where n is 1 or 4: a fixed tree.
template <int n, class A>
DA_INLINE void sum_lanes(const vec<A>* v, A* out) {
  constexpr bool pairs = sizeof(A) == kGroup / 2;
  if constexpr (n == 1) {
    vec<A> sums = fold<A>(v[0], v[0]);
    if constexpr (!pairs) sums = fold<A>(sums, sums);
    out[0] = sum_groups<A>(sums)[0];
  } else {
    static_assert(n == 4);
    vec<A> sums[] = {fold<A>(v[0], v[1]), fold<A>(v[2], v[3])};
    if constexpr (pairs) {
      for (int i = 0; i < 2; i++) sums[i] = sum_groups<A>(sums[i]);
      __builtin_memcpy(out, sums, kGroup), __builtin_memcpy(out + 2, sums + 1, kGroup);
    } else {
      sums[0] = sum_groups<A>(fold<A>(sums[0], sums[1]));
      __builtin_memcpy(out, sums, kGroup);
    }
  }
}

// exp(x) = 2^n exp(r), |r| <= ln(2)/2, with a Taylor polynomial for exp(r): its remainder is below
// 2^-27 of the value. Clamped where float has no reciprocal; a NaN passes through.
DA_INLINE vec<float> exponential(vec<float> x) {
  x = x > 88.f ? splat(88.f) : x;
  x = x < -88.f ? splat(-88.f) : x;
  const float shift = 12582912.f;  // 1.5 * 2^23: adding it rounds to an integer
  const vec<float> n = (x * 1.44269504088896341f + shift) - shift;
  // ln 2 in two parts, the first exact in few bits so that n * ln2_high is exact
  const vec<float> r = (x - n * 0.693359375f) - n * -2.12194440054690583e-4f;
  vec<float> p = splat(1.f / 5040);
  p = p * r + 1.f / 720;
  p = p * r + 1.f / 120;
  p = p * r + 1.f / 24;
  p = p * r + 1.f / 6;
  p = p * r + 0.5f;
  p = p * r * r + r + 1.f;
  const ivec<float> exponent = __builtin_convertvector(n, ivec<float>) + 127;
  return p * bits<vec<float>>(exponent << 23);
}
