"""`mlx-paged chat`: a conversation; each line that is typed or piped in is one turn."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from contextlib import closing, suppress
from typing import TYPE_CHECKING, Any

from mlx_paged.cli.answers import error_of
from mlx_paged.cli.generate import make_request
from mlx_paged.cli.terminal import INTERRUPTED, RunSummary, Terminal
from mlx_paged.outputs import RequestOutput
from mlx_paged.sampling_params import SamplingParams

if TYPE_CHECKING:
    from mlx_paged.llm import LLM

HELP = """/reset (or /clear)  forget the conversation
/exit (or Ctrl-D)   leave
Ctrl-C              stop the current answer"""


def require_chat_template(llm: LLM) -> None:
    """Raise ValueError, before weights are loaded, for a model that can't hold a conversation."""
    if not llm.has_chat_template:
        raise ValueError("this model has no chat template; mlx-paged generate --raw continues a text with it")


def hold_conversation(
    llm: LLM,
    params: SamplingParams,
    *,
    system: str | None,
    terminal: Terminal,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> int:
    """Talk until the input ends. Returns the exit code: 1 if a turn of piped input could not be answered."""
    opening = [] if system is None else [{"role": "system", "content": system}]
    messages = list(opening)
    template = {} if chat_template_kwargs is None else {"chat_template_kwargs": chat_template_kwargs}
    failed = False
    terminal.note("/help shows what can be typed, Ctrl-D leaves")
    while True:
        try:
            line = _read_line()
        except KeyboardInterrupt:
            terminal.end_answer()
            return INTERRUPTED
        if line is None or line in ("/exit", "/quit"):
            return 1 if failed and not sys.stdin.isatty() else 0
        if line in ("/reset", "/clear"):
            messages = list(opening)
        elif line == "/help":
            terminal.to_stderr(HELP)
        elif line[:1] == "/" and line[1:].isalpha():
            terminal.to_stderr(f"there is no {line}; /help shows what can be typed")
        elif line:
            turn = [*messages, {"role": "user", "content": line}]
            try:
                answer = _answer(llm, llm.encode_chat(turn, **template), params, terminal)
            except ValueError as error:
                failed = True
                terminal.failure(f"{error}; /reset begins a new conversation")
            else:
                messages = [*turn, {"role": "assistant", "content": answer}] if answer else messages


def _answer(llm: LLM, prompt: list[int], params: SamplingParams, terminal: Terminal) -> str:
    """Stream the answer and return it, as far as it came if Ctrl-C stopped it. Raises ValueError if there is none."""
    request = make_request(llm, prompt, params, stream=True)
    summary = RunSummary()
    pieces: list[str] = []
    error = None
    # Ctrl-C comes between two steps: the engine lets none be torn.
    with suppress(KeyboardInterrupt), closing(llm.run([request])) as outputs:
        for output in outputs:
            assert isinstance(output, RequestOutput)
            summary.count(output)
            error = error_of(output)
            for sample in output.outputs:
                pieces.append(sample.text)
                terminal.answer(sample.text)
                if sample.finish_reason == "length":
                    terminal.end_answer()
                    terminal.note(f"(ended after {summary.generated_tokens} tokens; --max-tokens allows more)")
    terminal.end_answer()
    if error is not None:
        raise ValueError(error)
    if terminal.verbose:
        terminal.note(*summary.lines(llm))
    return "".join(pieces)


def _read_line() -> str | None:
    """Read a line. Returns it without surrounding space, None at the end of the input."""
    if sys.stdin is None:
        return None
    if sys.stdin.isatty() and sys.stdout.isatty():
        import readline  # noqa: F401  (gives input() its editing keys and history)

        try:
            return input("> ").strip()
        except EOFError:
            print()
            return None
    line = sys.stdin.readline()
    return line.strip() if line else None
