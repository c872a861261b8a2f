// CUDA's words in C++, for clang: what the text of a kernel uses beside cuda/intrinsics.cuh.
#pragma once

#define __global__ static
#define __device__
#define __shared__
#define __grid_constant__

// Where a call stands in the kernel's text; a default argument evaluates to its caller's place.
#define CUDASIM_SITE ((__builtin_LINE() << 8) | (__builtin_COLUMN() & 255))
// For functions whose memory accesses belong to the simulator, not to the kernel.
#define CUDASIM_UNCHECKED __attribute__((no_sanitize("thread")))
#define CUDASIM_INLINE inline __attribute__((always_inline))

using uint8_t = unsigned char;
using uint16_t = unsigned short;
using int32_t = int;
using uint32_t = unsigned;
using int64_t = long;
using uint64_t = unsigned long;
using size_t = unsigned long;

// tests/metalsim/runtime
extern "C" {
void* metalsim_buffer(int index);
uint32_t metalsim_attribute(int which, int component);
void metalsim_threadgroup_barrier(int fences, int site);
void metalsim_simdgroup_barrier(int fences, int site);
const void* metalsim_exchange(const void* data, int size, int kind, int site);
uint32_t metalsim_lane();

float exp2f(float);
float expf(float);
float fabsf(float);
float fmaf(float, float, float);
float fmaxf(float, float);
float fminf(float, float);
float log2f(float);
float logf(float);
float rintf(float);
float tanhf(float);
}

struct float2 {
  float x, y;
} __attribute__((aligned(8)));
struct float4 {
  float x, y, z, w;
} __attribute__((aligned(16)));
struct uint2 {
  unsigned x, y;
} __attribute__((aligned(8)));
struct uint4 {
  unsigned x, y, z, w;
} __attribute__((aligned(16)));
inline float2 make_float2(float x, float y) { return {x, y}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }

inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
inline unsigned min(unsigned a, unsigned b) { return a < b ? a : b; }
inline unsigned max(unsigned a, unsigned b) { return a > b ? a : b; }
inline unsigned __float_as_uint(float x) { return __builtin_bit_cast(unsigned, x); }
inline float __uint_as_float(unsigned x) { return __builtin_bit_cast(float, x); }
inline float __fdiv_rn(float x, float y) { return x / y; }
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned which) {  // byte i is that of number which[i] of x and y
  unsigned result = 0;
  for (int i = 0; i < 4; i++) result |= unsigned((uint64_t(y) << 32 | x) >> (which >> 4 * i & 7) * 8 & 255) << 8 * i;
  return result;
}
inline int __ffs(int x) { return __builtin_ffs(x); }

using __half = _Float16;

struct __nv_bfloat16 {
  uint16_t bits;
  __nv_bfloat16() = default;
  explicit __nv_bfloat16(float value) {  // to the nearest, halves to even
    unsigned word = __builtin_bit_cast(unsigned, value);
    if (value == value) word += 0x7fff + (word >> 16 & 1);
    bits = word >> 16;
  }
  operator float() const { return __builtin_bit_cast(float, (unsigned)bits << 16); }
};

// What the runtime calls attributes 1 to 5: translate.ATTRIBUTES in tests/metalsim.
template <int WHICH>
struct CudasimIndex {
  struct Component {
    int which;
    operator unsigned() const { return metalsim_attribute(WHICH, which); }
  };
  Component x{0}, y{1}, z{2};
};
constexpr CudasimIndex<1> threadIdx;
constexpr CudasimIndex<2> blockIdx;
constexpr CudasimIndex<3> blockDim;
constexpr CudasimIndex<5> gridDim;

CUDASIM_INLINE void __syncthreads(int site = CUDASIM_SITE) { metalsim_threadgroup_barrier(3, site); }
CUDASIM_INLINE void __syncwarp(int site = CUDASIM_SITE) { metalsim_simdgroup_barrier(3, site); }

namespace cooperative_groups {}

namespace mlx::core::cu {
template <class V>
struct Dimensions {
  V values[10];
  V operator[](int i) const { return values[i]; }
};
using Shape = Dimensions<int32_t>;
using Strides = Dimensions<int64_t>;

// A kernel's shape or strides, from the buffer that holds as many numbers as the array has dimensions.
template <class D>
CUDASIM_UNCHECKED D cudasim_dimensions(int index, int ndim) {
  D result;
  __builtin_memset(&result, 0x7f, sizeof result);
  __builtin_memcpy(&result, metalsim_buffer(index), sizeof result.values[0] * ndim);
  return result;
}
}  // namespace mlx::core::cu
