// What draw_tokens computes of a score: its place in the order of all floats, its noise, and where a cut is looked for.
// intrinsics.cuh comes before it.

constexpr int NUM_PIVOTS = 8;
constexpr unsigned LEAST_KEY = 0x007fffffu;  // the keys of -inf and of 0
constexpr unsigned ZERO = 0x80000000u;
constexpr float LEAST_NOISE = -4.0f;  // a word of 0 would make it -inf, any other one makes it -3.1 or more
__device__ constexpr float BELOW[NUM_PIVOTS] = {0.0f, 24.0f, 16.0f, 11.0f, 7.0f, 4.0f, 2.0f, 1.0f};  // the best score
__device__ constexpr unsigned ROTATIONS[8] = {13, 15, 26, 6, 17, 29, 16, 24};

// An integer that rises with the float, the same for both zeros.
__device__ inline unsigned key_of(float x) {
  const unsigned bits = __float_as_uint(x);
  const unsigned key = bits >> 31 ? ~bits : bits | ZERO;
  return key == ZERO - 1 ? ZERO : key;
}

__device__ inline float of_key(unsigned key) { return __uint_as_float(key >> 31 ? key ^ ZERO : ~key); }

// The key of pivot i, from `low` to `high` and rising with i. The first pivots are `low` itself and scores that lie so far
// below the best one; later ones divide what is left evenly.
__device__ inline unsigned pivot_of(int i, bool is_first, unsigned low, unsigned high, float best) {
  if (!is_first) {
    const unsigned width = high - low;
    return low + min(width - 1, max(1u, width / (NUM_PIVOTS + 1)) * unsigned(i + 1));
  }
  if (i == 0) return low;
  return min(high, max(low, key_of(best - BELOW[i])));
}

// Adds each of N values (a power of two) up over all lanes. Lane i is left with the sum of value i % N: while more than
// one value is left, a lane passes on those that it does not keep, so that all N take about as many shuffles as one.
template <int N>
__device__ inline float spread_sum(float (&values)[N], int lane) {
  UNROLL for (int half_n = N / 2; half_n > 0; half_n /= 2) {
    const bool upper = lane & half_n;
    UNROLL for (int i = 0; i < half_n; i++) {
      const float kept = upper ? values[i + half_n] : values[i];
      const float passed = upper ? values[i] : values[i + half_n];
      values[i] = kept + shuffle_xor(passed, half_n);
    }
  }
  float sum = values[0];
  UNROLL for (int offset = N; offset < 32; offset *= 2) sum += shuffle_xor(sum, offset);
  return sum;
}

// The largest, and the least, of a warp's integers.
__device__ inline unsigned warp_max(unsigned value) {
  UNROLL for (int mask = 16; mask > 0; mask /= 2) value = max(value, shuffle_xor(value, mask));
  return value;
}

__device__ inline unsigned warp_min(unsigned value) { return ~warp_max(~value); }

// Threefry-2x32 of 20 rounds (Salmon et al. 2011), MLX's generator: two random words for a key and a counter.
__device__ inline uint2 random_words(uint2 key, uint2 counter) {
  const unsigned keys[3] = {key.x, key.y, key.x ^ key.y ^ 0x1bd11bdau};
  unsigned x = counter.x + keys[0], y = counter.y + keys[1];
  UNROLL for (unsigned four = 0; four < 5; four++) {
    UNROLL for (unsigned i = 0; i < 4; i++) {
      const unsigned bits = ROTATIONS[four % 2 * 4 + i];
      x += y;
      y = (y << bits | y >> (32 - bits)) ^ x;
    }
    x += keys[(four + 1) % 3];
    y += keys[(four + 2) % 3] + four + 1;
  }
  return make_uint2(x, y);
}

// Standard Gumbel noise of a random word, as mx.random.gumbel makes it.
__device__ inline float noise_of(unsigned word) {
  const float uniform = fminf(float(word) * 2.3283064365386963e-10f, 0.99999994f);
  return fmaxf(-logf(-logf(uniform)), LEAST_NOISE);
}
