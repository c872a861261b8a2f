"""`mlx-paged chat`: a conversation; each line that is typed or piped in is one turn."""

from __future__ import annotations

import signal
import sys
from types import FrameType
from typing import TYPE_CHECKING

from mlx_paged.cli.batch import INTERRUPTED, encode_chat, submit
from mlx_paged.cli.terminal import Tally, Terminal
from mlx_paged.outputs import RequestOutput
from mlx_paged.sampling_params import SamplingParams

if TYPE_CHECKING:
    from mlx_paged.llm import LLM

HELP = """/reset (or /clear)  forget the conversation
/exit (or Ctrl-D)   leave
Ctrl-C              stop the current answer"""


def run(llm: LLM, params: SamplingParams, *, system: str | None, terminal: Terminal) -> int:
    """Talks until the input ends and returns the exit code: 1 if a turn of piped input could not be answered."""
    if not llm.has_chat_template:
        terminal.failure("this model has no chat template; mlx-paged generate --raw continues a text with it")
        return 1
    opening = [] if system is None else [{"role": "system", "content": system}]
    messages = list(opening)
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
            terminal.say(HELP)
        elif line[:1] == "/" and line[1:].isalpha():
            terminal.say(f"there is no {line}; /help shows what can be typed")
        elif line:
            turn = [*messages, {"role": "user", "content": line}]
            try:
                answer = _answer(llm, turn, params, terminal)
            except ValueError as error:
                failed = True
                terminal.failure(f"{error}; /reset begins a new conversation")
            else:
                messages = [*turn, {"role": "assistant", "content": answer}] if answer else messages


def _answer(llm: LLM, messages: list[dict[str, str]], params: SamplingParams, terminal: Terminal) -> str:
    """Streams the answer and returns it, as far as it came if Ctrl-C stopped it. Raises ValueError if it can't fit."""
    request_id = submit(llm, encode_chat(llm, messages), params, stream=True)
    tally = Tally()
    pieces: list[str] = []
    with Interruption() as interruption:
        while llm.engine.has_unfinished():
            if interruption.requested:
                llm.engine.abort(request_id)
                break
            for output in llm.engine.step():
                assert isinstance(output, RequestOutput)
                tally.count(output)
                for sample in output.outputs:
                    pieces.append(sample.text)
                    terminal.answer(sample.text)
                    if sample.finish_reason == "error":
                        terminal.end_answer()
                        raise ValueError(str(sample.stop_reason))
                    if sample.finish_reason == "length":
                        terminal.end_answer()
                        terminal.note(f"(ended after {tally.generated_tokens} tokens; --max-tokens allows more)")
            if terminal.verbose:
                tally.look_at_pool(llm)
    terminal.end_answer()
    if terminal.verbose:
        for text in tally.lines():
            terminal.note(text)
    return "".join(pieces)


class Interruption:
    """Ctrl-C as a request that is looked at between steps, so that a step is never torn; a second one raises."""

    def __init__(self) -> None:
        self.requested = False

    def __enter__(self) -> Interruption:
        self._previous = signal.signal(signal.SIGINT, self._request)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._previous)

    def _request(self, _signal: int, _frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True


def _read_line() -> str | None:
    """The next line without surrounding space, None at the end of the input."""
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
