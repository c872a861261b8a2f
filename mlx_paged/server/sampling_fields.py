"""Sampling parameters as clients send them: OpenAI's names, and vLLM's for what OpenAI has not."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from mlx_paged.sampling_params import SamplingParams
from mlx_paged.server.body import Fields
from mlx_paged.server.errors import ApiError, bad_request

_PLAIN = {
    "n": int,
    "temperature": float,
    "top_p": float,
    "top_k": int,
    "min_p": float,
    "repetition_penalty": float,
    "presence_penalty": float,
    "frequency_penalty": float,
    "seed": int,
    "min_tokens": int,
    "ignore_eos": bool,
    "max_thinking_tokens": int,
    "skip_special_tokens": bool,
    "priority": int,
    "cache_salt": str,
}
_NOT_HERE = (  # fields of vLLM's without which the answer would be another one than was asked for
    "allowed_token_ids",
    "logits_processors",
    "include_stop_str_in_output",
    "use_beam_search",
    "truncate_prompt_tokens",
)
MAX_SAMPLES = 128
_MAX_TOP_LOGPROBS = 20
_MAX_STOPS = 16
_MAX_STOP_CHARACTERS = 1000
_MAX_BIASES = 1024
_MAX_BAD_WORDS = 128
_MAX_BAD_WORD_CHARACTERS = 100
_MAX_PROMPT_LOGPROBS = 20
_MAX_GRAMMAR_CHARACTERS = 1 << 16


def read_sampling(fields: Fields, salt: str | None, max_samples: int = MAX_SAMPLES) -> dict[str, Any]:
    """Read what `SamplingParams` takes, but for the number of tokens and what shapes the output.

    salt: that of the client's key, if it has one of its own. Raises ApiError.
    """
    for name in _NOT_HERE:
        if fields.take_any(name):
            raise fields.error(name, "is not supported")
    settings: dict[str, Any] = {name: fields.take(name, kind) for name, kind in _PLAIN.items()}
    settings["stop"] = fields.take_with("stop", read_stop)
    settings["stop_token_ids"] = fields.take("stop_token_ids", list)
    settings["logit_bias"] = fields.take_with("logit_bias", _read_bias)
    if (settings["n"] or 1) > max_samples:
        raise fields.error("n", f"must be at most {max_samples}")
    settings["bad_words"] = fields.take_with("bad_words", _read_bad_words) or None
    if (settings["top_k"] or 0) < 0:  # vLLM's way to say: all
        settings["top_k"] = 0
    settings["cache_salt"] = salt_of(settings["cache_salt"], salt)
    if settings["seed"] == -1:  # and to say: any
        settings["seed"] = None
    return {name: value for name, value in settings.items() if value is not None}


def salt_of(asked: str | None, of_key: str | None) -> str | None:
    """Return the part of the prefix cache that a request uses. asked: by itself. of_key: by its key, if it has one."""
    return asked if of_key is None else f"{of_key}:{asked or ''}"


def read_stop(value: Any) -> list[str]:
    """Read strings that end an answer. Raises ValueError."""
    stops = [value] if isinstance(value, str) else value
    valid = isinstance(stops, list) and all(isinstance(stop, str) for stop in stops)
    if not valid or len(stops) > _MAX_STOPS or any(len(stop) > _MAX_STOP_CHARACTERS for stop in stops):
        raise ValueError(f"must be text or a list of at most {_MAX_STOPS}, of {_MAX_STOP_CHARACTERS} characters each")
    return list(filter(None, stops))


def _read_bad_words(value: Any) -> list[str]:
    valid = isinstance(value, list) and all(isinstance(word, str) for word in value)
    if not valid or len(value) > _MAX_BAD_WORDS or any(len(word) > _MAX_BAD_WORD_CHARACTERS for word in value):
        raise ValueError(
            f"must be a list of at most {_MAX_BAD_WORDS} texts, of {_MAX_BAD_WORD_CHARACTERS} characters each"
        )
    return list(value)


def read_prompt_logprobs(fields: Fields, *, stream: bool) -> int | None:
    """Read vLLM's `prompt_logprobs`. Raises ApiError."""
    count = fields.take("prompt_logprobs", int)
    if count is not None and not 0 <= count <= _MAX_PROMPT_LOGPROBS:
        raise fields.error("prompt_logprobs", f"must be between 0 and {_MAX_PROMPT_LOGPROBS}")
    if count is not None and stream:
        raise fields.error("prompt_logprobs", "can't be had in a stream")
    return count


def _read_bias(value: Any) -> dict[int, float]:
    if not isinstance(value, dict) or len(value) > _MAX_BIASES:
        raise ValueError(f"must be an object of at most {_MAX_BIASES} token ids and numbers")
    try:
        return {int(token): bias for token, bias in value.items()}
    except ValueError:
        raise ValueError("must have token ids as keys") from None


def read_top_logprobs(fields: Fields) -> int | None:
    """Read how many of the likeliest tokens are wanted beside each one. Raises ApiError."""
    top = fields.take("top_logprobs", int)
    if top is not None and not 0 <= top <= _MAX_TOP_LOGPROBS:
        raise fields.error("top_logprobs", f"must be between 0 and {_MAX_TOP_LOGPROBS}")
    return top


def read_output_form(fields: Fields, wanted: Fields | None = None) -> dict[str, Any]:
    """Read what the output has to look like: a JSON schema, a regex or a grammar, as `SamplingParams` takes it.

    wanted: the form as the dialect has it; of OpenAI's chat "response_format". Raises ApiError.
    """
    if wanted is None:
        wanted = Fields(fields.take("response_format", dict, {"type": "text"}), "response_format")
    form = _read_json_form(wanted)
    asked = list(form)
    given = Fields(fields.take_any("structured_outputs") or {}, "structured_outputs")
    if given.take_any("structural_tag"):
        raise given.error("structural_tag", "is not supported")
    for name, ours in (("json", "json_schema"), ("regex", "regex"), ("grammar", "grammar"), ("choice", "regex")):
        read = _any_of if name == "choice" else _as_it_is
        value = given.take_with(name, read)
        value = fields.take_with(f"guided_{name}", read) if value is None else value
        if value is not None:
            form[ours] = value
            asked.append(name)
    if len(asked) > 1:
        raise bad_request(f"give one form of the output, got {' and '.join(asked)}", param="response_format")
    for name, value in form.items():
        if len(json.dumps(value)) > _MAX_GRAMMAR_CHARACTERS:
            raise bad_request(f"{name} is longer than {_MAX_GRAMMAR_CHARACTERS} characters", param=name)
    return form


def _as_it_is(value: Any) -> Any:
    return value


def _any_of(choices: Any) -> str:
    """Make the regex of exactly one of some texts."""
    if not isinstance(choices, list) or not choices or not all(isinstance(each, str) and each for each in choices):
        raise ValueError("must be a list of texts that are not empty")
    return "|".join(map(re.escape, choices))


def _read_json_form(wanted: Fields) -> dict[str, Any]:
    kind = wanted.take("type", str, "")
    if kind == "text":
        return {}
    if kind == "json_object":
        return {"json_schema": wanted.take("schema", dict, {"type": "object"})}
    if kind == "json_schema":
        is_flat = "schema" in wanted
        holder = wanted if is_flat else Fields(wanted.take_any("json_schema"), wanted.path("json_schema"))
        return {"json_schema": holder.take("schema", dict, {"type": "object"})}
    raise wanted.error("type", "must be text, json_object or json_schema")


def make_params(settings: dict[str, Any], names: Sequence[tuple[str, str]] = ()) -> SamplingParams:
    """Make the parameters of a request. names: (in Python, on the wire), where they differ. Raises ApiError."""
    try:
        return SamplingParams(**settings)
    except (ValueError, TypeError) as error:
        raise refusal(error, names) from None


def refusal(error: Exception, names: Sequence[tuple[str, str]] = (), prompt: str | None = None) -> ApiError:
    """What a client is told of a ValueError that names a parameter, or the prompt, first.

    prompt: the field that the prompt came in.
    """
    message = str(error)
    first = re.split("[ =:,]", message, maxsplit=1)[0]
    param = dict(names).get(first, first) if first in SamplingParams.__dataclass_fields__ else None
    if re.match(r"(the|a) prompt\b|the conversation\b|the model's chat template\b|messages\b", message):
        param = prompt
    for ours, theirs in names:
        message = message.replace(ours, theirs)
    return bad_request(message, param=param)
