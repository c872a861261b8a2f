// Puts the keys and values of new tokens into their slots: the body of a kernel; intrinsics.cuh and tiles.cuh come
// before it.
//
// MLX has no kernel that changes an input, and its own way to write, a scatter into a donated array, copies a whole
// pool as long as anything that reads it is not over. This kernel changes the pools where they lie and says nothing
// about it. MLX orders kernels by the arrays that one makes and another takes: what reads the pools next takes
// `write_done`, and this kernel takes what those have made that read them last.
//
// Inputs
//   keys          [num_tokens, num_kv_heads, HEAD_DIM], T
//   values        [num_tokens, num_kv_heads, VALUE_DIM], T
//   block_ids     [num_tokens], int32
//   offsets       [num_tokens], int32: token i goes to slot offsets[i] of block block_ids[i]; no two to one
//   k_cache       [num_blocks, block_size, num_kv_heads, HEAD_DIM], T: changed
//   v_cache       [num_blocks, block_size, num_kv_heads, VALUE_DIM], T: changed
//                 Where K is all that is stored VALUE_DIM is 0, and these and `values` are anything
//   reads_done    [8], int32: not looked at
//   All are contiguous. Of the pools one block is given, at whose address all others lie, too.
// Output
//   write_done    [8], int32: zeros
//
// Grid           a thread for every 16 bytes, token by token, its keys and then its values; those past the end do
//                nothing
//
// Must move      (HEAD_DIM + VALUE_DIM) elements per token and KV head, read once and written once.

constexpr int IN_PIECE = Element<T>::IN_PIECE;
const int num_kv_heads = k_cache_shape[2];
const int key_pieces = num_kv_heads * HEAD_DIM / IN_PIECE;  // of a token
const int value_pieces = num_kv_heads * VALUE_DIM / IN_PIECE;
const int thread = blockIdx.x * blockDim.x + threadIdx.x;
const int token = thread / (key_pieces + value_pieces);
const int piece = thread % (key_pieces + value_pieces);

if (thread < 8) write_done[thread] = 0;
if (token < keys_shape[0]) {
  const size_t slot = size_t(block_ids[token]) * k_cache_shape[1] + offsets[token];
  if (piece < key_pieces) {
    copy_piece_now(const_cast<T*>(k_cache), slot * key_pieces + piece, keys, size_t(token) * key_pieces + piece);
  } else {
    const int in_values = piece - key_pieces;
    copy_piece_now(
        const_cast<T*>(v_cache), slot * value_pieces + in_values, values, size_t(token) * value_pieces + in_values);
  }
}
