"""Short names for models: alias -> Hugging Face repository.

The bare family name is the smallest instruct model that is pleasant to talk to on any Mac; longer names pick a size.
All are 4-bit conversions (gpt-oss: its own MXFP4). Any other repository, or a folder, works without an alias.
"""

ALIASES: dict[str, str] = {
    "gemma3": "mlx-community/gemma-3-1b-it-4bit",
    "gemma3-4b": "mlx-community/gemma-3-4b-it-4bit",
    "gpt-oss": "mlx-community/gpt-oss-20b-MXFP4-Q8",
    "granite": "mlx-community/granite-3.3-2b-instruct-4bit",
    "llama": "mlx-community/Llama-3.2-1B-Instruct-4bit",
    "llama-3.1-8b": "mlx-community/Meta-Llama-3.1-8B-Instruct-4bit",
    "llama-3.2-1b": "mlx-community/Llama-3.2-1B-Instruct-4bit",
    "llama-3.2-3b": "mlx-community/Llama-3.2-3B-Instruct-4bit",
    "mistral": "mlx-community/Mistral-7B-Instruct-v0.3-4bit",
    "mixtral": "mlx-community/Mixtral-8x7B-Instruct-v0.1-4bit",
    "olmo2": "mlx-community/OLMo-2-1124-7B-Instruct-4bit",
    "olmoe": "mlx-community/OLMoE-1B-7B-0125-Instruct-4bit",
    "phi3": "mlx-community/Phi-3.5-mini-instruct-4bit",
    "phi4-mini": "mlx-community/Phi-4-mini-instruct-4bit",
    "qwen2": "mlx-community/Qwen2-0.5B-Instruct-4bit",
    "qwen2.5": "mlx-community/Qwen2.5-1.5B-Instruct-4bit",
    "qwen2.5-0.5b": "mlx-community/Qwen2.5-0.5B-Instruct-4bit",
    "qwen2.5-3b": "mlx-community/Qwen2.5-3B-Instruct-4bit",
    "qwen2.5-7b": "mlx-community/Qwen2.5-7B-Instruct-4bit",
    "qwen3": "mlx-community/Qwen3-0.6B-4bit",
    "qwen3-1.7b": "mlx-community/Qwen3-1.7B-4bit",
    "qwen3-4b": "mlx-community/Qwen3-4B-4bit",
    "qwen3-8b": "mlx-community/Qwen3-8B-4bit",
    "qwen3-30b-a3b": "mlx-community/Qwen3-30B-A3B-4bit",
    "smollm": "mlx-community/SmolLM-1.7B-Instruct-4bit",
    "smollm3": "mlx-community/SmolLM3-3B-4bit",
}
