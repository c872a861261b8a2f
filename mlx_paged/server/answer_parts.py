"""What a model writes, taken apart while it comes: thinking, text, tool calls.

The markers between them are mlx-lm's, by tokenizer, and so are the parsers of calls. They are found in the text and not
among the tokens, since a tokenizer may merge a marker with its neighbour.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from mlx_lm.generate import TextStateMachine

LOG = logging.getLogger(__name__)


class Part(NamedTuple):
    """A piece of an answer."""

    kind: str
    """"text", "thinking" or "call"."""
    text: str
    """What comes next of it; of a call its arguments, which are JSON."""
    name: str = ""
    """Of a call: the function."""


class AnswerParts:
    """Take one answer apart, piece by piece. Joined, the parts are the answer without its markers."""

    def __init__(self, tokenizer: Any, tools: Sequence[dict[str, Any]], *, is_thinking: bool = False) -> None:
        """tools: as chat templates take them; with none, calls are text. is_thinking: the prompt has begun to think."""
        self._tools = list(tools)
        self._parser = tokenizer.tool_parser if tools and tokenizer.has_tool_calling else None
        self._call_start, self._call_end = tokenizer.tool_call_start or "", tokenizer.tool_call_end or ""
        edges: dict[str, list[tuple[str, str]]] = {"text": [], "thinking": [], "call": []}
        if tokenizer.has_thinking:
            edges["text"].append((tokenizer.think_start, "thinking"))
            edges["thinking"].append((tokenizer.think_end, "text"))
        if self._parser is not None:
            edges["text"].append((self._call_start, "call"))
            if self._call_end:
                edges["call"].append((self._call_end, "text"))
        machine = TextStateMachine({kind: to for kind, to in edges.items() if to})
        self._state = machine.make_state("thinking" if is_thinking else "text")
        self._kind: str = self._state[0]
        self._call = ""  # what has come of the call that is being written
        self._spaces = self._call_spaces = ""  # at the text's end: they are dropped if a call follows
        self._after_marker = is_thinking
        self.num_calls = 0

    def feed(self, text: str) -> list[Part]:
        """Take what is new of the answer. Returns the parts that it certainly belongs to."""
        self._state, segments = TextStateMachine.split(self._state, text)
        parts: list[Part] = []
        for i, (kind, piece) in enumerate(segments):
            if i > 0:
                parts += self._pass_marker()
            self._kind = kind
            parts += self._add(piece)
        return parts

    def finish(self, *, cut: bool) -> list[Part]:
        """Say that the answer has ended. cut: not by itself, so a call may not be whole. Returns the last parts."""
        self._state, rest, _ = TextStateMachine.flush(self._state)
        parts = self._add(rest)
        if self._kind == "call":
            parts += self._end_call() if not (cut or self._call_end) else self._as_text(self._call_start + self._call)
        elif self._spaces and not self._after_marker:
            parts.append(Part("text", self._spaces))
        return parts

    def _add(self, piece: str) -> list[Part]:
        if self._kind == "call":
            self._call += piece
            return []
        if self._kind == "thinking":
            piece = piece.lstrip("\n") if self._after_marker else piece
            self._after_marker = self._after_marker and not piece
            return [Part("thinking", piece)] if piece else []
        text = self._spaces + piece
        if self._after_marker:
            text = text.lstrip()
        kept = text.rstrip() if self._parser is not None else text  # spaces before a call are none of the text's
        self._spaces = text[len(kept) :]
        if not kept:
            return []
        self._after_marker = False
        return [Part("text", kept)]

    def _pass_marker(self) -> list[Part]:
        parts = self._end_call() if self._kind == "call" else []
        self._call_spaces, self._spaces, self._after_marker = self._spaces, "", True
        return parts

    def _end_call(self) -> list[Part]:
        written, self._call = self._call, ""
        calls = list(self._parse(written))
        self.num_calls += len(calls)
        return calls or self._as_text(self._call_start + written + self._call_end)

    def _as_text(self, written: str) -> list[Part]:
        self._call = ""
        return [Part("text", self._call_spaces + written)]

    def _parse(self, written: str) -> Iterator[Part]:
        """The calls that the model's parser finds; none if it does not understand them, whatever it raises."""
        assert self._parser is not None
        try:
            found = self._parser(written.strip(), self._tools)
            calls = found if isinstance(found, list) else [found]
            parts = [Part("call", _arguments(call["arguments"]), str(call["name"])) for call in calls]
        except Exception as error:
            LOG.info("a tool call could not be parsed: %s", type(error).__name__)
            return
        yield from parts


def _arguments(arguments: Any) -> str:
    if not isinstance(arguments, str):
        return json.dumps(arguments, ensure_ascii=False)
    json.loads(arguments)
    return arguments


def starts_thinking(tokenizer: Any, prompt: Sequence[int]) -> bool:
    """Whether a prompt ends within thinking, as where the template opens it."""
    if not tokenizer.has_thinking:
        return False
    prompt = list(prompt)
    return bool(tokenizer.rfind_think_start(prompt) > tokenizer.rfind_think_end(prompt))


def count_thinking(tokenizer: Any, token_ids: Sequence[int], *, is_thinking: bool) -> int:
    """How many tokens of an answer are thinking, its markers included."""
    if not tokenizer.has_thinking:
        return 0
    token_ids = list(token_ids)
    end = tokenizer.find_think_end(token_ids)
    if not is_thinking and tokenizer.find_think_start(token_ids) < 0:
        return 0
    return len(token_ids) if end < 0 else end + len(tokenizer.think_end_tokens)
