"""LiteLLM, which aider, mini-swe-agent and others speak through: over chat and over messages."""

import json

import litellm
from wire import ANSWER, BASE_URL, BUSY_URL, CITY, LONG, MODEL, THOUGHT, freed, retried, script

USER = [{"role": "user", "content": "hi"}]


def tool(name, *names):
    parameters = {"type": "object", "properties": {each: {"type": "string"} for each in names}}
    return {"type": "function", "function": {"name": name, "description": "x", "parameters": parameters}}


for wire, url in (("openai", "/v1"), ("anthropic", "")):
    target = {"model": f"{wire}/{MODEL}", "api_base": BASE_URL + url, "api_key": "any", "max_tokens": 500}

    def ask(messages=USER, target=target, **more):
        return litellm.completion(messages=messages, **target | more)

    whole = ask()
    assert whole.choices[0].message.content == ANSWER and whole.usage.completion_tokens > 0, (wire, whole)
    chunks = list(ask(stream=True, stream_options={"include_usage": True}))
    joined = litellm.stream_chunk_builder(chunks)
    assert joined.choices[0].message.content == ANSWER and joined.usage.completion_tokens > 0, (wire, joined)

    weather = [tool("get_weather", "city")]
    called = litellm.stream_chunk_builder(list(ask(tools=weather, stream=True))).choices[0].message
    assert json.loads(called.tool_calls[0].function.arguments) == {"city": CITY}, (wire, called)
    result = {"role": "tool", "tool_call_id": called.tool_calls[0].id, "content": "sun"}
    last = ask([*USER, called.model_dump(), result], tools=weather)
    assert last.choices[0].message.content == ANSWER, (wire, last)
    assert last.usage.prompt_tokens_details.cached_tokens > 0, (wire, last.usage)

    thinking = ask(tools=[tool("exec_command", "cmd")]).choices[0].message
    assert thinking.reasoning_content == THOUGHT, (wire, thinking)

    endless = ask(script("endless"), stream=True, max_tokens=100_000)
    for _, _chunk in zip(range(5), endless, strict=False):
        pass
    endless.completion_stream.response.close() if wire == "openai" else None
    del endless, _chunk
    freed()

    for kind, change in (
        (litellm.NotFoundError, {"model": f"{wire}/other"}),
        (litellm.ContextWindowExceededError, {"messages": [{"role": "user", "content": LONG}]}),
    ):
        try:
            ask(**change)
        except kind:
            continue
        raise AssertionError((wire, kind))
    busy = {"api_base": BUSY_URL + url, "num_retries": 5}
    assert retried(lambda ask=ask, busy=busy: ask(**busy)).choices[0].message.content == ANSWER
