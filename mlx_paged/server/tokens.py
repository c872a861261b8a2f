"""vLLM's /tokenize and /detokenize."""

from __future__ import annotations

import asyncio
from typing import Any

from starlette.responses import JSONResponse
from starlette.types import ASGIApp

from mlx_paged.sampling_params import SamplingParams
from mlx_paged.server.body import Fields
from mlx_paged.server.chat import read_template, read_tools
from mlx_paged.server.conversation import read_messages
from mlx_paged.server.errors import bad_request
from mlx_paged.server.service import Service


async def read_prompt(service: Service, fields: Fields) -> list[int]:
    """Return the tokens of a prompt, or of a conversation with its tools. Raises ApiError."""
    service.require_model(fields.take("model", str))
    if ("prompt" in fields) == ("messages" in fields):
        raise bad_request("give either prompt or messages", param="prompt")
    if "prompt" in fields:
        params = SamplingParams(max_tokens=1)
        return (await service.make_request(fields.take_any("prompt"), params, stream=False)).prompt_token_ids
    messages = read_messages(fields.take("messages", list, []), service.note_omitted)
    return await service.encode_chat(messages, read_tools(fields), read_template(fields))


async def tokenize(service: Service, body: dict[str, Any], state: dict[str, Any]) -> ASGIApp:
    """Answer POST /tokenize. Raises ApiError."""
    token_ids = await read_prompt(service, Fields(body))
    return JSONResponse({"tokens": token_ids, "count": len(token_ids), "max_model_len": service.llm.max_model_len})


async def detokenize(service: Service, body: dict[str, Any], state: dict[str, Any]) -> ASGIApp:
    """Answer POST /detokenize: the text of tokens. Raises ApiError."""
    fields = Fields(body)
    service.require_model(fields.take("model", str))
    tokens, most = fields.take("tokens", list, []), service.llm.max_model_len
    if len(tokens) > most:
        raise bad_request(f"tokens are {len(tokens)}, and the context has {most}", param="tokens")
    if not all(type(token) is int and 0 <= token < service.llm.vocab_size for token in tokens):
        raise bad_request("tokens must be token ids of the model's vocabulary", param="tokens")
    return JSONResponse({"prompt": await asyncio.to_thread(service.tokenizer.decode, tokens)})
