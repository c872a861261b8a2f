"""`mlx-paged chat`: a conversation, and the commands that can be typed in it."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Mapping
from contextlib import closing, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlx_paged.cli.answers import error_of
from mlx_paged.cli.generate import make_request
from mlx_paged.cli.options import DEFAULT_MAX_TOKENS, read_text
from mlx_paged.cli.terminal import INTERRUPTED, RunSummary, Terminal
from mlx_paged.cli.turns import read_turn
from mlx_paged.config import meant_of
from mlx_paged.errors import PromptTooLong
from mlx_paged.outputs import RequestOutput
from mlx_paged.sampling_params import SamplingParams, is_text

if TYPE_CHECKING:
    from mlx_paged.engine.chat_template import TemplateOptions
    from mlx_paged.llm import LLM
    from mlx_paged.request import Request

HELP = '''\
""" ... """          a turn of several lines; pasted lines are one, and \\ at the end of a line goes on
/file NAME           put a text file before the next turn
/save NAME           write the conversation to a file
/load NAME           go on with a conversation that was saved
/set NAME VALUE      change a sampling parameter (/set temperature 0.7); /set alone shows them
/reset (or /clear)   forget the conversation
/exit (or Ctrl-D)    leave
Ctrl-C               stop the current answer'''
SETTABLE = (
    "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty",
    "max_tokens", "min_tokens", "max_thinking_tokens", "stop", "bad_words", "seed",
)  # fmt: skip
FULL = ("drop", "stop")  # what can be done when the context is full

Messages = list[dict[str, str]]


def require_chat_template(llm: LLM) -> None:
    """Raise ValueError, before weights are loaded, for a model that can't hold a conversation."""
    if not llm.has_chat_template:
        raise ValueError("this model has no chat template; mlx-paged generate --raw continues a text with it")


def hold_conversation(
    llm: LLM,
    params: SamplingParams,
    *,
    system: str | None,
    context_full: str,
    terminal: Terminal,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> int:
    """Talk until the input ends. Returns the exit code: 1 if something in piped input could not be done."""
    terminal.keep_names(SETTABLE)  # as /set has them
    opening = [] if system is None else [{"role": "system", "content": system}]
    template: TemplateOptions = {}
    if chat_template_kwargs is not None:
        template["chat_template_kwargs"] = chat_template_kwargs
    conversation = _Conversation(llm, params, opening, template, terminal, drops_oldest=context_full == "drop")
    terminal.note("/help shows what can be typed, Ctrl-D leaves")
    failed = False
    while True:
        try:
            turn = read_turn()
        except KeyboardInterrupt:
            terminal.end_answer()
            return INTERRUPTED
        if turn is None or turn in ("/exit", "/quit"):
            return 1 if failed and not sys.stdin.isatty() else 0
        try:
            conversation.take(turn)
        except (ValueError, OSError, click.UsageError) as error:
            failed = True
            terminal.failure(str(error))


class _Conversation:
    """What was said, and what is said next."""

    def __init__(
        self,
        llm: LLM,
        params: SamplingParams,
        opening: Messages,
        template: TemplateOptions,
        terminal: Terminal,
        *,
        drops_oldest: bool,
    ) -> None:
        self._llm = llm
        self._params = params
        self._opening = opening
        self._template = template
        self._terminal = terminal
        self._drops_oldest = drops_oldest
        self._messages = list(opening)
        self._files: list[str] = []  # to be put before the next turn

    def take(self, turn: str) -> None:
        """Answer a turn, or do what a command asks for. Raises ValueError or OSError, with nothing changed."""
        if not is_text(turn):
            raise ValueError("this turn is not UTF-8 text; the conversation goes on without it")
        command, _, argument = turn.partition(" ")
        argument = argument.strip()
        plain: dict[str, Callable[[], None]] = {"/reset": self._reset, "/clear": self._reset, "/help": self._help}
        named = {"/file": self._add_file, "/save": self._save, "/load": self._load}
        if turn in plain:
            plain[turn]()
        elif command == "/set":
            self._set(argument)
        elif command in named and "\n" not in turn:
            if not argument:
                raise ValueError(f"{command} needs the name of a file")
            named[command](Path(argument).expanduser())
        elif turn[:1] == "/" and turn[1:].isalpha():
            self._terminal.to_stderr(f"there is no {turn}; /help shows what can be typed")
        elif turn:
            self._answer(turn)

    def _say(self, text: str) -> None:
        if not self._terminal.quiet:
            self._terminal.to_stderr(text)

    def _help(self) -> None:
        self._terminal.to_stderr(HELP)

    def _reset(self) -> None:
        self._messages, self._files = list(self._opening), []
        self._say("the conversation is forgotten" + (", but for the system message" if self._opening else ""))

    def _set(self, argument: str) -> None:
        name, _, text = argument.partition(" ")
        name = {"temp": "temperature"}.get(name, name.replace("-", "_"))
        if not name:
            self._say(", ".join(f"{each} {getattr(self._params, each)}" for each in SETTABLE))
            return
        if name not in SETTABLE:
            raise ValueError(f"/set knows no {name!r}: {meant_of(name, SETTABLE)}")
        try:
            value = json.loads(text)
        except ValueError:
            value = None if text.strip().lower() == "none" else text.strip()
        self._params = dataclasses.replace(self._params, **{name: value})
        self._say(f"{name} is {getattr(self._params, name)}")

    def _add_file(self, path: Path) -> None:
        text = read_text(path)
        self._files.append(text)
        self._say(f"{path}, {len(text)} characters, goes before your next turn")

    def _save(self, path: Path) -> None:
        if path.exists():
            try:
                _read_messages(path)
            except (ValueError, click.UsageError):
                raise ValueError(f"{path} exists and holds something else, which is left as it is") from None
        path.write_text(json.dumps(self._messages, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
        self._say(f"{len(self._messages)} messages are in {path}")

    def _load(self, path: Path) -> None:
        self._messages, self._files = _read_messages(path), []
        self._opening = self._messages[:1] if self._messages and self._messages[0]["role"] == "system" else []
        self._say(f"{len(self._messages)} messages from {path}")

    def _answer(self, turn: str) -> None:
        """Show the answer to a turn. Both are remembered, unless there is none."""
        content = "\n\n".join([*self._files, turn])
        self._files = []
        try:
            request, messages = self._make_request({"role": "user", "content": content})
            answer = self._stream(request)
        except ValueError as error:
            if self._drops_oldest and isinstance(error, PromptTooLong):  # it does not fit alone
                raise
            raise ValueError(f"{error}; /reset begins a new conversation") from error
        if answer:
            self._messages = [*messages, {"role": "assistant", "content": answer}]

    def _make_request(self, turn: dict[str, str]) -> tuple[Request, Messages]:
        """Make the request for a turn. Returns it and the messages that it has: without the oldest turns, if need be.

        Raises PromptTooLong if the turn does not even fit alone, or nothing is to be dropped.
        """
        messages, oldest, num_dropped = [*self._messages, turn], len(self._opening), 0
        while True:
            try:
                prompt = self._llm.encode_chat(messages, **self._template)
                request = make_request(self._llm, prompt, self._params, stream=True)
                if self._has_room(request):
                    break
            except PromptTooLong:
                if not self._can_drop(messages):
                    raise
            if not self._can_drop(messages):
                break
            next_turn = next(i for i in range(oldest + 1, len(messages)) if messages[i]["role"] == "user")
            del messages[oldest:next_turn]
            num_dropped += 1
        if num_dropped:
            turns = "turn is" if num_dropped == 1 else f"{num_dropped} turns are"
            self._say(f"(the context is full: the oldest {turns} left out from here on)")
        return request, messages

    def _can_drop(self, messages: Messages) -> bool:
        return self._drops_oldest and len(messages) - 1 > len(self._opening)

    def _has_room(self, request: Request) -> bool:
        """Say whether there is room for an answer: for all that was asked for, or a quarter of the context."""
        context = len(request.prompt_token_ids) + request.max_tokens
        return request.max_tokens >= min(self._params.max_tokens or DEFAULT_MAX_TOKENS, context // 4)

    def _stream(self, request: Request) -> str:
        """Stream the answer and return it, as far as it came if Ctrl-C stopped it. Raises ValueError if it failed."""
        terminal = self._terminal
        summary = RunSummary()
        pieces: list[str] = []
        error = None
        # Ctrl-C comes between two steps: the engine lets none be torn.
        with suppress(KeyboardInterrupt), closing(self._llm.run([request])) as outputs:
            for output in outputs:
                assert isinstance(output, RequestOutput)
                summary.count(output)
                error = error_of(output)
                for sample in output.outputs:
                    pieces.append(sample.text)
                    terminal.answer(sample.text)
                    if sample.finish_reason == "length":
                        terminal.end_answer()
                        self._say_where_it_ended(summary.generated_tokens)
        terminal.end_answer()
        if error is not None:
            raise ValueError(error)
        if terminal.verbose:
            terminal.note(*summary.lines(self._llm))
        return "".join(pieces)

    def _say_where_it_ended(self, num_tokens: int) -> None:
        is_asked = num_tokens >= (self._params.max_tokens or DEFAULT_MAX_TOKENS)
        reason = "/set max_tokens allows more" if is_asked else "the context is full"
        self._terminal.note(f"(ended after {num_tokens} tokens; {reason})")


def _read_messages(path: Path) -> Messages:
    """Read a conversation that was saved. Raises ValueError for a file that holds something else."""
    try:
        messages = json.loads(read_text(path))
    except (ValueError, RecursionError):
        messages = None
    if not isinstance(messages, list) or not all(map(_is_message, messages)):
        raise ValueError(f'{path} holds no conversation: that is a list of {{"role": ..., "content": ...}}')
    return messages


def _is_message(message: object) -> bool:
    return isinstance(message, dict) and all(isinstance(message.get(name), str) for name in ("role", "content"))
