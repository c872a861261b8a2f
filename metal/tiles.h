// Tiles of a paged cache in threadgroup memory, and their products with the rows of a simdgroup: 8x8 simdgroup
// matrices for half types, plain sums for float32. packed.h comes before it.

// Copies `num_keys` rows of a cache, 16 bytes per thread and turn; lane i of every simdgroup knows where row i lies. The
// tile's other rows become zeros: what lies there in the cache may be NaN, which no weight of 0 would remove.
template <typename T, int DIM, int STRIDE, int TILE_KEYS, int THREADS>
METAL_FUNC void load_keys(threadgroup T* tile, const device T* cache, uint row_of_lane, int num_keys, int thread_index) {
  constexpr int PIECE = 16 / sizeof(T);
  constexpr int PIECES = DIM / PIECE;
  for (int first = 0; first < TILE_KEYS * PIECES; first += THREADS) {  // all lanes of a simdgroup meet in the shuffle
    const int row = (first + thread_index) / PIECES, column = (first + thread_index) % PIECES * PIECE;
    const uint from = simd_shuffle(row_of_lane, ushort(min(row, TILE_KEYS - 1)));
    uint4 piece = uint4(0);
    if (row < num_keys) piece = *reinterpret_cast<const device uint4*>(cache + size_t(from) * DIM + column);
    if (row < TILE_KEYS) *reinterpret_cast<threadgroup uint4*>(tile + row * STRIDE + column) = piece;
  }
}

// The two products of a tile, for 8 rows. Of an 8x8 matrix a lane holds columns `column` and `column + 1` of `row`.
template <typename T>
struct Products {
  // sum += a * b
  static METAL_FUNC void multiply_accumulate(
      thread float2& sum, thread simdgroup_matrix<T, 8, 8>& a, thread simdgroup_matrix<T, 8, 8>& b) {
    simdgroup_matrix<float, 8, 8> result;
    reinterpret_cast<thread float2&>(result.thread_elements()) = sum;
    simdgroup_multiply_accumulate(result, a, b, result);
    sum = reinterpret_cast<thread float2&>(result.thread_elements());
  }

  // scores[KEYS / 8] += queries [8, DIM] * keys [KEYS, DIM], transposed
  template <int DIM, int KEYS, int Q_STRIDE, int STRIDE>
  static METAL_FUNC void add_scores(
      thread float2* scores, const threadgroup T* queries, const threadgroup T* keys, int, int) {
    for (int d = 0; d < DIM; d += 8) {
      simdgroup_matrix<T, 8, 8> query, key;
      simdgroup_load(query, queries + d, Q_STRIDE);
      UNROLL for (int i = 0; i < KEYS / 8; i++) {
        simdgroup_load(key, keys + i * 8 * STRIDE + d, STRIDE, ulong2(0, 0), true);
        multiply_accumulate(scores[i], query, key);
      }
    }
  }

  // output[DIM / 8] += weights [8, KEYS] * values [KEYS, DIM]
  template <int DIM, int KEYS, int STRIDE>
  static METAL_FUNC void add_values(
      thread float2* output, const thread float2* weights, const threadgroup T* values, int, int) {
    UNROLL for (int i = 0; i < KEYS / 8; i++) {
      simdgroup_matrix<T, 8, 8> weight, value;
      reinterpret_cast<thread vec<T, 2>&>(weight.thread_elements()) = vec<T, 2>(T(weights[i].x), T(weights[i].y));
      UNROLL for (int j = 0; j < DIM / 8; j++) {
        simdgroup_load(value, values + i * 8 * STRIDE + j * 8, STRIDE);
        multiply_accumulate(output[j], weight, value);
      }
    }
  }
};

template <>
struct Products<float> {
  template <int DIM, int KEYS, int Q_STRIDE, int STRIDE>
  static METAL_FUNC void add_scores(
      thread float2* scores, const threadgroup float* queries, const threadgroup float* keys, int row, int column) {
    for (int d = 0; d < DIM; d += 4) {
      const float4 query = *reinterpret_cast<const threadgroup float4*>(queries + row * Q_STRIDE + d);
      UNROLL for (int i = 0; i < KEYS / 8; i++) {
        const threadgroup float* key = keys + (i * 8 + column) * STRIDE + d;
        scores[i].x += dot(query, *reinterpret_cast<const threadgroup float4*>(key));
        scores[i].y += dot(query, *reinterpret_cast<const threadgroup float4*>(key + STRIDE));
      }
    }
  }

  template <int DIM, int KEYS, int STRIDE>
  static METAL_FUNC void add_values(
      thread float2* output, const thread float2* weights, const threadgroup float* values, int row, int column) {
    UNROLL for (int i = 0; i < KEYS / 8; i++) {
      for (int k = 0; k < 8; k++) {
        // The lane that has (row, k).
        const ushort lane = (row & 4) << 2 | (k & 4) << 1 | (row & 3) << 1 | (k & 2) >> 1;
        const float weight = simd_shuffle(k % 2 ? weights[i].y : weights[i].x, lane);
        const threadgroup float* value = values + (i * 8 + k) * STRIDE + column;
        UNROLL for (int j = 0; j < DIM / 8; j++) {
          output[j] += weight * *reinterpret_cast<const threadgroup float2*>(value + j * 8);
        }
      }
    }
  }
};
