"""Load the model of a command: warnings, signals that end it, and a profile of what it does."""

from __future__ import annotations

import dataclasses
import os
import signal
import threading
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import click

from mlx_paged.cli.terminal import INTERRUPTED, Terminal
from mlx_paged.errors import EngineWarning, model_errors_of
from mlx_paged.sampling_params import BeamSearchParams, SamplingParams

if TYPE_CHECKING:
    from mlx_paged.llm import LLM

Params = SamplingParams | BeamSearchParams
Given = TypeVar("Given", bound=Params)
Prompt = str | list[int]
Requests = Callable[["LLM"], Iterable[tuple[Prompt, Params]] | None]

_ENDING = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]


@contextmanager
def loading(terminal: Terminal) -> Iterator[None]:
    """Silence other libraries' warnings while a model is loaded, and have signals end the process at once."""
    if not terminal.verbose:
        warnings.simplefilter("ignore")
        os.environ.setdefault("HF_HUB_VERBOSITY", "error")
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    warnings.simplefilter("always", EngineWarning)
    warnings.showwarning = lambda message, *_: terminal.warn_of_engine(str(message))
    if not terminal.shows_notes:
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    terminal.progress("loading ...")
    numbers = (signal.SIGINT, *_ENDING)
    handlers = {n: h for n in numbers if (h := signal.getsignal(n)) in (signal.default_int_handler, _exit)}
    for number in handlers:
        signal.signal(number, _exit_now)
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        terminal.progress("")


def find_models(model: str | None, engine: Mapping[str, Any]) -> None:
    """Check that a model and its draft model can be had, before anything heavy is imported. Raises ModelError.

    engine: settings of its EngineConfig.
    """
    from mlx_paged.models import hub

    hub.resolve(model, config_only=True)
    if draft_model := (engine.get("speculative_config") or {}).get("model"):
        with model_errors_of(f"draft model {draft_model}"):
            hub.resolve(draft_model, config_only=True)


def check_form(params: Params) -> None:
    """Check the form that an output must have, as far as that goes without a model. Raises ValueError, ImportError."""
    if isinstance(params, SamplingParams) and params.is_constrained:
        from mlx_paged.sampling import grammar

        grammar.check(params)


def load_model(model: str | None, engine: dict[str, Any], terminal: Terminal, requests: Requests | None = None) -> LLM:
    """Load a model, and note what its KV cache takes. engine: settings of its EngineConfig.

    requests: asked before the weights are loaded for what will be run, as in `LLM.for_requests`.
    """
    with loading(terminal):
        find_models(model, engine)
        from mlx_paged import LLM

        llm = LLM(model, **engine) if requests is None else LLM.for_requests(model, requests, **engine)
    terminal.note(llm.describe_memory())
    return llm


def complete_params(params: Given, given: Collection[str], llm: LLM, terminal: Terminal) -> Given:
    """Take from the model's generation_config.json what was not given; sampling is greedy if it does not say."""
    if not isinstance(params, SamplingParams):
        return params
    recommended = {name: value for name, value in llm.sampling_defaults.items() if name not in given}
    if terminal.verbose and recommended:
        listed = ", ".join(f"{name} {value:g}" for name, value in recommended.items())
        terminal.note(f"sampling as the model's generation_config.json has it: {listed}")
    greedy = {} if "temperature" in given else {"temperature": 0.0}
    return dataclasses.replace(params, **(greedy | recommended))


@contextmanager
def model_loader(
    model: str | None, engine: dict[str, Any], terminal: Terminal, *, profile: Path | None
) -> Iterator[Callable[[Requests], LLM]]:
    """Yield the function that loads a model for requests; write at the end to `profile`, if given, where time went.

    Raises click.UsageError at once if that file can't be written.
    """
    loaded: list[LLM] = []

    def load(requests: Requests) -> LLM:
        settings = engine if profile is None else engine | {"profile": True}
        loaded.append(load_model(model, settings, terminal, requests))
        return loaded[0]

    if profile is not None:
        try:
            profile.open("a").close()
        except OSError as error:
            raise click.UsageError(f"--profile: {error.strerror}: {profile}") from None
    try:
        yield load
    finally:
        if profile is not None and loaded and (measured := loaded[0].profile) is not None:
            if not terminal.quiet:
                terminal.to_stderr(measured.table())
            measured.write(profile)


@contextmanager
def ending_signals() -> Iterator[None]:
    """Have TERM and HUP end a command as Ctrl-C does, all cleared up, unless they are ignored or handled."""
    in_main_thread = threading.current_thread() is threading.main_thread()  # the only one that may ask for signals
    numbers = [number for number in _ENDING if in_main_thread and signal.getsignal(number) is signal.SIG_DFL]
    for number in numbers:
        signal.signal(number, _exit)
    try:
        yield
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)


def _exit(*_: object) -> NoReturn:
    """End the process, in chat as well, where KeyboardInterrupt ends an answer."""
    raise SystemExit(INTERRUPTED)


def _exit_now(*_: object) -> NoReturn:
    """End the process at once: after a KeyboardInterrupt a download's threads would first finish their files."""
    os.write(2, b"\n")
    os._exit(INTERRUPTED)
