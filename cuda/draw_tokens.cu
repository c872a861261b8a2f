// Draws a token for each row of scores, after min-p, top-k and top-p: the body of a kernel; intrinsics.cuh and draw.cuh
// come before it.
//
// No score is sorted and no noise is stored. Scores are compared as keys, integers in the order of the floats, and what
// min-p, top-k and top-p say is one key, `low`: what lies above it is kept. The search narrows: a pass over the scores
// counts, and weighs, what lies above each of eight pivots between a key that is too low and one that is not, and the
// next pass divides what is left between two of them. It is over when one score is left, however often it comes: half
// types have many ties. A token's noise is made where it is used, of the row's key and the token, as MLX makes it; one
// call makes the random words of two tokens.
//
// Inputs
//   scores        [num_rows, vocab_size], float
//   rows          [num_rows, 8], uint32: of each row its random key, the high and the low word, and what it asks for:
//                 temperature (0: the best token), min-p's logarithm, top-p (1: all), as bits of floats, top-k
//                 (vocab_size: all); two are not looked at
//   All are contiguous.
// Output
//   tokens        [num_rows], uint32: of equal ones the lowest
//
// Grid          a block per row: [THREADS * num_rows] threads
// Block         a row: 16 warps, which meet twice in a pass and in the end
// Warp          adds up what its threads have counted, each of 16 sums in the lanes of its number
// Thread        tokens i, i + THREADS, ... of the row; of a draw also those half a vocabulary further on, whose random
//               words come from the same call
//
// Must move     vocab_size floats per row and pass: one pass without a cut, two with a min-p, and with a top-k or a top-p
//               5 to 10 as a rule. All but the first find the row in a cache, if that has room for it; and most scores
//               lie outside of what is left, where a pass does nothing but compare.

constexpr int WARPS = THREADS / 32;
constexpr int NUM_SUMS = 2 * NUM_PIVOTS;
static_assert(WARPS <= 32 && NUM_SUMS == 16, "a warp adds up the sums of all");

const int thread = threadIdx.x;
const int lane = thread % 32;
const int warp = thread / 32;
const int row = blockIdx.x;
const int vocab_size = scores_shape[1];
const float* row_scores = scores + size_t(row) * vocab_size;
const uint32_t* asked = rows + row * 8;
const uint2 random_key = make_uint2(asked[0], asked[1]);
const float temperature = __uint_as_float(asked[2]);
const float log_min_p = __uint_as_float(asked[3]);
const float top_p = __uint_as_float(asked[4]);
const int top_k = asked[5];
const bool is_random = temperature > 0.0f;
const float divisor = is_random ? temperature : 1.0f;
const float nothing = of_key(LEAST_KEY);  // -inf

extern __shared__ uint4 shared_memory[];
float* sums_of = reinterpret_cast<float*>(shared_memory);  // [WARPS * NUM_SUMS]
unsigned* least_of = reinterpret_cast<unsigned*>(sums_of + WARPS * NUM_SUMS);
unsigned* most_of = least_of + WARPS;
float* totals = reinterpret_cast<float*>(most_of + WARPS);  // how many scores lie above each pivot, and their weights

unsigned low = 0;  // scores with keys above it are kept
if (is_random && (log_min_p > nothing || top_k < vocab_size || top_p < 1.0f)) {
  // ---- the best score, and min-p ----
  unsigned high = 0;
  for (int i = thread; i < vocab_size; i += THREADS) high = max(high, key_of(row_scores[i] / divisor));
  high = warp_max(high);
  if (lane == 0) most_of[warp] = high;
  __syncthreads();
  high = warp_max(lane < WARPS ? most_of[lane] : 0u);
  __syncthreads();
  const unsigned best_key = high;
  const float best = of_key(best_key);
  low = max(LEAST_KEY, key_of(best + log_min_p) - 1);

  // ---- top-k, which counts, then top-p, which weighs what top-k leaves ----
  for (int weighs = 0; weighs < 2; weighs++) {
    if (weighs ? top_p >= 1.0f : top_k >= vocab_size) continue;
    float limit = weighs ? top_p : float(top_k);  // what may lie above a score that is kept, but for the limit itself
    float num_above_low = vocab_size, num_above_high = 0.0f;
    bool is_first = true;
    high = best_key;
    while (low < high && high - low > 1) {
      unsigned pivots[NUM_PIVOTS];
      UNROLL for (int i = 0; i < NUM_PIVOTS; i++) pivots[i] = pivot_of(i, is_first, low, high, best);
      float sums[NUM_SUMS];
      UNROLL for (int i = 0; i < NUM_SUMS; i++) sums[i] = 0.0f;
      unsigned least = ~0u, most = 0;  // of the keys from low to high
      for (int i = thread; i < vocab_size; i += THREADS) {
        const float score = row_scores[i] / divisor;
        const unsigned key = key_of(score);
        if (key <= low) continue;
        const float weight = expf(score - best);
        UNROLL for (int p = 0; p < NUM_PIVOTS; p++) {
          sums[p] += key > pivots[p] ? 1.0f : 0.0f;
          sums[NUM_PIVOTS + p] += key > pivots[p] ? weight : 0.0f;
        }
        least = min(least, key);
        if (key <= high) most = max(most, key);
      }
      const float sum = spread_sum(sums, lane);
      least = warp_min(least);
      most = warp_max(most);
      if (lane < NUM_SUMS) sums_of[warp * NUM_SUMS + lane] = sum;
      if (lane == 0) least_of[warp] = least, most_of[warp] = most;
      __syncthreads();
      if (warp == 0 && lane < NUM_SUMS) {
        float total = 0.0f;
        for (int s = 0; s < WARPS; s++) total += sums_of[s * NUM_SUMS + lane];
        totals[lane] = total;
      }
      least = warp_min(lane < WARPS ? least_of[lane] : ~0u);
      most = warp_max(lane < WARPS ? most_of[lane] : 0u);
      __syncthreads();

      const float* above = totals + weighs * NUM_PIVOTS;
      if (is_first) {
        if (weighs) limit *= above[0];
        if (above[0] < limit) break;  // nothing is cut
      }
      if (least == most) {
        low = least - 1;
        break;
      }
      int i = 0;  // of the first pivot above which lies less than the limit
      while (i < NUM_PIVOTS && above[i] >= limit) i++;
      const unsigned lower = low, upper = high;
      if (i > 0) {
        low = pivot_of(i - 1, is_first, lower, upper, best);
        num_above_low = totals[i - 1];
      }
      if (i < NUM_PIVOTS) {
        high = pivot_of(i, is_first, lower, upper, best);
        num_above_high = totals[i];
      }
      if (num_above_low - num_above_high <= 1.0f) break;  // the only one from low to high is the least that is kept
      is_first = false;
    }
  }
}

// ---- the draw ----
float best_score = nothing;
unsigned token = 0;
const int half_size = (vocab_size + 1) / 2;
for (int first = thread; first < half_size; first += THREADS) {
  const int second = first + half_size;
  float pair[2] = {row_scores[first] / divisor, second < vocab_size ? row_scores[second] / divisor : nothing};
  const bool is_kept[2] = {key_of(pair[0]) > low, second < vocab_size && key_of(pair[1]) > low};
  if (is_random && (is_kept[0] || is_kept[1])) {
    const uint2 words = random_words(random_key, make_uint2(first, second < vocab_size ? second : 0));
    pair[0] += noise_of(words.x);
    pair[1] += noise_of(words.y);
  }
  UNROLL for (int i = 0; i < 2; i++) {
    const unsigned candidate = i ? second : first;
    if (is_kept[i] && (pair[i] > best_score || (pair[i] == best_score && candidate < token))) {
      best_score = pair[i];
      token = candidate;
    }
  }
}
float* best_of = sums_of;
unsigned* token_of = least_of;
for (int is_last = 0; is_last < 2; is_last++) {
  UNROLL for (int mask = 16; mask > 0; mask /= 2) {
    const float other_score = shuffle_xor(best_score, mask);
    const unsigned other = shuffle_xor(token, mask);
    if (other_score > best_score || (other_score == best_score && other < token)) {
      best_score = other_score;
      token = other;
    }
  }
  if (is_last) break;
  if (lane == 0) best_of[warp] = best_score, token_of[warp] = token;
  __syncthreads();
  best_score = lane < WARPS ? best_of[lane] : nothing;
  token = lane < WARPS ? token_of[lane] : ~0u;
}
if (thread == 0) tokens[row] = token;
