// Latent attention over a sequence's blocks, of one query or of several: the body of a kernel; packed.h and tiles.h
// come before it.
//
// A key is a row of HEAD_DIM elements, of which the first VALUE_DIM are its value as well, so K and V are read at once.
// All query heads of a KV head have the same keys: as in paged_prefill the rows of a sequence are its pairs (query,
// head), query by query, and a tile of TILE_ROWS of them reads each key once. A decode is a prompt of one query.
//
// Rows of K are long and rows of Q are many, so neither goes through threadgroup memory: each simdgroup has its own
// columns of both in registers, the same 8x8 matrices of K for the scores and for the values. What simdgroups exchange
// are scores. A lane loads up to 16 neighbouring bytes of a key, which are its two columns of up to four matrices: so
// the columns of a matrix are not neighbours in memory, and it is Q and `out` that follow this order.
//
// Inputs
//   q             [num_tokens, num_heads, HEAD_DIM], T
//   k_cache       [num_blocks, block_size, num_kv_heads, HEAD_DIM], T; block_size is a power of two
//   block_tables  [num_seqs, max_blocks], int32
//   work          [num_items or more, 8], int32: as of paged_prefill
//   window        int32: how many keys a query sees, itself among them
//   scale, cap    float: the base-2 logit of a key is q.k * scale, or cap * tanh(q.k * scale) with SOFTCAP
//   sinks         [num_heads] with SINKS, otherwise anything
//   write_done    [8], int32: not looked at; of paged_write
//   The cache is contiguous, and one block of it is given, at whose address all others lie, too. Of q and block_tables
//   the last dimension is contiguous. Rows of q lie at multiples of 16 bytes.
// Outputs
//   out           [num_parts, num_heads, VALUE_DIM], T: the mean of the values; zeros without keys. Those of a query
//                 lie side by side
//   lse           [num_parts, num_heads], float: the base-2 logarithm of the sum of the keys' exponentials
//   read_done     [8], int32: zeros, for the paged_write that comes next
//   Where each query has one part, `out` is the result; otherwise paged_merge joins the parts.
//
// Grid           threadgroups of one (KV head, item) each: [1, num_kv_heads, num_items], the last items first, since
//                the last tiles of a prompt see most keys
// Threadgroup    SIMDGROUPS simdgroups, which go through the keys together, TILE_KEYS at a time
// Simdgroup      its share of the columns, of the values and of the rest of a key: first the products of those with Q,
//                for all rows, which are added up over simdgroups in threadgroup memory; then its columns of the output
// Thread         of each tile a score or more, whose weight it computes for all
// Lane           of every 8x8 matrix two elements: of K and `output` in a row, of Q in a column
//
// Must move      per item and KV head: each key that a row of the tile sees in this part, HEAD_DIM elements, once (the
//                last one, out of a cache, also in the places after it); q and out of the rows. So for a sequence at
//                most ceil(num_queries * group / TILE_ROWS) times its keys. Keys that no row sees are not read, nor are
//                blocks that have no others.
// Threadgroup memory   for each simdgroup TILE_ROWS x TILE_KEYS scores; the weights; a number per row
//
// The method: FlashAttention-2 (Dao 2023) with DeepSeek-V2's absorbed projections (2024).

constexpr float LOG2E = 1.44269504f;
constexpr float HIDDEN = -FLT_MAX;   // the score of a key that a row does not see
constexpr float NOTHING = -1e30f;    // the peak of a row that has seen no key: exp2(HIDDEN - NOTHING) is 0

constexpr int THREADS = 32 * SIMDGROUPS;
constexpr int ROW_GROUPS = TILE_ROWS / 8;
constexpr int KEY_GROUPS = TILE_KEYS / 8;
constexpr int SCORES = (TILE_ROWS * TILE_KEYS + THREADS - 1) / THREADS;  // of a thread
constexpr int SCORE_STRIDE = TILE_KEYS + 4;            // keeps columns in different memory banks, as the next one
constexpr int WEIGHT_STRIDE = TILE_KEYS + 16 / sizeof(T);
static_assert(THREADS % TILE_KEYS == 0 && TILE_KEYS <= 32, "lanes side by side have the keys of one row");

// A simdgroup's matrices of a row, the first ones of values; a load is of as many as fit into 16 bytes.
constexpr int VALUES = VALUE_DIM / (8 * SIMDGROUPS);
constexpr int REST = (HEAD_DIM - VALUE_DIM) / (8 * SIMDGROUPS);
constexpr int MATRICES = VALUES + REST;
constexpr int WORDS = sizeof(T) / 2;                   // of a matrix in a lane
constexpr int VALUE_LOAD = VALUES % (4 / WORDS) == 0 ? 4 / WORDS : VALUES % 2 == 0 ? 2 : 1;
constexpr int REST_LOAD = REST % (4 / WORDS) == 0 ? 4 / WORDS : REST % 2 == 0 ? 2 : 1;
static_assert(HEAD_DIM == 8 * SIMDGROUPS * MATRICES && VALUES > 0, "simdgroups have equal shares of a row");

threadgroup float partial_scores[SIMDGROUPS * TILE_ROWS * SCORE_STRIDE];
threadgroup uint4 weight_memory[TILE_ROWS * WEIGHT_STRIDE * sizeof(T) / 16];
threadgroup float factors[TILE_ROWS];
threadgroup T* weights = reinterpret_cast<threadgroup T*>(weight_memory);

// The item: where the sequence's queries lie, the tile's rows, and the keys of this part that the rows see.
const int kv_head = threadgroup_position_in_grid.y;
const int item = threadgroups_per_grid.z - 1 - threadgroup_position_in_grid.z;
const int sequence = work[8 * item];
const int first_token = work[8 * item + 1];
const int num_queries = work[8 * item + 2];
const int first_position = work[8 * item + 3];
const int first_row = work[8 * item + 4];
const int part = work[8 * item + 5];
const int num_parts = work[8 * item + 6];
const int first_part = work[8 * item + 7];
const int num_kv_heads = k_cache_shape[2];
const int group = q_shape[1] / num_kv_heads;
const int num_rows = min(TILE_ROWS, num_queries * group - first_row);
const int first_key = max(0, first_position + first_row / group + 1 - window);
const int last_key = first_position + (first_row + num_rows - 1) / group;
const int rounds = (last_key - first_key) / (TILE_KEYS * num_parts) + 1;
const int begin = first_key + part * rounds * TILE_KEYS;
const int end = min(begin + rounds * TILE_KEYS, last_key + 1);
auto table = block_tables + sequence * block_tables_strides[0];
const int block_shift = metal::ctz(k_cache_shape[1]);  // a key's block is key >> block_shift

// The lane: its row and its columns of every 8x8 matrix, and where its elements of the first load of either kind begin.
const int thread_index = thread_index_in_threadgroup;
const int simd_index = simdgroup_index_in_threadgroup;
const int lane = thread_index_in_simdgroup;
const int matrix_row = (lane & 16) >> 2 | (lane & 6) >> 1;
const int column = (lane & 8) >> 1 | (lane & 1) << 1;
const int first_value = 8 * VALUES * simd_index + column * VALUE_LOAD;
const int first_rest = VALUE_DIM + 8 * REST * simd_index + column * REST_LOAD;

if (item == 0 && kv_head == 0 && thread_index < 8) read_done[thread_index] = 0;

// Q, transposed. Rows past the last one are copies of it that nobody asks for.
vec<T, 2> queries[ROW_GROUPS][MATRICES];
UNROLL for (int r = 0; r < ROW_GROUPS; r++) {
  const int row = first_row + min(r * 8 + matrix_row, num_rows - 1);
  const int head = kv_head * group + row % group;
  const device T* from = q + (first_token + row / group) * q_strides[0] + head * q_strides[1];
  uint words[MATRICES * WORDS];
  load_matrices<T, VALUES, VALUE_LOAD>(from + first_value, words);
  load_matrices<T, REST, REST_LOAD>(from + first_rest, words + VALUES * WORDS);
  UNROLL for (int m = 0; m < MATRICES; m++) queries[r][m] = transposed<T>(words + m * WORDS, matrix_row, column);
}

// The thread's scores of a tile: lanes side by side have the keys of one row.
const int score_key = thread_index % TILE_KEYS;
int score_rows[SCORES];
int positions[SCORES];
// Online softmax of these rows: `totals` are sums of this thread's weights, relative to exp2(peak).
float peaks[SCORES];
float totals[SCORES];
UNROLL for (int i = 0; i < SCORES; i++) {
  score_rows[i] = (thread_index + i * THREADS) / TILE_KEYS;
  positions[i] = score_rows[i] < num_rows ? first_position + (first_row + score_rows[i]) / group : -1;
  peaks[i] = NOTHING;
  totals[i] = 0;
}

float2 output[ROW_GROUPS][VALUES];
UNROLL for (int r = 0; r < ROW_GROUPS; r++) {
  UNROLL for (int j = 0; j < VALUES; j++) output[r][j] = float2(0);
}

// Where this lane's keys of the next tile lie. Past the last key it is that one again: it is there, and counts nothing.
uint rows[KEY_GROUPS];
UNROLL for (int g = 0; g < KEY_GROUPS; g++) {
  rows[g] = row_of(table, max(0, min(begin + g * 8 + matrix_row, end - 1)), block_shift, num_kv_heads, kv_head);
}

for (int first = begin; first < end; first += TILE_KEYS) {
  uint keys[KEY_GROUPS][MATRICES * WORDS];
  UNROLL for (int g = 0; g < KEY_GROUPS; g++) {
    const device T* row = k_cache + size_t(rows[g]) * HEAD_DIM;
    load_matrices<T, VALUES, VALUE_LOAD>(row + first_value, keys[g]);
    load_matrices<T, REST, REST_LOAD>(row + first_rest, keys[g] + VALUES * WORDS);
  }
  UNROLL for (int g = 0; g < KEY_GROUPS; g++) {
    rows[g] = row_of(table, min(first + TILE_KEYS + g * 8 + matrix_row, end - 1), block_shift, num_kv_heads, kv_head);
  }

  // scores, a row to each key: what this simdgroup's columns add to them
  UNROLL for (int r = 0; r < ROW_GROUPS; r++) {
    if (r * 8 < num_rows) {
      float2 scores[KEY_GROUPS];
      UNROLL for (int g = 0; g < KEY_GROUPS; g++) scores[g] = float2(0);
      UNROLL for (int m = 0; m < MATRICES; m++) {
        UNROLL for (int g = 0; g < KEY_GROUPS; g++) {
          multiply_accumulate(scores[g], matrix_of<T>(keys[g] + m * WORDS), matrix_of<T>(queries[r][m]));
        }
      }
      UNROLL for (int c = 0; c < 2; c++) {
        const int row = simd_index * TILE_ROWS + r * 8 + column + c;
        UNROLL for (int g = 0; g < KEY_GROUPS; g++) {
          partial_scores[row * SCORE_STRIDE + g * 8 + matrix_row] = scores[g][c];
        }
      }
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);

  // weights: each exponential once
  UNROLL for (int i = 0; i < SCORES; i++) {
    const int row = score_rows[i];
    if (row / 8 * 8 < num_rows) {  // the same for all lanes
      float score = 0;
      UNROLL for (int s = 0; s < SIMDGROUPS; s++) {
        score += partial_scores[(s * TILE_ROWS + row) * SCORE_STRIDE + score_key];
      }
      score *= scale;
      const int key = first + score_key;
      const int distance = positions[i] - key;
      const bool is_visible = key < end && distance >= 0 && distance < window;
      score = is_visible ? (SOFTCAP ? cap * precise::tanh(score) : score) : HIDDEN;
      float peak = max(peaks[i], score);
      UNROLL for (int mask = TILE_KEYS / 2; mask > 0; mask /= 2) peak = max(peak, simd_shuffle_xor(peak, mask));
      const float correction = fast::exp2(peaks[i] - peak);
      const float weight = fast::exp2(score - peak);
      totals[i] = totals[i] * correction + weight;
      peaks[i] = peak;
      weights[row * WEIGHT_STRIDE + score_key] = T(weight);
      if (score_key == 0) factors[row] = correction;
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);

  // values: this simdgroup's columns
  UNROLL for (int r = 0; r < ROW_GROUPS; r++) {
    if (r * 8 < num_rows) {
      const float correction = factors[r * 8 + matrix_row];
      UNROLL for (int j = 0; j < VALUES; j++) output[r][j] *= correction;
      UNROLL for (int g = 0; g < KEY_GROUPS; g++) {
        const threadgroup T* weight = weights + (r * 8 + matrix_row) * WEIGHT_STRIDE + g * 8 + column;
        simdgroup_matrix<T, 8, 8> of_keys = matrix_of<T>(*reinterpret_cast<const threadgroup vec<T, 2>*>(weight));
        UNROLL for (int j = 0; j < VALUES; j++) {
          multiply_accumulate(output[r][j], of_keys, matrix_of<T>(keys[g] + j * WORDS));
        }
      }
    }
  }
}

// Rows' totals, and by what the output of a row is multiplied.
threadgroup_barrier(mem_flags::mem_threadgroup);
UNROLL for (int i = 0; i < SCORES; i++) {
  const int row = score_rows[i];
  float total = totals[i];
  UNROLL for (int mask = TILE_KEYS / 2; mask > 0; mask /= 2) total += simd_shuffle_xor(total, mask);
  if (score_key == 0 && row < num_rows) {
    const int query = (first_row + row) / group;
    const int head = kv_head * group + (first_row + row) % group;
    float peak = peaks[i];
    float correction = 1;
    if (SINKS && part == 0) {
      const float sink = float(sinks[head]) * LOG2E;
      const float highest = max(peak, sink);
      correction = fast::exp2(peak - highest);
      total = total * correction + fast::exp2(sink - highest);
      peak = highest;
    }
    lse[int64_t(first_part + query * num_parts + part) * q_shape[1] + head] = total > 0 ? peak + log2(total) : LOWEST;
    factors[row] = total > 0 ? correction / total : 0;
  }
}
threadgroup_barrier(mem_flags::mem_threadgroup);
UNROLL for (int r = 0; r < ROW_GROUPS; r++) {
  const int row = r * 8 + matrix_row;
  if (row < num_rows) {
    const int query = (first_row + row) / group;
    const int head = kv_head * group + (first_row + row) % group;
    const int64_t result = int64_t(first_part + query * num_parts + part) * q_shape[1] + head;
    device T* to = out + result * VALUE_DIM + first_value;
    UNROLL for (int j = 0; j < VALUES; j += VALUE_LOAD) {
      uint words[VALUE_LOAD * WORDS];
      UNROLL for (int i = 0; i < VALUE_LOAD; i++) {
        const float2 elements = output[r][j + i] * factors[row];
        reinterpret_cast<thread vec<T, 2>&>(words[i * WORDS]) = vec<T, 2>(T(elements.x), T(elements.y));
      }
      store_words<VALUE_LOAD * WORDS>(words, reinterpret_cast<device uint*>(to + j * 8));
    }
  }
}
