"""The command line in this process, with a stub as the model."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType, SimpleNamespace
from typing import Any

import click.testing
import pytest

import mlx_paged
from mlx_paged.cli.main import cli
from mlx_paged.errors import PromptTooLong
from mlx_paged.outputs import BeamSearchOutput, CompletionOutput, RequestMetrics, RequestOutput
from mlx_paged.sampling_params import BeamSearchParams, SamplingParams

Params = SamplingParams | BeamSearchParams

METRICS = RequestMetrics(arrival_time=10, first_scheduled_time=11, first_token_time=13, finished_time=23)


class StubLLM:
    """Answers every prompt with "re:" and the prompt's words, streamed a word at a time; token ids are code points."""

    context = 400  # tokens, prompt and answer together
    has_chat_template = True
    attention_backends = ("cuda",)
    sampling_defaults: Mapping[str, float] = MappingProxyType({})
    config = SimpleNamespace(speculative_config=None)
    before_output: Callable[[StubLLM], None] | None = None

    def __init__(self, model: str | None, **settings: Any) -> None:
        self.model, self.settings = model, settings
        self.requests: list[SimpleNamespace] = []  # all that were run
        self.num_outputs = self.num_broken_off = 0  # runs that did not come to their end
        self.engine = self

    def describe_memory(self) -> str:
        return "KV cache: 8 blocks of 4 tokens"

    def stats(self) -> SimpleNamespace:
        return SimpleNamespace(num_blocks=8, peak_used_blocks=2, blas="OpenBLAS 0.3")

    def encode_chat(self, messages: list[dict[str, str]], **template: Any) -> list[int]:
        self.template = template
        return [ord(char) for char in " ".join(f"{message['role']}:{message['content']}" for message in messages)]

    def make_request(self, prompt: str | list[int], params: Params, *, stream: bool = False) -> SimpleNamespace:
        text = prompt if isinstance(prompt, str) else "".join(map(chr, prompt))
        if len(text) + (params.max_tokens or 1) > self.context:
            raise PromptTooLong(f"the prompt has {len(text)} tokens, the context {self.context}")
        max_tokens = params.max_tokens or self.context - len(text)
        return SimpleNamespace(
            request_id=-1, prompt=text, prompt_token_ids=[1] * len(text), params=params, stream=stream,
            max_tokens=max_tokens, sequences=[], finished=False,
        )  # fmt: skip

    def run(
        self, requests: Sequence[SimpleNamespace], on_step: Callable[[], None] = lambda: None
    ) -> Iterator[RequestOutput | BeamSearchOutput]:
        """Yields the outputs of all, the shortest prompts' first."""
        for request in requests:
            request.request_id = len(self.requests)
            self.requests.append(request)
        try:
            for request in sorted(requests, key=lambda request: len(request.prompt.split())):
                words = [word + " " for word in f"re: {request.prompt}".split()]
                for piece in words if request.stream else ["".join(words)]:
                    if self.before_output:
                        self.before_output()
                    self.num_outputs += 1
                    output = self.output(request, piece, finished=not request.stream or piece is words[-1])
                    on_step()
                    request.finished = output.finished
                    yield output
                    if output.finished:
                        break
        except BaseException:
            self.num_broken_off += 1
            raise

    def output(self, request: SimpleNamespace, text: str, finished: bool) -> RequestOutput | BeamSearchOutput:
        samples = [
            CompletionOutput(
                index=index,
                text=text,
                token_ids=[ord(char) for char in text],
                cumulative_logprob=-1.5,
                logprobs=None if request.params.logprobs is None else [{7: -0.5, 8: float("-inf")}],
                finish_reason="stop" if finished else None,
            )
            for index in range(request.params.n)
        ]
        prompt_token_ids = [1] * len(request.prompt)
        return RequestOutput(request.request_id, request.prompt, prompt_token_ids, samples, finished, 4, METRICS)


class _StubClass:
    """Stands for the class LLM."""

    def __init__(self, run: Run) -> None:
        self.run = run

    def __call__(self, model: str | None, **settings: Any) -> StubLLM:
        return self.run.make(model, **settings)

    def for_requests(self, model: str | None, requests: Callable[[StubLLM], Any], **settings: Any) -> StubLLM:
        llm = self.run.make(model, **settings)
        self.run.known = requests(llm)
        return llm


class Run:
    """Runs the command line in this process, with `StubLLM` as the model."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.made: list[StubLLM] = []
        self.known: Any = None  # the requests for which the last one was made
        self.stub: type[StubLLM] = type("Stub", (StubLLM,), {})

        def make(model: str | None, **settings: Any) -> StubLLM:
            self.made.append(self.stub(model, **settings))
            return self.made[-1]

        self.make = make
        monkeypatch.setitem(vars(mlx_paged), "LLM", _StubClass(self))
        monkeypatch.setattr("mlx_paged.cli.loading.find_models", lambda model, engine: None)

    def __call__(self, *args: str, stdin: str | bytes | None = None) -> click.testing.Result:
        return click.testing.CliRunner().invoke(cli, args, input=stdin)

    @property
    def prompts(self) -> list[str]:
        return [request.prompt for request in self.made[-1].requests]

    @property
    def params(self) -> Any:
        return self.made[-1].requests[-1].params


def invoke(*args: str, stdin: str | None = None) -> click.testing.Result:
    """The command line in this process, with real models."""
    return click.testing.CliRunner().invoke(cli, args, input=stdin)


def start(*args: str, **kwargs: Any) -> subprocess.Popen[bytes]:
    """The command line as a process of its own, for which Ctrl-C works however the tests were started."""
    pipes: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(
        [sys.executable, "-m", "mlx_paged", *args],
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        **{**pipes, **kwargs},
    )


def assert_one_line(result: click.testing.Result, exit_code: int, *words: str) -> None:
    """The command failed with one line on stderr that has these words."""
    assert result.exit_code == exit_code, result.output
    assert result.stderr.startswith("mlx-paged: ") and result.stderr.count("\n") == 1, result.stderr
    for word in words:
        assert word in result.stderr
