"""Arrays that hold state: the block pools, copies between blocks, block stores."""
