// Causal attention of several queries per sequence over the sequence's blocks: the body of a kernel; intrinsics.cuh
// and tiles.cuh come before it.
//
// The query heads that share a KV head are independent rows of the same products. So the rows of a sequence are its
// pairs (query, head of the group), query by query, and a tile of TILE_ROWS rows reads K and V once for all of them.
//
// With SHARED the queries are those of several sequences, `members`, and the keys are the first blocks that these
// share: each query sees all of them.
//
// Inputs
//   q             [num_tokens, num_heads, HEAD_DIM], T
//   k_cache       [num_blocks, block_size, num_kv_heads, HEAD_DIM], T; block_size is a power of two
//   v_cache       [num_blocks, block_size, num_kv_heads, VALUE_DIM], T
//   block_tables  [num_seqs, max_blocks], int32
//   work          [num_items or more, 8], int32: a sequence, its first token, its number of queries, the position of
//                 the first of them in the context (negative: padding, gives zeros), the first row of a tile, which
//                 part of the tile's keys, of how many, where the sequence's parts begin
//                 With SHARED: one of the sequences, its place in `members`, how many members follow, the position of
//                 the last key, and the rest likewise
//   members       [num_members or more] with SHARED, int32: rows of q; otherwise anything
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
//   Where each query has one part, `out` is the result; otherwise, and with SHARED, paged_merge joins the parts.
//
// Grid           blocks of one (item, KV head) each: [num_items, num_kv_heads], the last items first, since the last
//                tiles of a prompt see most keys
// Block          WARPS warps, which copy TILE_KEYS keys and as many values at a time into shared memory: the values
//                while the scores are computed, the next keys while the values are summed; all make equally many rounds
// Warp           MATRICES times 16 rows, whose scores, softmax and output stay in its registers
// Lane           of every 16 rows two, and two neighbouring columns of 8: see tiles.cuh
//
// Must move      per item and KV head: each key that a row of the tile sees in this part, HEAD_DIM + VALUE_DIM
//                elements, once; q and out of the rows. So for a sequence at most ceil(num_queries * group / TILE_ROWS)
//                times its K and V. Keys that no row sees are not read, nor are blocks that have no others.
// Shared memory  TILE_ROWS rows of q, TILE_KEYS rows of K and of V
//
// The method: FlashAttention-2 (Dao 2023).

#if QUANTISED
const Codes<T, HEAD_DIM, KEY_BITS, KEY_GROUP, NUM_PARAMS> k_cache{k_codes, k_params};
const Codes<T, VALUE_DIM, VALUE_BITS, VALUE_GROUP, NUM_PARAMS> v_cache{v_codes, v_params};
const int k_cache_shape[] = {1, k_codes_shape[2], k_codes_shape[1]};
#endif

constexpr float LOG2E = 1.44269504f;
constexpr int WARPS = TILE_ROWS / (16 * MATRICES);
constexpr int KEY_PIECES = row_elements<T, HEAD_DIM> / Element<T>::IN_PIECE;
constexpr int KEY_STRIDE = row_stride<T, HEAD_DIM>;

extern __shared__ uint4 shared_memory[];
T* q_tile = reinterpret_cast<T*>(shared_memory);
T* key_tile = q_tile + TILE_ROWS * KEY_STRIDE;
T* value_tile = key_tile + TILE_KEYS * KEY_STRIDE;

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
const int first_key = SHARED ? 0 : max(0, first_position + first_row / group + 1 - window_keys);
const int last_key = first_position + (SHARED ? 0 : (first_row + num_rows - 1) / group);
const int rounds = (last_key - first_key) / (TILE_KEYS * num_parts) + 1;
const int begin = first_key + part * rounds * TILE_KEYS;
const int end = min(begin + rounds * TILE_KEYS, last_key + 1);
const int block_shift = __ffs(k_cache_shape[1]) - 1;  // a key's block is key >> block_shift
const int* table = block_tables + sequence * block_tables_strides[0];
const float logit_scale = *scale, logit_cap = *cap;

// The warp's rows, and the lane's: of matrix m rows lane / 4 and that + 8.
const int thread = threadIdx.x;
const int lane = thread % 32;
const int warp_row = thread / 32 * 16 * MATRICES;
const int lane_row = warp_row + lane / 4;
const auto position_of = [&](int row) { return first_position + (SHARED ? 0 : (first_row + row) / group); };
const int lowest_position = position_of(warp_row);
const int highest_position = position_of(min(warp_row + 16 * MATRICES, num_rows) - 1);

for (int i = thread; i < TILE_ROWS * KEY_PIECES; i += WARPS * 32) {
  const int row = i / KEY_PIECES;
  int token = first_token + (first_row + min(row, num_rows - 1)) / group;
  if constexpr (SHARED) token = members[token];
  const int head = kv_head * group + (first_row + min(row, num_rows - 1)) % group;
  const T* from = q + token * q_strides[0] + head * q_strides[1];
  copy_piece<T, HEAD_DIM>(q_tile + row * KEY_STRIDE, from, i % KEY_PIECES, row < num_rows);
}

if (item == 0 && kv_head == 0 && thread < 8) read_done[thread] = 0;

Fragment output[MATRICES][VALUE_DIM / 8] = {};
Softmax softmax[MATRICES];
if (begin < end) {
  begin_tile_copies<T, HEAD_DIM, TILE_KEYS, WARPS * 32>(
      key_tile, k_cache, num_kv_heads, kv_head, table, block_shift, begin, end, thread);
}
for (int key = begin; key < end; key += TILE_KEYS) {
  wait_for_copies<0>();
  __syncthreads();
  begin_tile_copies<T, VALUE_DIM, TILE_KEYS, WARPS * 32>(
      value_tile, v_cache, num_kv_heads, kv_head, table, block_shift, key, end, thread);
  Fragment scores[MATRICES][TILE_KEYS / 8] = {};
  const bool is_seen =
      warp_row < num_rows && key <= highest_position && key + TILE_KEYS > lowest_position + 1 - window_keys;
  if (is_seen) {
    Products<T>::template add_scores<HEAD_DIM, TILE_KEYS>(scores, q_tile + warp_row * KEY_STRIDE, key_tile, lane);
    UNROLL for (int m = 0; m < MATRICES; m++) {
      UNROLL for (int i = 0; i < TILE_KEYS / 8; i++) {
        UNROLL for (int c = 0; c < 4; c++) {
          const float logit = scores[m][i][c] * logit_scale;
          scores[m][i][c] = SOFTCAP ? logit_cap * tanhf(logit) : logit;
        }
      }
    }
    // Where every row sees every key nothing is hidden.
    if (key + TILE_KEYS - 1 > lowest_position || key <= highest_position - window_keys) {
      UNROLL for (int r = 0; r < 2 * MATRICES; r++) {
        const int position = position_of(lane_row + r * 8);
        UNROLL for (int i = 0; i < TILE_KEYS / 8; i++) {
          UNROLL for (int c = 0; c < 2; c++) {
            const int distance = position - (key + i * 8 + lane % 4 * 2 + c);
            if (distance < 0 || distance >= window_keys) scores[r / 2][i][r % 2 * 2 + c] = LOWEST;
          }
        }
      }
    }
    UNROLL for (int m = 0; m < MATRICES; m++) softmax[m].weigh<2>(scores[m], output[m]);
  }
  wait_for_copies<0>();
  __syncthreads();
  if (key + TILE_KEYS < end) {
    begin_tile_copies<T, HEAD_DIM, TILE_KEYS, WARPS * 32>(
        key_tile, k_cache, num_kv_heads, kv_head, table, block_shift, key + TILE_KEYS, end, thread);
  }
  if (is_seen) Products<T>::template add_values<VALUE_DIM, TILE_KEYS>(output, scores, value_tile, lane);
}

UNROLL for (int m = 0; m < MATRICES; m++) {
  UNROLL for (int r = 0; r < 2; r++) {
    const int row = lane_row + m * 16 + r * 8;
    const int query = (first_row + row) / group;
    const int head = kv_head * group + (first_row + row) % group;
    float peak = softmax[m].peak[r];
    float total = softmax[m].sum(r);
    if (row < num_rows) {
      float correction = 1.0f;
      if (SINKS && part == 0) {
        const float sink = float(sinks[head]) * LOG2E;
        const float highest = fmaxf(peak, sink);
        correction = fast_exp2(peak - highest);
        total = total * correction + fast_exp2(sink - highest);
        peak = highest;
      }
      const size_t result = size_t(first_part + query * num_parts + part) * num_heads + head;
      if (lane % 4 == 0) lse[result] = total > 0.0f ? peak + log2f(total) : LOWEST;
      const float factor = total > 0.0f ? correction / total : 0.0f;
      T* to = out + result * VALUE_DIM + lane % 4 * 2;
      UNROLL for (int j = 0; j < VALUE_DIM / 8; j++) {
        store_pair(to + j * 8, output[m][j][2 * r] * factor, output[m][j][2 * r + 1] * factor);
      }
    }
  }
}
