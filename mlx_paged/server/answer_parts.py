"""What a model writes, taken apart while it comes: thinking, text, tool calls.

The markers between them are mlx-lm's, by tokenizer, and so are the parsers of calls. They are found in the text and not
among the tokens, since a tokenizer may merge a marker with its neighbour.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from mlx_lm.generate import TextStateMachine

from mlx_paged.sampling.thinking import starts_thinking as starts_thinking
from mlx_paged.server.written_call import WrittenCall

LOG = logging.getLogger(__name__)


class Part(NamedTuple):
    """A piece of an answer."""

    kind: str
    """"text", "thinking" or "call"."""
    text: str
    """What comes next of it; of a call its arguments, which are JSON."""
    name: str = ""
    """Of a call's first piece: the function."""


def join_parts(parts: Iterable[Part]) -> list[Part]:
    """Join the pieces of a whole answer: each call is one part, and so is all text between two others."""
    joined: list[Part] = []
    for part in parts:
        if joined and part.kind == joined[-1].kind and not part.name:
            joined[-1] = joined[-1]._replace(text=joined[-1].text + part.text)
        else:
            joined.append(part)
    return joined


class AnswerParts:
    """Take one answer apart, piece by piece. Joined, the parts are the answer without its markers.

    Calls that are JSON are handed out while they are written, so one that is cut short, or stops being JSON, has
    arguments that are the beginning of JSON. Others are handed out when they are whole; what is no call is text.
    """

    def __init__(
        self,
        tokenizer: Any,
        tools: Sequence[dict[str, Any]],
        *,
        is_thinking: bool = False,
        is_plain_call: bool = False,
    ) -> None:
        """tools: as chat templates take them; with none, calls are text. is_thinking: the prompt has begun to think.

        is_plain_call: all of the answer is one call, JSON without markers.
        """
        self._tools = list(tools)
        self._parser = tokenizer.tool_parser if tools and tokenizer.has_tool_calling else None
        self._call_start, self._call_end = tokenizer.tool_call_start or "", tokenizer.tool_call_end or ""
        self._is_json = getattr(self._parser, "__module__", "").endswith(".json_tools")
        if is_plain_call:
            self._parser, self._is_json, self._call_start, self._call_end = _parse_json, True, "{", ""
        self._call_head = "{" if is_plain_call else ""  # of what opens a call, that which belongs to it
        edges: dict[str, list[tuple[str, str]]] = {"text": [], "thinking": [], "call": []}
        if tokenizer.has_thinking:
            edges["text"].append((tokenizer.think_start, "thinking"))
            edges["thinking"].append((tokenizer.think_end, "text"))
        if self._parser is not None:
            edges["text"].append((self._call_start, "call"))
            if edges["thinking"] and not is_plain_call:  # some models call without closing their thinking
                edges["thinking"].append((self._call_start, "call"))
            if self._call_end:
                edges["call"].append((self._call_end, "text"))
        machine = TextStateMachine(edges)
        self._state = machine.make_state("thinking" if is_thinking else "text")
        self._kind: str = self._state[0]
        self._call = WrittenCall()
        self._spaces = self._call_spaces = ""  # at the text's end: they are dropped if a call follows
        self._after_marker = is_thinking
        self.num_calls = 0
        """How many have been handed out."""

    def feed(self, text: str) -> list[Part]:
        """Take what is new of the answer. Returns the parts that it certainly belongs to."""
        self._state, segments = TextStateMachine.split(self._state, text)
        parts: list[Part] = []
        for i, (kind, piece) in enumerate(segments):
            if i > 0:
                parts += self._pass_marker(kind)
            self._kind = kind
            parts += self._add(piece)
        return parts

    def finish(self, *, cut: bool) -> list[Part]:
        """Say that the answer has ended. cut: not by itself, so a call may not be whole. Returns the last parts."""
        self._state, rest, _ = TextStateMachine.flush(self._state)
        parts = self._add(rest)
        if self._kind == "call":
            parts += self._end_call(is_whole=not cut and not self._call_end)
        elif self._spaces and not self._after_marker:
            parts.append(Part("text", self._spaces))
        return parts

    def _add(self, piece: str) -> list[Part]:
        if self._kind == "call":
            return self._add_to_call(piece)
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

    def _pass_marker(self, to: str) -> list[Part]:
        parts = self._end_call(is_whole=True) if self._kind == "call" else []
        self._call_spaces, self._spaces = self._spaces, ""
        self._after_marker = not (parts and parts[-1].kind == "text")  # spaces behind what was no call are the text's
        if to == "call":
            self._call = WrittenCall()
            parts += self._add_to_call(self._call_head)
        return parts

    def _add_to_call(self, piece: str) -> list[Part]:
        call = self._call
        if not self._is_json:
            call.text += piece
            return []
        was_named = call.name is not None
        arguments = call.feed(piece)
        if call.name is None:
            return []
        if not was_named:
            self.num_calls += 1
            return [Part("call", arguments, call.name)]
        return [Part("call", arguments)] if arguments else []

    def _end_call(self, *, is_whole: bool) -> list[Part]:
        call, self._call = self._call, WrittenCall()
        if call.name is not None:
            return [Part("text", call.leftover)] if call.leftover else []
        calls = list(self._parse(call.text)) if is_whole else []
        self.num_calls += len(calls)
        if calls:
            return calls
        start = self._call_start.removesuffix(self._call_head)
        return [Part("text", self._call_spaces + start + call.text + (self._call_end if is_whole else ""))]

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


def _parse_json(text: str, tools: Any) -> Any:
    return json.loads(text)


def _arguments(arguments: Any) -> str:
    if not isinstance(arguments, str):
        return json.dumps(arguments, ensure_ascii=False)
    json.loads(arguments)
    return arguments


def require_readable(tokenizer: Any) -> None:
    """Raise ValueError for a model whose answers can't be taken apart."""
    vocab = tokenizer.get_vocab()
    if "<|channel|>" in vocab and "<|message|>" in vocab:
        raise ValueError(
            "this model writes in channels (harmony, as gpt-oss does), which serve can't take apart: "
            "use generate, chat or Python, or serve another model"
        )


def count_thinking(tokenizer: Any, token_ids: Sequence[int], *, is_thinking: bool) -> int:
    """How many tokens of an answer are thinking, its markers included."""
    if not tokenizer.has_thinking:
        return 0
    token_ids = list(token_ids)
    end = tokenizer.find_think_end(token_ids)
    if not is_thinking and tokenizer.find_think_start(token_ids) < 0:
        return 0
    return len(token_ids) if end < 0 else end + len(tokenizer.think_end_tokens)
