"""OpenAI's client against `mlx-paged serve`: a stream, thinking, a tool, a form. Needs pip install openai."""

import json
import os
import sys
from datetime import UTC, datetime

from openai import APIConnectionError, OpenAI

url = sys.argv[1] if len(sys.argv) > 1 else os.environ.get("OPENAI_BASE_URL", "http://127.0.0.1:8000/v1")
client = OpenAI(base_url=url, api_key=os.environ.get("OPENAI_API_KEY", "any"))
try:
    model = client.models.list().data[0].id
except APIConnectionError:
    sys.exit(f"there is no server at {url}: start one with mlx-paged serve, or give its address with /v1")
function = {"name": "get_time", "description": "Tell the time.", "parameters": {"type": "object", "properties": {}}}
tools = [{"type": "function", "function": function}]
messages = [{"role": "user", "content": "What time is it?"}]

while messages[-1]["role"] != "assistant":
    with client.chat.completions.stream(
        model=model, messages=messages, tools=tools, stream_options={"include_usage": True}
    ) as stream:
        for event in stream:
            if event.type == "chunk" and event.chunk.choices:
                print(getattr(event.chunk.choices[0].delta, "reasoning_content", None) or "", end="", flush=True)
            elif event.type == "content.delta":
                print(event.delta, end="", flush=True)
        answer = stream.get_final_completion()
    messages.append(answer.choices[0].message.to_dict())
    for call in answer.choices[0].message.tool_calls or []:
        messages.append({"role": "tool", "tool_call_id": call.id, "content": f"{datetime.now(UTC):%H:%M} UTC"})
        print(f"\n{call.function.name}: {messages[-1]['content']}", end="")
    cached = answer.usage.prompt_tokens_details.cached_tokens
    print(f"\n  [{cached} of {answer.usage.prompt_tokens} tokens of the prompt were there already]")

form = {"type": "json_schema", "json_schema": {"name": "day", "schema": {"enum": ["morning", "evening", "night"]}}}
answer = client.chat.completions.create(model=model, messages=messages, response_format=form)
print("form:", json.loads(answer.choices[0].message.content))
