// Elements of float16, bfloat16 or float32 kept as the 32-bit words that they are loaded in, sums over lanes, and where
// a key lies. A word becomes floats where it is used, so that what waits in registers takes no more room than in memory.

#define UNROLL _Pragma("clang loop unroll(full)")

constant constexpr float LOWEST = -3e38f;  // stands for minus infinity, without its arithmetic

template <typename T>
struct Word {
  static constant constexpr int COUNT = 2;  // elements per word
  static float element(uint word, int i) { return float(as_type<vec<T, 2>>(word)[i]); }
};

template <>
struct Word<float> {
  static constant constexpr int COUNT = 1;
  static float element(uint word, int i) { return as_type<float>(word); }
};

template <>
struct Word<bfloat16_t> {
  static constant constexpr int COUNT = 2;
  static float element(uint word, int i) { return as_type<float>(i == 0 ? word << 16 : word & 0xffff0000u); }
};

// Loads N words, 1, 2 or 4, at once, or four by four; `from` must be aligned to a load's size.
template <int N>
METAL_FUNC void load_words(const device uint* from, thread uint* to) {
  static_assert(N == 1 || N == 2 || N % 4 == 0, "a load is of 4, 8 or 16 bytes");
  if constexpr (N % 4 == 0) {
    UNROLL for (int n = 0; n < N; n += 4) {
      const uint4 words = *reinterpret_cast<const device uint4*>(from + n);
      UNROLL for (int i = 0; i < 4; i++) to[n + i] = words[i];
    }
  } else if constexpr (N == 2) {
    const uint2 words = *reinterpret_cast<const device uint2*>(from);
    UNROLL for (int i = 0; i < N; i++) to[i] = words[i];
  } else {
    to[0] = *from;
  }
}

// Stores N words, 1, 2 or 4, at once; `to` must be aligned to their size.
template <int N>
METAL_FUNC void store_words(const thread uint* from, device uint* to) {
  static_assert(N == 1 || N == 2 || N == 4, "a store is of 4, 8 or 16 bytes");
  if constexpr (N == 4) *reinterpret_cast<device uint4*>(to) = uint4(from[0], from[1], from[2], from[3]);
  else if constexpr (N == 2) *reinterpret_cast<device uint2*>(to) = uint2(from[0], from[1]);
  else *to = from[0];
}

// Adds each of N values (a power of two) up over every `lanes` neighbouring lanes. Lane i is left with the sum of
// value i % N: while more than one value is left, a lane passes on those that it does not keep, so that all
// N take about as many shuffles as one.
template <int N>
METAL_FUNC float spread_sum(thread float* values, int lanes, int lane) {
  UNROLL for (int half_n = N / 2; half_n > 0; half_n /= 2) {
    const bool upper = lane & half_n;
    UNROLL for (int i = 0; i < half_n; i++) {
      const float kept = upper ? values[i + half_n] : values[i];
      const float passed = upper ? values[i] : values[i + half_n];
      values[i] = kept + simd_shuffle_xor(passed, half_n);
    }
  }
  float sum = values[0];
  UNROLL for (int offset = N; offset < lanes; offset *= 2) sum += simd_shuffle_xor(sum, offset);
  return sum;
}

// The row of a cache, [num_blocks * block_size * num_kv_heads, dim], that belongs to a key of the table's sequence. Its
// 32 bits are enough for a pool of 64 GB, with the shortest rows there are. HEADS_FIRST: where heads come before slots.
template <bool HEADS_FIRST = false, typename Table>
METAL_FUNC uint row_of(Table table, int key, int block_shift, int num_kv_heads, int kv_head) {
  const uint block = table[key >> block_shift], offset = key & ((1 << block_shift) - 1);
  if constexpr (HEADS_FIRST) return (block * num_kv_heads + uint(kv_head)) << block_shift | offset;
  const uint slot = block << block_shift | offset;
  return slot * num_kv_heads + kv_head;
}

// Loads a lane's share of N rows of a cache, one after another into `words`: of the loads of WORDS words that a row
// consists of, CHUNKS in all, numbers column, column + LANES, ... Where a row has no more of them it is the last one.
// own_row: of this lane's key. first_lane: the keys are those of this lane and of each STEP-th one after it.
template <int N, int LOADS, int LANES, int WORDS, int CHUNKS, int STEP = 1>
METAL_FUNC void load_rows(const device uint* cache, uint own_row, int first_lane, int column, thread uint* words) {
  UNROLL for (int t = 0; t < N; t++) {
    const device uint* row = cache + size_t(simd_shuffle(own_row, first_lane + t * STEP)) * (CHUNKS * WORDS);
    UNROLL for (int i = 0; i < LOADS; i++) {
      load_words<WORDS>(row + metal::min(column + i * LANES, CHUNKS - 1) * WORDS, words + (t * LOADS + i) * WORDS);
    }
  }
}
