"""LangChain's chat models, over chat, responses and messages."""

import anthropic
import openai
from langchain_anthropic import ChatAnthropic
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from wire import ANSWER, BASE_URL, CITY, MODEL


@tool
def get_weather(city: str) -> str:
    """Tell the weather."""
    return f"sun in {city}"


def make(kind, model=MODEL, **more):
    if kind is ChatAnthropic:
        return ChatAnthropic(model=model, base_url=BASE_URL, api_key="any", max_retries=0, **more)
    more["stream_usage"] = True
    return ChatOpenAI(model=model, base_url=f"{BASE_URL}/v1", api_key="any", max_retries=0, **more)


for kind, more in ((ChatOpenAI, {}), (ChatOpenAI, {"use_responses_api": True}), (ChatAnthropic, {})):
    model = make(kind, **more)
    whole = model.invoke("hi")
    pieces = list(model.stream("hi"))
    joined = pieces[0]
    for piece in pieces[1:]:
        joined += piece
    assert whole.text == joined.text == ANSWER, (more, whole, joined)
    assert whole.usage_metadata["output_tokens"] == joined.usage_metadata["output_tokens"] > 0, (more, joined)

    able = model.bind_tools([get_weather])
    messages = [HumanMessage("hi")]
    called = able.invoke(messages)
    assert [call["args"] for call in called.tool_calls] == [{"city": CITY}], (more, called)
    result = ToolMessage(get_weather.invoke(called.tool_calls[0]["args"]), tool_call_id=called.tool_calls[0]["id"])
    last = able.invoke([*messages, called, result])
    assert last.text == ANSWER and last.usage_metadata["input_token_details"]["cache_read"] > 0, (more, last)
    try:
        make(kind, "other", **more).invoke("hi")
    except (openai.NotFoundError, anthropic.NotFoundError):
        continue
    raise AssertionError(kind)
