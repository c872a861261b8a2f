"""How mlx-lm's models are found, loaded, patched and named."""
