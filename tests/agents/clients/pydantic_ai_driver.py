"""Pydantic AI, over chat, responses and messages."""

import asyncio
from collections.abc import Callable

from pydantic_ai import Agent
from pydantic_ai.exceptions import ModelHTTPError
from pydantic_ai.messages import ThinkingPart
from pydantic_ai.models.anthropic import AnthropicModel
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.anthropic import AnthropicProvider
from pydantic_ai.providers.openai import OpenAIProvider
from wire import ANSWER, BASE_URL, CITY, MODEL, THOUGHT

OPENAI = OpenAIProvider(base_url=f"{BASE_URL}/v1", api_key="any")
ANTHROPIC = AnthropicProvider(base_url=BASE_URL, api_key="any")


def weather_noted_in(asked: list[str]) -> Callable[[str], str]:
    """A tool that notes what it is asked."""

    def get_weather(city: str) -> str:
        asked.append(city)
        return "sun " * 50

    return get_weather


def exec_command(cmd: str) -> str:
    """Run a command, or say so."""
    return "ran"


async def main() -> None:
    for kind, provider in ((OpenAIChatModel, OPENAI), (OpenAIResponsesModel, OPENAI), (AnthropicModel, ANTHROPIC)):
        agent = Agent(kind(MODEL, provider=provider))
        asked: list[str] = []
        agent.tool_plain(weather_noted_in(asked))
        whole = await agent.run("hi")
        async with agent.run_stream("hi") as streamed:
            text = await streamed.get_output()
        assert whole.output == text == ANSWER and asked == [CITY, CITY], (kind, whole.output, text, asked)
        usage = whole.usage
        assert usage.requests == 2 and usage.output_tokens > 0 and usage.cache_read_tokens > 0, (kind, usage)

        thinker = Agent(kind(MODEL, provider=provider))
        thinker.tool_plain(exec_command)
        parts = [part for message in (await thinker.run("hi")).all_messages() for part in message.parts]
        (thought,) = [part for part in parts if isinstance(part, ThinkingPart)]
        raw = (thought.provider_details or {}).get("raw_content", [])  # what is not a summary, over responses
        assert THOUGHT in (thought.content, *raw), (kind, parts)
        try:
            await Agent(kind("other", provider=provider)).run("hi")
        except ModelHTTPError as error:
            assert error.status_code == 404
        else:
            raise AssertionError(kind)


asyncio.run(main())
