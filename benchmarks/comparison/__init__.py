"""The same requests in this engine and in mlx-lm: speed, latency, memory."""
