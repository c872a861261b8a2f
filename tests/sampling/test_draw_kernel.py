"""draw_tokens, Metal's and CUDA's: the tokens of plain operations, and nothing that float64 rules out."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from helpers.attention_cases import Case
from helpers.gpu import Gpu
from helpers.planted import Mistake
from helpers.sampling_oracle import VOCAB_SIZE, Drawn, Row, bitmask, make_logits, oracle, run

from mlx_paged import SamplingParams
from mlx_paged.attention.paged_attention import BACKENDS
from mlx_paged.errors import EngineWarning
from mlx_paged.kernels import BACKEND_VARIABLE, TITLES
from mlx_paged.sampling.draw_kernel import THREADS, KernelRows, choose_kind
from mlx_paged.sampling.draws import RandomRows
from mlx_paged.sampling.sampler import PARAMETERS

pytestmark = pytest.mark.filterwarnings("error::mlx_paged.errors.EngineWarning")  # that the kernel is not used

INF = np.float32(np.inf)
ASKED: list[dict[str, Any]] = [
    {},
    {"temperature": 0},
    {"temperature": 0.6, "top_k": 20, "top_p": 0.95},
    {"top_k": 1},
    {"top_k": 50},
    {"top_k": 100_000},
    {"top_p": 0.9},
    {"top_p": 1e-30, "temperature": 3.0},
    {"top_p": 1.0, "min_p": 0.05},
    {"min_p": 1.0},
    {"temperature": 1.7, "top_k": 5, "min_p": 0.01},
    {"top_p": 0.3, "min_p": 0.02},
    {"top_k": 30, "top_p": 0.7, "min_p": 0.001, "temperature": 5.0},
]


def normal(num_rows: int, vocab_size: int, seed: int, spread: float = 3.0) -> np.ndarray:
    """float32 [num_rows, vocab_size]."""
    return (spread * np.random.default_rng(seed).standard_normal((num_rows, vocab_size))).astype(np.float32)


def rows_of(asked: Sequence[dict[str, Any]], num_rows: int) -> list[Row]:
    """Rows that ask for these in turn, each a sequence of its own."""
    choices = itertools.islice(itertools.cycle(asked), num_rows)
    return [Row(SamplingParams(**values), 1000 + number, number) for number, values in enumerate(choices)]


def drawn_plainly(patches: pytest.MonkeyPatch, *arguments: Any) -> Drawn:
    """What `run` draws with plain operations."""
    with patches.context() as patched:
        patched.setenv(BACKEND_VARIABLE, "reference")
        return run(*arguments)


def check(gpu: Gpu, patches: pytest.MonkeyPatch, logits: Any, rows: list[Row], masks: np.ndarray | None = None) -> None:
    """The kernel draws all rows' tokens, which are those of plain operations."""
    expected = drawn_plainly(patches, logits, rows, masks).token_ids
    drawn = run(logits, rows, masks).token_ids
    assert drawn.tolist() == expected.tolist()
    if gpu.simulated:
        assert gpu.report.kernel == "draw_tokens"


@pytest.mark.parametrize("vocab_size", [1, 7, 8, 513, 1000])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_the_kernel_draws_the_tokens_of_plain_operations(
    vocab_size: int, dtype: mx.Dtype, gpu: Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu.configure(order="random", seed=vocab_size)
    logits = mx.array(normal(2 * len(ASKED), vocab_size, vocab_size))
    check(gpu, monkeypatch, logits.astype(dtype), rows_of(ASKED, len(logits)))


def test_a_large_vocabulary_is_drawn_from_as_a_small_one(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu.configure(check=gpu.name == "cuda")
    logits = mx.array(normal(3, 151_936, 1)).astype(mx.bfloat16)
    check(gpu, monkeypatch, logits, rows_of([ASKED[0], ASKED[2], ASKED[6]], 3))


def awkward() -> dict[str, np.ndarray]:
    """Rows of scores by what is unusual about them."""
    spread = normal(1, 600, 5, 4.0)[0]
    few = np.full(600, -INF)
    few[[3, 299, 300, 599]] = [1, 4, 2, 3]
    return {
        "few that are allowed": few,
        "one that is allowed": np.where(np.arange(600) == 599, np.float32(-7), -INF),
        "none that is allowed": np.full(600, -INF),
        "all equal": np.full(600, 2.5, np.float32),
        "ties at every cut": np.round(spread),
        "both zeros": np.where(spread > 1, np.float32(-0.0), np.where(spread > 0, np.float32(0.0), spread)),
        "all below zero": -np.abs(spread) - 1,
        "far apart": np.geomspace(1e-30, 1e30, 600, dtype=np.float32) * np.where(np.arange(600) % 2, 1, -1),
        "hardly apart": np.float32(1) + np.arange(600, dtype=np.float32) * np.float32(1.2e-7),
        "one far above": np.where(np.arange(600) == 77, np.float32(90), spread),
    }


@pytest.mark.parametrize("name", awkward())
def test_awkward_scores_are_drawn_from_as_by_plain_operations(
    name: str, gpu: Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu.configure(order="descending")
    check(gpu, monkeypatch, np.repeat(awkward()[name][None], len(ASKED), axis=0), rows_of(ASKED, len(ASKED)))


@pytest.mark.parametrize("wrong", [np.nan, -np.nan, np.inf])
def test_a_row_without_a_distribution_gets_some_token_and_disturbs_no_other(wrong: float, gpu: Gpu) -> None:
    logits, rows = normal(2 * len(ASKED), 100, 6), rows_of(ASKED, 2 * len(ASKED))
    whole = run(logits, rows).token_ids
    broken = logits.copy()
    broken[::2, 50] = wrong
    broken[::4] = wrong
    drawn = run(broken, rows)
    assert (drawn.token_ids < 100).all() and np.isnan(drawn.logprobs[::2]).all()
    assert drawn.token_ids[1::2].tolist() == whole[1::2].tolist()


def test_masks_penalties_biases_and_log_probabilities_are_those_of_plain_operations(
    gpu: Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits, rows = normal(26, 300, 7), []
    for number, row in enumerate(rows_of(ASKED, 26)):
        values = ASKED[number % len(ASKED)] | {"repetition_penalty": 1.3, "logit_bias": {5: 3.0}, "logprobs": 2}
        rows.append(Row(SamplingParams(**values) if number % 2 else row.params, row.stream, number, [1, 2], [3, 3]))
    masks = bitmask(np.random.default_rng(0).random((26, 300)) < 0.4)
    check(gpu, monkeypatch, logits, rows, masks)
    found, expected = run(logits, rows, masks), drawn_plainly(monkeypatch, logits, rows, masks)
    for ours, plain in zip(found, expected, strict=True):
        np.testing.assert_array_equal(ours, plain)


def test_a_row_alone_gets_the_token_that_it_gets_among_others(gpu: Gpu) -> None:
    logits, rows = normal(len(ASKED), 200, 8), rows_of(ASKED, len(ASKED))
    together = run(logits, rows).token_ids.tolist()
    assert [int(run(logits[i : i + 1], [row]).token_ids[0]) for i, row in enumerate(rows)] == together


def test_draws_by_the_kernel_follow_the_oracles_distribution(gpu: Gpu) -> None:
    gpu.configure(check=gpu.name == "cuda")
    params = SamplingParams(temperature=1.3, top_k=12, top_p=0.8, min_p=0.01)
    logits, num_draws = make_logits(1, 4)[0], 200 if gpu.name == "metal" else 80
    rows = [Row(params, 3, position) for position in range(num_draws)]
    seen = np.bincount(run(np.repeat(logits[None], num_draws, axis=0), rows).token_ids, minlength=VOCAB_SIZE)
    expected = oracle(logits, params, [], []) * num_draws
    kept = expected > 0
    assert not seen[~kept].any() and 2 < kept.sum() < 12
    statistic, degrees = ((seen - expected)[kept] ** 2 / expected[kept]).sum(), kept.sum() - 1
    assert statistic <= degrees + 6 * np.sqrt(2 * degrees)


def test_the_kernel_keeps_exactly_the_tokens_of_the_oracle(gpu: Gpu) -> None:
    """Of scores that hardly differ each that is kept comes up, and none that is not."""
    gpu.configure(check=gpu.name == "cuda")
    logits, rows, kept = make_logits(1, 9, 12, 0.3)[0], [], []
    for values in ({"top_k": 3}, {"top_p": 0.35}, {"min_p": 0.75}, {"top_k": 9, "top_p": 0.5, "min_p": 0.6}):
        params = SamplingParams(**values)
        rows += [Row(params, 4, position) for position in range(40)]
        kept.append(set(np.flatnonzero(oracle(logits, params, [], []))))
    drawn = run(np.repeat(logits[None], len(rows), axis=0), rows).token_ids.reshape(len(kept), -1)
    assert [set(each.tolist()) for each in drawn] == kept and all(1 < len(each) < 7 for each in kept)


@pytest.mark.parametrize("by_kernel", [False, True])
def test_a_random_word_of_zero_does_not_rule_out_the_only_token(
    by_kernel: bool, gpu: Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    if by_kernel:
        plant(gpu, "(words.", "(0 * words.", monkeypatch, occurrence=-1)
    else:
        monkeypatch.setenv(BACKEND_VARIABLE, "reference")
        monkeypatch.setattr(mx.random, "gumbel", lambda shape, key: mx.full(shape, -mx.inf) + 0 * key[0])
    rows = np.array([(1, -np.inf, 1, 0, 0, 0, 1, 0, 5)], PARAMETERS)
    way = KernelRows.gather(gpu.name, rows, 9) if by_kernel else RandomRows.gather(rows, 9)
    scores = mx.array([[0.0, 1, 2, 3, 9, 3, 2, 1, 0]])
    assert way.draw(scores, np.zeros(1, np.int64)).tolist() == [4]


# -- what it reads --


def passes(gpu: Gpu, logits: mx.array, *asked: dict[str, Any]) -> int:
    """How often the scores of a row are read, of all rows together."""
    run(logits, rows_of(asked, len(asked)))
    traffic = gpu.report.traffic
    assert traffic is not None
    scores = traffic.buffers["scores"]
    assert {"scores", "rows", "tokens"} == {name for name in traffic.buffers if "shape" not in name}
    assert scores.distinct_bytes_read == 4 * logits.size
    return scores.bytes_read // (4 * logits.shape[1])


def test_passes_over_the_scores_are_as_few_as_the_page_says(gpu: Gpu) -> None:
    gpu.only_simulated("traffic is counted")
    page = " ".join((Path(__file__).parents[2] / "docs" / "kernels.md").read_text().split())
    many = [
        mx.array(normal(1, 32_000, spread, spread)).astype(dtype)
        for spread in (2, 3, 4)
        for dtype in (mx.float32, mx.bfloat16)
    ]
    assert passes(gpu, mx.repeat(many[0], 3, axis=0), {"temperature": 0}, {}, {"min_p": 0.1}) == 1 + 1 + 2
    asked = {
        "a top-k of 50": {"top_k": 50},
        "a top-p of 0.9": {"top_p": 0.9},
        "a top-k of 20 and a top-p of 0.95": {"temperature": 0.6, "top_k": 20, "top_p": 0.95},
    }
    for words, values in asked.items():
        counted = [passes(gpu, logits, values) for logits in many]
        assert f"{min(counted)} to {max(counted)} with {words}" in page
    assert f"{THREADS} threads: token i, i + {THREADS}, ... each" in page


def test_passes_over_scores_of_any_size_are_bounded(gpu: Gpu) -> None:
    gpu.only_simulated("traffic is counted")
    for scores in awkward().values():
        for values in ({"top_k": 3}, {"top_k": 300}, {"top_p": 0.999}):
            assert passes(gpu, mx.array(scores[None]), values) <= 14


# -- mistakes --


def plant(gpu: Gpu, old: str, new: str, monkeypatch: pytest.MonkeyPatch, occurrence: int = 0) -> list[str]:
    """Make kernels with `new` in the place of `old` from here on."""
    return gpu.plant(Mistake(old, new, Case(()), occurrence), monkeypatch)


MISTAKES = {
    "another generator": ("0x1bd11bdau", "0x1bd11bdbu"),
    "the words of two tokens are exchanged": ("noise_of(words.x)", "noise_of(words.y)"),
    "the counter of the last token of an odd number": ("second < vocab_size ? second : 0", "second"),
    "zeros are apart": ("key == ZERO - 1 ? ZERO : key", "key"),
    "floats below zero in the wrong order": ("~bits : bits | ZERO", "bits : bits | ZERO"),
    "one more than top-k": ("above[i] >= limit", "above[i] > limit"),
    "top-p of all that there is": ("limit *= above[0]", "limit *= 1.0f"),
    "top-p by counts": ("weighs * NUM_PIVOTS", "0 * weighs"),
    "the last two scores are not told apart": ("num_above_high <= 1.0f", "num_above_high <= 2.0f"),
    "min-p leaves out the best": ("key_of(best + log_min_p) - 1", "key_of(best + log_min_p)"),
    "the higher of two equal tokens": ("candidate < token", "candidate > token"),
    "greedy rows draw": ("is_random && (is_kept", "(is_kept"),
    "a neighbour's scores": ("size_t(row) * vocab_size", "size_t(row / 2) * vocab_size"),
    "past the end": ("i < vocab_size; i +=", "i <= vocab_size; i +="),
    "no barrier": ("{barrier};\n  high", ";\n  high"),
    "totals are read too early": ("{barrier};\n\n      const", ";\n\n      const"),
}


def telling() -> tuple[np.ndarray, list[Row]]:
    """Scores of an odd number of tokens, and rows, that show mistakes."""
    middle, zeros, even = np.full(601, -INF), np.full(601, np.float32(-9)), np.linspace(0, 1, 601, dtype=np.float32)
    middle[[5, 300]] = 1
    zeros[:40:4], zeros[2:40:4] = -0.0, 0.0
    scores = [np.zeros(601, np.float32), *normal(len(ASKED), 601, 2), *[middle] * 6, *[zeros] * 6, *[even] * 18]
    asked: list[dict[str, Any]] = [{"temperature": 0}, *ASKED, *[{}] * 6, *[{"top_k": 4}] * 6]
    asked += [*({"top_k": k} for k in range(2, 16)), *[{"top_p": 0.3, "temperature": 0.1}] * 4]
    return np.stack(scores), rows_of(asked, len(asked))


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_in_drawing_is_noticed(name: str, gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu.take_part(list(MISTAKES).index(name))
    barrier = "threadgroup_barrier(mem_flags::mem_threadgroup)" if gpu.name == "metal" else "__syncthreads()"
    old, new = (text.replace("{barrier}", barrier) for text in MISTAKES[name])
    monkeypatch.setattr("mlx_paged.sampling.draw_kernel._failure", lambda *_: None)
    planted = plant(gpu, old, new, monkeypatch)
    with pytest.raises(AssertionError):  # a SimulationError is one
        check(gpu, monkeypatch, *telling())
    assert planted


def test_what_shows_mistakes_passes_without_one(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    check(gpu, monkeypatch, *telling())


# -- when it is used --


def test_the_device_or_the_variable_of_attention_decides_who_draws(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_kind() == gpu.name
    for asked, expected in ((gpu.name, gpu.name), ("reference", None), ("cpu", None)):
        monkeypatch.setenv(BACKEND_VARIABLE, asked)
        assert choose_kind() == expected
    assert set(TITLES) < set(BACKENDS)


def test_without_a_gpu_plain_operations_draw(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in TITLES:
        monkeypatch.setattr(getattr(mx, kind), "is_available", lambda: False)
    assert choose_kind() is None


@pytest.mark.parametrize(
    ("new", "failure"), [("limit *= 0.1f *", "it draws other tokens than plain operations"), ("not C++", ".*error.*")]
)
def test_where_the_kernel_does_not_work_plain_operations_take_its_place_and_a_warning_says_so(
    new: str, failure: str, gpu: Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits, rows = normal(len(ASKED), 100, 1), rows_of(ASKED, len(ASKED))
    expected = drawn_plainly(monkeypatch, logits, rows).token_ids
    plant(gpu, "limit *=", new, monkeypatch)
    instead = re.escape("; plain MLX operations take their place, more slowly")
    with pytest.warns(EngineWarning, match=f"^{gpu.backend.title} kernels can't draw tokens here: {failure}{instead}$"):
        drawn = run(logits, rows).token_ids
    assert drawn.tolist() == expected.tolist()


def test_the_engine_draws_with_the_kernel_where_there_is_one(
    gpu: Gpu, tiny_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlx_paged import LLM

    params = SamplingParams(seed=3, top_k=40, top_p=0.9, max_tokens=4, ignore_eos=True)

    def generated() -> list[list[int]]:
        llm = LLM.from_model(tiny_model("llama"), num_kv_blocks=16, pipelining="off")
        return [output.outputs[0].token_ids for output in llm.generate([[3, 1, 4], [1, 5]], params)]

    found = generated()
    gpu.only_simulated("launches are counted")
    assert "draw_tokens" in [report.kernel for report in gpu.reports]
    monkeypatch.setenv(BACKEND_VARIABLE, "reference")
    assert generated() == found
