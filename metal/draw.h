// What draw_tokens computes of a score: its place in the order of all floats, its noise, and where a cut is looked for.
// packed.h comes before it.

constant constexpr int NUM_PIVOTS = 8;
constant constexpr uint LEAST_KEY = 0x007fffffu;  // the keys of -inf and of 0
constant constexpr uint ZERO = 0x80000000u;
constant constexpr float LEAST_NOISE = -4.0f;  // a word of 0 would make it -inf, any other one makes it -3.1 or more
constant constexpr float BELOW[NUM_PIVOTS] = {0.0f, 24.0f, 16.0f, 11.0f, 7.0f, 4.0f, 2.0f, 1.0f};  // the best score
constant constexpr uint ROTATIONS[8] = {13, 15, 26, 6, 17, 29, 16, 24};

// An integer that rises with the float, the same for both zeros.
METAL_FUNC uint key_of(float x) {
  const uint bits = as_type<uint>(x);
  const uint key = bits >> 31 ? ~bits : bits | ZERO;
  return key == ZERO - 1 ? ZERO : key;
}

METAL_FUNC float of_key(uint key) { return as_type<float>(key >> 31 ? key ^ ZERO : ~key); }

// The key of pivot i, from `low` to `high` and rising with i. The first pivots are `low` itself and scores that lie so far
// below the best one; later ones divide what is left evenly.
METAL_FUNC uint pivot_of(int i, bool is_first, uint low, uint high, float best) {
  if (!is_first) {
    const uint width = high - low;
    return low + metal::min(width - 1, metal::max(1u, width / (NUM_PIVOTS + 1)) * uint(i + 1));
  }
  if (i == 0) return low;
  return metal::min(high, metal::max(low, key_of(best - BELOW[i])));
}

// Threefry-2x32 of 20 rounds (Salmon et al. 2011), MLX's generator: two random words for a key and a counter.
METAL_FUNC uint2 random_words(uint2 key, uint2 counter) {
  const uint keys[3] = {key.x, key.y, key.x ^ key.y ^ 0x1bd11bdau};
  uint x = counter.x + keys[0], y = counter.y + keys[1];
  UNROLL for (uint four = 0; four < 5; four++) {
    UNROLL for (uint i = 0; i < 4; i++) {
      const uint bits = ROTATIONS[four % 2 * 4 + i];
      x += y;
      y = (y << bits | y >> (32 - bits)) ^ x;
    }
    x += keys[(four + 1) % 3];
    y += keys[(four + 2) % 3] + four + 1;
  }
  return uint2(x, y);
}

// Standard Gumbel noise of a random word, as mx.random.gumbel makes it.
METAL_FUNC float noise_of(uint word) {
  const float uniform = metal::min(float(word) * 2.3283064365386963e-10f, 0.99999994f);
  return metal::max(-metal::precise::log(-metal::precise::log(uniform)), LEAST_NOISE);
}
