"""Sampling parameters: what is refused, by name, and what the derived properties say."""

from __future__ import annotations

import dataclasses
import math
import pickle
import re
from typing import Any

import hypothesis
import numpy as np
import pytest
from helpers.budget import budget
from helpers.junk import anything
from hypothesis import strategies as st

from mlx_paged import BeamSearchParams, EngineConfig, SamplingParams

OUT_OF_RANGE: list[tuple[str, Any]] = [
    ("n", 0),
    ("n", -1),
    ("n", 1.0),
    ("n", True),
    ("n", "2"),
    ("temperature", -0.1),
    ("temperature", math.nan),
    ("temperature", math.inf),
    ("temperature", "hot"),
    ("temperature", None),
    ("top_p", 0),
    ("top_p", 7),
    ("top_p", -0.5),
    ("top_p", 1.0001),
    ("top_p", math.nan),
    ("top_k", -1),
    ("top_k", 1.5),
    ("top_k", None),
    ("min_p", -0.01),
    ("min_p", 1.01),
    ("min_p", math.nan),
    ("repetition_penalty", 0),
    ("repetition_penalty", -1),
    ("repetition_penalty", math.inf),
    ("presence_penalty", 2.1),
    ("presence_penalty", -2.1),
    ("presence_penalty", math.nan),
    ("frequency_penalty", 3),
    ("frequency_penalty", -3),
    ("frequency_penalty", "1"),
    ("max_tokens", 0),
    ("max_tokens", -5),
    ("max_tokens", 2.0),
    ("stop", ""),
    ("stop", ["end", ""]),
    ("stop", [3]),
    ("stop_token_ids", [-1]),
    ("stop_token_ids", ["a"]),
    ("stop_token_ids", [1.0]),
    ("skip_special_tokens", 1),
    ("skip_special_tokens", None),
    ("seed", 1.5),
    ("seed", "7"),
    ("seed", True),
    ("logprobs", -1),
    ("logprobs", 2.5),
    ("logprobs", True),
    ("min_tokens", -1),
    ("min_tokens", 1.5),
    ("min_tokens", None),
    ("prompt_logprobs", -1),
    ("prompt_logprobs", True),
    ("bad_words", "word"),
    ("bad_words", [""]),
    ("bad_words", ["a", " "]),
    ("bad_words", [b"a"]),
    ("logits_processors", len),
    ("logits_processors", [3]),
    ("logit_bias", {-1: 0.5}),
    ("logit_bias", {"a": 0.5}),
    ("logit_bias", {1: math.nan}),
    ("logit_bias", {1: math.inf}),
    ("logit_bias", {1: "x"}),
    ("logit_bias", [(1, 0.5)]),
    ("logit_bias", {1: 10**400}),
    ("temperature", 10**400),
    ("stop", b"end"),
    ("stop", 3),
    ("stop", {"a": 1}),
    ("stop", "\ud800"),
    ("stop", ["a", "\ud800"]),
    ("stop_token_ids", 3),
    ("stop_token_ids", b"12"),
    ("stop_token_ids", [True]),
    ("ignore_eos", 1),
    ("ignore_eos", "no"),
    ("cache_salt", 3),
    ("priority", 1.5),
    ("regex", b"a"),
    ("regex", "\ud800"),
    ("grammar", ""),
    ("json_schema", 3),
    ("json_schema", "{"),
]
BEAMS_OUT_OF_RANGE: list[tuple[str, Any]] = [
    ("beam_width", 0),
    ("beam_width", None),
    ("max_tokens", None),
    ("max_tokens", 2.0),
    ("length_penalty", math.nan),
    ("length_penalty", 10**400),
    ("early_stopping", "always"),
    ("early_stopping", 1),
    ("num_return_sequences", 0),
    ("num_return_sequences", 5),
    ("cache_salt", b"a"),
    ("priority", "high"),
]


@pytest.mark.parametrize(
    "kind, name, value",
    [(SamplingParams, *each) for each in OUT_OF_RANGE] + [(BeamSearchParams, *each) for each in BEAMS_OUT_OF_RANGE],
    ids=ascii,
)
def test_a_value_out_of_range_is_refused_by_name_with_the_value(kind: Any, name: str, value: Any) -> None:
    with pytest.raises(ValueError) as caught:
        kind(**{name: value})
    message = str(caught.value)
    assert message.startswith(f"{name} must be ")
    assert message.endswith(f"got {value!r}") or len(repr(value)) > 200
    assert "\n" not in message


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": 0},
        {"temperature": 0.0, "n": 5},
        {"top_p": 1},
        {"top_p": 1e-9},
        {"top_k": 0},
        {"top_k": 10**9},
        {"min_p": 0},
        {"min_p": 1},
        {"presence_penalty": -2, "frequency_penalty": 2},
        {"repetition_penalty": 0.5},
        {"max_tokens": 1},
        {"stop": "x"},
        {"stop": ("x", "yy")},
        {"stop": []},
        {"stop_token_ids": [0]},
        {"stop_token_ids": []},
        {"seed": -(2**70)},
        {"seed": 0},
        {"logprobs": 0},
        {"logit_bias": {}},
        {"logit_bias": {0: -100, 5: 2.5}},
    ],
    ids=str,
)
def test_values_at_the_ends_of_the_ranges_are_taken(values: dict[str, Any]) -> None:
    params = SamplingParams(**values)
    for name, value in values.items():
        assert getattr(params, name) == (tuple(value) if isinstance(value, list) else value)


def test_what_can_be_read_once_is_copied_and_what_is_changed_later_changes_nothing() -> None:
    ids, bias = [5, 5, 6], {3: 1}
    params = SamplingParams(stop=(s for s in ("a", "b")), stop_token_ids=ids, logit_bias=bias)  # type: ignore[arg-type]
    ids.append(-1)
    bias[-1] = 0
    assert (params.stop_strings, params.stop_token_ids, params.logit_bias) == (("a", "b"), (5, 6), {3: 1.0})
    assert SamplingParams(stop_token_ids=iter([7])).stop_token_ids == (7,)  # type: ignore[arg-type]


def test_numbers_of_numpy_are_kept_as_pythons() -> None:
    given: dict[str, Any] = {"n": np.int64(2), "temperature": np.float32(0.5), "stop_token_ids": np.array([1, 2])}
    params: Any = SamplingParams(**given, logit_bias={np.int32(3): np.float16(2)})
    kept = [params.n, params.temperature, *params.stop_token_ids, *params.logit_bias.items()]
    assert kept == [2, 0.5, 1, 2, (3, 2.0)]
    assert all(is_plain(one) for one in kept)


def test_a_schema_that_is_nested_too_deep_to_be_read_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"^json_schema must be "):
        SamplingParams(json_schema="[" * 100_000)


@pytest.mark.parametrize(
    "kind, name, meant",
    [
        (SamplingParams, "temprature", "did you mean temperature?"),
        (SamplingParams, "stop_strings", "did you mean stop"),
        (BeamSearchParams, "beamwidth", "did you mean beam_width?"),
        (EngineConfig, "blocksize", "did you mean block_size?"),
        (SamplingParams, "q", "there are n, temperature, "),
    ],
)
def test_an_unknown_parameter_is_refused_with_the_one_that_may_be_meant(kind: Any, name: str, meant: str) -> None:
    with pytest.raises(TypeError, match=f"there is no argument '{name}': {re.escape(meant)}"):
        kind(**{name: 1})


def is_plain(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(map(is_plain, value))
    if type(value) is dict:
        return all(is_plain(key) and is_plain(each) for key, each in value.items())
    return value is None or type(value) in (bool, int, float, str)


@hypothesis.given(st.data(), st.sampled_from([SamplingParams, BeamSearchParams]), anything)
@hypothesis.settings(max_examples=budget(400, 20_000))
def test_any_value_of_any_field_is_refused_by_name_or_kept_as_a_plain_value(
    data: st.DataObject, kind: Any, value: Any
) -> None:
    name = data.draw(st.sampled_from([field.name for field in dataclasses.fields(kind)]))
    try:
        params = kind(**{name: value})
    except ValueError as error:
        assert str(error).startswith(f"{name} must be ") and "\n" not in str(error)
    else:
        assert dataclasses.replace(params) == params
        if name != "json_schema":
            assert is_plain(getattr(params, name))
            assert pickle.loads(pickle.dumps(params)) == params


def test_the_defaults_change_nothing_about_the_models_distribution() -> None:
    params = SamplingParams()
    assert (params.temperature, params.top_p, params.top_k, params.min_p) == (1.0, 1.0, 0, 0.0)
    assert not params.is_greedy
    assert not params.has_penalties
    assert params.stop_strings == ()
    assert params.max_tokens is None


def test_parameters_cannot_be_changed_after_validation() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        SamplingParams().top_p = 7  # type: ignore[misc]


def test_one_stop_string_is_not_taken_apart() -> None:
    assert SamplingParams(stop="end").stop_strings == ("end",)
    assert SamplingParams(stop=["a", "bc"]).stop_strings == ("a", "bc")


@pytest.mark.parametrize("temperature, greedy", [(0, True), (0.0, True), (1e-7, True), (0.01, False), (1, False)])
def test_temperature_zero_and_what_rounds_to_it_is_greedy(temperature: float, greedy: bool) -> None:
    assert SamplingParams(temperature=temperature).is_greedy is greedy


@pytest.mark.parametrize(
    "values", [{"repetition_penalty": 1.1}, {"presence_penalty": -0.1}, {"frequency_penalty": 0.1}], ids=str
)
def test_any_of_the_three_penalties_asks_for_token_counts(values: dict[str, float]) -> None:
    assert SamplingParams(**values).has_penalties  # type: ignore[arg-type]
