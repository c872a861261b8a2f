"""What the engine is told of an answer's form: by what a client asks, and by how the model thinks and calls."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from mlx_paged.sampling_params import SamplingParams
from mlx_paged.server.errors import bad_request
from mlx_paged.server.tool_grammar import call_grammar, calls_are_plain

_MAX_GRAMMAR_CHARACTERS = 1 << 18


def with_form(
    params: SamplingParams,
    tokenizer: Any,
    tools: Sequence[dict[str, Any]],
    choice: str | None,
    *,
    parallel: bool,
    max_thinking_tokens: int | None,
    max_model_len: int,
) -> SamplingParams:
    """Return the parameters of an answer that calls what it has to, thinks no longer than it may, and is in its form.

    choice: "required", or the name of the tool that has to be called; None: none has to. Of an answer that has to be
    JSON and may also call, both are allowed. max_thinking_tokens: the most that anyone may ask for. Raises ApiError.
    """
    changes: dict[str, Any] = {}
    form = None
    if choice is None and tools and not calls_are_plain(tokenizer):
        form = _schema(params.json_schema)
    if choice is not None or form is not None:
        try:
            grammar = call_grammar(tokenizer, tools, choice or "required", parallel=parallel, form=form)
        except ValueError as error:
            raise bad_request(f"tool_choice: {error}", param="tool_choice") from None
        if len(grammar) > _MAX_GRAMMAR_CHARACTERS:
            raise bad_request(f"the tools make a grammar of more than {_MAX_GRAMMAR_CHARACTERS} characters", "tools")
        changes |= {"json_schema": None, "regex": None, "grammar": grammar}
    has_form = bool(changes) or params.is_constrained
    limits = [limit for limit in (params.max_thinking_tokens, max_thinking_tokens) if limit is not None]
    most = min(limits, default=max_model_len if has_form else None)
    changes["max_thinking_tokens"] = most if tokenizer.has_thinking else None
    markers = (tokenizer.think_start, tokenizer.tool_call_start)
    if any(marker in tokenizer.all_special_tokens for marker in markers):
        changes["skip_special_tokens"] = False  # or the markers would be missing from the text
    return replace(params, **changes)


def _schema(given: Mapping[str, Any] | bool | str | None) -> Mapping[str, Any] | None:
    schema = json.loads(given) if isinstance(given, str) else given
    return {} if schema is True else schema or None
