// K and V as codes of 8 or 4 bits: how a warp makes them of a row's numbers, and how numbers, and products, come of them.
// intrinsics.cuh and tiles.cuh come before it. What kernels do differently with codes stands between `#if QUANTISED`.
//
// A row is the K, or the V, of a token in one head, and lies at (block * num_kv_heads + head) * block_size + offset. It
// is divided into groups, each with NUM_PARAMS parameters of type T: 2, a scale and a bias, of which a number is
// scale * code + bias; or 1, a scale, by which the code, an E4M3, is multiplied: a sign, 4 bits of exponent, 3 of
// mantissa. Codes fill a word from its lowest bits. mlx_paged/cache/codes.py does the same with MLX's operations.

#define QUANTISED 1

// Numbers that are loaded or stored at once.
template <typename T, int N>
struct alignas(N * sizeof(T) < 16 ? N * sizeof(T) : 16) Together {
  T of[N];
};

// The nearest E4M3, of two the even one, and 448 for all that is larger. Its bits.
__device__ inline unsigned e4m3_of(float number) {
  const unsigned bits = __float_as_uint(number), sign = bits >> 24 & 0x80, magnitude = bits & 0x7fffffff;
  unsigned code = 0x7e;
  if (fabsf(number) < 0x1p-6f) {
    code = unsigned(rintf(fabsf(number) * 0x1p9f));  // these are all 2**-9 apart
  } else if (fabsf(number) < 448.0f) {
    code = ((magnitude + 0x7ffff + (magnitude >> 20 & 1)) >> 20) - (120 << 3);
  }
  return sign | code;
}

// How a cache of rows is stored, and where.
template <typename T, int DIM, int BITS, int GROUP, int NUM_PARAMS>
struct Codes {
  const unsigned* codes;  // [num_blocks, num_kv_heads, block_size, DIM * BITS / 32]
  const T* params;        // [num_blocks, num_kv_heads, block_size, DIM / GROUP, NUM_PARAMS]

  static constexpr int BYTES = DIM * BITS / 8;  // of a row's codes
  static constexpr int PARAMS = DIM / GROUP * NUM_PARAMS;

  // ---- a row is written, by a warp ----

  // A word of codes is a lane's, and a group that of neighbours. to_codes, to_params: the cache's.
  static __device__ inline void write(const T* numbers, unsigned* to_codes, T* to_params, size_t row, int lane) {
    constexpr int IN_WORD = 32 / BITS, WORDS = BYTES / 4, ROUNDS = (WORDS + 31) / 32, LANES = GROUP / IN_WORD;
    constexpr float LAST = (1 << BITS) - 1;
    float number[ROUNDS][IN_WORD];
    float largest = 0.0f;
    UNROLL for (int i = 0; i < ROUNDS; i++) {  // lanes past the end repeat the last word
      const auto some = reinterpret_cast<const Together<T, IN_WORD>*>(numbers)[min(i * 32 + lane, WORDS - 1)];
      UNROLL for (int k = 0; k < IN_WORD; k++) {
        number[i][k] = float(some.of[k]);
        largest = fmaxf(largest, fabsf(number[i][k]));
      }
    }
    T* row_params = to_params + row * PARAMS;
    float scale = 1.0f;
    if constexpr (NUM_PARAMS == 1) {
      UNROLL for (int mask = 16; mask > 0; mask /= 2) largest = fmaxf(largest, shuffle_xor(largest, mask));
      const T rounded = T(__fdiv_rn(largest, 448.0f));
      if (float(rounded) != 0.0f) scale = float(rounded);
      if (lane == 0) row_params[0] = T(scale);
    }
    UNROLL for (int i = 0; i < ROUNDS; i++) {
      const int word = i * 32 + lane;
      float bias = 0.0f;
      if constexpr (NUM_PARAMS == 2) {
        float low = number[i][0], high = low;
        UNROLL for (int k = 1; k < IN_WORD; k++) low = fminf(low, number[i][k]), high = fmaxf(high, number[i][k]);
        UNROLL for (int mask = LANES / 2; mask > 0; mask /= 2) {
          low = fminf(low, shuffle_xor(low, mask));
          high = fmaxf(high, shuffle_xor(high, mask));
        }
        // The edge that is farther from 0 is code 0, or if that is 0 exactly, so is 0; codes are made before the
        // parameters are rounded.
        const bool is_low = fabsf(low) > fabsf(high);
        const float edge = is_low ? low : high;
        scale = fmaxf(__fdiv_rn(high - low, LAST), 1e-7f);
        if (!is_low) scale = -scale;
        const float steps = rintf(__fdiv_rn(edge, scale));
        if (steps != 0.0f) {
          scale = __fdiv_rn(edge, steps);
          bias = edge;
        }
        if (word < WORDS && lane % LANES == 0) store_pair(row_params + word / LANES * 2, scale, bias);
      }
      unsigned all = 0;
      UNROLL for (int k = 0; k < IN_WORD; k++) {
        const float steps = __fdiv_rn(number[i][k] - bias, scale);
        all |= (NUM_PARAMS == 1 ? e4m3_of(steps) : unsigned(fminf(fmaxf(rintf(steps), 0.0f), LAST))) << BITS * k;
      }
      if (word < WORDS) to_codes[row * WORDS + word] = all;
    }
  }

  // ---- numbers ----

  // Four neighbouring codes, the first in the lowest bits. row: of a multiple of BYTES; column: a multiple of 4.
  static __device__ inline unsigned four_codes(const void* row, int column) {
    if constexpr (BITS == 8) return static_cast<const unsigned*>(row)[column / 4];
    return static_cast<const unsigned short*>(row)[column / 4];
  }

  // The scale and the bias of a row's group.
  static __device__ inline float2 params_of(const T* row_params, int group) {
    if constexpr (NUM_PARAMS == 1) return make_float2(float(row_params[0]), 0.0f);
    const auto pair = reinterpret_cast<const Together<T, 2>*>(row_params)[group];
    return make_float2(float(pair.of[0]), float(pair.of[1]));
  }

  // The number of code i of four.
  static __device__ inline float number_of(unsigned four, int i, float2 param) {
    if constexpr (NUM_PARAMS == 1) {  // sign and bits where a float has them, whose exponents count from 120 lower
      const int bits = int(four << (24 - 8 * i)) >> 4 & 0x87f00000;
      return __uint_as_float(bits) * 0x1p120f * param.x;
    } else {  // in the last bits of a float they count ones
      const unsigned bits =
          BITS == 8 ? __byte_perm(four, 0x4b000000, 0x7440 + i) : 0x4b000000 | (four >> 4 * i & 15);
      return fmaf(param.x, __uint_as_float(bits) - 0x1p23f, param.y);
    }
  }

  // ---- a tile of 16 rows, in shared memory as codes ----
  // Rows of codes, 16 times an odd number of bytes apart so that 8 of them lie in different banks, and their parameters.

  static constexpr bool IS_HALF = Element<T>::IS_HALF;
  static constexpr int STEPS = (DIM + 15) / 16;
  static constexpr int PIECE = BYTES % 16 == 0 ? 16 : 8;  // bytes that are copied at once
  static constexpr int ROW_BYTES = (BYTES + 15) / 16 * 16;
  static constexpr int STRIDE = (ROW_BYTES / 16 | 1) * 16;
  // At least 4 bytes are copied: of single scales of 16 bits the neighbour's as well, of a pair within the block.
  static constexpr bool IN_PAIRS = PARAMS * sizeof(T) < 4;
  static constexpr int PARAM_BYTES = IN_PAIRS ? 4 : PARAMS * sizeof(T);
  static constexpr int TILE_BYTES = 16 * (STRIDE + PARAM_BYTES);
  static constexpr int OUTPUTS = (DIM + 31) / 32 * 4;  // of 8 columns

  // row: of the key of number lane % 16, or -1, and zeros come of it.
  __device__ inline void begin_copies(unsigned char* tile, int row, int lane) const {
    begin_copies_of<PIECE, BYTES, ROW_BYTES, STRIDE>(tile, codes, row, lane);
    begin_copies_of<4, PARAM_BYTES, PARAM_BYTES, PARAM_BYTES>(
        tile + 16 * STRIDE, params, IN_PAIRS ? row >> 1 : row, lane);
  }

  // Of a row there are BYTES_THERE bytes; up to BYTES_COPIED follow zeros.
  template <int BYTES_AT_ONCE, int BYTES_THERE, int BYTES_COPIED, int BYTES_BETWEEN>
  static __device__ inline void begin_copies_of(unsigned char* to, const void* from, int row, int lane) {
    constexpr int PIECES = BYTES_COPIED / BYTES_AT_ONCE, ALL = 16 * PIECES;
#pragma unroll 4
    for (int i = 0; i < (ALL + 31) / 32; i++) {
      const int to_row = min((i * 32 + lane) / PIECES, 15), at = (i * 32 + lane) % PIECES * BYTES_AT_ONCE;
      const int from_row = shuffle(row, to_row);
      const bool is_there = from_row >= 0 && at < BYTES_THERE;
      const char* piece = static_cast<const char*>(from) + (is_there ? size_t(from_row) * BYTES_THERE + at : 0);
      if (ALL % 32 == 0 || i * 32 + lane < ALL) {
        copy_async<BYTES_AT_ONCE>(to + to_row * BYTES_BETWEEN + at, piece, is_there);
      }
    }
  }

  // first_key: the position of the tile's first key.
  static __device__ inline float2 tile_params(const unsigned char* tile, int row, int first_key, int group) {
    const T* row_params = reinterpret_cast<const T*>(tile + 16 * STRIDE + row * PARAM_BYTES);
    return params_of(row_params + (IN_PAIRS ? (first_key + row) % 2 : 0), group);
  }

  // scores [16, 16] += queries [16, DIM] * keys [16, DIM], transposed. A lane's four codes of a row in 16 columns are
  // neighbours: queries of half types lie as copy_query_piece has put them.
  static __device__ inline void add_scores(
      Fragment (&scores)[2], const T* queries, const unsigned char* tile, int first_key, int lane) {
    constexpr int QUERY_STRIDE = row_stride<T, DIM>;
    if constexpr (IS_HALF) {
      static_assert(BITS == 8, "of keys");
      const T* query_row = queries + lane % 16 * QUERY_STRIDE + lane / 16 * 8;
      float2 param[2];
      unsigned four[4];  // of this and the next 16 columns of two keys
      UNROLL for (int s = 0; s < STEPS; s++) {
        if (s % 2 == 0) load_matrices(four, tile + lane % 16 * STRIDE + min(s + lane / 16, STEPS - 1) * 16);
        unsigned query[4];
        load_matrices(query, query_row + s * 16);
        UNROLL for (int i = 0; i < 2; i++) {
          if (s * 16 % GROUP == 0) param[i] = tile_params(tile, lane / 4 + 8 * i, first_key, s * 16 / GROUP);
          float key[4];
          UNROLL for (int k = 0; k < 4; k++) key[k] = number_of(four[s % 2 * 2 + i], k, param[i]);
          multiply_accumulate(scores[i], query, pack(key[0], key[1], T()), pack(key[2], key[3], T()), T());
        }
      }
    } else {
      for (int d = 0; d < DIM; d += 4) {
        UNROLL for (int c = 0; c < 4; c++) {
          const int row = c / 2 * 8 + lane % 4 * 2 + c % 2;
          const unsigned four = four_codes(tile + row * STRIDE, d);
          const float2 param = tile_params(tile, row, first_key, d / GROUP);
          UNROLL for (int k = 0; k < 4; k++) {
            const float key = number_of(four, k, param);
            UNROLL for (int r = 0; r < 2; r++) {
              scores[c / 2][2 * r + c % 2] += queries[(lane / 4 + 8 * r) * QUERY_STRIDE + d + k] * key;
            }
          }
        }
      }
    }
  }

  // output [16, DIM] += weights [16, 16] * values [16, DIM]. A lane's codes of 32 columns of a row are 4 neighbours, and
  // so the output's columns lie elsewhere than in tiles.cuh: see `column`.
  static __device__ inline void add_values(
      Fragment (&output)[1][OUTPUTS], const Fragment (&weights)[2], const unsigned char* tile, int first_key,
      int lane) {
    if constexpr (IS_HALF) {
      unsigned weight[4];
      UNROLL for (int w = 0; w < 4; w++) {
        weight[w] = pack(weights[w / 2][w % 2 * 2], weights[w / 2][w % 2 * 2 + 1], T());
      }
      const int first = lane % 4 * 2;  // of the lane's four rows
      float2 param[4];
      UNROLL for (int j = 0; j < OUTPUTS; j += 4) {
        unsigned four[4];
        UNROLL for (int k = 0; k < 4; k++) {
          const int row = first + k / 2 * 8 + k % 2, column = j * 8 + lane / 4 * 4;
          if (j * 8 % GROUP == 0) param[k] = tile_params(tile, row, first_key, j * 8 / GROUP);
          four[k] = j * 8 + 32 <= DIM || column < DIM ? four_codes(tile + row * STRIDE, column) : 0;
        }
        UNROLL for (int i = 0; i < 4; i++) {
          float value[4];
          UNROLL for (int k = 0; k < 4; k++) value[k] = number_of(four[k], i, param[k]);
          multiply_accumulate(
              output[0][j + i], weight, pack(value[0], value[1], T()), pack(value[2], value[3], T()), T());
        }
      }
    } else {
      UNROLL for (int half = 0; half < 2; half++) {
#pragma unroll 1
        for (int pair = 0; pair < 4; pair++) {  // of keys, whose weights another lane of the row has
          UNROLL for (int k = 0; k < 2; k++) {
            const int row = half * 8 + pair * 2 + k;
            float weight[2];  // in this lane's rows
            UNROLL for (int r = 0; r < 2; r++) weight[r] = shuffle(weights[half][2 * r + k], lane / 4 * 4 + pair);
            UNROLL for (int j = 0; j < OUTPUTS; j += 4) {
              const float2 param = tile_params(tile, row, first_key, j * 8 / GROUP);
              UNROLL for (int c = 0; c < 2; c++) {
                if (column(j, c, lane) < DIM) {
                  const unsigned four = four_codes(tile + row * STRIDE, column(j, c, lane));
                  UNROLL for (int i = 0; i < 4; i++) {
                    const float value = number_of(four, i, param);
                    UNROLL for (int r = 0; r < 2; r++) output[0][j + i][2 * r + c] += weight[r] * value;
                  }
                }
              }
            }
          }
        }
      }
    }
  }

  // Which column of the output a lane has in elements c and 2 + c of its j-th fragment.
  static __device__ inline int column(int j, int c, int lane) { return j / 4 * 32 + (lane % 4 * 2 + c) * 4 + j % 4; }
};

// As copy_piece. Of half types words of every 16 columns, w0 to w7, come as w0 w2 w4 w6 w1 w3 w5 w7: so a lane that has
// columns 2 * (lane % 4), the next one and those 8 further in a matrix has four neighbours.
template <typename T, int DIM>
__device__ inline void copy_query_piece(T* row, const T* from, int piece, bool is_there) {
  if constexpr (Element<T>::IS_HALF) {
    const bool is_in_row = is_there && piece * 8 < DIM;
    const auto words = reinterpret_cast<const unsigned*>(is_in_row ? from + piece * 8 : from);
    const auto to = reinterpret_cast<unsigned*>(row) + piece / 2 * 8 + piece % 2 * 2;
    UNROLL for (int w = 0; w < 4; w++) copy_async<4>(to + w % 2 * 4 + w / 2, words + w, is_in_row);
  } else {
    copy_piece<T, DIM>(row, from, piece, is_there);
  }
}

// The same as of a cache of numbers, but they are there at the next barrier, rounded to T.
template <typename T, int DIM, int TILE_KEYS, int THREADS, int BITS, int GROUP, int NUM_PARAMS>
__device__ inline void begin_tile_copies(
    T* tile, Codes<T, DIM, BITS, GROUP, NUM_PARAMS> cache, int num_kv_heads, int kv_head, const int* table,
    int block_shift, int first_key, int end, int thread) {
  constexpr int IN_PIECE = Element<T>::IN_PIECE, PIECES = row_elements<T, DIM> / IN_PIECE;
  using Piece = Together<unsigned char, IN_PIECE * BITS / 8>;
  for (int i = thread; i < TILE_KEYS * PIECES; i += THREADS) {
    const int row = i / PIECES, element = i % PIECES * IN_PIECE;
    const int key = min(first_key + row, end - 1);
    const size_t head = size_t(table[key >> block_shift]) * num_kv_heads + kv_head;
    const size_t from = head << block_shift | (key & ((1 << block_shift) - 1));
    Together<T, IN_PIECE> numbers = {};
    if (first_key + row < end && element < DIM) {
      const auto codes = reinterpret_cast<const unsigned char*>(cache.codes) + from * cache.BYTES + element * BITS / 8;
      const Piece piece = *reinterpret_cast<const Piece*>(codes);
      const float2 param = cache.params_of(cache.params + from * cache.PARAMS, element / GROUP);
      UNROLL for (int k = 0; k < IN_PIECE; k += 2) {
        const unsigned four = cache.four_codes(piece.of, k / 4 * 4);
        store_pair(numbers.of + k, cache.number_of(four, k % 4, param), cache.number_of(four, k % 4 + 1, param));
      }
    }
    *reinterpret_cast<Together<T, IN_PIECE>*>(tile + row * row_stride<T, DIM> + element) = numbers;
  }
  end_copy_group();
}
