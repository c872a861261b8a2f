"""JSON that is not whole yet: how far it has come, and whether it can still become a value."""

from __future__ import annotations

import re

_PLAIN = re.compile(r'[^"\\\x00-\x1f]+')  # a run of characters within a string
_SPACE = " \t\n\r"
_WORDS = {"t": "rue", "f": "alse", "n": "ull"}
_DIGITS = "0123456789"
# Of a number's beginning, by what has come last: what may come next. Those with an empty key are whole as they are.
_NUMBER: dict[str, dict[str, str]] = {
    "-": {"0": "0"} | dict.fromkeys("123456789", "int"),
    "0": {"": "", ".": ".", "e": "e", "E": "e"},
    "int": {"": "", ".": ".", "e": "e", "E": "e"} | dict.fromkeys(_DIGITS, "int"),
    ".": dict.fromkeys(_DIGITS, "frac"),
    "frac": {"": "", "e": "e", "E": "e"} | dict.fromkeys(_DIGITS, "frac"),
    "e": {"+": "sign", "-": "sign"} | dict.fromkeys(_DIGITS, "exp"),
    "sign": dict.fromkeys(_DIGITS, "exp"),
    "exp": {"": ""} | dict.fromkeys(_DIGITS, "exp"),
}


class JsonPrefix:
    """Follow one JSON object or list, as it is written."""

    def __init__(self) -> None:
        self._open: list[str] = []  # brackets that are to be closed, as they close
        self._expected = "value"
        self._rest = ""  # of a word or an escape: characters that are still to come
        self._is_key = False
        self.is_whole = False

    def feed(self, text: str) -> int:
        """Take what is written next. Returns how many characters of it fit; what follows a whole value does not."""
        i = 0
        while i < len(text) and not self.is_whole:
            if self._expected == "string" and (run := _PLAIN.match(text, i)):
                i = run.end()
            elif self._take(text[i]):
                i += 1
            else:
                break
        return i

    def _take(self, c: str) -> bool:
        if self._expected in _NUMBER:
            following = _NUMBER[self._expected]
            if c in following:
                self._expected = following[c]
                return True
            if "" not in following:
                return False
            self._expected = "next"
        if self._expected in ("string", "escape", "hex", "word"):
            return self._take_within(c)
        if c in _SPACE:
            return True
        if self._expected == "colon":
            self._expected = "value"
            return c == ":"
        if self._expected in ("next", "first", "first key") and c == self._open[-1]:
            self._open.pop()
            self._expected, self.is_whole = "next", not self._open
            return True
        if self._expected == "next":
            self._expected = "key" if self._open[-1] == "}" else "value"
            return c == ","
        if self._expected in ("key", "first key"):
            self._expected, self._is_key = "string", True
            return c == '"'
        return self._begin_value(c)

    def _begin_value(self, c: str) -> bool:
        if c in "{[":
            self._open.append("}" if c == "{" else "]")
            self._expected = "first key" if c == "{" else "first"
        elif not self._open:
            return False
        elif c == '"':
            self._expected, self._is_key = "string", False
        elif c in _WORDS:
            self._expected, self._rest = "word", _WORDS[c]
        elif c == "-" or c in _DIGITS:
            self._expected = c if c in "-0" else "int"
        else:
            return False
        return True

    def _take_within(self, c: str) -> bool:
        if self._expected == "word":
            is_right, self._rest = c == self._rest[0], self._rest[1:]
            self._expected = "word" if self._rest else "next"
            return is_right
        if self._expected == "escape":
            self._expected, self._rest = ("hex", "0000") if c == "u" else ("string", "")
            return c in '"\\/bfnrtu'
        if self._expected == "hex":
            self._rest = self._rest[1:]
            self._expected = "hex" if self._rest else "string"
            return c in "0123456789abcdefABCDEF"
        if c == "\\":
            self._expected = "escape"
        elif c == '"':
            self._expected = "colon" if self._is_key else "next"
        return c >= " "
