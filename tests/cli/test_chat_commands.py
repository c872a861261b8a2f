"""What can be typed in a conversation beside turns: files, sampling parameters, saving and loading."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.stub_llm import Run, assert_one_line

from mlx_paged.cli.chat import HELP, SETTABLE
from mlx_paged.sampling_params import SamplingParams


def test_help_lists_every_command(run: Run) -> None:
    assert run("chat", stdin="/help\n").stderr == HELP + "\n"
    for command in ("/file", "/save", "/load", "/set", "/reset", "/clear", "/exit", '"""', "Ctrl-C", "Ctrl-D"):
        assert command in HELP
    assert all(len(line) <= 110 for line in HELP.splitlines())


def test_a_file_goes_before_the_next_turn_and_only_that_one(run: Run, tmp_path: Path) -> None:
    (tmp_path / "my notes.txt").write_bytes(b"\xef\xbb\xbfred\nkite\n")
    result = run("chat", stdin=f"/file {tmp_path / 'my notes.txt'}\nWhat colour?\nSure?\n")
    assert (result.exit_code, run.prompts[0]) == (0, "user:red\nkite\n\nWhat colour?")
    assert run.prompts[1].endswith("user:Sure?") and run.prompts[1].count("kite") == 2
    assert result.stderr == f"{tmp_path / 'my notes.txt'}, 8 characters, goes before your next turn\n"


@pytest.mark.parametrize("command", ["/file", "/save", "/load"])
def test_a_command_without_its_file_says_so(run: Run, command: str) -> None:
    assert_one_line(run("chat", stdin=f"{command}\n"), 1, f"{command} needs the name of a file")


@pytest.mark.parametrize("command", ["/file", "/load"])
def test_a_file_that_can_not_be_read_is_one_line_and_the_conversation_goes_on(
    run: Run, command: str, tmp_path: Path
) -> None:
    (tmp_path / "image").write_bytes(b"\xff\xd8")
    for name, words in (("none", "No such file"), ("image", "not UTF-8"), ("", "s a directory")):
        assert_one_line(run("chat", stdin=f"{command} {tmp_path / name}\none\n"), 1, words, str(tmp_path / name))
        assert run.prompts == ["user:one"]


def test_a_conversation_that_is_saved_goes_on_where_it_was(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "talk.json"
    result = run("chat", "--system", "S", stdin=f"ünë\n/save {file}\n/save {file}\n")
    assert result.stderr == f"3 messages are in {file}\n" * 2
    assert [message["role"] for message in json.loads(file.read_text("utf-8"))] == ["system", "user", "assistant"]
    result = run("chat", stdin=f"other\n/load {file}\nmore\n/reset\nnew\n")
    assert result.exit_code == 0 and f"3 messages from {file}\n" in result.stderr
    first = "system:S user:ünë"
    assert run.prompts[1:] == [f"{first} assistant:re: {first}  user:more", "system:S user:new"]


def test_a_file_that_holds_something_else_is_not_overwritten(run: Run, tmp_path: Path) -> None:
    for content in (b"my notes", b"\xff", b'{"role": "user"}', b"[1]"):
        (tmp_path / "notes").write_bytes(content)
        assert_one_line(run("chat", "-q", stdin=f"one\n/save {tmp_path / 'notes'}\n"), 1, "left as it is")
        assert (tmp_path / "notes").read_bytes() == content


@pytest.mark.parametrize(
    "content", ["", "{}", "[1]", '[{"role": "user"}]', '[{"role": 1, "content": "a"}]', "[" * 99_999]
)
def test_a_file_without_a_conversation_is_not_loaded(run: Run, content: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text(content)
    assert_one_line(run("chat", stdin=f"/load {tmp_path / 'file'}\none\n"), 1, "holds no conversation")
    assert run.prompts == ["user:one"]


def test_set_changes_a_sampling_parameter_from_the_next_answer_on(run: Run) -> None:
    lines = ["one", "/set temperature 0.7", "/set top-k 5", "/set stop END", "/set max_tokens 7", "/set seed 3", "two"]
    result = run("chat", "-q", stdin="\n".join(lines))
    assert (result.exit_code, result.stderr) == (0, "")
    first, second = (request.params for request in run.made[-1].requests)
    assert first == SamplingParams(temperature=0.0, max_tokens=256, stop=())
    assert second == SamplingParams(temperature=0.7, top_k=5, stop="END", max_tokens=7, seed=3)
    result = run("chat", stdin="/set temp 0.5\n/set max_tokens none\n/set\n")
    shown = result.stderr.splitlines()
    assert shown[:2] == ["temperature is 0.5", "max_tokens is None"]
    assert shown[2].startswith("temperature 0.5, top_p 1.0, ") and all(name in shown[2] for name in SETTABLE)


@pytest.mark.parametrize(
    "command, words",
    [
        ("/set temprature 1", "did you mean temperature?"),
        ("/set q 1", "there are temperature, "),
        ("/set n 2", "knows no 'n'"),
        ("/set top_p 7", "top_p must be above 0"),
        ("/set top_p", "top_p must be above 0"),
        ("/set max_tokens many", "max_tokens must be a whole number"),
    ],
)
def test_a_parameter_that_can_not_be_set_is_told_why_and_stays(run: Run, command: str, words: str) -> None:
    assert_one_line(run("chat", stdin=f"{command}\none\n"), 1, words)
    assert run.params == SamplingParams(temperature=0.0, max_tokens=256, stop=())
