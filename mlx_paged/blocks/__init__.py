"""Block ids: who holds which block, and who may share it."""
