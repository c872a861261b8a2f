// Puts the keys and values of new tokens into their slots as codes: the body of a kernel; packed.h and codes.h come
// before it. It changes the pools where they lie, as paged_write does, which tells how others wait for it. What is
// stored for a token depends on that token alone.
//
// Inputs
//   k_codes       [num_blocks, num_kv_heads, block_size, HEAD_DIM * KEY_BITS / 32], uint32: changed
//   k_params      [num_blocks, num_kv_heads, block_size, HEAD_DIM / KEY_GROUP, NUM_PARAMS], T: changed
//   v_codes       [num_blocks, num_kv_heads, block_size, VALUE_DIM * VALUE_BITS / 32], uint32: changed
//   v_params      [num_blocks, num_kv_heads, block_size, VALUE_DIM / VALUE_GROUP, NUM_PARAMS], T: changed
//   keys          [num_tokens, num_kv_heads, HEAD_DIM], T
//   values        [num_tokens, num_kv_heads, VALUE_DIM], T
//   block_ids     [num_tokens], int32
//   offsets       [num_tokens], int32: token i goes to slot offsets[i] of block block_ids[i]; no two to one
//   reads_done    [8], int32: not looked at
//   All are contiguous. Of the pools one block is given, at whose address all others lie, too.
// Output
//   write_done    [8], int32: zeros
//
// Grid           a simdgroup for the K, and the next one for the V, of a token in one head, token by token; those past
//                the end do nothing
// Lane           as many numbers as a word has codes: it finds the edges of its group with the group's other lanes
//
// Must move      (HEAD_DIM + VALUE_DIM) elements per token and KV head, read once (by E4M3, whose scale is a row's,
//                twice), and their codes and parameters, written once.

const int num_kv_heads = k_codes_shape[1];
const int thread_index = thread_position_in_grid.x;
const int lane = thread_index_in_simdgroup;
const int row = thread_index / 64;  // of keys and of values
const int token = row / num_kv_heads;

if (thread_index < 8) write_done[thread_index] = 0;
if (token < keys_shape[0]) {
  const size_t head = size_t(block_ids[token]) * num_kv_heads + row % num_kv_heads;
  const size_t slot = head * k_codes_shape[2] + offsets[token];
  if (thread_index / 32 % 2 == 0) {
    quantise_row<T, HEAD_DIM, KEY_BITS, KEY_GROUP, NUM_PARAMS>(
        keys + size_t(row) * HEAD_DIM,
        const_cast<device uint*>(k_codes) + slot * (HEAD_DIM * KEY_BITS / 32),
        const_cast<device T*>(k_params) + slot * (HEAD_DIM / KEY_GROUP * NUM_PARAMS), lane);
  } else {
    quantise_row<T, VALUE_DIM, VALUE_BITS, VALUE_GROUP, NUM_PARAMS>(
        values + size_t(row) * VALUE_DIM,
        const_cast<device uint*>(v_codes) + slot * (VALUE_DIM * VALUE_BITS / 32),
        const_cast<device T*>(v_params) + slot * (VALUE_DIM / VALUE_GROUP * NUM_PARAMS), lane);
  }
}
