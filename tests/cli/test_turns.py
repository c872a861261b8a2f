"""What belongs to one turn: lines with a backslash, lines between quotes, lines that were pasted."""

from __future__ import annotations

import os
import pty
import re
import select
import subprocess
import sys
import time

import pytest
from helpers.stub_llm import Run

QUOTES = '"""'


@pytest.mark.parametrize(
    "typed, turns",
    [
        ("one\ntwo\n", ["one", "two"]),
        ("  one  \r\n", ["one"]),
        ("one\\\ntwo\\\nthree\nfour\n", ["one\ntwo\nthree", "four"]),
        ("one\\\n\ntwo\n", ["one", "two"]),
        ("one\\", ["one"]),
        (f"{QUOTES}one\n\n  two{QUOTES}\nthree\n", ["one\n\n  two", "three"]),
        (f"{QUOTES}\none\n/reset\n{QUOTES}\n", ["one\n/reset"]),
        (f"{QUOTES}one{QUOTES}\ntwo\n", ["one", "two"]),
        (f"{QUOTES}one\ntwo", ["one\ntwo"]),
        (f"{QUOTES}{QUOTES}\none\n", ["one"]),
        (f"say {QUOTES}\ntwo\n", [f"say {QUOTES}", "two"]),
    ],
    ids=ascii,
)
def test_lines_that_belong_together_are_one_turn(run: Run, typed: str, turns: list[str]) -> None:
    assert run("chat", stdin=typed).exit_code == 0
    expected, before = [], ""
    for turn in turns:
        expected.append(f"{before}user:{turn}")
        before = f"{expected[-1]} assistant:re: {' '.join(expected[-1].split())}  "
    assert run.prompts == expected


READ = (
    "import sys; from mlx_paged.cli.turns import read_turn; print('ready', flush=True)\n"
    "while (turn := read_turn()) is not None: print('turn', ascii(turn), flush=True)"
)


def read_until(terminal: int, pattern: bytes) -> None:
    """Read what is shown on the terminal, up to what fits a pattern."""
    seen, end = b"", time.monotonic() + 60
    while not re.search(pattern, seen, re.DOTALL):
        assert select.select([terminal], [], [], max(0, end - time.monotonic()))[0], seen
        seen += os.read(terminal, 4096)


@pytest.mark.parametrize(
    "pasted", [b"one\ntwo\nthree\n", b"\x1b[200~one\ntwo\nthree\x1b[201~\n"], ids=["as typed", "as a bracketed paste"]
)
def test_lines_that_are_pasted_into_a_terminal_are_one_turn_and_typed_ones_are_not(pasted: bytes) -> None:
    terminal, other = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "INPUTRC": os.devnull}
    process = subprocess.Popen([sys.executable, "-c", READ], stdin=other, stdout=other, stderr=other, env=environment)
    try:
        read_until(terminal, b"> ")
        os.write(terminal, pasted)
        read_until(terminal, rb"turn 'one\\ntwo\\nthree'.*> ")
        for line, turn in ((b"four", b"four"), (b"\xff", rb"\\udcff")):
            os.write(terminal, line + b"\n")
            read_until(terminal, b"turn '" + turn + b"'.*> ")
        os.write(terminal, b"\x04")
        assert process.wait(60) == 0
    finally:
        process.kill()
        os.close(terminal)
        os.close(other)
