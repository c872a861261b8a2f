"""What makes MLX's CPU build fast."""
