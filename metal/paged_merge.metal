// Joins what paged_decode or paged_prefill computed for the parts of each query's keys: the body of a kernel; packed.h
// comes before it.
//
// Inputs
//   parts       [num_parts, num_heads, VALUE_DIM], T: the mean of each part's values
//   lse         [num_parts, num_heads], float: the base-2 logarithm of its sum of exponentials
//   cu_parts    [num_queries + 1 or more], int32: the parts of query i are cu_parts[i] to cu_parts[i + 1]
// Output
//   out         [num_queries, num_heads, VALUE_DIM], T: the mean of the parts, weighed by exp2(lse)
//
// Grid          a simdgroup per (query, head): [32, num_heads, num_queries] threads
// Threadgroup   HEADS simdgroups, which have nothing to do with each other
// Simdgroup     lane i owns part i of every 32: its weight; and elements i, i + 32, ... of the output
//
// Must move     (VALUE_DIM elements + a float) per part and head, and VALUE_DIM elements out per query and head.

constexpr int LOADS = (VALUE_DIM + 31) / 32;
const int lane = thread_index_in_simdgroup;
const int head = thread_position_in_grid.y;
const int num_heads = threads_per_grid.y;
const int query = thread_position_in_grid.z;
const int begin = cu_parts[query];
const int end = cu_parts[query + 1];

float peak = LOWEST;
for (int i = begin + lane; i < end; i += 32) peak = metal::max(peak, lse[size_t(i) * num_heads + head]);
peak = simd_max(peak);

float total = 0.0f;
float output[LOADS];
UNROLL for (int e = 0; e < LOADS; e++) output[e] = 0.0f;
for (int first = begin; first < end; first += 32) {
  const int count = metal::min(32, end - first);
  const float own = lane < count ? metal::fast::exp2(lse[size_t(first + lane) * num_heads + head] - peak) : 0.0f;
  total += simd_sum(own);
#pragma clang loop unroll_count(4)
  for (int i = 0; i < count; i++) {
    const float weight = simd_shuffle(own, i);
    const device T* part = parts + (size_t(first + i) * num_heads + head) * VALUE_DIM;
    UNROLL for (int e = 0; e < LOADS; e++) {
      if (lane + e * 32 < VALUE_DIM) output[e] += weight * float(part[lane + e * 32]);
    }
  }
}
UNROLL for (int e = 0; e < LOADS; e++) {
  if (lane + e * 32 < VALUE_DIM) {
    out[(size_t(query) * num_heads + head) * VALUE_DIM + lane + e * 32] = static_cast<T>(output[e] / total);
  }
}
