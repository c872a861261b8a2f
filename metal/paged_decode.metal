// Attention of one new token per sequence, or of up to QUERIES, over the sequence's blocks: the body of a kernel;
// packed.h, and codes.h where K and V are codes, come before it.
//
// The query heads that share a KV head are independent rows of the same products, and so are a sequence's queries: its
// rows are the pairs (query, head of the group), query by query, ROWS = QUERIES * HEADS at most.
//
// Inputs
//   q             [num_tokens, num_heads, HEAD_DIM], T
//   k_cache       [num_blocks, block_size, num_kv_heads, HEAD_DIM], T; block_size is a power of two
//   v_cache       [num_blocks, block_size, num_kv_heads, VALUE_DIM], T
//                 In their place: k_codes, k_params, v_codes, v_params, as paged_write_codes has them
//   block_tables  [num_seqs, max_blocks], int32
//   work          [num_items or more, 9], int32: a sequence, its first token, its number of queries, the position of
//                 the first of them in the context, a first and a past the last key, which part of the sequence's keys
//                 these are, of how many, where the sequence's parts begin
//   window        int32: how many keys a query sees, itself among them; looked at where QUERIES is more than 1, since
//                 one query sees all keys of its items
//   scale, cap    float: the base-2 logit of a key is q.k * scale, or cap * tanh(q.k * scale) with SOFTCAP
//   sinks         [num_heads] with SINKS, otherwise anything
//   write_done    [8], int32: not looked at; of paged_write
//   The caches are contiguous, and one block of each is given, at whose address all others lie, too. Of q and
//   block_tables the last dimension is contiguous. Rows of q lie at multiples of 16 bytes.
// Outputs
//   out           [num_parts, num_heads, VALUE_DIM], T: the mean of the item's values; zeros without keys or a sink.
//                 The parts of a query lie side by side
//   lse           [num_parts, num_heads], float: the base-2 logarithm of the sum of its keys' exponentials
//   read_done     [8], int32: zeros, for the paged_write that comes next
//   Where each query has one part, `out` is the result; otherwise paged_merge joins the parts.
//
// Grid           threadgroups of one (KV head, item) each: [1, num_kv_heads, num_items]
// Threadgroup    SIMDGROUPS simdgroups, in teams of GROUPS neighbours; teams take every TEAMS-th tile of 32 keys of the
//                item, and meet only to merge. Teams of more than one are for many or long rows: see Simdgroup
// Simdgroup      the scores of a tile's 32 keys, then their values, for H = ROWS_PER_SIMDGROUP of the rows, since more
//                would not fit into registers; the same tile's for the others are its neighbours'. Lane i owns key i:
//                where it lies, which is looked up a tile ahead, its scores, its weights
// Lanes          LANES of them read one row together, WIDTH elements (up to 16 bytes) each; BATCH rows are under way
//                at once, of V the first ones before the weights are known. No load depends on a condition: lanes past
//                the end of a row or of the keys read the last of them again, for nothing. A load of codes lies in one
//                group, and rows that are under way have neighbouring keys: parameters of as many are one load of all
//                lanes. Where a lane computes with 16 bits of a row of V, two load the words of two rows for each other
// Lane           of every one of its rows: its elements of the query and of the output. What belongs to a row alone,
//                its peak and total, lies in the lane of that number
//
// Must move      per sequence, KV head and visible key HEAD_DIM + VALUE_DIM elements, each once, whatever ROWS is: what
//                the simdgroups of a team read again, GROUPS times in all, is for the core's cache to give; a block id
//                per lane and tile; per item and query HEADS * HEAD_DIM elements of q and HEADS * (VALUE_DIM + a float)
//                out. Keys outside begin .. end are not read, nor are blocks that have no others. Of codes half of these
//                bytes, or a fourth, and NUM_PARAMS elements for each KEY_GROUP, and VALUE_GROUP, of them.
//
// Online softmax: Milakov and Gimelshein 2018; the split over the context: Flash-Decoding (Dao et al. 2023).

constexpr int ROWS = QUERIES * HEADS;
constexpr int H = ROWS_PER_SIMDGROUP;
constexpr int GROUPS = (ROWS + H - 1) / H;            // of rows
constexpr int TEAMS = SIMDGROUPS / GROUPS;
constexpr int WORDS = WIDTH / Word<T>::COUNT;         // of the query, to a load
constexpr int KEY_CHUNKS = HEAD_DIM / WIDTH;          // loads in a row of K, and of V
constexpr int VALUE_CHUNKS = VALUE_DIM / WIDTH;
constexpr int KEY_LOADS = (KEY_CHUNKS + LANES - 1) / LANES;            // of one lane
constexpr int VALUE_LOADS = (VALUE_CHUNKS + LANES - 1) / LANES;
constexpr int LOADS = KEY_LOADS > VALUE_LOADS ? KEY_LOADS : VALUE_LOADS;
constexpr int OUTPUTS = VALUE_LOADS * WIDTH;          // elements of the output in a lane, of a row
constexpr int ROOM = 2048 / (SIMDGROUPS * VALUE_DIM) > 1 ? 2048 / (SIMDGROUPS * VALUE_DIM) : 1;
constexpr int MERGED = ROOM < H ? ROOM : H;           // rows of a simdgroup that are merged at once
#if QUANTISED
constexpr bool HEADS_FIRST = true;
constexpr int KEY_WORDS = WIDTH * KEY_BITS / 32;      // in a load
constexpr int SHARERS = WIDTH * VALUE_BITS == 16 ? 2 : 1;  // neighbours that compute with the codes of one load of V
constexpr int VALUE_WORDS = WIDTH * SHARERS * VALUE_BITS / 32;
static_assert(KEY_GROUP % WIDTH == 0 && VALUE_GROUP % (WIDTH * SHARERS) == 0, "a load lies in one group");
#else
constexpr bool HEADS_FIRST = false;
constexpr int KEY_WORDS = WORDS;
constexpr int SHARERS = 1;
constexpr int VALUE_WORDS = WORDS;
#endif
static_assert(SIMDGROUPS == TEAMS * GROUPS && H <= LANES && LANES % BATCH == 0, "lanes own rows and keys");

const int lane = thread_index_in_simdgroup, simd_index = simdgroup_index_in_threadgroup;
const int team = simd_index / GROUPS, group = simd_index % GROUPS;
const int column = lane % LANES;                      // this lane's place in a row
const int row_lanes = lane / LANES * LANES;           // the first lane of those it shares rows with

const int kv_head = threadgroup_position_in_grid.y, item = threadgroup_position_in_grid.z;
auto of_item = work + 9 * item;
const int sequence = of_item[0], first_token = of_item[1], num_queries = of_item[2], first_position = of_item[3];
const int begin = of_item[4], end = of_item[5];
const int part = of_item[6], num_parts = of_item[7], first_part = of_item[8];
#if QUANTISED
const int num_kv_heads = k_codes_shape[1], block_size = k_codes_shape[2];
const int place = column * (32 / LANES) + lane / LANES;  // of this lane's key in a tile
#else
const int num_kv_heads = k_cache_shape[2], block_size = k_cache_shape[1];
const int place = lane;                               // of this lane's key in a tile
#endif
const int num_heads = num_kv_heads * HEADS, num_tiles = (end - begin + 31) / 32;
const int block_shift = metal::ctz(block_size);       // a key's block is key >> block_shift
auto table = block_tables + sequence * block_tables_strides[0];

if (item == 0 && kv_head == 0 && simd_index * 32 + lane < 8) read_done[simd_index * 32 + lane] = 0;

// ---- the queries; past the last row it is that one again, and nobody asks for the result ----
const int first_row = group * H;  // of this simdgroup's
const int num_rows = num_queries * HEADS;
uint query[H * KEY_LOADS * WORDS];
UNROLL for (int g = 0; g < H; g++) {
  const int row = metal::min(first_row + g, num_rows - 1);
  const int token = first_token + row / HEADS, head = kv_head * HEADS + row % HEADS;
  const device uint* from = reinterpret_cast<const device uint*>(q + token * q_strides[0] + head * q_strides[1]);
  UNROLL for (int i = 0; i < KEY_LOADS; i++) {
    const int chunk = column + i * LANES;
    thread uint* to = query + (g * KEY_LOADS + i) * WORDS;
    UNROLL for (int w = 0; w < WORDS; w++) to[w] = 0;
    if (chunk < KEY_CHUNKS) load_words<WORDS>(from + chunk * WORDS, to);
  }
}

// ---- this team's tiles ----
#if QUANTISED
using KeyCode = Code<KEY_BITS, NUM_PARAMS>;
using ValueCode = Code<VALUE_BITS, NUM_PARAMS>;
using Factors = Params<T, NUM_PARAMS>;
const device uint* keys = k_codes;
const device uint* values = v_codes;
using KeyParams = RowParams<T, BATCH, LANES, HEAD_DIM / KEY_GROUP, NUM_PARAMS>;
using ValueParams = RowParams<T, BATCH, LANES, VALUE_DIM / VALUE_GROUP, NUM_PARAMS>;
uint params[Factors::WORDS];
uint row_params[BATCH * KEY_LOADS * Factors::WORDS];  // of the groups of this lane's loads
float query_sums[H * KEY_LOADS];  // of this lane's elements
UNROLL for (int i = 0; i < H * KEY_LOADS; i++) {
  query_sums[i] = 0.0f;
  UNROLL for (int e = 0; e < WIDTH; e++) {
    query_sums[i] += Word<T>::element(query[i * WORDS + e / Word<T>::COUNT], e % Word<T>::COUNT);
  }
}
// The group of this lane's load i.
const auto key_group = [&](int i) { return metal::min(column + i * LANES, KEY_CHUNKS - 1) * WIDTH / KEY_GROUP; };
const auto value_group = [&](int i) { return metal::min(column + i * LANES, VALUE_CHUNKS - 1) * WIDTH / VALUE_GROUP; };
#else
const device uint* keys = reinterpret_cast<const device uint*>(k_cache);
const device uint* values = reinterpret_cast<const device uint*>(v_cache);
#endif
const int last_key = metal::max(end - 1, 0);
uint next_row =
    row_of<HEADS_FIRST>(table, metal::min(begin + team * 32 + place, last_key), block_shift, num_kv_heads, kv_head);
float output[H][OUTPUTS];
UNROLL for (int g = 0; g < H; g++) {
  UNROLL for (int e = 0; e < OUTPUTS; e++) output[g][e] = 0.0f;
}
float peak = LOWEST;   // of the row of this lane's number: its greatest logit
float total = 0.0f;    // and the sum of its weights, exp2(logit - peak)
if constexpr (SINKS) {
  if (part == 0 && team == 0 && lane < H) {
    peak = float(sinks[kv_head * HEADS + (first_row + lane) % HEADS]) * M_LOG2E_F;
    total = 1.0f;
  }
}
float scores[H];
constexpr int IN_KEY = KEY_LOADS * KEY_WORDS;         // words of a row in a lane
constexpr int IN_VALUE = VALUE_LOADS * VALUE_WORDS / SHARERS;
uint words[BATCH * (IN_KEY > IN_VALUE ? IN_KEY : IN_VALUE)];
float sums[BATCH];
#if QUANTISED
constexpr int OF_CODES = sizeof(params) + sizeof(row_params) + sizeof(query_sums);
#else
constexpr int OF_CODES = 0;
#endif
static_assert(sizeof(query) + sizeof(output) + sizeof(scores) + sizeof(words) + sizeof(sums) + OF_CODES + 8 <= 96 * 4,
              "the private state of a thread is more than 96 words");

for (int tile = team; tile < num_tiles; tile += TEAMS) {
  const int key = begin + tile * 32 + place;
  const uint own_row = next_row;  // of this lane's key
  next_row = row_of<HEADS_FIRST>(table, metal::min(key + TEAMS * 32, last_key), block_shift, num_kv_heads, kv_head);

  // scores: lane i ends up with those of key i
  UNROLL for (int g = 0; g < H; g++) scores[g] = 0.0f;
  for (int batch = 0; batch < LANES / BATCH; batch++) {
    load_rows<BATCH, KEY_LOADS, LANES, KEY_WORDS, KEY_CHUNKS>(keys, own_row, row_lanes + batch * BATCH, column, words);
#if QUANTISED
    if (batch * BATCH % KeyParams::ROWS == 0) {
      KeyParams::load(k_params, own_row, row_lanes + batch * BATCH, column, params);
    }
    UNROLL for (int n = 0; n < BATCH * KEY_LOADS; n++) {
      const int row = batch * BATCH + n / KEY_LOADS;
      KeyParams::get(params, row, key_group(n % KEY_LOADS), row_lanes, row_params + n * Factors::WORDS);
    }
#endif
    UNROLL for (int g = 0; g < H; g++) {
      UNROLL for (int t = 0; t < BATCH; t++) sums[t] = 0.0f;
#if QUANTISED
      UNROLL for (int i = 0; i < KEY_LOADS; i++) {
        UNROLL for (int t = 0; t < BATCH; t++) {
          const int load = t * KEY_LOADS + i;
          const thread uint* of_query = query + (g * KEY_LOADS + i) * WORDS;
          const float product = KeyCode::template product<T, WIDTH>(of_query, words + load * KEY_WORDS);
          const float2 factors = Factors::factors(row_params + load * Factors::WORDS);
          const float rest = factors.y * query_sums[g * KEY_LOADS + i];
          sums[t] += metal::fma(factors.x, product, rest);
        }
      }
#else
      UNROLL for (int w = 0; w < KEY_LOADS * WORDS; w++) {
        UNROLL for (int e = 0; e < Word<T>::COUNT; e++) {
          const float factor = Word<T>::element(query[g * KEY_LOADS * WORDS + w], e);
          UNROLL for (int t = 0; t < BATCH; t++) {
            sums[t] = metal::fma(factor, Word<T>::element(words[t * KEY_LOADS * WORDS + w], e), sums[t]);
          }
        }
      }
#endif
      const float score = spread_sum<BATCH>(sums, LANES, lane);
      scores[g] = column / BATCH == batch ? score : scores[g];
    }
  }
  load_rows<BATCH / SHARERS, VALUE_LOADS, LANES / SHARERS, VALUE_WORDS, VALUE_CHUNKS / SHARERS, SHARERS>(
      values, own_row, row_lanes + column % SHARERS, column / SHARERS, words);
#if QUANTISED
  ValueParams::load(v_params, own_row, row_lanes, column, params);
#endif

  // weights: each exponential once
  UNROLL for (int g = 0; g < H; g++) {
    bool is_visible = key < end;
    if constexpr (QUERIES > 1) {
      const int distance = first_position + (first_row + g) / HEADS - key;
      is_visible = is_visible && distance >= 0 && distance < window;
    }
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
    UNROLL for (int e = 0; e < OUTPUTS; e++) output[g][e] *= correction;
  }

  // values
  for (int batch = 0; batch < LANES / BATCH; batch++) {
    const int first_lane = row_lanes + batch * BATCH;
    if (batch > 0) {
      load_rows<BATCH / SHARERS, VALUE_LOADS, LANES / SHARERS, VALUE_WORDS, VALUE_CHUNKS / SHARERS, SHARERS>(
          values, own_row, first_lane + column % SHARERS, column / SHARERS, words);
#if QUANTISED
      if (batch * BATCH % ValueParams::ROWS == 0) ValueParams::load(v_params, own_row, first_lane, column, params);
#endif
    }
#if QUANTISED
    if constexpr (SHARERS == 2) {
      UNROLL for (int n = 0; n < BATCH / 2 * VALUE_LOADS; n++) words[n] = exchanged(words[n], lane);
    }
#endif
    UNROLL for (int t = 0; t < BATCH; t++) {
#if QUANTISED
      float row[OUTPUTS];
      UNROLL for (int i = 0; i < VALUE_LOADS; i++) {
        uint of_group[Factors::WORDS];
        ValueParams::get(params, batch * BATCH + t, value_group(i), row_lanes, of_group);
        const float2 factors = Factors::factors(of_group);
        UNROLL for (int e = 0; e < WIDTH; e++) {
          const int code = t % SHARERS * WIDTH + e;
          const uint word = words[(t / SHARERS * VALUE_LOADS + i) * VALUE_WORDS + code / ValueCode::COUNT];
          row[i * WIDTH + e] = metal::fma(factors.x, float(ValueCode::of(word, code % ValueCode::COUNT)), factors.y);
        }
      }
#endif
      UNROLL for (int g = 0; g < H; g++) {
        const float weight = simd_shuffle(scores[g], first_lane + t);
        UNROLL for (int e = 0; e < OUTPUTS; e++) {
#if QUANTISED
          output[g][e] = metal::fma(weight, row[e], output[g][e]);
#else
          const uint word = words[t * VALUE_LOADS * WORDS + e / Word<T>::COUNT];
          output[g][e] = metal::fma(weight, Word<T>::element(word, e % Word<T>::COUNT), output[g][e]);
#endif
        }
      }
    }
  }
}

// ---- the merge of the teams, as a transpose through threadgroup memory ----
threadgroup float peaks[SIMDGROUPS * H], totals[SIMDGROUPS * H];
threadgroup float scratch[TEAMS == 1 ? 1 : MERGED * SIMDGROUPS * VALUE_DIM];
if (lane < H) {
  peaks[simd_index * H + lane] = peak;
  totals[simd_index * H + lane] = total;
}
threadgroup_barrier(mem_flags::mem_threadgroup);
float share = 0.0f;  // what this team's output counts for in the row of this lane's number
const auto result_of = [&](int row) {
  return size_t(first_part + row / HEADS * num_parts + part) * num_heads + kv_head * HEADS + row % HEADS;
};
if (lane < H) {
  float all_peak = LOWEST;
  float all_total = 0.0f;
  UNROLL for (int i = group; i < SIMDGROUPS; i += GROUPS) all_peak = metal::max(all_peak, peaks[i * H + lane]);
  UNROLL for (int i = group; i < SIMDGROUPS; i += GROUPS) {
    all_total += totals[i * H + lane] * metal::fast::exp2(peaks[i * H + lane] - all_peak);
  }
  share = all_total > 0.0f ? metal::fast::exp2(peak - all_peak) / all_total : 0.0f;
  if (team == 0 && first_row + lane < num_rows) {
    lse[result_of(first_row + lane)] = all_total > 0.0f ? all_peak + metal::precise::log2(all_total) : LOWEST;
  }
}
UNROLL for (int g = 0; g < H; g++) {
  const float factor = simd_shuffle(share, g);
  UNROLL for (int e = 0; e < OUTPUTS; e++) {
    output[g][e] *= factor;
    UNROLL for (int offset = LANES; offset < 32; offset *= 2) output[g][e] += simd_shuffle_xor(output[g][e], offset);
  }
}
if constexpr (TEAMS == 1) {
  UNROLL for (int g = 0; g < H; g++) {
    UNROLL for (int e = 0; e < OUTPUTS; e++) {
      const int chunk = column + e / WIDTH * LANES;
      if (lane < LANES && chunk < VALUE_CHUNKS && first_row + g < num_rows) {
        out[result_of(first_row + g) * VALUE_DIM + chunk * WIDTH + e % WIDTH] = static_cast<T>(output[g][e]);
      }
    }
  }
} else {
  UNROLL for (int first = 0; first < H; first += MERGED) {
    const int count = H - first < MERGED ? H - first : MERGED;
    UNROLL for (int g = 0; g < count; g++) {
      UNROLL for (int e = 0; e < OUTPUTS; e++) {
        const int chunk = column + e / WIDTH * LANES;
        if (lane < LANES && chunk < VALUE_CHUNKS) {
          scratch[(g * SIMDGROUPS + simd_index) * VALUE_DIM + chunk * WIDTH + e % WIDTH] = output[first + g][e];
        }
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (int i = simd_index * 32 + lane; i < count * GROUPS * VALUE_DIM; i += SIMDGROUPS * 32) {
      const int g = i / VALUE_DIM / GROUPS;
      const int of_group = i / VALUE_DIM % GROUPS;
      const int row = of_group * H + first + g;
      const threadgroup float* parts = scratch + (g * SIMDGROUPS + of_group) * VALUE_DIM + i % VALUE_DIM;
      float sum = 0.0f;
      UNROLL for (int t = 0; t < TEAMS; t++) sum += parts[t * GROUPS * VALUE_DIM];
      if (row < num_rows) out[result_of(row) * VALUE_DIM + i % VALUE_DIM] = static_cast<T>(sum);
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }
}
