// What a kernel asks of the machine and C++ has no word for: copies that run by themselves, matrix products of a warp,
// sums over lanes. Nothing else in this folder is PTX, so that a stand-in for this file runs the kernels elsewhere.
// Ampere (sm_80) or newer.

#define UNROLL _Pragma("unroll")

// ---- copies from global to shared memory that go on while the thread computes ----

// Begins to copy 16 bytes, or 8 or 4, or to write so many zero bytes where nothing is to be copied. Both places are
// aligned to that number.
template <int BYTES = 16>
__device__ inline void copy_async(void* to, const void* from, bool is_there) {
  const unsigned shared = static_cast<unsigned>(__cvta_generic_to_shared(to));
  const int bytes = is_there ? BYTES : 0;
  if constexpr (BYTES == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(from), "r"(bytes) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %3, %2;" ::"r"(shared), "l"(from), "r"(bytes), "n"(BYTES)
                 : "memory");
  }
}

// Ends a group of this thread's copies: those that it has begun since the last call.
__device__ inline void end_copy_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most N of this thread's last groups are unfinished. Only then do other threads' barriers help.
template <int N>
__device__ inline void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// ---- matrices of 16-bit elements in the registers of a warp ----
// Of an 8x8 matrix a lane holds row lane / 4, columns 2 * (lane % 4) and the next one: a word.

// Four 8x8 matrices from shared memory. `row`: lane i names row i % 8 of matrix i / 8, 16 aligned bytes.
__device__ inline void load_matrices(unsigned (&words)[4], const void* row) {
  const unsigned shared = static_cast<unsigned>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(shared)
               : "memory");
}

// The same, each matrix transposed.
__device__ inline void load_matrices_transposed(unsigned (&words)[4], const void* row) {
  const unsigned shared = static_cast<unsigned>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(shared)
               : "memory");
}

// sum [16, 8] += a [16, 16] * b [16, 8]. Of sum a lane holds row lane / 4 in elements 0 and 1 and the row 8 below in
// 2 and 3, columns as above. The 8x8 matrices of a are: upper left, lower left, upper right, lower right; those of b,
// each transposed: upper, lower.
__device__ inline void multiply_accumulate(
    float (&sum)[4], const unsigned (&a)[4], unsigned upper_b, unsigned lower_b, __half) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
               : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(upper_b), "r"(lower_b));
}

__device__ inline void multiply_accumulate(
    float (&sum)[4], const unsigned (&a)[4], unsigned upper_b, unsigned lower_b, __nv_bfloat16) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
               : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(upper_b), "r"(lower_b));
}

// Two floats rounded and packed into a word, the first in its lower half.
__device__ inline unsigned pack(float first, float second, __half) {
  unsigned word;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(second), "f"(first));
  return word;
}

__device__ inline unsigned pack(float first, float second, __nv_bfloat16) {
  unsigned word;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(second), "f"(first));
  return word;
}

// ---- functions ----

// 2 to the power of x, to about 2 units in the last place; tiny results become 0.
__device__ inline float fast_exp2(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

template <typename V>
__device__ inline V shuffle(V value, int lane) {
  return __shfl_sync(0xffffffffu, value, lane);
}

template <typename V>
__device__ inline V shuffle_xor(V value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}
