"""Read what is typed or piped into a conversation, a turn at a time: a line, or several that belong together."""

from __future__ import annotations

import select
import sys
from contextlib import suppress

_QUOTES = '"""'


def read_turn() -> str | None:
    '''Read a turn. Returns it without surrounding space, None at the end of the input.

    A turn is a line. It goes on after a backslash at the end of a line, from """ to the next """, and with lines that
    were pasted together. Bytes that are not UTF-8 come as lone surrogates.
    '''
    line = _read_line("> ")
    if line is None:
        return None
    if line.lstrip().startswith(_QUOTES):
        return _read_quoted(line.lstrip().removeprefix(_QUOTES))
    lines = [line]
    while line is not None and (line.endswith("\\") or (not lines[0].startswith("/") and _more_is_waiting())):
        lines[-1] = lines[-1].removesuffix("\\")
        if (line := _read_line("... ")) is not None:
            lines.append(line)
    return "\n".join(lines).strip()


def _read_quoted(text: str) -> str:
    while not text.rstrip().endswith(_QUOTES):
        line = _read_line("... ")
        if line is None:
            break
        text += f"\n{line}"
    return text.strip().removesuffix(_QUOTES).strip()


def _read_line(prompt: str) -> str | None:
    """Read a line without its end. Returns None at the end of the input."""
    if sys.stdin is None:
        return None
    if sys.stdin.isatty() and sys.stdout.isatty():
        with suppress(ImportError):
            import readline  # gives input() its editing keys and history

            readline.parse_and_bind("set enable-bracketed-paste on")  # a paste of several lines is one
        try:
            return input(prompt)
        except EOFError:
            print()
            return None
        except UnicodeDecodeError as error:
            return error.object.decode("utf-8", "surrogateescape")
    line = sys.stdin.buffer.readline()
    return line.decode("utf-8-sig", "surrogateescape").rstrip("\r\n") if line else None


def _more_is_waiting() -> bool:
    """Say whether another line has arrived already, which only a paste does so fast."""
    return sys.stdin is not None and sys.stdin.isatty() and bool(select.select([sys.stdin], [], [], 0.05)[0])
