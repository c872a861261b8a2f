// Stands in for cuda/intrinsics.cuh: the same functions, by the definitions of NVIDIA's PTX ISA.
#pragma once

#define UNROLL

enum CudasimKind { SHUFFLE = 1, LOAD_MATRICES, MULTIPLY_ACCUMULATE };

template <class V>
CUDASIM_UNCHECKED V cudasim_slot(const void* slots, int lane) {
  return *(const V*)((const char*)slots + lane * 64);
}

// Part i of what a lane brought.
template <class V>
CUDASIM_UNCHECKED V cudasim_word(const void* slots, int lane, int i) {
  return ((const V*)((const char*)slots + lane * 64))[i];
}

// ---- copies ----
// The source is read at once. The destination holds all ones until the copy is waited for: whoever reads too early, or
// forgets to wait, computes NaN.

struct CudasimCopies {
  static constexpr int MOST = 512;
  void* to[MOST];
  uint4 data[MOST];
  int bytes[MOST], group[MOST];
  int begun, done, groups;
};
static CudasimCopies cudasim_copies[1024];

CUDASIM_UNCHECKED inline CudasimCopies& cudasim_own_copies() { return cudasim_copies[metalsim_attribute(8, 0)]; }

CUDASIM_UNCHECKED inline void cudasim_start() {
  CudasimCopies& own = cudasim_own_copies();
  own.begun = own.done = own.groups = 0;
}

CUDASIM_UNCHECKED inline void cudasim_remember(void* to, const uint4& data, int bytes) {
  CudasimCopies& own = cudasim_own_copies();
  if (own.begun - own.done == CudasimCopies::MOST) __builtin_trap();
  const int i = own.begun++ % CudasimCopies::MOST;
  own.to[i] = to;
  own.data[i] = data;
  own.bytes[i] = bytes;
  own.group[i] = own.groups;
}

// The next copy of a group that must be complete, or null.
CUDASIM_UNCHECKED inline void* cudasim_next(int unfinished_groups, uint4* data, int* bytes) {
  CudasimCopies& own = cudasim_own_copies();
  const int i = own.done % CudasimCopies::MOST;
  if (own.done == own.begun || own.group[i] >= own.groups - unfinished_groups) return nullptr;
  own.done++;
  *data = own.data[i];
  *bytes = own.bytes[i];
  return own.to[i];
}

template <int BYTES>
struct CudasimWords;
template <>
struct CudasimWords<16> {
  using Type = uint4;
};
template <>
struct CudasimWords<8> {
  using Type = uint2;
};
template <>
struct CudasimWords<4> {
  using Type = unsigned;
};

template <int BYTES = 16>
CUDASIM_INLINE void copy_async(void* to, const void* from, bool is_there) {
  using Data = typename CudasimWords<BYTES>::Type;
  uint4 data = {}, ones = {~0u, ~0u, ~0u, ~0u};
  if (is_there) *(Data*)&data = *(const Data*)from;
  *(Data*)to = *(Data*)&ones;
  cudasim_remember(to, data, BYTES);
}

CUDASIM_UNCHECKED inline void end_copy_group() { cudasim_own_copies().groups++; }

template <int N>
CUDASIM_INLINE void wait_for_copies() {
  uint4 data;
  int bytes;
  while (void* to = cudasim_next(N, &data, &bytes)) {
    if (bytes == 16) *(uint4*)to = data;
    if (bytes == 8) *(uint2*)to = {data.x, data.y};
    if (bytes == 4) *(unsigned*)to = data.x;
  }
}

// ---- matrices ----

// Each lane reads the row that it names, and finds its words in the rows of others.
CUDASIM_INLINE void load_matrices(unsigned (&words)[4], const void* row, int site = CUDASIM_SITE) {
  const uint4 own = *(const uint4*)row;
  const void* slots = metalsim_exchange(&own, sizeof own, LOAD_MATRICES, site);
  const int lane = metalsim_lane();
  for (int i = 0; i < 4; i++) words[i] = cudasim_word<unsigned>(slots, i * 8 + lane / 4, lane % 4);
}

CUDASIM_INLINE void load_matrices_transposed(unsigned (&words)[4], const void* row, int site = CUDASIM_SITE) {
  const uint4 own = *(const uint4*)row;
  const void* slots = metalsim_exchange(&own, sizeof own, LOAD_MATRICES, site);
  for (int i = 0; i < 4; i++) {
    const int first_row = i * 8 + metalsim_lane() % 4 * 2, column = metalsim_lane() / 4;
    words[i] = cudasim_word<uint16_t>(slots, first_row, column) |
               cudasim_word<uint16_t>(slots, first_row + 1, column) << 16;
  }
}

struct CudasimOperands {
  unsigned a[4], b[2];
};

CUDASIM_UNCHECKED inline float cudasim_element(unsigned word, int i, __half) {
  return __builtin_bit_cast(__half, (uint16_t)(word >> 16 * i));
}
CUDASIM_UNCHECKED inline float cudasim_element(unsigned word, int i, __nv_bfloat16) {
  return __builtin_bit_cast(float, i == 0 ? word << 16 : word & 0xffff0000u);
}

// Row k of the result's column in b, and column k of its row in a, lie in lanes of their own.
template <class T>
CUDASIM_UNCHECKED void cudasim_multiply(float* sum, const void* slots) {
  const int lane = metalsim_lane();
  for (int e = 0; e < 4; e++) {
    const int row = lane / 4 + e / 2 * 8, column = lane % 4 * 2 + e % 2;
    for (int k = 0; k < 16; k++) {
      const CudasimOperands of_a = cudasim_slot<CudasimOperands>(slots, row % 8 * 4 + k % 8 / 2);
      const CudasimOperands of_b = cudasim_slot<CudasimOperands>(slots, column * 4 + k % 8 / 2);
      sum[e] += cudasim_element(of_a.a[row / 8 + k / 8 * 2], k % 2, T()) * cudasim_element(of_b.b[k / 8], k % 2, T());
    }
  }
}

template <class T>
CUDASIM_INLINE void multiply_accumulate(
    float (&sum)[4], const unsigned (&a)[4], unsigned upper_b, unsigned lower_b, T, int site = CUDASIM_SITE) {
  const CudasimOperands own = {{a[0], a[1], a[2], a[3]}, {upper_b, lower_b}};
  const void* slots = metalsim_exchange(&own, sizeof own, MULTIPLY_ACCUMULATE, site);
  float own_sum[4] = {sum[0], sum[1], sum[2], sum[3]};
  cudasim_multiply<T>(own_sum, slots);
  for (int e = 0; e < 4; e++) sum[e] = own_sum[e];
}

template <class T>
inline unsigned pack(float first, float second, T) {
  return __builtin_bit_cast(uint16_t, T(first)) | (unsigned)__builtin_bit_cast(uint16_t, T(second)) << 16;
}

// ---- functions ----

inline float fast_exp2(float x) { return exp2f(x); }

template <class V>
CUDASIM_INLINE V shuffle(V value, int lane, int site = CUDASIM_SITE) {
  return cudasim_slot<V>(metalsim_exchange(&value, sizeof value, SHUFFLE, site), lane);
}

template <class V>
CUDASIM_INLINE V shuffle_xor(V value, int mask, int site = CUDASIM_SITE) {
  return shuffle(value, (int)metalsim_lane() ^ mask, site);
}
