// Attention of one new token per sequence over the sequence's blocks: the body of a kernel; packed.h comes before it.
//
// Inputs
//   q             [num_seqs, num_heads, HEAD_DIM], T
//   k_cache       [num_blocks, block_size, num_kv_heads, HEAD_DIM], T; block_size is a power of two
//   v_cache       [num_blocks, block_size, num_kv_heads, VALUE_DIM], T
//   block_tables  [num_seqs, max_blocks], int32
//   work          [num_items or more, 4], int32: a sequence, a first and a past the last key, 1 if these are its first
//   scale, cap    float: the base-2 logit of a key is q.k * scale, or cap * tanh(q.k * scale) with SOFTCAP
//   sinks         [num_heads] with SINKS, otherwise anything
//   write_done    [8], int32: not looked at; of paged_write
//   The caches are contiguous, and one block of each is given, at whose address all others lie, too. Of q and
//   block_tables the last dimension is contiguous. Rows of q lie at multiples of 16 bytes.
// Outputs
//   out           [num_items, num_heads, VALUE_DIM], T: the mean of the item's values; zeros without keys or a sink
//   lse           [num_items, num_heads], float: the base-2 logarithm of the sum of its keys' exponentials
//   read_done     [8], int32: zeros, for the paged_write that comes next
//   Where a sequence has one item each, `out` is the result; otherwise paged_merge joins the items of a sequence.
//
// Grid           threadgroups of one (KV head, item) each: [1, num_kv_heads, num_items]
// Threadgroup    SIMDGROUPS simdgroups, in teams of PARTS; teams take every TEAMS-th tile of 32 keys of the item
// Simdgroup      the scores of a tile's 32 keys, then their values, for all HEADS query heads of the KV head; lane i
//                owns key i: where it lies, which is looked up a tile ahead, its scores, its weights. No barriers,
//                except with two simdgroups to a team (PARTS == 2), where all teams make equally many rounds
// Lanes          LANES of them read one row together, WIDTH elements (up to 16 bytes) each; BATCH rows are under way
//                at once. With PARTS == 2 a row is shared by the LANES lanes of both simdgroups. No load depends on a
//                condition: lanes past the end of a row or of the keys read the last of them again, for nothing
// Lane           of every query head: its elements of the query (QUERY_IN_REGISTERS) and of the output. What belongs to
//                a head alone, its peak and total, lies in the lane of that number
//
// Must move      per sequence, KV head and visible key HEAD_DIM + VALUE_DIM elements, each once, whatever HEADS is; a
//                block id per lane and tile; per item HEADS * HEAD_DIM elements of q and HEADS * (VALUE_DIM + a float)
//                out. Keys outside begin .. end are not read, nor are blocks that have no others.
//
// Online softmax: Milakov and Gimelshein 2018; the split over the context: Flash-Decoding (Dao et al. 2023).

constexpr int TEAMS = SIMDGROUPS / PARTS;
constexpr int COLUMNS = LANES * PARTS;                // lanes that share a row
constexpr int WORDS = WIDTH / Word<T>::COUNT;         // in a load
constexpr int KEY_CHUNKS = HEAD_DIM / WIDTH;          // loads in a row of K, and of V
constexpr int VALUE_CHUNKS = VALUE_DIM / WIDTH;
constexpr int KEY_LOADS = (KEY_CHUNKS + COLUMNS - 1) / COLUMNS;        // of one lane
constexpr int VALUE_LOADS = (VALUE_CHUNKS + COLUMNS - 1) / COLUMNS;
constexpr int LOADS = KEY_LOADS > VALUE_LOADS ? KEY_LOADS : VALUE_LOADS;
constexpr int QUERY_WORDS = HEAD_DIM / Word<T>::COUNT;  // of a row of q, and of K
constexpr int VALUE_WORDS = VALUE_DIM / Word<T>::COUNT;
constexpr int MERGED_HEADS = SCRATCH / (TEAMS * VALUE_DIM) < HEADS ? SCRATCH / (TEAMS * VALUE_DIM) : HEADS;
static_assert(MERGED_HEADS > 0 && (PARTS == 1 || TEAMS * HEADS * 32 <= SCRATCH), "scratch memory is too small");
static_assert(HEADS <= 32 && LANES % BATCH == 0 && (PARTS == 1 || LANES == 32), "lanes own heads and keys");

const int lane = thread_index_in_simdgroup;
const int simd_index = simdgroup_index_in_threadgroup;
const int team = simd_index / PARTS;
const int part = simd_index % PARTS;
const int column = part * 32 + lane % LANES;          // this lane's place in a row
const int row_lanes = lane / LANES * LANES;           // the first lane of those it shares rows with

const int kv_head = threadgroup_position_in_grid.y;
const int item = threadgroup_position_in_grid.z;
const int sequence = work[4 * item];
const int begin = work[4 * item + 1];
const int end = work[4 * item + 2];
const bool is_first = work[4 * item + 3] == 1;
const int num_kv_heads = k_cache_shape[2];
const int num_heads = num_kv_heads * HEADS;
const int num_tiles = (end - begin + 31) / 32;
const int block_size = k_cache_shape[1];
const int block_shift = metal::ctz(block_size);       // a key's block is key >> block_shift
auto table = block_tables + sequence * block_tables_strides[0];

if (item == 0 && kv_head == 0 && simd_index * 32 + lane < 8) read_done[simd_index * 32 + lane] = 0;

// ---- the queries ----
const device uint* q_words = reinterpret_cast<const device uint*>(q + sequence * q_strides[0]
    + kv_head * HEADS * q_strides[1]);
const int head_stride = q_strides[1] / Word<T>::COUNT;
threadgroup uint shared_query[QUERY_IN_REGISTERS ? 1 : HEADS * QUERY_WORDS];
uint query[QUERY_IN_REGISTERS ? HEADS * KEY_LOADS * WORDS : 1];
if constexpr (QUERY_IN_REGISTERS) {
  UNROLL for (int i = 0; i < HEADS * KEY_LOADS; i++) {
    const int chunk = column + i % KEY_LOADS * COLUMNS;
    UNROLL for (int w = 0; w < WORDS; w++) query[i * WORDS + w] = 0;
    const device uint* from = q_words + i / KEY_LOADS * head_stride + chunk * WORDS;
    if (chunk < KEY_CHUNKS) load_words<WORDS>(from, query + i * WORDS);
  }
} else {
  for (int i = simd_index * 32 + lane; i < HEADS * QUERY_WORDS; i += SIMDGROUPS * 32) {
    shared_query[i] = q_words[i / QUERY_WORDS * head_stride + i % QUERY_WORDS];
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
}

// ---- this team's tiles ----
const int last_key = metal::max(end - 1, 0);
uint next_row = row_of(table, metal::min(begin + team * 32 + lane, last_key), block_shift, num_kv_heads, kv_head);
threadgroup float scratch[SCRATCH];
float output[HEADS][VALUE_LOADS * WIDTH];
UNROLL for (int g = 0; g < HEADS; g++) {
  UNROLL for (int e = 0; e < VALUE_LOADS * WIDTH; e++) output[g][e] = 0.0f;
}
float peak = LOWEST;   // of the head of this lane's number: its greatest logit
float total = 0.0f;    // and the sum of its weights, exp2(logit - peak)
if constexpr (SINKS) {
  if (is_first && team == 0 && lane < HEADS) {
    peak = float(sinks[kv_head * HEADS + lane]) * M_LOG2E_F;
    total = 1.0f;
  }
}
float scores[HEADS];
uint words[BATCH][LOADS * WORDS];
float sums[BATCH];
static_assert(sizeof(query) + sizeof(output) + sizeof(scores) + sizeof(words) + sizeof(sums) + 8 <= 96 * 4,
              "the private state of a thread is more than 96 floats");

for (int first_tile = 0; PARTS == 1 ? first_tile + team < num_tiles : first_tile < num_tiles; first_tile += TEAMS) {
  const int key = begin + (first_tile + team) * 32 + lane;
  const bool is_visible = key < end;
  const uint own_row = next_row;  // of this lane's key
  next_row = row_of(table, metal::min(key + TEAMS * 32, last_key), block_shift, num_kv_heads, kv_head);

  // scores: lane i ends up with those of key i
  UNROLL for (int g = 0; g < HEADS; g++) scores[g] = 0.0f;
  for (int batch = 0; batch < LANES / BATCH; batch++) {
    UNROLL for (int t = 0; t < BATCH; t++) {
      const uint row = simd_shuffle(own_row, row_lanes + batch * BATCH + t);
      const device uint* k = reinterpret_cast<const device uint*>(k_cache) + size_t(row) * QUERY_WORDS;
      UNROLL for (int i = 0; i < KEY_LOADS; i++) {
        load_words<WORDS>(k + metal::min(column + i * COLUMNS, KEY_CHUNKS - 1) * WORDS, words[t] + i * WORDS);
      }
    }
    UNROLL for (int g = 0; g < HEADS; g++) {
      UNROLL for (int t = 0; t < BATCH; t++) sums[t] = 0.0f;
      UNROLL for (int i = 0; i < KEY_LOADS; i++) {
        const int chunk = column + i * COLUMNS;
        if (QUERY_IN_REGISTERS || chunk < KEY_CHUNKS) {
          UNROLL for (int w = 0; w < WORDS; w++) {
            uint from_query;
            if constexpr (QUERY_IN_REGISTERS) from_query = query[(g * KEY_LOADS + i) * WORDS + w];
            else from_query = shared_query[(g * KEY_CHUNKS + chunk) * WORDS + w];
            UNROLL for (int e = 0; e < Word<T>::COUNT; e++) {
              const float factor = Word<T>::element(from_query, e);
              UNROLL for (int t = 0; t < BATCH; t++) {
                sums[t] = metal::fma(factor, Word<T>::element(words[t][i * WORDS + w], e), sums[t]);
              }
            }
          }
        }
      }
      const float score = spread_sum<BATCH>(sums, LANES, lane);
      scores[g] = lane % LANES / BATCH == batch ? score : scores[g];
    }
  }
  if constexpr (PARTS == 2) {  // the second simdgroup of a team hands over its part of the scores, and gets the sums
    threadgroup float* exchanged = scratch + team * HEADS * 32 + lane;
    UNROLL for (int g = 0; g < HEADS; g++) {
      if (part == 1) exchanged[g * 32] = scores[g];
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    UNROLL for (int g = 0; g < HEADS; g++) {
      if (part == 0) exchanged[g * 32] = scores[g] += exchanged[g * 32];
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    UNROLL for (int g = 0; g < HEADS; g++) {
      if (part == 1) scores[g] = exchanged[g * 32];
    }
  }

  // weights: each exponential once
  UNROLL for (int g = 0; g < HEADS; g++) {
    float logit = scores[g] * scale;
    if constexpr (SOFTCAP) logit = cap * metal::precise::tanh(logit);
    const float old_peak = simd_shuffle(peak, g);
    const float new_peak = metal::max(old_peak, simd_max(is_visible ? logit : LOWEST));
    const float correction = metal::fast::exp2(old_peak - new_peak);
    scores[g] = is_visible ? metal::fast::exp2(logit - new_peak) : 0.0f;
    const float sum = simd_sum(scores[g]);
    if (lane == g) {
      peak = new_peak;
      total = total * correction + sum;
    }
    UNROLL for (int e = 0; e < VALUE_LOADS * WIDTH; e++) output[g][e] *= correction;
  }

  // values
  for (int batch = 0; batch < LANES / BATCH; batch++) {
    UNROLL for (int t = 0; t < BATCH; t++) {
      const uint row = simd_shuffle(own_row, row_lanes + batch * BATCH + t);
      const device uint* v = reinterpret_cast<const device uint*>(v_cache) + size_t(row) * VALUE_WORDS;
      UNROLL for (int i = 0; i < VALUE_LOADS; i++) {
        load_words<WORDS>(v + metal::min(column + i * COLUMNS, VALUE_CHUNKS - 1) * WORDS, words[t] + i * WORDS);
      }
    }
    UNROLL for (int t = 0; t < BATCH; t++) {
      UNROLL for (int g = 0; g < HEADS; g++) {
        const float weight = simd_shuffle(scores[g], row_lanes + batch * BATCH + t);
        UNROLL for (int e = 0; e < VALUE_LOADS * WIDTH; e++) {
          const float value = Word<T>::element(words[t][e / Word<T>::COUNT], e % Word<T>::COUNT);
          output[g][e] = metal::fma(weight, value, output[g][e]);
        }
      }
    }
  }
}

// ---- the merge of the teams, as a transpose through threadgroup memory ----
threadgroup float peaks[TEAMS * HEADS];
threadgroup float totals[TEAMS * HEADS];
if (part == 0 && lane < HEADS) {
  peaks[team * HEADS + lane] = peak;
  totals[team * HEADS + lane] = total;
}
threadgroup_barrier(mem_flags::mem_threadgroup);
float share = 0.0f;  // what this team's output counts for in the head of this lane's number
if (lane < HEADS) {
  float all_peak = LOWEST;
  float all_total = 0.0f;
  UNROLL for (int i = 0; i < TEAMS; i++) all_peak = metal::max(all_peak, peaks[i * HEADS + lane]);
  UNROLL for (int i = 0; i < TEAMS; i++) {
    all_total += totals[i * HEADS + lane] * metal::fast::exp2(peaks[i * HEADS + lane] - all_peak);
  }
  share = all_total > 0.0f ? metal::fast::exp2(peak - all_peak) / all_total : 0.0f;
  if (simd_index == 0) {
    const float log_total = all_total > 0.0f ? all_peak + metal::precise::log2(all_total) : LOWEST;
    lse[size_t(item) * num_heads + kv_head * HEADS + lane] = log_total;
  }
}
UNROLL for (int g = 0; g < HEADS; g++) {
  const float factor = simd_shuffle(share, g);
  UNROLL for (int e = 0; e < VALUE_LOADS * WIDTH; e++) {
    output[g][e] *= factor;
    UNROLL for (int offset = LANES; offset < 32; offset *= 2) output[g][e] += simd_shuffle_xor(output[g][e], offset);
  }
}
UNROLL for (int first = 0; first < HEADS; first += MERGED_HEADS) {
  const int count = HEADS - first < MERGED_HEADS ? HEADS - first : MERGED_HEADS;
  if (lane < LANES) {
    UNROLL for (int g = 0; g < count; g++) {
      UNROLL for (int e = 0; e < VALUE_LOADS * WIDTH; e++) {
        const int chunk = column + e / WIDTH * COLUMNS;
        if (chunk < VALUE_CHUNKS) {
          scratch[(g * TEAMS + team) * VALUE_DIM + chunk * WIDTH + e % WIDTH] = output[first + g][e];
        }
      }
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (int i = simd_index * 32 + lane; i < count * VALUE_DIM; i += SIMDGROUPS * 32) {
    const threadgroup float* parts = scratch + i / VALUE_DIM * TEAMS * VALUE_DIM + i % VALUE_DIM;
    float sum = 0.0f;
    UNROLL for (int t = 0; t < TEAMS; t++) sum += parts[t * VALUE_DIM];
    out[(size_t(item) * num_heads + kv_head * HEADS + first) * VALUE_DIM + i] = static_cast<T>(sum);
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
}
