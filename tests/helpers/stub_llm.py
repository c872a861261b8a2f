"""The command line in this process, with a stub as the model."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import click.testing
import pytest

import mlx_paged
from mlx_paged.cli.main import cli
from mlx_paged.outputs import CompletionOutput, RequestMetrics, RequestOutput
from mlx_paged.sampling_params import SamplingParams


class StubLLM:
    """Answers every prompt with "re:" and the prompt's words, a word per step; token ids are code points."""

    context = 400  # tokens, prompt and answer together
    has_chat_template = True
    attention_backends = ("cuda",)
    before_step: Callable[[StubLLM], None] | None = None

    def __init__(self, model: str | None, **settings: Any) -> None:
        self.model, self.settings = model, settings
        self.requests: list[tuple[str, SamplingParams]] = []
        self.running: dict[int, tuple[list[str], bool]] = {}
        self.said: dict[int, list[str]] = {}
        self.aborted: list[int] = []
        self.num_steps = 0
        self.engine = self

    def describe_memory(self) -> str:
        return "KV cache: 8 blocks of 4 tokens"

    def stats(self) -> SimpleNamespace:
        used = 2 if self.running else 0
        return SimpleNamespace(num_blocks=8, num_free_blocks=8 - used, kv_waste=0.25 if used else 0.0)

    def encode_chat(self, messages: list[dict[str, str]]) -> list[int]:
        return [ord(char) for char in " ".join(f"{message['role']}:{message['content']}" for message in messages)]

    def add_request(self, prompt: str | list[int], params: SamplingParams, *, stream: bool = False) -> int:
        text = prompt if isinstance(prompt, str) else "".join(map(chr, prompt))
        if len(text) + (params.max_tokens or 1) > self.context:
            raise ValueError(f"the prompt has {len(text)} tokens, the context {self.context}")
        self.requests.append((text, params))
        request_id = len(self.requests) - 1
        self.running[request_id] = ([word + " " for word in f"re: {text}".split()], stream)
        self.said[request_id] = []
        return request_id

    def has_unfinished(self) -> bool:
        return bool(self.running)

    def abort(self, request_id: int) -> None:
        self.aborted.append(request_id)
        del self.running[request_id]

    def step(self) -> list[RequestOutput]:
        if self.before_step:
            self.before_step()
        self.num_steps += 1
        outputs = []
        for request_id, (words, stream) in list(self.running.items()):
            word = words.pop(0)
            self.said[request_id].append(word)
            if not words:
                del self.running[request_id]
            if stream or not words:
                text = word if stream else "".join(self.said[request_id])
                outputs.append(self._output(request_id, text, finished=not words))
        return outputs

    def _output(self, request_id: int, text: str, finished: bool) -> RequestOutput:
        prompt, params = self.requests[request_id]
        samples = [
            CompletionOutput(
                index=index,
                text=text,
                token_ids=[ord(char) for char in text],
                cumulative_logprob=-1.5,
                logprobs=None if params.logprobs is None else [{7: -0.5, 8: float("-inf")}],
                finish_reason="stop" if finished else None,
            )
            for index in range(params.n)
        ]
        metrics = RequestMetrics(arrival_time=10, first_scheduled_time=11, first_token_time=13, finished_time=23)
        return RequestOutput(request_id, prompt, [1] * len(prompt), samples, finished, 4, metrics)


class Run:
    """Runs the command line in this process, with `StubLLM` as the model."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.made: list[StubLLM] = []
        self.stub: type[StubLLM] = type("Stub", (StubLLM,), {})

        def make(model: str | None, **settings: Any) -> StubLLM:
            self.made.append(self.stub(model, **settings))
            return self.made[-1]

        self.make = make
        monkeypatch.setitem(vars(mlx_paged), "LLM", lambda *args, **settings: self.make(*args, **settings))

    def __call__(self, *args: str, stdin: str | bytes | None = None) -> click.testing.Result:
        return click.testing.CliRunner().invoke(cli, args, input=stdin)

    @property
    def prompts(self) -> list[str]:
        return [text for text, _ in self.made[-1].requests]

    @property
    def params(self) -> SamplingParams:
        return self.made[-1].requests[-1][1]


def assert_one_line(result: click.testing.Result, exit_code: int, *words: str) -> None:
    """The command failed with one line on stderr that has these words."""
    assert result.exit_code == exit_code, result.output
    assert result.stderr.startswith("mlx-paged: ") and result.stderr.count("\n") == 1, result.stderr
    for word in words:
        assert word in result.stderr
