// Joins what paged_decode or paged_prefill computed for the parts of each query's keys: the body of a kernel; packed.h
// comes before it.
//
// Inputs
//   parts         [num_parts, num_heads, VALUE_DIM], T: the mean of each part's values
//   lse           [num_parts, num_heads], float: the base-2 logarithm of its sum of exponentials
//   cu_parts      [num_queries + 1 or more], int32: the parts of query i are cu_parts[i] to cu_parts[i + 1]
//   With SHARED each query has further parts, those of a prefix that it shares; otherwise these are anything:
//   shared_parts  [num_shared_parts, num_heads, VALUE_DIM], T
//   shared_lse    [num_shared_parts, num_heads], float
//   ranges        [num_queries or more, 2], int32: its first one and past its last one, both 0 if it shares nothing
// Output
//   out           [num_queries, num_heads, VALUE_DIM], T: the mean of the parts, weighed by exp2(lse)
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
const int num_own = cu_parts[query + 1] - begin;
const int shared_begin = SHARED ? ranges[2 * query] - num_own : 0;  // part num_own is its first one
const int num_parts = num_own + (SHARED ? ranges[2 * query + 1] - ranges[2 * query] : 0);

float peak = LOWEST;
for (int i = lane; i < num_parts; i += 32) {
  const float log_total = i < num_own ? lse[size_t(begin + i) * num_heads + head]
                                      : shared_lse[size_t(shared_begin + i) * num_heads + head];
  peak = metal::max(peak, log_total);
}
peak = simd_max(peak);

float total = 0.0f;
float output[LOADS];
UNROLL for (int e = 0; e < LOADS; e++) output[e] = 0.0f;
for (int first = 0; first < num_parts; first += 32) {
  const int count = metal::min(32, num_parts - first);
  float own = 0.0f;
  if (lane < count) {
    const int i = first + lane;
    const float log_total = i < num_own ? lse[size_t(begin + i) * num_heads + head]
                                        : shared_lse[size_t(shared_begin + i) * num_heads + head];
    own = metal::fast::exp2(log_total - peak);
  }
  total += simd_sum(own);
#pragma clang loop unroll_count(4)
  for (int i = first; i < first + count; i++) {
    const float weight = simd_shuffle(own, i - first);
    const device T* part = i < num_own ? parts + (size_t(begin + i) * num_heads + head) * VALUE_DIM
                                       : shared_parts + (size_t(shared_begin + i) * num_heads + head) * VALUE_DIM;
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
