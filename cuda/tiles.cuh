// Tiles of a paged cache in shared memory, and what a warp computes of 16 rows with them: products on tensor cores for
// half types, plain sums for float32, and the online softmax between the two. intrinsics.cuh comes before it.
//
// A warp's matrices of 16 rows lie in its registers as columns of 8: Fragment[j] holds columns 8 * j to 8 * j + 7, of
// which a lane has columns 2 * (lane % 4) and the next one, of row lane / 4 and of the row 8 below.

[[maybe_unused]] constexpr float LOWEST = -3e38f;  // stands for minus infinity, without its arithmetic
constexpr float NOTHING = -1e30f;                  // the peak of a row without a key: exp2(LOWEST - NOTHING) is 0

using Fragment = float[4];

template <typename T>
struct Element {
  static constexpr int IN_PIECE = 16 / sizeof(T);  // of 16 bytes, in which everything is copied
  static constexpr bool IS_HALF = sizeof(T) == 2;
};

// Elements of a row that are copied: tensor cores take 16 at a time, of which 8 may be zeros.
template <typename T, int DIM>
constexpr int row_elements = Element<T>::IS_HALF ? (DIM + 15) / 16 * 16 : DIM;

// Elements from a row to the next in shared memory: 16 bytes of padding keep a column's rows in different banks.
template <typename T, int DIM>
constexpr int row_stride = row_elements<T, DIM> + Element<T>::IN_PIECE;

// Begins to copy a row's piece, counted from 0; pieces past DIM and rows that are not there become zeros: what lies
// in the cache may be NaN, which no weight of 0 would remove.
template <typename T, int DIM>
__device__ inline void copy_piece(T* row, const T* from, int piece, bool is_there) {
  const int element = piece * Element<T>::IN_PIECE;
  const bool is_in_row = is_there && element < DIM;
  copy_async(row + element, is_in_row ? from + element : from, is_in_row);
}

// Begins to copy the rows of a cache from position `first_key` on, and ends the group of copies. The tile's rows from
// position `end` on become zeros.
template <typename T, int DIM, int TILE_KEYS, int THREADS>
__device__ inline void begin_tile_copies(
    T* tile, const T* cache, int num_kv_heads, int kv_head, const int* table, int block_shift, int first_key, int end,
    int thread) {
  constexpr int PIECES = row_elements<T, DIM> / Element<T>::IN_PIECE;
  for (int i = thread; i < TILE_KEYS * PIECES; i += THREADS) {
    const int row = i / PIECES;
    const int key = min(first_key + row, end - 1);
    const int slot = table[key >> block_shift] << block_shift | (key & ((1 << block_shift) - 1));
    const T* from = cache + (size_t(slot) * num_kv_heads + kv_head) * DIM;
    copy_piece<T, DIM>(tile + row * row_stride<T, DIM>, from, i % PIECES, first_key + row < end);
  }
  end_copy_group();
}

// The products of a tile with MATRICES times 16 rows of a warp, which share what is read of the tile.
template <typename T>
struct Products {
  // scores[m] [16, KEYS] += queries [16 * m to 16 * m + 15, DIM] * keys [KEYS, DIM], transposed
  template <int DIM, int KEYS, int MATRICES>
  static __device__ inline void add_scores(
      Fragment (&scores)[MATRICES][KEYS / 8], const T* queries, const T* keys, int lane) {
    constexpr int STRIDE = row_stride<T, DIM>;
    const T* query_row = queries + lane % 16 * STRIDE + lane / 16 * 8;
    const T* key_row = keys + (lane % 8 + lane / 16 * 8) * STRIDE + lane / 8 % 2 * 8;
    UNROLL for (int d = 0; d < DIM; d += 16) {
      unsigned query[MATRICES][4];
      UNROLL for (int m = 0; m < MATRICES; m++) load_matrices(query[m], query_row + m * 16 * STRIDE + d);
      UNROLL for (int i = 0; i < KEYS / 16; i++) {
        unsigned key[4];
        load_matrices(key, key_row + i * 16 * STRIDE + d);
        UNROLL for (int m = 0; m < MATRICES; m++) {
          multiply_accumulate(scores[m][2 * i], query[m], key[0], key[1], T());
          multiply_accumulate(scores[m][2 * i + 1], query[m], key[2], key[3], T());
        }
      }
    }
  }

  // output[m] [16, DIM] += weights[m] [16, KEYS] * values [KEYS, DIM]
  template <int DIM, int KEYS, int MATRICES>
  static __device__ inline void add_values(
      Fragment (&output)[MATRICES][DIM / 8], const Fragment (&weights)[MATRICES][KEYS / 8], const T* values,
      int lane) {
    constexpr int STRIDE = row_stride<T, DIM>;
    const T* value_row = values + lane % 16 * STRIDE + lane / 16 * 8;
    UNROLL for (int i = 0; i < KEYS / 16; i++) {
      unsigned weight[MATRICES][4];
      UNROLL for (int m = 0; m < MATRICES; m++) {
        UNROLL for (int w = 0; w < 4; w++) {
          const Fragment& half = weights[m][2 * i + w / 2];
          weight[m][w] = pack(half[w % 2 * 2], half[w % 2 * 2 + 1], T());
        }
      }
      unsigned value[4];  // of two columns of output
      UNROLL for (int j = 0; j < DIM / 8; j++) {
        if (j % 2 == 0) load_matrices_transposed(value, value_row + i * 16 * STRIDE + j * 8);
        UNROLL for (int m = 0; m < MATRICES; m++) {
          multiply_accumulate(output[m][j], weight[m], value[j % 2 * 2], value[j % 2 * 2 + 1], T());
        }
      }
    }
  }
};

template <>
struct Products<float> {
  template <int DIM, int KEYS, int MATRICES>
  static __device__ inline void add_scores(
      Fragment (&scores)[MATRICES][KEYS / 8], const float* queries, const float* keys, int lane) {
    constexpr int STRIDE = row_stride<float, DIM>;
    const float* query_row = queries + lane / 4 * STRIDE;
    const float* key_row = keys + lane % 4 * 2 * STRIDE;
    for (int d = 0; d < DIM; d += 4) {
      float4 query[2 * MATRICES];
      UNROLL for (int r = 0; r < 2 * MATRICES; r++) {
        query[r] = *reinterpret_cast<const float4*>(query_row + r * 8 * STRIDE + d);
      }
      UNROLL for (int i = 0; i < KEYS / 8; i++) {
        UNROLL for (int c = 0; c < 2; c++) {
          const float4 key = *reinterpret_cast<const float4*>(key_row + (i * 8 + c) * STRIDE + d);
          UNROLL for (int r = 0; r < 2 * MATRICES; r++) {
            scores[r / 2][i][r % 2 * 2 + c] +=
                query[r].x * key.x + query[r].y * key.y + query[r].z * key.z + query[r].w * key.w;
          }
        }
      }
    }
  }

  template <int DIM, int KEYS, int MATRICES>
  static __device__ inline void add_values(
      Fragment (&output)[MATRICES][DIM / 8], const Fragment (&weights)[MATRICES][KEYS / 8], const float* values,
      int lane) {
    constexpr int STRIDE = row_stride<float, DIM>;
    UNROLL for (int i = 0; i < KEYS / 8; i++) {
      UNROLL for (int k = 0; k < 8; k++) {
        const float* value_row = values + (i * 8 + k) * STRIDE + lane % 4 * 2;
        float weight[2 * MATRICES];  // of key k in this lane's rows; another lane of the row has it
        UNROLL for (int r = 0; r < 2 * MATRICES; r++) {
          weight[r] = shuffle(weights[r / 2][i][r % 2 * 2 + k % 2], lane / 4 * 4 + k / 2);
        }
        UNROLL for (int j = 0; j < DIM / 8; j++) {
          const float2 value = *reinterpret_cast<const float2*>(value_row + j * 8);
          UNROLL for (int r = 0; r < 2 * MATRICES; r++) {
            output[r / 2][j][r % 2 * 2] += weight[r] * value.x;
            output[r / 2][j][r % 2 * 2 + 1] += weight[r] * value.y;
          }
        }
      }
    }
  }
};

// Online softmax of two rows in each lane (Milakov and Gimelshein 2018). `total` is the sum of this lane's weights,
// relative to exp2(peak); the four lanes of a row add theirs up at the end.
struct Softmax {
  float peak[2] = {NOTHING, NOTHING};
  float total[2] = {0.0f, 0.0f};

  // Turns the base-2 logits of the first ROWS of the two rows into weights, and rescales what was summed before.
  template <int ROWS, int TILES, int OUTPUTS>
  __device__ inline void weigh(Fragment (&scores)[TILES], Fragment (&output)[OUTPUTS]) {
    UNROLL for (int r = 0; r < ROWS; r++) {
      float new_peak = peak[r];
      UNROLL for (int i = 0; i < TILES; i++) new_peak = fmaxf(new_peak, fmaxf(scores[i][2 * r], scores[i][2 * r + 1]));
      new_peak = fmaxf(new_peak, shuffle_xor(new_peak, 1));
      new_peak = fmaxf(new_peak, shuffle_xor(new_peak, 2));
      const float correction = fast_exp2(peak[r] - new_peak);
      peak[r] = new_peak;
      total[r] *= correction;
      UNROLL for (int i = 0; i < TILES; i++) {
        UNROLL for (int c = 2 * r; c < 2 * r + 2; c++) {
          scores[i][c] = fast_exp2(scores[i][c] - new_peak);
          total[r] += scores[i][c];
        }
      }
      UNROLL for (int j = 0; j < OUTPUTS; j++) {
        output[j][2 * r] *= correction;
        output[j][2 * r + 1] *= correction;
      }
    }
  }

  // The row's total, in all four of its lanes.
  __device__ inline float sum(int r) const {
    const float pair = total[r] + shuffle_xor(total[r], 1);
    return pair + shuffle_xor(pair, 2);
  }
};

// Rounds two neighbouring elements and stores them at once.
template <typename T>
__device__ inline void store_pair(T* to, float first, float second) {
  if constexpr (Element<T>::IS_HALF) {
    *reinterpret_cast<unsigned*>(to) = pack(first, second, T());
  } else {
    *reinterpret_cast<float2*>(to) = make_float2(first, second);
  }
}

// Copies 16 bytes; both places are counted in pieces of so many.
template <typename T>
__device__ inline void copy_piece_now(T* to, size_t to_piece, const T* from, size_t from_piece) {
  reinterpret_cast<float4*>(to)[to_piece] = reinterpret_cast<const float4*>(from)[from_piece];
}
