"""`mlx-paged chat`: turns, what can be typed beside them, Ctrl-C. The last test runs the bundled model."""

import os
import re
import signal
from types import SimpleNamespace

import pytest
from helpers.stub_llm import Run, StubLLM, assert_one_line, invoke

from mlx_paged.outputs import CompletionOutput, RequestOutput


def test_chat_remembers_the_conversation(run: Run) -> None:
    result = run("chat", "--system", "Be kind.", "--max-tokens", "20", stdin="Hello\n\nBye\n")
    assert result.exit_code == 0
    assert run.prompts == [
        "system:Be kind. user:Hello",
        "system:Be kind. user:Hello assistant:re: system:Be kind. user:Hello  user:Bye",
    ]
    assert result.stdout.splitlines() == [f"re: {' '.join(prompt.split())} " for prompt in run.prompts]
    assert result.stderr == ""


@pytest.mark.parametrize("command", ["/reset", "/clear"])
def test_reset_forgets_all_but_the_system_message(command: str, run: Run) -> None:
    run("chat", "--system", "S", stdin=f"one\n{command}\ntwo\n")
    assert run.prompts == ["system:S user:one", "system:S user:two"]


@pytest.mark.parametrize("command", ["/exit", "/quit"])
def test_exit_leaves(command: str, run: Run) -> None:
    assert run("chat", stdin=f"{command}\nnever read\n").exit_code == 0
    assert run.prompts == []


def test_help_and_typing_errors_are_not_sent_to_the_model_but_paths_are(run: Run) -> None:
    result = run("chat", stdin="/help\n/rest\n/usr/bin is what?\n")
    assert run.prompts == ["user:/usr/bin is what?"]
    assert "/reset" in result.stderr and "there is no /rest;" in result.stderr


def test_a_conversation_too_long_for_the_context_says_reset_and_goes_on(run: Run) -> None:
    result = run("chat", stdin="short\n" + "x" * StubLLM.context + "\nagain\n/reset\nnew\n")
    assert_one_line(result, 1, "context 400", "/reset")
    assert run.prompts == ["user:short", "user:short assistant:re: user:short  user:again", "user:new"]


def test_an_answer_that_fails_in_the_engine_is_one_line_and_is_not_remembered(run: Run) -> None:
    def output(self: StubLLM, request: SimpleNamespace, text: str, finished: bool) -> RequestOutput:
        sample = CompletionOutput(0, "", [], 0.0, finish_reason="error", stop_reason="the step failed")
        return RequestOutput(request.request_id, None, [1], [sample], True)

    run.stub.output = output  # type: ignore[method-assign]
    result = run("chat", stdin="one\ntwo\n")
    assert (result.exit_code, result.stdout, run.prompts) == (1, "", ["user:one", "user:two"])
    assert result.stderr == "mlx-paged: the step failed; /reset begins a new conversation\n" * 2


def test_chat_without_a_template_names_generate_raw(run: Run) -> None:
    run.stub.has_chat_template = False
    assert_one_line(run("chat", stdin="Hi\n"), 1, "chat template", "generate --raw")


def test_ctrl_c_stops_the_answer_and_the_conversation_goes_on_with_its_beginning(run: Run) -> None:
    def before_output(self: StubLLM) -> None:
        if self.num_outputs == 2:
            self.num_outputs += 1  # once
            os.kill(os.getpid(), signal.SIGINT)

    run.stub.before_output = before_output
    ignored = signal.signal(signal.SIGINT, signal.default_int_handler)  # as it is in a shell's background jobs
    try:
        result = run("chat", stdin="one two three\nnext\n")
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, ignored)
    assert result.exit_code == 0
    assert run.made[-1].num_broken_off == 1
    assert result.stdout.splitlines()[0] == "re: user:one "
    assert run.prompts[1] == "user:one two three assistant:re: user:one  user:next"


def test_ctrl_c_at_the_prompt_exits_130(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def read_line() -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr("mlx_paged.cli.chat._read_line", read_line)
    assert run("chat").exit_code == 130


def test_a_conversation_keeps_its_history_until_reset() -> None:
    story = "Theo lived in a small town. Theo had a red kite. Where did Theo live?"
    result = invoke("chat", "-v", "--max-tokens", "12", stdin=f"{story}\n/reset\n{story}\n{story}\n")
    assert result.exit_code == 0
    first, afresh, _ = result.stdout.splitlines()
    assert first == afresh != ""
    first_size, afresh_size, grown_size = map(int, re.findall(r"^prompt (\d+) tokens", result.stderr, re.MULTILINE))
    assert first_size == afresh_size < grown_size
