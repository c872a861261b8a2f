// Attention of one new token per sequence, or of up to QUERIES, over the sequence's blocks: the body of a kernel;
// intrinsics.cuh and tiles.cuh come before it.
//
// The query heads that share a KV head are independent rows of the same products, and so are a sequence's queries: its
// rows are the pairs (query, head of the group), query by query, ROWS = QUERIES * HEADS at most.
//
// Inputs
//   q             [num_tokens, num_heads, HEAD_DIM], T
//   k_cache       [num_blocks, block_size, num_kv_heads, HEAD_DIM], T; block_size is a power of two
//   v_cache       [num_blocks, block_size, num_kv_heads, VALUE_DIM], T
//   block_tables  [num_seqs, max_blocks], int32
//   work          [num_items or more, 9], int32: a sequence, its first token, its number of queries, the position of
//                 the first of them in the context, a first and a past the last key, which part of the sequence's keys
//                 these are, of how many, where the sequence's parts begin
//   window        int32: how many keys a query sees, itself among them; looked at where QUERIES is more than 1, since
//                 one query sees all keys of its items
//   scale, cap    float: the base-2 logit of a key is q.k * scale, or cap * tanh(q.k * scale) with SOFTCAP
//   sinks         [num_heads] with SINKS, otherwise anything
//   write_done    [8], int32: not looked at; of paged_write
//   With codes k_codes, k_params, v_codes and v_params take the place of the caches: see codes.cuh.
//   The caches are contiguous, and one block of each is given, at whose address all others lie, too. Of q and
//   block_tables the last dimension is contiguous. Rows of q lie at multiples of 16 bytes.
// Outputs
//   out           [num_parts, num_heads, VALUE_DIM], T: the mean of the item's values; zeros without keys or a sink.
//                 The parts of a query lie side by side
//   lse           [num_parts, num_heads], float: the base-2 logarithm of the sum of its keys' exponentials
//   read_done     [8], int32: zeros, for the paged_write that comes next
//   Where each query has one part, `out` is the result; otherwise paged_merge joins the parts.
//
// Grid           blocks of one (item, KV head) each: [num_items, num_kv_heads]
// Block          WARPS warps, which take every WARPS-th tile of TILE_KEYS keys of the item and have nothing to do with
//                each other until their results are merged
// Warp           the scores of a tile's keys, then their values, for all rows, which are the first of 16. STAGES tiles
//                are in shared memory: one is computed, the others are under way
// Lane           key i of a tile: where it lies; a sixteen-byte piece of two or more rows at a time when they are
//                copied; of the products see tiles.cuh
//
// Must move      per sequence, KV head and visible key HEAD_DIM + VALUE_DIM elements, each once, whatever ROWS is; a
//                block id per key; per item and query HEADS * HEAD_DIM elements of q and HEADS * (VALUE_DIM + a float)
//                out. Keys outside begin .. end are not read, nor are blocks that have no others.
// Shared memory  16 rows of q; for each warp STAGES times TILE_KEYS rows of K and of V, whose place the merge reuses.
//                Codes are copied as they are, and become T in the registers of the lane that multiplies them
//
// Online softmax: Milakov and Gimelshein 2018; the split over the context: Flash-Decoding (Dao et al. 2023).

#if QUANTISED
const Codes<T, HEAD_DIM, KEY_BITS, KEY_GROUP, NUM_PARAMS> k_cache{k_codes, k_params};
const Codes<T, VALUE_DIM, VALUE_BITS, VALUE_GROUP, NUM_PARAMS> v_cache{v_codes, v_params};
const int k_cache_shape[] = {1, k_codes_shape[2], k_codes_shape[1]};
#endif

constexpr float LOG2E = 1.44269504f;
constexpr int KEY_PIECES = row_elements<T, HEAD_DIM> / Element<T>::IN_PIECE;
constexpr int KEY_STRIDE = row_stride<T, HEAD_DIM>;
#if QUANTISED
constexpr int STAGE = (k_cache.TILE_BYTES + v_cache.TILE_BYTES) / sizeof(T);  // elements
constexpr int OUTPUTS = v_cache.OUTPUTS;
static_assert(TILE_KEYS == 16, "a tile of codes has 16 rows");
#else
constexpr int VALUE_PIECES = row_elements<T, VALUE_DIM> / Element<T>::IN_PIECE;
constexpr int VALUE_STRIDE = row_stride<T, VALUE_DIM>;
constexpr int STAGE = TILE_KEYS * (KEY_STRIDE + VALUE_STRIDE);  // elements
constexpr int OUTPUTS = VALUE_DIM / 8;
#endif
constexpr int ROWS = QUERIES * HEADS;
constexpr int ROWS_OF_LANE = ROWS > 8 ? 2 : 1;                  // rows 8 to 15 may all be padding
static_assert(ROWS <= 16 && TILE_KEYS % 16 == 0 && 32 % TILE_KEYS == 0, "a warp has 16 rows, its lanes the keys");

const int thread = threadIdx.x;
const int lane = thread % 32;
const int warp = thread / 32;
const int kv_head = blockIdx.y;
const int item = blockIdx.x;
const int sequence = work[9 * item];
const int first_token = work[9 * item + 1];
const int num_rows = work[9 * item + 2] * HEADS;
const int first_position = work[9 * item + 3];
const int begin = work[9 * item + 4];
const int end = work[9 * item + 5];
const int part = work[9 * item + 6];
const int num_parts = work[9 * item + 7];
const int first_part = work[9 * item + 8];
const int num_kv_heads = k_cache_shape[2];
const int num_heads = num_kv_heads * HEADS;
const int num_tiles = (end - begin + TILE_KEYS - 1) / TILE_KEYS;
const int block_size = k_cache_shape[1];
const int block_shift = __ffs(block_size) - 1;  // a key's block is key >> block_shift
const int* table = block_tables + sequence * block_tables_strides[0];
const float logit_scale = *scale, logit_cap = *cap;
const int window_keys = *window;

extern __shared__ uint4 shared_memory[];
T* queries = reinterpret_cast<T*>(shared_memory);
T* stages = queries + 16 * KEY_STRIDE;
T* own_stages = stages + warp * STAGES * STAGE;

if (item == 0 && kv_head == 0 && thread < 8) read_done[thread] = 0;

// ---- the queries ----
for (int i = thread; i < 16 * KEY_PIECES; i += WARPS * 32) {
  const int row = i / KEY_PIECES, there = min(row, num_rows - 1);
  const T* from = q + (first_token + there / HEADS) * q_strides[0] + (kv_head * HEADS + there % HEADS) * q_strides[1];
#if QUANTISED
  copy_query_piece<T, HEAD_DIM>(queries + row * KEY_STRIDE, from, i % KEY_PIECES, row < num_rows);
#else
  copy_piece<T, HEAD_DIM>(queries + row * KEY_STRIDE, from, i % KEY_PIECES, row < num_rows);
#endif
}
end_copy_group();
wait_for_copies<0>();
__syncthreads();

// ---- this warp's tiles ----
const auto slot_in = [&](int tile) {  // where the key of this lane's number lies, -1 past the last
  const int key = begin + tile * TILE_KEYS + lane % TILE_KEYS;
  return key < end ? table[key >> block_shift] << block_shift | (key & (block_size - 1)) : -1;
};
int slot = slot_in(warp);  // of the tile that is copied next
const auto begin_copies = [&](int tile, int stage) {
  if (tile < num_tiles) {
    T* keys = own_stages + stage * STAGE;
#if QUANTISED
    const int row = ((slot >> block_shift) * num_kv_heads + kv_head) * block_size + (slot & (block_size - 1));
    unsigned char* rows = reinterpret_cast<unsigned char*>(keys);
    k_cache.begin_copies(rows, slot < 0 ? -1 : row, lane);
    v_cache.begin_copies(rows + k_cache.TILE_BYTES, slot < 0 ? -1 : row, lane);
#else
#pragma unroll 8
    for (int i = 0; i < TILE_KEYS * KEY_PIECES / 32; i++) {
      const int row = (i * 32 + lane) / KEY_PIECES, piece = (i * 32 + lane) % KEY_PIECES;
      const int from = shuffle(slot, row);
      const T* key = k_cache + (size_t(max(from, 0)) * num_kv_heads + kv_head) * HEAD_DIM;
      copy_piece<T, HEAD_DIM>(keys + row * KEY_STRIDE, key, piece, from >= 0);
    }
    T* values = keys + TILE_KEYS * KEY_STRIDE;
#pragma unroll 8
    for (int i = 0; i < TILE_KEYS * VALUE_PIECES / 32; i++) {
      const int row = (i * 32 + lane) / VALUE_PIECES, piece = (i * 32 + lane) % VALUE_PIECES;
      const int from = shuffle(slot, row);
      const T* value = v_cache + (size_t(max(from, 0)) * num_kv_heads + kv_head) * VALUE_DIM;
      copy_piece<T, VALUE_DIM>(values + row * VALUE_STRIDE, value, piece, from >= 0);
    }
#endif
    slot = slot_in(tile + WARPS);
  }
  end_copy_group();
};

Fragment output[1][OUTPUTS] = {};
Softmax softmax;
if constexpr (SINKS) {
  if (part == 0 && warp == 0) {
    UNROLL for (int r = 0; r < ROWS_OF_LANE; r++) {
      const int head = kv_head * HEADS + (lane / 4 + 8 * r) % HEADS;
      softmax.peak[r] = float(sinks[head]) * LOG2E;
      softmax.total[r] = lane % 4 == 0 ? 1.0f : 0.0f;
    }
  }
}

UNROLL for (int i = 0; i < STAGES - 1; i++) begin_copies(warp + i * WARPS, i);
int stage = 0;
for (int tile = warp; tile < num_tiles; tile += WARPS) {
  __syncwarp();
  begin_copies(tile + (STAGES - 1) * WARPS, (stage + STAGES - 1) % STAGES);
  wait_for_copies<STAGES - 1>();
  __syncwarp();
  const T* keys = own_stages + stage * STAGE;

  // scores
  Fragment scores[1][TILE_KEYS / 8] = {};
#if QUANTISED
  const unsigned char* rows = reinterpret_cast<const unsigned char*>(keys);
  const int first_key = begin + tile * TILE_KEYS;
  k_cache.add_scores(scores[0], queries, rows, first_key, lane);
#else
  Products<T>::template add_scores<HEAD_DIM, TILE_KEYS>(scores, queries, keys, lane);
#endif
  UNROLL for (int i = 0; i < TILE_KEYS / 8; i++) {
    UNROLL for (int c = 0; c < 2 * ROWS_OF_LANE; c++) {
      float logit = scores[0][i][c] * logit_scale;
      if constexpr (SOFTCAP) logit = logit_cap * tanhf(logit);
      const int key = begin + tile * TILE_KEYS + i * 8 + lane % 4 * 2 + c % 2;
      bool is_visible = key < end;
      if constexpr (QUERIES > 1) {
        const int distance = first_position + (lane / 4 + c / 2 * 8) / HEADS - key;
        is_visible = is_visible && distance >= 0 && distance < window_keys;
      }
      scores[0][i][c] = is_visible ? logit : LOWEST;
    }
  }

  // weights, each exponential once
  softmax.weigh<ROWS_OF_LANE>(scores[0], output[0]);

  // values
#if QUANTISED
  v_cache.add_values(output, scores[0], rows + k_cache.TILE_BYTES, first_key, lane);
#else
  Products<T>::template add_values<VALUE_DIM, TILE_KEYS>(output, scores, keys + TILE_KEYS * KEY_STRIDE, lane);
#endif
  stage = (stage + 1) % STAGES;
}

// ---- the merge of the warps, as a transpose through shared memory ----
float* parts = reinterpret_cast<float*>(stages);
float* peaks = parts + WARPS * ROWS * VALUE_DIM;
float* totals = peaks + WARPS * 16;
wait_for_copies<0>();
__syncthreads();
UNROLL for (int r = 0; r < ROWS_OF_LANE; r++) {
  const float total = softmax.sum(r);
  if (lane % 4 == 0) {
    peaks[warp * 16 + lane / 4 + 8 * r] = softmax.peak[r];
    totals[warp * 16 + lane / 4 + 8 * r] = total;
  }
}
__syncthreads();
const auto result_of = [&](int row) {
  return size_t(first_part + row / HEADS * num_parts + part) * num_heads + kv_head * HEADS + row % HEADS;
};
UNROLL for (int r = 0; r < ROWS_OF_LANE; r++) {
  const int row = lane / 4 + 8 * r;
  float all_peak = LOWEST;
  float all_total = 0.0f;
  UNROLL for (int w = 0; w < WARPS; w++) all_peak = fmaxf(all_peak, peaks[w * 16 + row]);
  UNROLL for (int w = 0; w < WARPS; w++) all_total += totals[w * 16 + row] * fast_exp2(peaks[w * 16 + row] - all_peak);
  const float share = all_total > 0.0f ? fast_exp2(softmax.peak[r] - all_peak) / all_total : 0.0f;
  if (row < num_rows) {
    if (warp == 0 && lane % 4 == 0) lse[result_of(row)] = all_total > 0.0f ? all_peak + log2f(all_total) : LOWEST;
    float* own = parts + (row * WARPS + warp) * VALUE_DIM;
    UNROLL for (int j = 0; j < OUTPUTS; j++) {
#if QUANTISED
      UNROLL for (int c = 0; c < 2; c++) {
        const int column = v_cache.column(j, c, lane);
        if (column < VALUE_DIM) own[column] = output[0][j][2 * r + c] * share;
      }
#else
      store_pair(own + j * 8 + lane % 4 * 2, output[0][j][2 * r] * share, output[0][j][2 * r + 1] * share);
#endif
    }
  }
}
__syncthreads();
for (int i = thread; i < num_rows * VALUE_DIM; i += WARPS * 32) {
  const float* summands = parts + i / VALUE_DIM * WARPS * VALUE_DIM + i % VALUE_DIM;
  float sum = 0.0f;
  UNROLL for (int w = 0; w < WARPS; w++) sum += summands[w * VALUE_DIM];
  out[result_of(i / VALUE_DIM) * VALUE_DIM + i % VALUE_DIM] = T(sum);
}
