"""One server of the scripted model for all tests of the room, and its clients."""

from __future__ import annotations

from collections.abc import Iterator

import anthropic
import openai
import pytest
from helpers.scripted_model import make_scripted_model
from helpers.servers import serving

from mlx_paged.async_llm import AsyncLLM


@pytest.fixture(scope="session")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AsyncLLM]:
    llm = AsyncLLM(make_scripted_model(tmp_path_factory.mktemp("scripted")), num_kv_blocks=2000, block_size=16)
    yield llm
    llm.close()


@pytest.fixture(scope="session")
def url(llm: AsyncLLM) -> Iterator[str]:
    with serving(llm, keepalive_s=0.3) as address:
        yield address


@pytest.fixture
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0, timeout=30) as client:
        yield client


@pytest.fixture
def claude(url: str) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=url, api_key="any", max_retries=0, timeout=30) as client:
        yield client
