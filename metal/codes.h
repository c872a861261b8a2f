// K and V as codes, 8 or 4 bits of a number, lowest first in words of 32: how they become numbers where they are used,
// and how they are made. packed.h comes before it. What bodies do otherwise with codes is in their `#if QUANTISED`.
//
// With two parameters to a group of neighbours in a row, a scale and a bias, a number is scale * code + bias, as
// mx.quantize has it. With one it is scale * code, and codes are E4M3: a sign, four bits of an exponent, three of a mantissa.

#define QUANTISED 1

template <int BITS, int NUM_PARAMS>
struct Code {
  static constant constexpr int COUNT = 32 / BITS;  // in a word

  // Code i of a word, so as it takes the fewest instructions for all of them: two at a time, as halves of 1024 + code,
  // or of an E4M3 over 256, whose exponent is a half's but for the first bit. Both are exact.
  static METAL_FUNC half of(uint word, int i) {
    constexpr int APART = COUNT / 2;
    const uint pair = word >> BITS * (i % APART) & (BITS == 8 ? 0x00ff00ffu : 0x000f000fu);
    const uint halves = NUM_PARAMS == 2 ? pair | 0x64006400u : (pair & 0x007f007fu) << 7 | (pair & 0x00800080u) << 8;
    return as_type<half2>(halves)[i / APART];
  }

  // The sum of products of WIDTH elements of type T, in words, with what `of` makes of as many codes.
  template <typename T, int WIDTH>
  static METAL_FUNC float product(const thread uint* elements, const thread uint* codes) {
    float sum = 0.0f;
    UNROLL for (int i = 0; i < WIDTH; i++) {
      const float element = Word<T>::element(elements[i / Word<T>::COUNT], i % Word<T>::COUNT);
      sum = metal::fma(element, float(of(codes[i / COUNT], i % COUNT)), sum);
    }
    return sum;
  }
};

// The parameters of a group, as the words that they are loaded in.
template <typename T, int NUM_PARAMS>
struct Params {
  static constant constexpr int BYTES = sizeof(T) * NUM_PARAMS;
  static constant constexpr int WORDS = BYTES > 4 ? 2 : 1;

  static METAL_FUNC void load(const device T* from, thread uint* words) {
    if constexpr (BYTES == 2) words[0] = *reinterpret_cast<const device ushort*>(from);
    else load_words<WORDS>(reinterpret_cast<const device uint*>(from), words);
  }

  // What a number is made with: x * (what `Code` makes of its code) + y.
  static METAL_FUNC float2 factors(const thread uint* words) {
    const float scale = Word<T>::element(words[0], 0);
    if constexpr (NUM_PARAMS == 1) return float2(256.0f * scale, 0.0f);
    const float bias = Word<T>::element(words[WORDS - 1], Word<T>::COUNT - 1);
    return float2(scale, metal::fma(-1024.0f, scale, bias));
  }
};

// Parameters of rows of GROUPS groups. LANES lanes that read N rows at once load those of ROWS rows together, a group
// each and a row side by side, and ask each other for those of their own groups: group g of row t is with lane
// t * ROOM + g of them.
template <typename T, int N, int LANES, int GROUPS, int NUM_PARAMS>
struct RowParams {
  static constant constexpr int ROOM = GROUPS > 8 ? 16 : GROUPS > 4 ? 8 : GROUPS > 2 ? 4 : GROUPS;
  static constant constexpr int ROWS = LANES / ROOM;
  static_assert(GROUPS <= 16 && LANES % (N * ROOM) == 0, "a load is of the parameters of some times N rows");

  static METAL_FUNC void load(const device T* params, uint own_row, int first_lane, int column, thread uint* words) {
    const size_t row = simd_shuffle(own_row, ushort(first_lane + column / ROOM));
    const int group = metal::min(column % ROOM, GROUPS - 1);
    Params<T, NUM_PARAMS>::load(params + (row * GROUPS + group) * NUM_PARAMS, words);
  }

  // Those of a group of row t. row_lanes: the first of the lanes.
  static METAL_FUNC void get(const thread uint* words, int t, int group, int row_lanes, thread uint* to) {
    const ushort from = row_lanes + t % ROWS * ROOM + group;
    UNROLL for (int w = 0; w < Params<T, NUM_PARAMS>::WORDS; w++) to[w] = simd_shuffle(words[w], from);
  }
};

// Of two neighbouring lanes each has loaded a word of a row, and computes with four of its eight codes, the first lane
// with the first four: leaves both with their codes of the first one's row, and then of the other's.
METAL_FUNC uint exchanged(uint word, int lane) {
  const bool is_second = lane % 2;
  const uint other = simd_shuffle_xor(is_second ? word : word >> 16, 1);
  return is_second ? (word & 0xffff0000u) | other : (word & 0xffffu) | other << 16;
}

// As load_keys of tiles.h, of codes, which become numbers of type T.
template <typename T, int DIM, int BITS, int GROUP, int NUM_PARAMS, int STRIDE, int TILE_KEYS, int THREADS>
METAL_FUNC void load_coded_keys(
    threadgroup T* tile, const device uint* codes, const device T* params, uint row_of_lane, int num_keys,
    int thread_index) {
  constexpr int PIECE = DIM % 16 == 0 ? 16 : 8;
  constexpr int PIECES = DIM / PIECE;
  constexpr int COUNT = Code<BITS, NUM_PARAMS>::COUNT;
  for (int first = 0; first < TILE_KEYS * PIECES; first += THREADS) {  // all lanes of a simdgroup meet in the shuffle
    const int row = (first + thread_index) / PIECES, column = (first + thread_index) % PIECES * PIECE;
    const size_t from = simd_shuffle(row_of_lane, ushort(metal::min(row, TILE_KEYS - 1)));
    uint words[PIECE / COUNT], of_group[Params<T, NUM_PARAMS>::WORDS];
    float2 factors = float2(0.0f);
    UNROLL for (int w = 0; w < PIECE / COUNT; w++) words[w] = 0;
    if (row < num_keys) {
      load_words<PIECE / COUNT>(codes + from * (DIM / COUNT) + column / COUNT, words);
      Params<T, NUM_PARAMS>::load(params + (from * (DIM / GROUP) + column / GROUP) * NUM_PARAMS, of_group);
      factors = Params<T, NUM_PARAMS>::factors(of_group);
    }
    if (row < TILE_KEYS) {
      UNROLL for (int i = 0; i < PIECE; i += 4) {
        vec<T, 4> numbers;
        UNROLL for (int e = 0; e < 4; e++) {
          const half code = Code<BITS, NUM_PARAMS>::of(words[(i + e) / COUNT], (i + e) % COUNT);
          numbers[e] = static_cast<T>(metal::fma(factors.x, float(code), factors.y));
        }
        *reinterpret_cast<threadgroup vec<T, 4>*>(tile + row * STRIDE + column + i) = numbers;
      }
    }
  }
}

// The E4M3 nearest to a number, of two the even one; the greatest for greater numbers.
METAL_FUNC uint e4m3_of(float x) {
  const uint bits = as_type<uint>(x), size = bits & 0x7fffffffu;
  uint code = (size - (120u << 23) + 0x7ffffu + (size >> 20 & 1)) >> 20;
  if (size < 121u << 23) code = as_type<uint>(as_type<float>(size) + 16384.0f) - as_type<uint>(16384.0f);  // below 2**-6
  return (size >= 543u << 21 ? 0x7eu : code) | (bits >> 31 << 7);
}

// Makes codes and parameters of a row of DIM numbers, by the lanes of a simdgroup: with two parameters those of
// mx.quantize, bit for bit, with one those of mx.to_fp8. A lane has as many neighbours as there are codes in a word.
template <typename T, int DIM, int BITS, int GROUP, int NUM_PARAMS>
METAL_FUNC void quantise_row(const device T* from, device uint* codes, device T* params, int lane) {
  constexpr int COUNT = Code<BITS, NUM_PARAMS>::COUNT;
  constexpr int TURNS = (DIM / COUNT + 31) / 32;
  float most = 0.0f;  // of the whole row
  if constexpr (NUM_PARAMS == 1) {
    for (int d = lane; d < DIM; d += 32) most = metal::max(most, metal::abs(float(from[d])));
    most = simd_max(most);
  }
  UNROLL for (int turn = 0; turn < TURNS; turn++) {
    const int word = turn * 32 + lane;
    const bool is_there = word < DIM / COUNT;
    uint loaded[COUNT / Word<T>::COUNT];
    UNROLL for (int w = 0; w < COUNT / Word<T>::COUNT; w++) loaded[w] = 0;
    if (is_there) load_words<COUNT / Word<T>::COUNT>(reinterpret_cast<const device uint*>(from + word * COUNT), loaded);
    float numbers[COUNT];
    UNROLL for (int i = 0; i < COUNT; i++) numbers[i] = Word<T>::element(loaded[i / Word<T>::COUNT], i % Word<T>::COUNT);
    float scale, bias = 0.0f;
    if constexpr (NUM_PARAMS == 1) {
      scale = float(static_cast<T>(most / 448.0f));
      scale = scale == 0.0f ? 1.0f : scale;
    } else {
      constexpr float MOST_CODE = (1 << BITS) - 1;
      float least = numbers[0];
      most = numbers[0];
      UNROLL for (int i = 1; i < COUNT; i++) least = metal::min(least, numbers[i]), most = metal::max(most, numbers[i]);
      UNROLL for (int mask = 1; mask < GROUP / COUNT; mask *= 2) {  // the lanes of a group
        least = metal::min(least, simd_shuffle_xor(least, mask));
        most = metal::max(most, simd_shuffle_xor(most, mask));
      }
      // The edge that lies further from zero has a code of its own, and so has zero.
      const bool is_least = metal::abs(least) > metal::abs(most);
      const float edge = is_least ? least : most, step = metal::max((most - least) / MOST_CODE, 1e-7f);
      scale = is_least ? step : -step;
      const float code = metal::rint(edge / scale);
      if (code != 0.0f) scale = edge / code, bias = edge;
    }
    uint packed = 0;
    UNROLL for (int i = 0; i < COUNT; i++) {
      if constexpr (NUM_PARAMS == 1) {
        packed |= e4m3_of(numbers[i] / scale) << (BITS * i);
      } else {
        const float code = metal::rint((numbers[i] - bias) / scale);
        packed |= uint(metal::min(metal::max(code, 0.0f), float((1 << BITS) - 1))) << (BITS * i);
      }
    }
    if (is_there) codes[word] = packed;
    if (is_there && word % (GROUP / COUNT) == 0) {
      device T* to = params + word / (GROUP / COUNT) * NUM_PARAMS;
      to[0] = static_cast<T>(scale);
      if constexpr (NUM_PARAMS == 2) to[1] = static_cast<T>(bias);
    }
  }
}
