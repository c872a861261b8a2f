"""HTTP dialects onto AsyncLLM: OpenAI's chat completions, completions and responses, and Anthropic's messages."""
