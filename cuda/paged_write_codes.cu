// Puts the keys and values of new tokens into their slots as codes: the body of a kernel; intrinsics.cuh, tiles.cuh and
// codes.cuh come before it. What it says to MLX, and what not, is as of paged_write.
//
// What is stored for a token and head depends on its own numbers alone, and is to the byte what mx.quantize, or
// mx.to_fp8 after a division by the scale, makes of them on a CPU.
//
// Inputs
//   k_codes       [num_blocks, num_kv_heads, block_size, HEAD_DIM * KEY_BITS / 32], uint32: changed
//   k_params      [num_blocks, num_kv_heads, block_size, HEAD_DIM / KEY_GROUP, NUM_PARAMS], T: changed
//   v_codes, v_params
//                 of VALUE_DIM, VALUE_BITS and VALUE_GROUP likewise: changed
//   keys          [num_tokens, num_kv_heads, HEAD_DIM], T
//   values        [num_tokens, num_kv_heads, VALUE_DIM], T
//   block_ids     [num_tokens], int32
//   offsets       [num_tokens], int32: token i goes to slot offsets[i] of block block_ids[i]; no two to one
//   reads_done    [8], int32: not looked at
//   All are contiguous. Of the pools one block is given, at whose address all others lie, too.
// Output
//   write_done    [8], int32: zeros
//
// Grid           a warp for the K of a token in a head and one for its V, token by token, head by head; those past the
//                end do nothing
// Lane           every 32nd word of codes, and what becomes it
//
// Must move      (HEAD_DIM + VALUE_DIM) elements per token and KV head, read once; their codes and parameters, written
//                once.

const int num_kv_heads = k_codes_shape[1];
const int thread = blockIdx.x * blockDim.x + threadIdx.x;
const int new_row = thread / 64;
const int token = new_row / num_kv_heads;

if (thread < 8) write_done[thread] = 0;
if (token < keys_shape[0]) {
  const size_t head = size_t(block_ids[token]) * num_kv_heads + new_row % num_kv_heads;
  const size_t row = head * k_codes_shape[2] + offsets[token];
  if (thread / 32 % 2 == 0) {
    Codes<T, HEAD_DIM, KEY_BITS, KEY_GROUP, NUM_PARAMS>::write(
        keys + size_t(new_row) * HEAD_DIM, const_cast<uint32_t*>(k_codes), const_cast<T*>(k_params), row, thread % 32);
  } else {
    Codes<T, VALUE_DIM, VALUE_BITS, VALUE_GROUP, NUM_PARAMS>::write(
        values + size_t(new_row) * VALUE_DIM, const_cast<uint32_t*>(v_codes), const_cast<T*>(v_params), row,
        thread % 32);
  }
}
