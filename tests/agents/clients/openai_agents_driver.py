"""OpenAI's Agents SDK, over responses and over chat."""

import asyncio

from agents import Agent, OpenAIChatCompletionsModel, OpenAIResponsesModel, Runner, function_tool, set_tracing_disabled
from openai import AsyncOpenAI, NotFoundError
from wire import ANSWER, BASE_URL, CITY, MODEL

set_tracing_disabled(True)
asked: list[str] = []


@function_tool
def get_weather(city: str) -> str:
    """Tell the weather."""
    asked.append(city)
    return "sun " * 50


async def main() -> None:
    client = AsyncOpenAI(base_url=f"{BASE_URL}/v1", api_key="any", max_retries=0)
    for kind in (OpenAIResponsesModel, OpenAIChatCompletionsModel):
        asked.clear()
        agent = Agent("local", instructions="Help.", tools=[get_weather], model=kind(MODEL, client))
        whole = await Runner.run(agent, "hi")
        streamed = Runner.run_streamed(agent, "hi")
        async for _ in streamed.stream_events():
            pass
        assert whole.final_output == streamed.final_output == ANSWER and asked == [CITY, CITY], kind
        usage = whole.context_wrapper.usage
        assert usage.requests == 2 and usage.output_tokens > 0, (kind, usage)
        assert usage.input_tokens_details.cached_tokens > 0, (kind, usage)
        try:
            await Runner.run(Agent("local", model=kind("other", client)), "hi")
        except NotFoundError as error:
            assert error.code == "model_not_found"
        else:
            raise AssertionError(kind)


asyncio.run(main())
