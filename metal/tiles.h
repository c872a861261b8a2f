// Tiles of a paged cache in threadgroup memory, and their products with the rows of a simdgroup: 8x8 simdgroup
// matrices for half types, plain sums for float32; and such matrices straight from a cache. packed.h comes before it.

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

// The lane that has an element of an 8x8 matrix.
METAL_FUNC ushort lane_of(int row, int column) {
  return (row & 4) << 2 | (column & 4) << 1 | (row & 3) << 1 | (column & 2) >> 1;
}

// The 8x8 matrix of which this lane holds two elements.
template <typename T>
METAL_FUNC simdgroup_matrix<T, 8, 8> matrix_of(vec<T, 2> elements) {
  simdgroup_matrix<T, 8, 8> matrix;
  reinterpret_cast<thread vec<T, 2>&>(matrix.thread_elements()) = elements;
  return matrix;
}

template <typename T>
METAL_FUNC simdgroup_matrix<T, 8, 8> matrix_of(const thread uint* words) {
  return matrix_of<T>(*reinterpret_cast<const thread vec<T, 2>*>(words));
}

// This lane's elements of N neighbouring 8x8 matrices. Those of LOAD matrices, 4 to 16 bytes, are loaded at once from
// neighbouring places, so that columns of a matrix lie apart in memory. from: those of the first LOAD matrices.
template <typename T, int N, int LOAD>
METAL_FUNC void load_matrices(const device T* from, thread uint* words) {
  constexpr int WORDS = sizeof(T) / 2;  // of a matrix
  UNROLL for (int m = 0; m < N; m += LOAD) {
    load_words<LOAD * WORDS>(reinterpret_cast<const device uint*>(from + m * 8), words + m * WORDS);
  }
}

// This lane's elements of the transpose of a matrix; row, column: where they are in it.
template <typename T>
METAL_FUNC vec<T, 2> transposed(const thread uint* words, int row, int column) {
  vec<T, 2> elements;
  UNROLL for (int c = 0; c < 2; c++) {
    uint pair[sizeof(T) / 2];
    UNROLL for (int w = 0; w < int(sizeof(T) / 2); w++) pair[w] = simd_shuffle(words[w], lane_of(column + c, row));
    const vec<T, 2> both = *reinterpret_cast<const thread vec<T, 2>*>(pair);
    elements[c] = row % 2 == 0 ? both.x : both.y;
  }
  return elements;
}

// sum += a * b
template <typename T>
METAL_FUNC void multiply_accumulate(
    thread float2& sum, simdgroup_matrix<T, 8, 8> a, simdgroup_matrix<T, 8, 8> b) {
  simdgroup_matrix<float, 8, 8> result = matrix_of<float>(sum);
  simdgroup_multiply_accumulate(result, a, b, result);
  sum = reinterpret_cast<thread float2&>(result.thread_elements());
}

// The two products of a tile, for 8 rows. Of an 8x8 matrix a lane holds columns `column` and `column + 1` of `row`.
template <typename T>
struct Products {
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
      simdgroup_matrix<T, 8, 8> value, weight = matrix_of<T>(vec<T, 2>(T(weights[i].x), T(weights[i].y)));
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
        const float weight = simd_shuffle(k % 2 ? weights[i].y : weights[i].x, lane_of(row, k));
        const threadgroup float* value = values + (i * 8 + k) * STRIDE + column;
        UNROLL for (int j = 0; j < DIM / 8; j++) {
          output[j] += weight * *reinterpret_cast<const threadgroup float2*>(value + j * 8);
        }
      }
    }
  }
};
