"""Random requests of every kind, what each of them gives alone, and when an engine holds nothing any more."""

from __future__ import annotations

import random
import string
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.tokenizer_utils import TokenizerWrapper
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from helpers.tiny_models import make_model
from mlx_paged import LLM, BeamSearchParams, SamplingParams
from mlx_paged.engine.engine import Engine
from mlx_paged.outputs import BeamSearchOutput, RequestOutput

Output = RequestOutput | BeamSearchOutput
Params = SamplingParams | BeamSearchParams

SPECIAL = ["<s>", "</s>", "<unk>"]
CHARACTERS = [*string.ascii_letters, *"012345678"]
VOCAB_SIZE = len(SPECIAL) + len(CHARACTERS)
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"num_hidden_layers": 1},
    "gemma3_text": {"num_hidden_layers": 2, "head_dim": 16, "sliding_window": 7, "sliding_window_pattern": 2},
}
MOST_PROMPT_TOKENS, MOST_OUTPUT_TOKENS = 60, 24
_NOISE = 1e-4  # on logits: what a near tie may be decided by
_NUM_NOISES = 40


@cache
def tiny_tokenizer() -> Any:
    """A token for each of 61 characters."""
    vocab = {token: number for number, token in enumerate([*SPECIAL, *CHARACTERS])}
    backend = Tokenizer(models.BPE(vocab, [], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    return TokenizerWrapper(fast)


@cache
def tiny(family: str) -> nn.Module:
    """A model of 1 or 2 layers; gemma3_text has a window in the first."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_key_value_heads": 1}
    return make_model(family, vocab_size=VOCAB_SIZE, **(sizes | FAMILIES[family]))


def make_engine(family: str, **config: Any) -> Engine:
    return LLM.from_model(tiny(family), tiny_tokenizer(), **config).engine


# -- requests ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Asked:
    """A request; `name` tells it from others."""

    prompt: list[int]
    params: Params
    stream: bool = False

    @property
    def name(self) -> str:
        return f"{self.prompt} {self.params} stream={self.stream}"

    @property
    def width(self) -> int:
        return self.params.n if isinstance(self.params, SamplingParams) else self.params.beam_width

    def num_blocks(self, block_size: int) -> int:
        """The smallest pool that takes the request."""
        assert self.params.max_tokens is not None
        shared = len(self.prompt) // block_size
        tail = -(-(len(self.prompt) + self.params.max_tokens - 1) // block_size) - shared
        return shared + (1 if isinstance(self.params, SamplingParams) else self.width) * tail


def random_requests(chance: random.Random, count: int) -> list[Asked]:
    """Samples, beam searches and streams; many of their prompts begin alike."""
    prefixes = [[chance.randrange(3, VOCAB_SIZE) for _ in range(chance.randrange(8, 40))] for _ in range(3)]
    return [_random_request(chance, prefixes) for _ in range(count)]


def _random_request(chance: random.Random, prefixes: list[list[int]]) -> Asked:
    prefix = chance.choice(prefixes) if chance.random() < 0.6 else []
    prefix = prefix[: chance.randrange(len(prefix) // 2, len(prefix) + 1)]
    num_own = chance.choice((0, 1, 2, 5, 12, 20)) + (not prefix)
    prompt = [*prefix, *(chance.randrange(3, VOCAB_SIZE) for _ in range(num_own))][:MOST_PROMPT_TOKENS]
    shared = {
        "max_tokens": chance.randrange(1, MOST_OUTPUT_TOKENS + 1),
        "priority": chance.choice((0, 0, 0, 1, -1)),
        "cache_salt": chance.choice((None, None, None, "salt")),
    }
    if chance.random() < 0.3:
        return Asked(
            prompt,
            BeamSearchParams(
                beam_width=chance.randrange(2, 6),
                length_penalty=chance.choice((-1.0, 0.0, 0.5, 1.0, 2.0)),
                early_stopping=chance.choice((False, True, "never")),
                **shared,
            ),
        )
    return Asked(prompt, _random_sampling(chance, shared), stream=chance.random() < 0.25)


def _random_sampling(chance: random.Random, shared: dict[str, Any]) -> SamplingParams:
    def sometimes(probability: float, value: Any, otherwise: Any) -> Any:
        return value if chance.random() < probability else otherwise

    some = [chance.randrange(3, VOCAB_SIZE) for _ in range(8)]
    return SamplingParams(
        n=sometimes(0.3, chance.randrange(2, 5), 1),
        temperature=chance.choice((0.0, 0.7, 1.0, 1.5)),
        seed=chance.randrange(1000),
        top_k=sometimes(0.2, chance.randrange(2, 20), 0),
        top_p=sometimes(0.2, 0.8, 1.0),
        min_p=sometimes(0.1, 0.05, 0.0),
        repetition_penalty=sometimes(0.2, 1.3, 1.0),
        presence_penalty=sometimes(0.2, 0.5, 0.0),
        frequency_penalty=sometimes(0.2, -0.5, 0.0),
        stop_token_ids=sometimes(0.3, some[:2], None),
        stop=sometimes(0.3, [_text(some[2:3]), _text(some[3:5])], None),
        ignore_eos=chance.random() < 0.3,
        logprobs=sometimes(0.3, chance.randrange(0, 4), None),
        logit_bias=sometimes(0.2, {some[5]: 3.0, some[6]: -5.0}, None),
        regex=sometimes(0.1, chance.choice(("[a-h]{1,12}", "(ab|cd)+x?", "[A-Z][a-z]*[0-9]{1,3}")), None),
        **shared,
    )


# -- results ----------------------------------------------------------------------------------------------------


@dataclass
class Result:
    """What can be compared of a sample or a hypothesis."""

    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    logprob: float = 0.0
    reason: tuple[str | None, int | str | None] = (None, None)
    score: float = 0.0
    logprobs: list[dict[int, float]] = field(default_factory=list)


class Results:
    """Results of the requests of an engine as they come; those of a stream are put together."""

    def __init__(self) -> None:
        self.finished: dict[int, list[Result]] = {}
        self.errors: dict[int, str] = {}
        self._streams: dict[int, dict[int, Result]] = {}

    def take(self, outputs: Iterable[Output]) -> None:
        for output in outputs:
            assert output.request_id not in self.finished, f"request {output.request_id} is handed out twice"
            parts = self._streams.setdefault(output.request_id, {})
            if isinstance(output, BeamSearchOutput):
                results = [Result(h.token_ids, h.text, h.cum_logprob, score=h.score) for h in output.sequences]
            else:
                for one in output.outputs:
                    part = parts.setdefault(one.index, Result())
                    part.token_ids = part.token_ids + one.token_ids
                    part.text += one.text
                    part.logprobs = part.logprobs + (one.logprobs or [])
                    part.logprob, part.reason = one.cumulative_logprob, (one.finish_reason, one.stop_reason)
                results = [parts[index] for index in sorted(parts)]
            error = output.error if isinstance(output, BeamSearchOutput) else _first_error(output)
            if output.finished:
                self.finished[output.request_id] = results
                if error is not None:
                    self.errors[output.request_id] = error


def _text(token_ids: Sequence[int]) -> str:
    return "".join(CHARACTERS[token - len(SPECIAL)] for token in token_ids)


def _first_error(output: RequestOutput) -> str | None:
    return next((str(one.stop_reason) for one in output.outputs if one.finish_reason == "error"), None)


class Alone:
    """What requests give each on its own, in an engine with room for anything. Every one is run once."""

    def __init__(self, family: str) -> None:
        self.num_ties = 0
        self._engine = make_engine(
            family, block_size=16, num_kv_blocks=64, max_num_seqs=8, pipelining="off", prefix_caching=False
        )
        self._known: dict[str, list[Result]] = {}

    def __call__(self, asked: Asked) -> list[Result]:
        if asked.name not in self._known:
            self._known[asked.name] = self._run(asked)
        return self._known[asked.name]

    def compare(self, asked: Asked, found: Sequence[Result]) -> None:
        """Raise AssertionError unless the results are those of the request alone, near ties counted apart."""
        expected = self(asked)
        if _tokens(found) != _tokens(expected):
            assert self._may_be(asked, found), f"{asked.name}\n{_tokens(found)}\nand alone {_tokens(expected)}"
            self.num_ties += 1
            return
        for one, other in zip(found, expected, strict=True):
            assert (one.text, one.reason) == (other.text, other.reason), asked.name
            assert abs(one.logprob - other.logprob) < 1e-3, f"{asked.name}: {one.logprob}, alone {other.logprob}"
            assert abs(one.score - other.score) < 1e-3, f"{asked.name}: {one.score}, alone {other.score}"
            assert len(one.logprobs) == len(other.logprobs), asked.name
            for here, there in zip(one.logprobs, other.logprobs, strict=True):
                assert all(abs(here.get(token, -1e9) - there[token]) < 1e-3 for token in list(there)[:1]), asked.name

    def compare_part(self, asked: Asked, found: Sequence[Result]) -> None:
        """As `compare`, for samples that were aborted: they have a part of the tokens."""
        if isinstance(asked.params, BeamSearchParams):
            return
        expected = self(asked)
        assert len(found) in (1, asked.width), asked.name
        for one, other in zip(found, expected, strict=False):
            if one.token_ids != other.token_ids[: len(one.token_ids)]:
                assert self._may_be(asked, found), f"{asked.name}\n{_tokens(found)}\nand alone {_tokens(expected)}"
                self.num_ties += 1
                return
            assert other.text.startswith(one.text), asked.name

    def _may_be(self, asked: Asked, found: Sequence[Result]) -> bool:
        """Whether the results come about, up to where they first differ, by a change of logits within rounding."""
        is_beam = isinstance(asked.params, BeamSearchParams)
        unexplained = [
            (result, _num_equal(result, expected))
            for result, expected in zip(found, self(asked), strict=False)
            if result.token_ids != expected.token_ids
        ]
        for seed in range(_NUM_NOISES):
            noisy = self._run(asked, seed)
            if is_beam and _tokens(noisy) == _tokens(found):
                return True
            unexplained = [
                (result, num_equal)
                for result, num_equal in unexplained
                if all(_num_equal(result, one) < min(num_equal + 1, len(result.token_ids)) for one in noisy)
            ]
            if not unexplained and not is_beam:
                return True
        return False

    def _run(self, asked: Asked, noise: int | None = None) -> list[Result]:
        runner, results = self._engine._runner, Results()
        original = runner.run
        if noise is not None:
            runner.run = with_noise(original, noise)  # type: ignore[method-assign]
        try:
            request_id = self._engine.add_request(asked.prompt, asked.params)
            while request_id not in results.finished:
                results.take(self._engine.step())
        finally:
            if noise is not None:
                del runner.run
        return results.finished[request_id]


def _tokens(results: Sequence[Result]) -> list[list[int]]:
    return [result.token_ids for result in results]


def _num_equal(one: Result, other: Result) -> int:
    pairs = zip(one.token_ids, other.token_ids, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one.token_ids), len(other.token_ids)))


def with_noise(run: Callable[[Any], mx.array], seed: int) -> Callable[[Any], mx.array]:
    keys = iter(mx.random.split(mx.random.key(seed), 4 * MOST_OUTPUT_TOKENS))

    def noisy(inputs: Any) -> mx.array:
        logits = run(inputs)
        return logits + mx.random.uniform(-_NOISE, _NOISE, logits.shape, key=next(keys))

    return noisy


# -- ends -------------------------------------------------------------------------------------------------------


def assert_idle(engine: Engine) -> None:
    """Nothing runs, waits, or is held, on the host or in the pool."""
    assert engine.step() == []
    assert not engine.has_unfinished()
    engine.cache_groups.check()
    for manager in engine.cache_groups.managers:
        assert manager.num_free_blocks == manager.num_blocks, "blocks are still held"
        assert manager.seq_ids == []
    assert engine.cache_groups.transfers == []
    scheduler, batch = engine._scheduler, engine._batch
    assert (scheduler.waiting, scheduler.running, scheduler._num_reserved_rows) == ([], [], 0)
    assert batch.sequences == [None] * len(batch.sequences)
    assert sorted(batch._free_rows) == list(range(len(batch.sequences)))
    assert (engine._in_flight, engine._steps.unfinished, len(engine._arrivals)) == (None, [], 0)
