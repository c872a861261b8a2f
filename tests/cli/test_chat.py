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
    result = run("chat", "--system", "S", stdin=f"one\n{command}\ntwo\n")
    assert run.prompts == ["system:S user:one", "system:S user:two"]
    assert result.stderr == "the conversation is forgotten, but for the system message\n"


@pytest.mark.parametrize("command", ["/exit", "/quit"])
def test_exit_leaves(command: str, run: Run) -> None:
    assert run("chat", stdin=f"{command}\nnever read\n").exit_code == 0
    assert run.prompts == []


def test_help_and_typing_errors_are_not_sent_to_the_model_but_paths_are(run: Run) -> None:
    result = run("chat", stdin="/help\n/rest\n/usr/bin is what?\n")
    assert run.prompts == ["user:/usr/bin is what?"]
    assert "/reset" in result.stderr and "there is no /rest;" in result.stderr


def test_a_turn_that_does_not_fit_alone_is_refused_and_the_conversation_goes_on(run: Run) -> None:
    result = run("chat", "-q", stdin="short\n" + "x" * StubLLM.context + "\nagain\n/reset\nnew\n")
    assert_one_line(result, 1, "context 400")
    assert "/reset" not in result.stderr, "a new conversation would not help"
    assert run.prompts == ["user:short", "user:short assistant:re: user:short  user:again", "user:new"]


LONG = [letter * 110 for letter in "abcd"]  # a turn and its answer take about 130 of the stub's 400 tokens


def test_at_the_end_of_the_context_the_oldest_turns_are_dropped_with_a_line(run: Run) -> None:
    output = StubLLM.output
    run.stub.output = lambda self, request, text, finished: output(self, request, "ok", True)  # type: ignore[method-assign]
    result = run("chat", "--system", "S", stdin="\n".join(LONG) + "\n")
    assert result.exit_code == 0
    assert result.stderr == "(the context is full: the oldest turn is left out from here on)\n" * 2
    assert all(prompt.startswith("system:S user:") for prompt in run.prompts)
    turns = [[text[0] for text in LONG if f"user:{text}" in prompt] for prompt in run.prompts]
    assert turns == [["a"], ["a", "b"], ["b", "c"], ["c", "d"]]
    assert min(StubLLM.context - len(prompt) for prompt in run.prompts) >= StubLLM.context // 4, "room for the answer"


def test_several_turns_are_dropped_where_one_is_not_enough(run: Run) -> None:
    result = run("chat", stdin="a\nb\nc\n" + "d" * 280 + "\n")
    assert "3 turns are left out" in result.stderr
    assert run.prompts[-1] == "user:" + "d" * 280


def test_context_full_stop_refuses_what_does_not_fit_and_drops_nothing(run: Run) -> None:
    result = run("chat", "--context-full", "stop", stdin="short\n" + "x" * 390 + "\nagain\n")
    assert_one_line(result, 1, "context 400", "/reset begins a new conversation")
    assert run.prompts == ["user:short", "user:short assistant:re: user:short  user:again"]
    assert_one_line(run("chat", "--context-full", "forget", stdin=""), 2, "--context-full", "drop", "stop")


def test_a_turn_that_is_not_utf8_is_refused_and_the_conversation_goes_on(run: Run) -> None:
    result = run("chat", stdin=b'one\nbad \xff byte\n"""\n\xfe\n"""\ntwo\n')
    assert (result.exit_code, result.stderr.count("\n")) == (1, 2)
    assert (
        result.stderr.splitlines()[0] == "mlx-paged: this turn is not UTF-8 text; the conversation goes on without it"
    )
    assert run.prompts == ["user:one", "user:one assistant:re: user:one  user:two"]


def test_a_byte_order_mark_before_the_first_turn_is_no_part_of_it(run: Run) -> None:
    run("chat", stdin=b"\xef\xbb\xbfone\n")
    assert run.prompts == ["user:one"]


def test_what_the_model_recommends_for_sampling_is_taken_where_nothing_is_given(run: Run) -> None:
    run.stub.sampling_defaults = {"temperature": 0.6, "top_p": 0.9}
    result = run("chat", "-v", "--top-p", "1", stdin="one\n")
    assert (run.params.temperature, run.params.top_p) == (0.6, 1.0)
    assert "sampling as the model's generation_config.json has it: temperature 0.6\n" in result.stderr


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
    def read_turn() -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr("mlx_paged.cli.chat.read_turn", read_turn)
    assert run("chat").exit_code == 130


def test_a_conversation_keeps_its_history_until_reset() -> None:
    story = "Theo lived in a small town. Theo had a red kite. Where did Theo live?"
    result = invoke("chat", "-v", "--max-tokens", "12", stdin=f"{story}\n/reset\n{story}\n{story}\n")
    assert result.exit_code == 0
    first, afresh, _ = result.stdout.splitlines()
    assert first == afresh != ""
    first_size, afresh_size, grown_size = map(int, re.findall(r"^prompt (\d+) tokens", result.stderr, re.MULTILINE))
    assert first_size == afresh_size < grown_size
