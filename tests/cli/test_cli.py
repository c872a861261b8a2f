"""The command line: options, streams, exit codes. Most tests use a stub model; the last ones run the real thing."""

import io
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import click.testing
import pytest
from helpers.stub_llm import Run, StubLLM, assert_one_line

from mlx_paged.cli import generate as cli_generate
from mlx_paged.cli.main import cli
from mlx_paged.cli.terminal import Tally, Terminal, excerpt
from mlx_paged.errors import ModelError
from mlx_paged.models.hub import DEMO_FOLDER
from mlx_paged.outputs import CompletionOutput, RequestMetrics, RequestOutput
from mlx_paged.sampling_params import SamplingParams

DEMO_WEIGHTS = (DEMO_FOLDER / "model.safetensors").read_bytes()


def test_the_answer_is_all_there_is_on_stdout_and_stderr_is_silent_without_a_terminal(run: Run) -> None:
    result = run("generate", "--raw", "Once upon a time")
    assert (result.exit_code, result.stdout, result.stderr) == (0, "re: Once upon a time \n", "")


def test_a_single_answer_is_shown_word_by_word(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[str] = []
    monkeypatch.setattr(Terminal, "answer", lambda self, text: shown.append(text))
    run("generate", "--raw", "Once upon")
    assert shown == ["re: ", "Once ", "upon "]


def test_prompts_come_from_arguments_options_files_and_stdin(run: Run, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("from a\nfile\n")
    result = run("generate", "--raw", "one", "-p", "two", "-p", "-", "-f", str(tmp_path / "a.txt"), stdin="piped\n")
    assert result.exit_code == 0
    assert run.prompts == ["one", "two", "piped", "from a\nfile"]


def test_without_a_prompt_stdin_is_one_prompt(run: Run) -> None:
    assert run("generate", "--raw", stdin="two\r\nlines\r\n").exit_code == 0
    assert run.prompts == ["two\r\nlines"]


def test_without_any_prompt_the_ways_to_give_one_are_named(run: Run) -> None:
    assert_one_line(run("generate", stdin=""), 2, "argument", "-p", "-f", "pipe")
    assert run.made == []


def test_stdin_and_files_that_are_not_utf8_are_bad_usage(run: Run, tmp_path: Path) -> None:
    (tmp_path / "image").write_bytes(b"\xff\xd8")
    assert_one_line(run("generate", "-f", str(tmp_path / "image")), 2, "image is not UTF-8")
    assert_one_line(run("generate", stdin=b"\xff\xd8"), 2, "standard input is not UTF-8")
    assert_one_line(run("generate", "-f", str(tmp_path / "missing")), 2, "missing", "does not exist")


def test_the_chat_template_is_used_where_there_is_one_unless_raw(run: Run) -> None:
    run("generate", "Hi")
    assert run.prompts == ["user:Hi"]
    run("generate", "--system", "Be brief.", "Hi")
    assert run.prompts == ["system:Be brief. user:Hi"]
    run("generate", "--raw", "Hi")
    assert run.prompts == ["Hi"]
    run.stub.has_chat_template = False
    run("generate", "Hi")
    assert run.prompts == ["Hi"]


def test_a_system_message_without_a_template_is_never_dropped_silently(run: Run) -> None:
    assert_one_line(run("generate", "--raw", "--system", "Be brief.", "Hi"), 2, "--system", "--raw")
    run.stub.has_chat_template = False
    assert_one_line(run("generate", "--system", "Be brief.", "Hi"), 1, "--system", "chat template")


def test_a_template_that_refuses_the_conversation_is_one_line(run: Run) -> None:
    refusal = type("TemplateError", (Exception,), {"__module__": "jinja2.exceptions"})

    def encode_chat(self: StubLLM, messages: list[dict[str, str]]) -> list[int]:
        raise refusal("System role not supported")

    run.stub.encode_chat = encode_chat  # type: ignore[method-assign]
    assert_one_line(run("generate", "Hi"), 1, "chat template refuses", "System role not supported")


def test_sampling_options_reach_the_request_by_their_usual_names(run: Run) -> None:
    options = {
        "max_tokens": 12, "temperature": 0.7, "top_p": 0.9, "top_k": 40, "min_p": 0.05, "repetition_penalty": 1.1,
        "presence_penalty": 0.2, "frequency_penalty": 0.3, "seed": 7, "logprobs": 2,
    }  # fmt: skip
    args = [part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    run("generate", *args, "-n", "3", "--stop", "END", "--stop", "\n\n", "--ignore-eos", "--json", "Hi")
    assert run.params == SamplingParams(**options, n=3, stop=("END", "\n\n"), ignore_eos=True)


def test_the_form_of_the_output_is_a_schema_from_a_file_or_an_expression(run: Run, tmp_path: Path) -> None:
    schema = {"type": "object", "properties": {"name": {"type": "string"}}}
    (tmp_path / "person.json").write_text(json.dumps(schema))
    assert run("generate", "--json-schema", str(tmp_path / "person.json"), "Hi").exit_code == 0
    assert run.params.json_schema == schema
    run("generate", "--regex", "[a-z]+", "Hi")
    assert (run.params.regex, run.params.json_schema) == ("[a-z]+", None)


@pytest.mark.parametrize(
    "content, words", [("{type: object}", "not JSON"), ("", "not JSON"), ("[" * 100_000, "not JSON"),
                       ("null", "object"), ("[1]", "object"), ('"text"', "object"), (b"\xff", "UTF-8")]
)  # fmt: skip
def test_a_file_without_a_schema_is_bad_usage(content: str | bytes, words: str, run: Run, tmp_path: Path) -> None:
    path = tmp_path / "schema.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert_one_line(run("generate", "--json-schema", str(path), "Hi"), 2, str(path), words)
    assert_one_line(run("generate", "--json-schema", str(tmp_path / "none.json"), "Hi"), 2, "none.json")
    assert run.made == []


def test_a_schema_and_an_expression_at_once_are_bad_usage(run: Run, tmp_path: Path) -> None:
    (tmp_path / "any.json").write_text("true")
    assert_one_line(run("generate", "--json-schema", str(tmp_path / "any.json"), "--regex", "a", "Hi"), 2, "not both")
    assert_one_line(run("generate", "--regex", "", "Hi"), 2, "--regex")


def test_short_names_mean_the_same(run: Run) -> None:
    run("generate", "--temp", "0.5", "-m", "9", "Hi")
    assert (run.params.temperature, run.params.max_tokens) == (0.5, 9)


def test_the_default_is_greedy_and_256_tokens_or_what_fits(run: Run) -> None:
    run("generate", "--raw", "Hi")
    assert run.params == SamplingParams(temperature=0.0, max_tokens=256, stop=())
    run("generate", "--raw", "x" * (StubLLM.context - 100))
    assert run.params.max_tokens is None


def test_a_max_tokens_that_was_asked_for_is_not_reduced(run: Run) -> None:
    assert_one_line(run("generate", "--raw", "--max-tokens", "399", "Hello"), 1, "context 400")


def test_engine_options_reach_the_model_and_those_not_given_stay_its_own(run: Run) -> None:
    run("generate", "Hi")
    assert (run.made[-1].model, run.made[-1].settings) == (None, {})
    options = (
        "--model qwen2 --block-size 8 --num-kv-blocks 99 --max-num-seqs 4 --max-num-batched-tokens 64 "
        "--max-model-len 512 --dtype float16 --no-prefix-caching"
    )
    run("generate", *options.split(), "Hi")
    assert run.made[-1].model == "qwen2"
    assert run.made[-1].settings == {
        "block_size": 8, "num_kv_blocks": 99, "max_num_seqs": 4, "max_num_batched_tokens": 64, "max_model_len": 512,
        "dtype": "float16", "prefix_caching": False,
    }  # fmt: skip
    run("generate", "--kv-cache-memory", "30%", "Hi")
    assert run.made[-1].settings == {"kv_cache_memory": "30%"}


@pytest.mark.parametrize(
    "args",
    [
        "--top-p 7", "--top-p 0", "--top-k -1", "--min-p 2", "--temperature -1", "--temp cold", "--max-tokens 0",
        "-n 0", "--repetition-penalty 0", "--presence-penalty 9", "--logprobs -1 --json", "--logprobs 3",
        "--block-size 0", "--num-kv-blocks 0", "--kv-cache-memory 4XB", "--kv-cache-memory 200%", "--max-num-seqs 0",
        "--dtype int3", "--max-num-batched-tokens 0", "--max-model-len 0", "--no-such-option",
        "--num-kv-blocks 9 --kv-cache-memory 1GB",
    ],
)  # fmt: skip
def test_a_value_out_of_range_is_bad_usage_told_in_one_line_before_a_model_is_loaded(args: str, run: Run) -> None:
    option = "--temp" if args == "--temp cold" else args.split()[0]
    assert_one_line(run("generate", *args.split(), "Hi"), 2, "memory size" if "memory" in option else option, "--help")
    assert run.made == []


def test_an_unknown_command_is_bad_usage_and_none_shows_the_help(run: Run) -> None:
    assert_one_line(run("generat"), 2, "generat", "--help")
    result = run()
    assert result.exit_code == 2 and "generate" in result.stderr and "chat" in result.stderr


def test_several_answers_stand_under_headings_in_the_order_of_the_prompts(run: Run) -> None:
    result = run("generate", "--raw", "a much longer prompt", "short")
    assert result.exit_code == 0
    assert result.stdout == ("==> 1: a much longer prompt\nre: a much longer prompt \n\n==> 2: short\nre: short \n")


def test_samples_are_numbered(run: Run) -> None:
    assert run("generate", "--raw", "-n", "2", "Hi").stdout == "==> sample 1\nre: Hi \n\n==> sample 2\nre: Hi \n"
    assert "==> 2, sample 1: b\n" in run("generate", "--raw", "-n", "2", "a", "b").stdout


def test_json_is_one_object_per_prompt_in_order(run: Run) -> None:
    result = run("generate", "--raw", "--json", "--logprobs", "2", "a longer one", "", "Hi")
    assert result.exit_code == 1
    records = [json.loads(line, parse_constant=pytest.fail) for line in result.stdout.splitlines()]
    assert [record["prompt"] for record in records] == ["a longer one", "", "Hi"]
    assert records[1] == {"prompt": "", "error": "the prompt is empty"}
    assert records[2] == {
        "prompt": "Hi",
        "outputs": [
            {
                "index": 0,
                "text": "re: Hi ",
                "token_ids": [ord(char) for char in "re: Hi "],
                "finish_reason": "stop",
                "stop_reason": None,
                "cumulative_logprob": -1.5,
                "logprobs": [{"7": -0.5, "8": None}],
            }
        ],
        "num_prompt_tokens": 2,
        "num_cached_tokens": 4,
        "metrics": {"scheduled_s": 1.0, "first_token_s": 3.0, "finished_s": 13.0, "per_token_s": 1.666667},
    }


def test_a_bad_prompt_fails_alone(run: Run) -> None:
    result = run("generate", "--raw", "good", "", "x" * StubLLM.context, "also good")
    assert result.exit_code == 1
    assert run.prompts == ["good", "also good"]
    assert "re: good" in result.stdout and "==> 4: also good\nre: also good" in result.stdout
    lines = result.stderr.splitlines()
    assert lines[0] == "mlx-paged: prompt 2: the prompt is empty"
    assert lines[1] == "mlx-paged: prompt 3: the prompt has 400 tokens, the context 400"
    assert len(lines) == 2


def test_only_bad_prompts_need_no_model(run: Run) -> None:
    assert_one_line(run("generate", "  "), 1, "the prompt is empty")
    assert_one_line(run("generate", "\udcff"), 1, "not UTF-8")
    assert run.made == []


def test_a_request_that_fails_in_the_engine_is_one_line_and_exit_1(run: Run) -> None:
    def step(self: StubLLM) -> list[RequestOutput]:
        self.running.clear()
        sample = CompletionOutput(0, "", [], 0.0, finish_reason="error", stop_reason="the grammar has no way on")
        return [RequestOutput(0, None, [1], [sample], True)]

    run.stub.step = step  # type: ignore[method-assign]
    assert_one_line(run("generate", "Hi"), 1, "the grammar has no way on")


@pytest.mark.parametrize(
    "error", [ModelError("no such model"), ImportError("install mlx-paged[cpu]"), ValueError("too small")]
)
def test_a_model_that_cannot_be_had_is_one_line(error: Exception, run: Run) -> None:
    def make(*_: object, **__: object) -> StubLLM:
        raise error

    run.make = make
    for command in (["generate", "Hi"], ["chat"]):
        assert_one_line(run(*command), 1, str(error))


def test_a_surprise_is_one_line_and_its_traceback_is_for_verbose(run: Run) -> None:
    def before_step(self: StubLLM) -> None:
        raise RuntimeError("two\nlines")

    run.stub.before_step = before_step
    assert_one_line(run("generate", "Hi"), 1, "unexpected RuntimeError: two lines", "--verbose")
    result = run("generate", "--verbose", "Hi")
    assert result.exit_code == 1 and "Traceback" in result.stderr
    assert result.stderr.splitlines()[-1] == "mlx-paged: unexpected RuntimeError: two lines"


def test_verbose_tells_of_memory_speed_and_blocks(run: Run) -> None:
    result = run("generate", "--raw", "--verbose", "Hi", "there")
    assert result.exit_code == 0
    assert result.stderr.splitlines()[0] == "KV cache: 8 blocks of 4 tokens"
    assert result.stderr.splitlines()[-2:] == ["blocks 2/8, waste 25.0%", "attention: CUDA kernels"]
    assert "prompt 7 tokens" in result.stderr and "generation 17 tokens, 1.5 tokens/s" in result.stderr
    assert result.stderr.splitlines()[-3] == "first token 3.00 s, 1388.9 ms per token, mean of 2 prompts"
    assert "KV cache" not in result.stdout


def test_the_time_per_token_of_a_stream_counts_all_of_its_pieces(run: Run) -> None:
    assert "first token 3.00 s, 1666.7 ms per token\n" in run("generate", "--raw", "--verbose", "Hi").stderr


def test_quiet_is_stronger_than_verbose_but_failures_are_told(run: Run) -> None:
    assert run("generate", "--quiet", "--verbose", "Hi").stderr == ""
    assert_one_line(run("generate", "-q", ""), 1, "the prompt is empty")


def test_equal_samples_are_pointed_out(run: Run) -> None:
    assert "equal" in run("generate", "-v", "-n", "2", "Hi").stderr
    assert "equal" not in run("generate", "-v", "-n", "2", "--temp", "1", "Hi").stderr


def test_ctrl_c_keeps_what_was_said_and_exits_130(run: Run) -> None:
    def before_step(self: StubLLM) -> None:
        if self.num_steps == 2:
            raise KeyboardInterrupt

    run.stub.before_step = before_step
    result = run("generate", "--raw", "Once upon a time")
    assert (result.exit_code, result.stdout, result.stderr) == (130, "re: Once \n", "")


def test_ctrl_c_while_the_model_loads_exits_130(run: Run) -> None:
    def make(*_: object, **__: object) -> StubLLM:
        raise KeyboardInterrupt

    run.make = make
    result = run("generate", "Hi")
    assert result.exit_code == 130 and result.stderr.strip() == ""


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


def test_chat_without_a_template_names_generate_raw(run: Run) -> None:
    run.stub.has_chat_template = False
    assert_one_line(run("chat", stdin="Hi\n"), 1, "chat template", "generate --raw")


def test_ctrl_c_stops_the_answer_and_the_conversation_goes_on_with_its_beginning(run: Run) -> None:
    def before_step(self: StubLLM) -> None:
        if self.num_steps == 1:
            os.kill(os.getpid(), signal.SIGINT)

    run.stub.before_step = before_step
    before = signal.getsignal(signal.SIGINT)
    result = run("chat", stdin="one two three\nnext\n")
    assert result.exit_code == 0
    assert run.made[-1].aborted == [0] and not run.made[-1].running
    assert result.stdout.splitlines()[0] == "re: user:one "
    assert run.prompts[1] == "user:one two three assistant:re: user:one  user:next"
    assert signal.getsignal(signal.SIGINT) is before


def test_ctrl_c_at_the_prompt_exits_130(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def read_line() -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr("mlx_paged.cli.chat._read_line", read_line)
    assert run("chat").exit_code == 130


class Screen(io.StringIO):
    """A terminal that remembers what was written to it."""

    def isatty(self) -> bool:
        return True


def screens(monkeypatch: pytest.MonkeyPatch) -> tuple[Screen, Screen]:
    """stdout and stderr as terminals, from here to the end of the test."""
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    out, err = Screen(), Screen()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    return out, err


def test_a_terminal_gets_notes_and_colour_and_no_color_takes_the_colour(monkeypatch: pytest.MonkeyPatch) -> None:
    out, err = screens(monkeypatch)
    Terminal().heading("one")
    Terminal().note("two")
    assert out.getvalue() == "\x1b[1m==> one\x1b[0m\n" and err.getvalue() == "\x1b[2mtwo\x1b[0m\n"
    monkeypatch.setenv("NO_COLOR", "1")
    Terminal().heading("one")
    Terminal().note("two")
    Terminal(quiet=True).note("three")
    assert out.getvalue().endswith("m\n==> one\n") and err.getvalue().endswith("m\ntwo\n")


def test_progress_is_one_line_that_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    _, err = screens(monkeypatch)
    terminal = Terminal()
    terminal.progress("10 of 12")
    terminal.progress("11 of 12")
    terminal.failure("done")
    assert err.getvalue() == "\r10 of 12\r11 of 12\r        \rmlx-paged: done\n"


def test_many_prompts_have_a_progress_bar_on_a_terminal_that_answers_push_aside(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out, err = screens(monkeypatch)
    monkeypatch.setenv("COLUMNS", "100")
    llm: Any = StubLLM(None)
    params = SamplingParams(max_tokens=9)
    options: dict[str, Any] = {"system": None, "raw": True, "as_json": False}
    prompts = ["one", "two three", "four"]
    code = cli_generate.run(prompts, lambda: llm, params, **options, terminal=Terminal())
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", err.getvalue())
    assert code == 0 and "0/3 prompts, 0 tokens" in plain
    assert re.search(r"2/3 prompts, 17 tokens, \d+\.\d tokens/s", plain)
    assert "prompts" not in out.getvalue() and out.getvalue().endswith("re: four \n")
    err.truncate(0)
    cli_generate.run(prompts, lambda: llm, params, **options, terminal=Terminal(quiet=True))
    assert err.getvalue() == ""


def test_an_excerpt_is_one_short_line_without_control_characters() -> None:
    assert excerpt("two\nlines\x1b[31m") == "two lines [31m"
    assert excerpt("word " * 40, limit=20) == "word word word wo..."


def test_tokens_per_second_count_what_was_computed() -> None:
    tally = Tally()
    metrics = RequestMetrics(arrival_time=0, first_scheduled_time=1, first_token_time=3, finished_time=8)
    sample = CompletionOutput(0, "", [1] * 11, 0.0)
    tally.count(RequestOutput(0, None, [1] * 50, [sample], True, num_cached_tokens=30, metrics=metrics))
    assert "prompt 50 tokens, 10.0 tokens/s (30 cached); generation 11 tokens, 2.0 tokens/s" in tally.lines()[0]


# From here on the bundled model: first in this process, then as commands.


def invoke(*args: str, stdin: str | None = None) -> click.testing.Result:
    return click.testing.CliRunner().invoke(cli, args, input=stdin)


def test_a_batch_with_an_empty_prompt_answers_the_others_as_json() -> None:
    result = invoke("generate", "--json", "--logprobs", "1", "--max-tokens", "4", "Once", "", "There was", "-v")
    assert result.exit_code == 1
    records = [json.loads(line) for line in result.stdout.splitlines()]
    assert [record["prompt"] for record in records] == ["Once", "", "There was"]
    assert records[1] == {"prompt": "", "error": "the prompt is empty"}
    for record in (records[0], records[2]):
        (sample,) = record["outputs"]
        assert 1 <= len(sample["token_ids"]) <= 4 and len(sample["logprobs"]) == len(sample["token_ids"])
        assert sample["cumulative_logprob"] <= 0
        assert 0 <= record["metrics"]["scheduled_s"] <= record["metrics"]["first_token_s"]
        assert record["metrics"]["first_token_s"] <= record["metrics"]["finished_s"]
    lines = result.stderr.splitlines()
    assert "mlx-paged: prompt 2: the prompt is empty" in lines
    assert any(re.fullmatch(r"blocks [1-9]\d*/[1-9]\d*, waste \d+\.\d%", line) for line in lines)
    assert lines[-1] == "attention: plain MLX operations"


def test_several_prompts_give_what_each_gives_alone() -> None:
    together = invoke("generate", "--max-tokens", "8", "Tell me a story.", "Once upon a time").stdout
    for prompt in ("Tell me a story.", "Once upon a time"):
        alone = invoke("generate", "--max-tokens", "8", prompt).stdout
        assert alone.strip() and alone in together


def test_a_conversation_keeps_its_history_until_reset() -> None:
    story = "Theo lived in a small town. Theo had a red kite. Where did Theo live?"
    result = invoke("chat", "-v", "--max-tokens", "12", stdin=f"{story}\n/reset\n{story}\n{story}\n")
    assert result.exit_code == 0
    first, afresh, _ = result.stdout.splitlines()
    assert first == afresh != ""
    first_size, afresh_size, grown_size = map(int, re.findall(r"^prompt (\d+) tokens", result.stderr, re.MULTILINE))
    assert first_size == afresh_size < grown_size


def test_a_mistyped_model_is_one_line() -> None:
    assert_one_line(invoke("generate", "--model", "qwen22", "Hi"), 1, "did you mean")


@pytest.mark.parametrize("content", [b"", b"not weights", DEMO_WEIGHTS[:-1]])
def test_broken_weights_are_one_line_that_names_the_file(content: bytes, tmp_path: Path) -> None:
    for path in DEMO_FOLDER.glob("*.json"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "model.safetensors").write_bytes(content)
    assert_one_line(invoke("generate", "--model", str(tmp_path), "Hi"), 1, "model.safetensors")


def test_an_unknown_architecture_is_one_line_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "perceptron"}')
    (tmp_path / "model.safetensors").write_bytes(DEMO_WEIGHTS)
    assert_one_line(invoke("generate", "--model", str(tmp_path), "Hi"), 1, "perceptron")


def test_a_prompt_that_can_never_fit_is_one_line_with_both_numbers() -> None:
    result = invoke("generate", "--raw", "--num-kv-blocks", "2", "--block-size", "16", "a b c d " * 50)
    assert_one_line(result, 1, "16", " 2")


def test_a_small_pool_shortens_the_default_max_tokens() -> None:
    result = invoke("generate", "--raw", "--ignore-eos", "--json", "--num-kv-blocks", "2", "--block-size", "16", "Once")
    (record,) = map(json.loads, result.stdout.splitlines())
    assert record["num_prompt_tokens"] + len(record["outputs"][0]["token_ids"]) == 33  # the last is not fed back


def start(*args: str, **kwargs: Any) -> subprocess.Popen[bytes]:
    """The command as a process of its own, for which Ctrl-C works however the tests were started."""
    pipes: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(
        [sys.executable, "-m", "mlx_paged", *args],
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        **{**pipes, **kwargs},
    )


@pytest.mark.parametrize(
    "args",
    ["--help", "--version", "generate --help", "chat --help", "beam-search --help", "generate --top-p 7 Hi",
     "beam-search --beam-width 0 Hi"],
)  # fmt: skip
def test_help_and_usage_errors_import_nothing_heavy(args: str) -> None:
    code = "import sys\nfrom mlx_paged.cli import main\ntry: main()\nexcept SystemExit: print('LOADED', *sys.modules)"
    command = [sys.executable, "-c", code, *args.split()]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    modules = {name.split(".")[0] for name in result.stdout.split("LOADED ")[1].split()}
    assert "click" in modules
    assert not modules & {"mlx", "mlx_lm", "transformers", "numpy", "huggingface_hub", "rich", "torch", "tokenizers"}


def test_the_first_command_of_the_readme_generates_text_from_the_bundled_model() -> None:
    process = start("generate", "Once upon a time")
    out, err = process.communicate()
    assert (process.returncode, err) == (0, b"")
    assert len(out.split()) > 5 and out.endswith(b"\n") and b"\x1b" not in out


def test_a_pipe_gives_the_same_as_an_argument() -> None:
    process = start("generate", "--max-tokens", "8", stdin=subprocess.PIPE)
    out, err = process.communicate(b"Tell me a story.\n")
    assert (process.returncode, err) == (0, b"")
    assert out.decode() == invoke("generate", "--max-tokens", "8", "Tell me a story.").stdout


def test_ctrl_c_ends_a_real_run_with_130_and_no_traceback() -> None:
    process = start("generate", "--ignore-eos", "--max-tokens", "2000", "Once")
    assert process.stdout is not None
    first = process.stdout.read(10)  # it is in the middle of its answer
    process.send_signal(signal.SIGINT)
    _, err = process.communicate()
    assert (process.returncode, len(first), err) == (130, 10, b"")


def test_a_reader_that_leaves_ends_the_run_quietly() -> None:
    process = start("generate", "--ignore-eos", "--max-tokens", "300", "Once")
    assert process.stdout is not None and process.stderr is not None
    assert process.stdout.read(1)
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() == 0
