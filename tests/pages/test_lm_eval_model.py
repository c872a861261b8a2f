"""The example for lm-evaluation-harness gives mlx-lm's unpaged numbers. Where the harness is not installed its names
stand in: what they do is not tested here."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm import generate, load, stream_generate

from mlx_paged.models.hub import DEMO_FOLDER

EXAMPLE = Path(__file__).parents[2] / "examples" / "lm_eval_model.py"
CONTEXT = "Once upon a time, there was a girl named Rosa."
ENDS = [
    " Her best friend was Tom.",
    " She",
    " green green green",
    " Every day after school, Rosa went to play with Ben.",
]


def stand_in() -> dict[str, ModuleType]:
    """The harness's modules that the example imports, with as little as it takes to have a class."""

    def windows(token_list: list[int], prefix_token: int, max_seq_len: int, context_len: int) -> Iterator[Any]:
        assert len(token_list) <= max_seq_len and context_len == 1
        yield [prefix_token, *token_list[:-1]], token_list

    names: dict[str, dict[str, Any]] = {
        "lm_eval": {},
        "lm_eval.api": {},
        "lm_eval.__main__": {"cli_evaluate": None},
        "lm_eval.api.model": {"TemplateLM": object},
        "lm_eval.api.registry": {"register_model": lambda name: lambda model: model},
        "lm_eval.utils": {
            "get_rolling_token_windows": windows,
            "make_disjoint_window": lambda pair: (pair[0][: len(pair[0]) - len(pair[1]) + 1], pair[1]),
        },
    }
    modules = {name: ModuleType(name) for name in names}
    for name, module in modules.items():
        vars(module).update(names[name])
    return modules


@pytest.fixture
def lm(monkeypatch: pytest.MonkeyPatch) -> Any:
    if find_spec("lm_eval") is None:
        for name, module in stand_in().items():
            monkeypatch.setitem(sys.modules, name, module)
    return runpy.run_path(str(EXAMPLE))["PagedLM"](num_kv_blocks=64, dtype="float32")


@pytest.fixture(scope="module")
def unpaged() -> tuple[Any, Any]:
    model, tokenizer, *_ = load(str(DEMO_FOLDER))
    model.set_dtype(mx.float32)
    return model, tokenizer


def expected(model: Any, context: list[int], end: list[int]) -> tuple[float, bool]:
    """What mlx-lm's model says without a cache: the sum of the end's log-probabilities, and whether each is best."""
    logits = model(mx.array([context + end[:-1]]))[0].astype(mx.float32)[len(context) - 1 :]
    found = mx.take_along_axis(nn.log_softmax(logits), mx.array(end)[:, None], axis=-1)
    return found.sum().item(), bool((mx.argmax(logits, axis=-1) == mx.array(end)).all().item())


def test_log_likelihoods_of_continuations_are_those_of_mlx_lm_unpaged(lm: Any, unpaged: tuple[Any, Any]) -> None:
    model, tokenizer = unpaged
    context = tokenizer.encode(CONTEXT, add_special_tokens=False)
    greedy = [each.token for each in stream_generate(model, tokenizer, context, max_tokens=8)]
    ends = [tokenizer.encode(end, add_special_tokens=False) for end in ENDS] + [greedy]
    assert lm.tok_encode(CONTEXT) == context
    answers = lm._loglikelihood_tokens([(("", ""), context, end) for end in ends])
    for end, (logprob, is_greedy) in zip(ends, answers, strict=True):
        wanted, is_best = expected(model, context, end)
        assert logprob == pytest.approx(wanted, abs=1e-3) and is_greedy == is_best
    assert {is_greedy for _, is_greedy in answers} == {True, False}


def test_the_log_likelihood_of_a_text_begins_with_its_first_token(lm: Any, unpaged: tuple[Any, Any]) -> None:
    model, tokenizer = unpaged
    texts = [CONTEXT, "The kite was red."]
    start = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    wanted = [expected(model, [start], tokenizer.encode(text, add_special_tokens=False))[0] for text in texts]
    assert lm.loglikelihood_rolling([SimpleNamespace(args=(text,)) for text in texts]) == pytest.approx(
        wanted, abs=1e-3
    )


def test_answers_are_greedy_and_end_before_what_they_are_to_end_at(lm: Any, unpaged: tuple[Any, Any]) -> None:
    model, tokenizer = unpaged
    whole = generate(model, tokenizer, tokenizer.encode(CONTEXT, add_special_tokens=False), max_tokens=40)
    wishes = [{"until": ["."], "max_gen_toks": 40}, {"until": [], "max_gen_toks": 5}]
    sentence, short = lm.generate_until([SimpleNamespace(args=(CONTEXT, wish)) for wish in wishes])
    assert sentence.strip() == whole.split(".")[0] and "." in whole
    assert len(tokenizer.encode(short, add_special_tokens=False)) == 5 and whole.startswith(short.strip())
