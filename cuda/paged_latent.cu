// Attention of long rows over a sequence's blocks, of one query or of several: the body of a kernel; intrinsics.cuh and
// tiles.cuh come before it.
//
// With VALUE_IN_KEY attention is latent: a key is a row of HEAD_DIM elements, of which the first VALUE_DIM are its value
// as well, so K and V are read at once. Without, these are heads longer than 256.
// All query heads of a KV head have the same keys: as in paged_prefill the rows of a sequence are its pairs (query,
// head), query by query, and a tile of TILE_ROWS of them reads each key once. A decode is a prompt of one query.
//
// Rows of K are long: warps share the columns of K, V and Q. Each has its columns of Q in registers, a tile of K and of V
// lies in shared memory for all of them, and what warps exchange are scores.
//
// Inputs
//   q             [num_tokens, num_heads, HEAD_DIM], T
//   k_cache       [num_blocks, block_size, num_kv_heads, HEAD_DIM], T; block_size is a power of two
//   v_cache       [num_blocks, block_size, num_kv_heads, VALUE_DIM], T, without VALUE_IN_KEY
//   block_tables  [num_seqs, max_blocks], int32
//   work          [num_items or more, 8], int32: as of paged_prefill
//   window        int32: how many keys a query sees, itself among them
//   scale, cap    float: the base-2 logit of a key is q.k * scale, or cap * tanh(q.k * scale) with SOFTCAP
//   sinks         [num_heads] with SINKS, otherwise anything
//   write_done    [8], int32: not looked at; of paged_write
//   With codes k_codes, k_params, v_codes and v_params take the place of the caches: see codes.cuh.
//   The caches are contiguous, and one block of each is given, at whose address all others lie, too. Of q and
//   block_tables the last dimension is contiguous. Rows of q lie at multiples of 16 bytes.
// Outputs
//   out           [num_parts, num_heads, VALUE_DIM], T: the mean of the values; zeros without keys. Those of a query
//                 lie side by side
//   lse           [num_parts, num_heads], float: the base-2 logarithm of the sum of the keys' exponentials
//   read_done     [8], int32: zeros, for the paged_write that comes next
//   Where each query has one part, `out` is the result; otherwise paged_merge joins the parts.
//
// Grid           blocks of one (item, KV head) each: [num_items, num_kv_heads], the last items first, since the last
//                tiles of a prompt see most keys
// Block          4 * MATRICES warps, which go through the keys together, TILE_KEYS at a time; the next ones are copied
//                meanwhile, or the values while the scores are computed and the next keys while the values are summed
// Warp           a fourth of the columns, for the products of Q with one of MATRICES parts of the keys, which are added
//                up over warps in shared memory; then its columns of the output, for MATRICES times 16 rows
// Thread         of each tile 4 scores of one row, whose weights it computes for all
// Lane           of the products see tiles.cuh
//
// Must move      per item and KV head: each key that a row of the tile sees in this part, HEAD_DIM elements, and its
//                value where it is another row, once; q and out of the rows. So for a sequence at most
//                ceil(num_queries * group / TILE_ROWS) times its K and V. Keys that no row sees are not read, nor are
//                blocks that have no others.
// Shared memory  2 times TILE_KEYS keys, or as many keys and as many values, the second also for Q at first; 4 times
//                TILE_ROWS x TILE_KEYS scores; the weights; a number per row
//
// The method: FlashAttention-2 (Dao 2023) with DeepSeek-V2's absorbed projections (2024).

#if QUANTISED
const Codes<T, HEAD_DIM, KEY_BITS, KEY_GROUP, NUM_PARAMS> k_cache{k_codes, k_params};
const Codes<T, VALUE_DIM, VALUE_BITS, VALUE_GROUP, NUM_PARAMS> v_cache{v_codes, v_params};
const int k_cache_shape[] = {1, k_codes_shape[2], k_codes_shape[1]};
#endif

constexpr float LOG2E = 1.44269504f;
constexpr int MATRICES = TILE_ROWS / 16;
constexpr int WARPS = 4 * MATRICES;
constexpr int KEY_PIECES = row_elements<T, HEAD_DIM> / Element<T>::IN_PIECE;
constexpr int KEY_STRIDE = row_stride<T, HEAD_DIM>;
constexpr int VALUE_STRIDE = VALUE_IN_KEY ? KEY_STRIDE : row_stride<T, VALUE_DIM>;
constexpr int STAGE = TILE_KEYS * (KEY_STRIDE > VALUE_STRIDE ? KEY_STRIDE : VALUE_STRIDE);  // elements
constexpr int STEPS = (row_elements<T, HEAD_DIM> / 16 + 3) / 4;  // of 16 columns of a product, of a warp
constexpr int OWN_KEYS = TILE_KEYS / MATRICES;           // of a warp's products
constexpr int PAIRS = (VALUE_DIM + 16 * WARPS - 1) / (16 * WARPS);  // of 8 columns of the output, of a warp
constexpr int SCORE_STRIDE = TILE_KEYS + 8;              // keeps rows in different memory banks, as of `weights`
static_assert(TILE_KEYS == 32 && TILE_ROWS <= 32, "8 threads have the 32 scores of a row; Q fits into a stage");

extern __shared__ uint4 shared_memory[];
T* stages = reinterpret_cast<T*>(shared_memory);
float* partial_scores = reinterpret_cast<float*>(stages + 2 * STAGE);
T* weights = reinterpret_cast<T*>(partial_scores + 4 * TILE_ROWS * SCORE_STRIDE);
float* factors = reinterpret_cast<float*>(weights + TILE_ROWS * SCORE_STRIDE);

// The item: where the sequence's queries lie, the tile's rows, and the keys of this part that the rows see.
const int kv_head = blockIdx.y;
const int item = gridDim.x - 1 - blockIdx.x;
const int sequence = work[8 * item];
const int first_token = work[8 * item + 1];
const int num_queries = work[8 * item + 2];
const int first_position = work[8 * item + 3];
const int first_row = work[8 * item + 4];
const int part = work[8 * item + 5];
const int num_parts = work[8 * item + 6];
const int first_part = work[8 * item + 7];
const int num_heads = q_shape[1];
const int num_kv_heads = k_cache_shape[2];
const int group = num_heads / num_kv_heads;
const int num_rows = min(TILE_ROWS, num_queries * group - first_row);
const int window_keys = *window;
const int first_key = max(0, first_position + first_row / group + 1 - window_keys);
const int last_key = first_position + (first_row + num_rows - 1) / group;
const int rounds = (last_key - first_key) / (TILE_KEYS * num_parts) + 1;
const int begin = first_key + part * rounds * TILE_KEYS;
const int end = min(begin + rounds * TILE_KEYS, last_key + 1);
const int block_shift = __ffs(k_cache_shape[1]) - 1;  // a key's block is key >> block_shift
const int* table = block_tables + sequence * block_tables_strides[0];
const float logit_scale = *scale, logit_cap = *cap;

const int thread = threadIdx.x;
const int lane = thread % 32;
const int warp = thread / 32;
const int quarter = warp % 4;                 // of the columns
const int own_key = warp / 4 * OWN_KEYS;      // the first of the warp's products

if (item == 0 && kv_head == 0 && thread < 8) read_done[thread] = 0;

// ---- the queries ----
T* q_tile = stages + STAGE;
for (int i = thread; i < TILE_ROWS * KEY_PIECES; i += WARPS * 32) {
  const int row = i / KEY_PIECES;
  const int from_row = first_row + min(row, num_rows - 1);
  const int head = kv_head * group + from_row % group;
  const T* from = q + (first_token + from_row / group) * q_strides[0] + head * q_strides[1];
  copy_piece<T, HEAD_DIM>(q_tile + row * KEY_STRIDE, from, i % KEY_PIECES, row < num_rows);
}
end_copy_group();
if (begin < end) {
  begin_tile_copies<T, HEAD_DIM, TILE_KEYS, WARPS * 32>(
      stages, k_cache, num_kv_heads, kv_head, table, block_shift, begin, end, thread);
} else {
  end_copy_group();
}
wait_for_copies<1>();
__syncthreads();
unsigned queries[MATRICES][STEPS][4];
UNROLL for (int m = 0; m < MATRICES; m++) {
  UNROLL for (int s = 0; s < STEPS; s++) {
    const int d = min(s * 4 + quarter, row_elements<T, HEAD_DIM> / 16 - 1) * 16;
    load_matrices(queries[m][s], q_tile + (m * 16 + lane % 16) * KEY_STRIDE + lane / 16 * 8 + d);
  }
}

// ---- the keys ----
Fragment output[MATRICES][2 * PAIRS] = {};
const int score_row = thread / 8;             // the thread's scores of a tile: 4 neighbouring keys of this row
const int score_key = thread % 8 * 4;
const int position = score_row < num_rows ? first_position + (first_row + score_row) / group : -1;
float peak = NOTHING;
float total = 0.0f;                           // of this thread's weights, relative to exp2(peak)
int stage = 0;
for (int key = begin; key < end; key += TILE_KEYS) {
  wait_for_copies<0>();
  __syncthreads();
  const T* keys = stages + stage * STAGE;
  const T* values = VALUE_IN_KEY ? keys : stages + STAGE;
  const auto begin_next_keys = [&]() {
    if (key + TILE_KEYS < end) {
      begin_tile_copies<T, HEAD_DIM, TILE_KEYS, WARPS * 32>(
          stages + stage * STAGE, k_cache, num_kv_heads, kv_head, table, block_shift, key + TILE_KEYS, end, thread);
    }
  };
  if constexpr (VALUE_IN_KEY) {
    stage = 1 - stage;
    begin_next_keys();
  } else {
    begin_tile_copies<T, VALUE_DIM, TILE_KEYS, WARPS * 32>(
        stages + STAGE, v_cache, num_kv_heads, kv_head, table, block_shift, key, end, thread);
  }

  // scores: what this warp's columns add to them
  Fragment scores[MATRICES][OWN_KEYS / 8] = {};
  const T* key_row = keys + (own_key + lane % 8 + lane / 16 * 8) * KEY_STRIDE + lane / 8 % 2 * 8;
  UNROLL for (int s = 0; s < STEPS; s++) {
    if ((s * 4 + quarter) * 16 < HEAD_DIM) {
      UNROLL for (int i = 0; i < OWN_KEYS / 16; i++) {
        unsigned of_keys[4];
        load_matrices(of_keys, key_row + i * 16 * KEY_STRIDE + (s * 4 + quarter) * 16);
        UNROLL for (int m = 0; m < MATRICES; m++) {
          multiply_accumulate(scores[m][2 * i], queries[m][s], of_keys[0], of_keys[1], T());
          multiply_accumulate(scores[m][2 * i + 1], queries[m][s], of_keys[2], of_keys[3], T());
        }
      }
    }
  }
  UNROLL for (int m = 0; m < MATRICES; m++) {
    UNROLL for (int r = 0; r < 2; r++) {
      const int row = quarter * TILE_ROWS + m * 16 + r * 8 + lane / 4;
      UNROLL for (int i = 0; i < OWN_KEYS / 8; i++) {
        store_pair(
            partial_scores + row * SCORE_STRIDE + own_key + i * 8 + lane % 4 * 2, scores[m][i][2 * r],
            scores[m][i][2 * r + 1]);
      }
    }
  }
  __syncthreads();

  // weights, each exponential once
  float logits[4] = {};
  UNROLL for (int w = 0; w < 4; w++) {
    const float4 some =
        *reinterpret_cast<const float4*>(partial_scores + (w * TILE_ROWS + score_row) * SCORE_STRIDE + score_key);
    logits[0] += some.x, logits[1] += some.y, logits[2] += some.z, logits[3] += some.w;
  }
  float new_peak = peak;
  UNROLL for (int i = 0; i < 4; i++) {
    const int distance = position - (key + score_key + i);
    const float logit = SOFTCAP ? logit_cap * tanhf(logits[i] * logit_scale) : logits[i] * logit_scale;
    logits[i] = key + score_key + i < end && distance >= 0 && distance < window_keys ? logit : LOWEST;
    new_peak = fmaxf(new_peak, logits[i]);
  }
  UNROLL for (int mask = 4; mask > 0; mask /= 2) new_peak = fmaxf(new_peak, shuffle_xor(new_peak, mask));
  const float correction = fast_exp2(peak - new_peak);
  peak = new_peak;
  total *= correction;
  UNROLL for (int i = 0; i < 4; i++) {
    logits[i] = fast_exp2(logits[i] - peak);
    total += logits[i];
  }
  store_pair(weights + score_row * SCORE_STRIDE + score_key, logits[0], logits[1]);
  store_pair(weights + score_row * SCORE_STRIDE + score_key + 2, logits[2], logits[3]);
  if (score_key == 0) factors[score_row] = correction;
  if constexpr (!VALUE_IN_KEY) wait_for_copies<0>();
  __syncthreads();
  if constexpr (!VALUE_IN_KEY) begin_next_keys();

  // values: this warp's columns
  UNROLL for (int m = 0; m < MATRICES; m++) {
    const float of_rows[2] = {factors[m * 16 + lane / 4], factors[m * 16 + lane / 4 + 8]};
    UNROLL for (int j = 0; j < 2 * PAIRS; j++) {
      UNROLL for (int c = 0; c < 4; c++) output[m][j][c] *= of_rows[c / 2];
    }
  }
  UNROLL for (int i = 0; i < TILE_KEYS / 16; i++) {
    unsigned of_keys[MATRICES][4];
    UNROLL for (int m = 0; m < MATRICES; m++) {
      load_matrices(of_keys[m], weights + (m * 16 + lane % 16) * SCORE_STRIDE + i * 16 + lane / 16 * 8);
    }
    UNROLL for (int j = 0; j < PAIRS; j++) {
      if ((j * WARPS + warp) * 16 < VALUE_DIM) {
        unsigned value[4];
        load_matrices_transposed(
            value, values + (i * 16 + lane % 16) * VALUE_STRIDE + lane / 16 * 8 + (j * WARPS + warp) * 16);
        UNROLL for (int m = 0; m < MATRICES; m++) {
          multiply_accumulate(output[m][2 * j], of_keys[m], value[0], value[1], T());
          multiply_accumulate(output[m][2 * j + 1], of_keys[m], value[2], value[3], T());
        }
      }
    }
  }
}

// ---- rows' totals, and by what the output of a row is multiplied ----
const auto result_of = [&](int row) {
  const int in_sequence = first_row + row;
  const size_t of_query = first_part + in_sequence / group * num_parts + part;
  return of_query * num_heads + kv_head * group + in_sequence % group;
};
wait_for_copies<0>();
__syncthreads();
UNROLL for (int mask = 4; mask > 0; mask /= 2) total += shuffle_xor(total, mask);
if (score_key == 0 && score_row < num_rows) {
  float correction = 1.0f;
  if (SINKS && part == 0) {
    const float sink = float(sinks[kv_head * group + (first_row + score_row) % group]) * LOG2E;
    const float highest = fmaxf(peak, sink);
    correction = fast_exp2(peak - highest);
    total = total * correction + fast_exp2(sink - highest);
    peak = highest;
  }
  lse[result_of(score_row)] = total > 0.0f ? peak + log2f(total) : LOWEST;
  factors[score_row] = total > 0.0f ? correction / total : 0.0f;
}
__syncthreads();
UNROLL for (int m = 0; m < MATRICES; m++) {
  UNROLL for (int r = 0; r < 2; r++) {
    const int row = m * 16 + r * 8 + lane / 4;
    if (row < num_rows) {
      T* to = out + result_of(row) * VALUE_DIM + lane % 4 * 2;
      UNROLL for (int j = 0; j < 2 * PAIRS; j++) {
        const int d = (j / 2 * WARPS + warp) * 16 + j % 2 * 8;
        const float factor = factors[row];
        if (d < VALUE_DIM) store_pair(to + d, output[m][j][2 * r] * factor, output[m][j][2 * r + 1] * factor);
      }
    }
  }
}
