#!/usr/bin/env bash
# Tells Cline, once, of the model that mlx-paged serves.
cline auth openai-compatible --apikey any --modelid qwen3 --baseurl http://127.0.0.1:8000/v1
