"""A tool call that is being written in JSON: its name as soon as it is there, then its arguments as they come."""

from __future__ import annotations

import json
import re

from mlx_paged.server.json_prefix import JsonPrefix

# How calls begin that are handed out before they are whole. Its parts are bounded, so that it is soon known to fail.
_HEAD = re.compile(
    r'\s{0,20}\{\s{0,20}"name"\s{0,20}:\s{0,20}("(?:[^"\\\x00-\x1f]|\\.){1,200}")\s{0,20},'
    r'\s{0,20}"arguments"\s{0,20}:\s{0,20}(?=\{\s{0,20}["}])'
)
_MAX_HEAD = 700  # characters; no head is longer


class WrittenCall:
    """One call. What it says of a text does not depend on the pieces in which that came."""

    def __init__(self) -> None:
        self.text = ""
        """All that has been written."""
        self.name: str | None = None
        """The function; None until arguments that may become valid JSON have begun, and where they never do."""
        self.rest = ""
        """What was written behind those of its arguments that are JSON."""
        self._arguments = JsonPrefix()
        self._is_open = True  # it may still turn out to have a name

    def feed(self, text: str) -> str:
        """Take what is written next. Returns what is new of the arguments, as far as they are the beginning of JSON."""
        self.text += text
        if self.name is None:
            head = _HEAD.match(self.text) if self._is_open else None
            self._is_open = self._is_open and head is None and len(self.text) <= _MAX_HEAD
            if head is None:
                return ""
            try:
                self.name = str(json.loads(head[1]))
            except ValueError:  # of an escape that there is not
                return ""
            text = self.text[head.end() :]
        num = 0 if self.rest else self._arguments.feed(text)
        self.rest += text[num:]
        return text[:num]

    @property
    def leftover(self) -> str:
        """What was written and is no part of a call, at its end."""
        try:
            if self._arguments.is_whole and self.rest.strip() not in ("", "}"):
                json.loads(self.text)
        except (ValueError, RecursionError):
            return self.rest
        return "" if self._arguments.is_whole else self.rest
