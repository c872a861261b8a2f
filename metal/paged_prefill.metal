// Causal attention of several queries per sequence over the sequence's blocks: the body of a kernel; packed.h, codes.h
// where K and V are codes, and tiles.h come before it.
//
// The query heads that share a KV head are independent rows of the same products. So the rows of a sequence are its
// pairs (query, head of the group), query by query, and a tile of TILE_ROWS rows reads K and V once for all of them.
//
// With SHARED the queries are those of several sequences, `members`, and the keys are the first blocks that these share:
// each query sees all of them.
//
// Inputs
//   q             [num_tokens, num_heads, HEAD_DIM], T
//   k_cache       [num_blocks, block_size, num_kv_heads, HEAD_DIM], T; block_size is a power of two
//   v_cache       [num_blocks, block_size, num_kv_heads, VALUE_DIM], T
//                 In their place: k_codes, k_params, v_codes, v_params, as paged_write_codes has them
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
//   The caches are contiguous, and one block of each is given, at whose address all others lie, too. Of q and
//   block_tables the last dimension is contiguous. Rows of q lie at multiples of 16 bytes.
// Outputs
//   out           [num_parts, num_heads, VALUE_DIM], T: the mean of the values; zeros without keys. Those of a query lie
//                 side by side
//   lse           [num_parts, num_heads], float: the base-2 logarithm of the sum of the keys' exponentials
//   read_done     [8], int32: zeros, for the paged_write that comes next
//   Where each query has one part, `out` is the result; otherwise, and with SHARED, paged_merge joins the parts.
//
// Grid           threadgroups of one (KV head, item) each: [1, num_kv_heads, num_items], the last items first, since the
//                last tiles of a prompt see most keys
// Threadgroup    TILE_ROWS / 8 simdgroups, twice as many for values longer than 256, which copy TILE_KEYS keys at a time
//                into threadgroup memory, then as many values to the same place; all make equally many rounds
// Simdgroup      8 rows, whose scores, softmax and output stay in its registers. Of long values it has half of the
//                columns, as its neighbour has the others, which computes the same scores
// Lane           two neighbouring columns of one row of every 8x8 matrix; 4 lanes hold a row. Lane i knows where key i of
//                a tile lies, which is looked up a tile ahead
//
// Must move      per item and KV head: each key that a row of the tile sees in this part, HEAD_DIM + VALUE_DIM
//                elements, once; q and out of the rows. So for a sequence at most ceil(num_queries * group / TILE_ROWS)
//                times its K and V. Keys that no row sees are not read, nor are blocks that have no others.
// Threadgroup memory   TILE_ROWS rows of HEAD_DIM elements, TILE_KEYS rows of the longer dimension, 16 bytes of padding
//                per row, which keep columns of a tile in different memory banks
//
// The method: FlashAttention-2 (Dao 2023).

constexpr float LOG2E = 1.44269504f;
constexpr float HIDDEN = -FLT_MAX;   // the score of a key that a row does not see
constexpr float NOTHING = -1e30f;    // the peak of a row that has seen no key: exp2(HIDDEN - NOTHING) is 0

constexpr int HALVES = VALUE_DIM > 256 ? 2 : 1;  // of the values' columns
constexpr int COLUMNS = VALUE_DIM / HALVES;
constexpr int THREADS = TILE_ROWS * 4 * HALVES;
static_assert(COLUMNS % 8 == 0, "columns are computed eight at a time");
constexpr int ADVANCE = SHARED ? 0 : 1;  // positions from a query to the next
constexpr int PAD = 16 / sizeof(T);
constexpr int Q_STRIDE = HEAD_DIM + PAD;
constexpr int KV_STRIDE = (HEAD_DIM > VALUE_DIM ? HEAD_DIM : VALUE_DIM) + PAD;
threadgroup uint4 q_memory[TILE_ROWS * Q_STRIDE * sizeof(T) / 16];
threadgroup uint4 kv_memory[TILE_KEYS * KV_STRIDE * sizeof(T) / 16];
threadgroup T* q_tile = reinterpret_cast<threadgroup T*>(q_memory);
threadgroup T* kv_tile = reinterpret_cast<threadgroup T*>(kv_memory);

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
#if QUANTISED
const int num_kv_heads = k_codes_shape[1];
const int block_shift = metal::ctz(k_codes_shape[2]);  // a key's block is key >> block_shift
constexpr bool HEADS_FIRST = true;
#else
const int num_kv_heads = k_cache_shape[2];
const int block_shift = metal::ctz(k_cache_shape[1]);  // a key's block is key >> block_shift
constexpr bool HEADS_FIRST = false;
#endif
const int group = q_shape[1] / num_kv_heads;
const int num_rows = min(TILE_ROWS, num_queries * group - first_row);
const int first_key = SHARED ? 0 : max(0, first_position + first_row / group + 1 - window);
const int last_key = first_position + (first_row + num_rows - 1) / group * ADVANCE;
const int rounds = (last_key - first_key) / (TILE_KEYS * num_parts) + 1;
const int begin = first_key + part * rounds * TILE_KEYS;
const int end = min(begin + rounds * TILE_KEYS, last_key + 1);
auto table = block_tables + sequence * block_tables_strides[0];

// The lane: its row of the tile, and its columns of every 8x8 matrix.
const int thread_index = thread_index_in_threadgroup;
const int lane = thread_index_in_simdgroup;
const int simdgroup_row = simdgroup_index_in_threadgroup / HALVES * 8;
const int first_column = simdgroup_index_in_threadgroup % HALVES * COLUMNS;
const int matrix_row = (lane & 16) >> 2 | (lane & 6) >> 1;
const int column = (lane & 8) >> 1 | (lane & 1) << 1;
const int row = simdgroup_row + matrix_row;
const int head = kv_head * group + (first_row + row) % group;
const int query = (first_row + row) / group;
const int position = first_position + query * ADVANCE;
const int last_row = min(simdgroup_row + 8, num_rows) - 1;
const int lowest_position = first_position + (first_row + simdgroup_row) / group * ADVANCE;
const int highest_position = first_position + (first_row + last_row) / group * ADVANCE;

constexpr int PIECES = HEAD_DIM / PAD;
for (int i = thread_index; i < TILE_ROWS * PIECES; i += THREADS) {
  const int tile_row = i / PIECES, d = i % PIECES * PAD;
  uint4 piece = uint4(0);
  if (tile_row < num_rows) {
    int token = first_token + (first_row + tile_row) / group;
    if constexpr (SHARED) token = members[token];
    const int q_head = kv_head * group + (first_row + tile_row) % group;
    piece = *reinterpret_cast<const device uint4*>(q + token * q_strides[0] + q_head * q_strides[1] + d);
  }
  *reinterpret_cast<threadgroup uint4*>(q_tile + tile_row * Q_STRIDE + d) = piece;
}

if (item == 0 && kv_head == 0 && thread_index < 8) read_done[thread_index] = 0;

// Online softmax: `total` is the sum of the weights, relative to exp2(peak).
float2 output[COLUMNS / 8];
UNROLL for (int j = 0; j < COLUMNS / 8; j++) output[j] = float2(0);
float peak = NOTHING;
float total = 0;

int own_key = begin + lane % TILE_KEYS;  // of this lane, and where it lies
uint own_row = row_of<HEADS_FIRST>(table, max(min(own_key, end - 1), 0), block_shift, num_kv_heads, kv_head);
for (int key = begin; key < end; key += TILE_KEYS) {
  const int num_keys = min(TILE_KEYS, end - key);
  const bool is_seen =
      simdgroup_row < num_rows && key <= highest_position && key + TILE_KEYS > lowest_position + 1 - window;
  float2 scores[TILE_KEYS / 8];
  threadgroup_barrier(mem_flags::mem_threadgroup);
#if QUANTISED
  load_coded_keys<T, HEAD_DIM, KEY_BITS, KEY_GROUP, NUM_PARAMS, KV_STRIDE, TILE_KEYS, THREADS>(
      kv_tile, k_codes, k_params, own_row, num_keys, thread_index);
#else
  load_keys<T, HEAD_DIM, KV_STRIDE, TILE_KEYS, THREADS>(kv_tile, k_cache, own_row, num_keys, thread_index);
#endif
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (is_seen) {
    UNROLL for (int i = 0; i < TILE_KEYS / 8; i++) scores[i] = float2(0);
    Products<T>::template add_scores<HEAD_DIM, TILE_KEYS, Q_STRIDE, KV_STRIDE>(
        scores, q_tile + simdgroup_row * Q_STRIDE, kv_tile, matrix_row, column);
    UNROLL for (int i = 0; i < TILE_KEYS / 8; i++) {
      UNROLL for (int c = 0; c < 2; c++) {
        const float score = scores[i][c] * scale;
        scores[i][c] = SOFTCAP ? cap * precise::tanh(score) : score;
      }
    }
    // Where every row sees every key nothing is hidden.
    if (key + TILE_KEYS - 1 > lowest_position || key <= highest_position - window) {
      UNROLL for (int i = 0; i < TILE_KEYS / 8; i++) {
        UNROLL for (int c = 0; c < 2; c++) {
          const int distance = position - (key + i * 8 + column + c);
          if (distance < 0 || distance >= window) scores[i][c] = HIDDEN;
        }
      }
    }
    float tile_peak = peak;
    UNROLL for (int i = 0; i < TILE_KEYS / 8; i++) tile_peak = max(tile_peak, max(scores[i].x, scores[i].y));
    // The four lanes of a row differ in bits 0 and 3.
    tile_peak = max(tile_peak, simd_shuffle_xor(tile_peak, 1));
    tile_peak = max(tile_peak, simd_shuffle_xor(tile_peak, 8));
    const float correction = fast::exp2(peak - tile_peak);
    float sum = 0;
    UNROLL for (int i = 0; i < TILE_KEYS / 8; i++) {
      scores[i] = float2(fast::exp2(scores[i].x - tile_peak), fast::exp2(scores[i].y - tile_peak));
      sum += scores[i].x + scores[i].y;
    }
    sum += simd_shuffle_xor(sum, 1);
    sum += simd_shuffle_xor(sum, 8);
    total = total * correction + sum;
    peak = tile_peak;
    UNROLL for (int j = 0; j < COLUMNS / 8; j++) output[j] *= correction;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
#if QUANTISED
  load_coded_keys<T, VALUE_DIM, VALUE_BITS, VALUE_GROUP, NUM_PARAMS, KV_STRIDE, TILE_KEYS, THREADS>(
      kv_tile, v_codes, v_params, own_row, num_keys, thread_index);
#else
  load_keys<T, VALUE_DIM, KV_STRIDE, TILE_KEYS, THREADS>(kv_tile, v_cache, own_row, num_keys, thread_index);
#endif
  own_key += TILE_KEYS;
  own_row = row_of<HEADS_FIRST>(table, min(own_key, end - 1), block_shift, num_kv_heads, kv_head);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (is_seen) {
    Products<T>::template add_values<COLUMNS, TILE_KEYS, KV_STRIDE>(
        output, scores, kv_tile + first_column, matrix_row, column);
  }
}

if (row < num_rows) {
  if (SINKS && part == 0) {
    const float sink = float(sinks[head]) * LOG2E;
    const float highest = max(peak, sink);
    const float correction = fast::exp2(peak - highest);
    total = total * correction + fast::exp2(sink - highest);
    peak = highest;
    UNROLL for (int j = 0; j < COLUMNS / 8; j++) output[j] *= correction;
  }
  const int64_t result = int64_t(first_part + query * num_parts + part) * q_shape[1] + head;
  if (first_column + column == 0) lse[result] = total > 0 ? peak + log2(total) : LOWEST;
  const float factor = total > 0 ? 1 / total : 0;
  device T* to = out + result * VALUE_DIM + first_column + column;
  UNROLL for (int j = 0; j < COLUMNS / 8; j++) {
    *reinterpret_cast<device vec<T, 2>*>(to + j * 8) = vec<T, 2>(T(output[j].x * factor), T(output[j].y * factor));
  }
}
