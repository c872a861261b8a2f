"""Anthropic's client against `mlx-paged serve`: a stream, thinking, a tool. Needs pip install anthropic."""

import os
import sys
from datetime import UTC, datetime

from anthropic import Anthropic, APIConnectionError

url = sys.argv[1] if len(sys.argv) > 1 else os.environ.get("ANTHROPIC_BASE_URL", "http://127.0.0.1:8000")
client = Anthropic(base_url=url, api_key=os.environ.get("ANTHROPIC_API_KEY", "any"))
try:
    model = client.models.list().data[0].id
except APIConnectionError:
    sys.exit(f"there is no server at {url}: start one with mlx-paged serve, or give its address without /v1")
tools = [{"name": "get_time", "description": "Tell the time.", "input_schema": {"type": "object", "properties": {}}}]
messages = [{"role": "user", "content": "What time is it?"}]

while messages[-1]["role"] != "assistant":
    with client.messages.stream(model=model, max_tokens=1000, messages=messages, tools=tools) as stream:
        for event in stream:
            if event.type in ("thinking", "text"):
                print(getattr(event, event.type), end="", flush=True)
        answer = stream.get_final_message()
    messages.append({"role": "assistant", "content": answer.content})
    results = []
    for block in answer.content:
        if block.type == "tool_use":
            now = f"{datetime.now(UTC):%H:%M} UTC"
            results.append({"type": "tool_result", "tool_use_id": block.id, "content": now})
            print(f"\n{block.name}: {now}", end="")
    if results:
        messages.append({"role": "user", "content": results})
    cached = answer.usage.cache_read_input_tokens
    print(f"\n  [{cached} of {cached + answer.usage.input_tokens} tokens of the prompt were there already]")
