"""Sampling parameters: what is refused, by name, and what the derived properties say."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest

from mlx_paged import SamplingParams

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
    ("logit_bias", {-1: 0.5}),
    ("logit_bias", {"a": 0.5}),
    ("logit_bias", {1: math.nan}),
    ("logit_bias", {1: math.inf}),
    ("logit_bias", {1: "x"}),
]


@pytest.mark.parametrize("name, value", OUT_OF_RANGE, ids=str)
def test_a_value_out_of_range_is_refused_by_name_with_the_value(name: str, value: Any) -> None:
    with pytest.raises(ValueError) as caught:
        SamplingParams(**{name: value})
    message = str(caught.value)
    assert message.startswith(f"{name} must be ")
    assert message.endswith(f"got {value!r}")
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
        assert getattr(params, name) == value


def test_an_unknown_parameter_is_refused() -> None:
    with pytest.raises(TypeError, match="top_q"):
        SamplingParams(top_q=1)  # type: ignore[call-arg]


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
