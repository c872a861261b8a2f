"""One step, and what becomes of its tokens."""
