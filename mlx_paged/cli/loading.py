"""Load the model of a command: warnings, Ctrl-C, and a profile of what it does."""

from __future__ import annotations

import os
import signal
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from mlx_paged.cli.terminal import INTERRUPTED, Terminal
from mlx_paged.errors import EngineWarning
from mlx_paged.sampling_params import BeamSearchParams, SamplingParams

if TYPE_CHECKING:
    from mlx_paged.llm import LLM

Params = SamplingParams | BeamSearchParams
Prompt = str | list[int]
Requests = Callable[["LLM"], Iterable[tuple[Prompt, Params]] | None]


@contextmanager
def loading(terminal: Terminal) -> Iterator[None]:
    """Silence other libraries' warnings while a model is loaded, and have Ctrl-C end the process at once."""
    if not terminal.verbose:
        warnings.simplefilter("ignore")
        os.environ.setdefault("HF_HUB_VERBOSITY", "error")
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    warnings.simplefilter("always", EngineWarning)
    warnings.showwarning = lambda message, *_: None if terminal.quiet else terminal.to_stderr(f"mlx-paged: {message}")
    if not terminal.shows_notes:
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    terminal.progress("loading ...")
    previous = signal.getsignal(signal.SIGINT)
    if previous is signal.default_int_handler:
        signal.signal(signal.SIGINT, _exit_now)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
        terminal.progress("")


def find_model(model: str | None) -> None:
    """Check that a model can be had, before anything heavy is imported. Raises ModelError."""
    from mlx_paged.models import hub

    hub.resolve(model, config_only=True)


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
        find_model(model)
        from mlx_paged import LLM

        llm = LLM(model, **engine) if requests is None else LLM.for_requests(model, requests, **engine)
    terminal.note(llm.describe_memory())
    return llm


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


def _exit_now(*_: object) -> NoReturn:
    """End the process at once: after a KeyboardInterrupt a download's threads would first finish their files."""
    os.write(2, b"\n")
    os._exit(INTERRUPTED)
