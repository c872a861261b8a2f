"""A model that nobody asks is unloaded, and loaded again for the next request; a server drains before it ends."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from helpers.scripted_model import make_scripted_model

from mlx_paged.async_llm import AsyncLLM
from mlx_paged.sampling_params import SamplingParams
from mlx_paged.server.errors import ApiError
from mlx_paged.server.sampling_fields import refusal
from mlx_paged.server.service import ServerOptions, Service

USER: Any = [{"role": "user", "content": "hi"}]


async def answer(service: Service, max_tokens: int = 10) -> str:
    request = await service.prepare_chat(USER, SamplingParams(temperature=0, max_tokens=max_tokens), stream=False)
    return [output async for output in service.run(request)][-1].outputs[0].text


def test_a_model_that_nobody_asks_is_unloaded_and_loaded_by_the_next_request(tmp_path: Path) -> None:
    folder = make_scripted_model(tmp_path / "model")

    def load() -> AsyncLLM:
        return AsyncLLM(folder, num_kv_blocks=100, prefix_cache_dir=str(tmp_path / "saved"))

    async def run() -> None:
        first = load()
        service = Service(first, ServerOptions(["m"], idle_unload_s=0.1), load=load)
        text = await answer(service)
        service.num_clients = 1  # one is being answered
        await asyncio.sleep(0.15)
        await service.unload_if_idle()
        assert not service.is_unloaded
        service.num_clients = 0
        await service.unload_if_idle()
        assert not service.is_unloaded  # the time begins when the last one is answered
        await asyncio.sleep(0.15)
        await service.unload_if_idle()
        assert service.is_unloaded and service.failure is None and first.failure is not None
        assert await service.encode_chat(USER, [], {})  # counting the tokens of a conversation wakes it too
        assert not service.is_unloaded
        service.is_unloaded = True
        await service.llm.aclose()
        gone = asyncio.ensure_future(answer(service))
        await asyncio.sleep(0)
        gone.cancel()  # whoever asked first goes while the model is loaded
        both = await asyncio.gather(answer(service), answer(service))
        assert both == [text, text] and service.llm is not first and not service.is_unloaded
        await service.drain()

    asyncio.run(run())


def test_a_draining_server_lets_requests_end_and_refuses_new_ones(llm: AsyncLLM) -> None:
    async def run() -> None:
        service = Service(llm, ServerOptions(["m"]))
        service.is_draining = True
        with pytest.raises(ApiError) as caught:
            await answer(service)
        assert caught.value.status == 503 and caught.value.retry_after > 0

    asyncio.run(run())


@pytest.mark.parametrize(
    "message, param",
    [
        ("the model's chat template does not take this conversation: no", "messages"),
        ("the prompt is empty: give it at least one token", "messages"),
        ("a prompt is text or a list of token ids, got 5", "messages"),
        ("an output of a given form needs an end token, and the model's tokenizer has none", None),
        ("bad_words need a tokenizer, and this engine has none", "bad_words"),
        ("max_tokens must be at least 1", "max_output_tokens"),
    ],
)
def test_a_refusal_names_the_field_that_its_message_begins_with_and_no_other_word(
    message: str, param: str | None
) -> None:
    names = [("max_tokens", "max_output_tokens")]
    assert refusal(ValueError(message), names, prompt="messages").param == param
