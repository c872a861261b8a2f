"""`mlx-paged generate`: answers as text and JSON. Most tests use a stub model; the last ones run the bundled one."""

import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers.stub_llm import Run, StubLLM, assert_one_line, invoke, start

from mlx_paged.cli.terminal import Terminal
from mlx_paged.outputs import CompletionOutput, RequestOutput


def test_the_answer_is_all_there_is_on_stdout_and_stderr_is_silent_without_a_terminal(run: Run) -> None:
    result = run("generate", "--raw", "Once upon a time")
    assert (result.exit_code, result.stdout, result.stderr) == (0, "re: Once upon a time \n", "")


def test_a_single_answer_is_shown_word_by_word(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[str] = []
    monkeypatch.setattr(Terminal, "answer", lambda self, text: shown.append(text))
    run("generate", "--raw", "Once upon")
    assert shown == ["re: ", "Once ", "upon "]


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
    def encode_chat(self: StubLLM, messages: list[dict[str, str]], **template: object) -> list[int]:
        raise ValueError("the model's chat template does not take this conversation: no system messages")

    run.stub.encode_chat = encode_chat  # type: ignore[method-assign]
    assert_one_line(run("generate", "Hi"), 1, "does not take this conversation: no system messages")


def test_several_answers_stand_under_headings_in_the_order_of_the_prompts(run: Run) -> None:
    result = run("generate", "--raw", "a much longer prompt", "short")
    assert result.exit_code == 0
    assert result.stdout == ("==> 1: a much longer prompt\nre: a much longer prompt \n\n==> 2: short\nre: short \n")


def test_samples_are_numbered(run: Run) -> None:
    assert run("generate", "--raw", "-n", "2", "Hi").stdout == "==> sample 1\nre: Hi \n\n==> sample 2\nre: Hi \n"
    assert "==> 2, sample 1: b\n" in run("generate", "--raw", "-n", "2", "a", "b").stdout


def test_json_is_one_object_per_prompt_written_when_it_ends(run: Run) -> None:
    result = run("generate", "--raw", "--json", "--logprobs", "2", "a longer one", "", "Hi")
    assert result.exit_code == 1
    records = [json.loads(line, parse_constant=pytest.fail) for line in result.stdout.splitlines()]
    assert [record["prompt"] for record in records] == ["", "Hi", "a longer one"]
    assert records[0] == {"id": 2, "prompt": "", "error": "the prompt is empty"}
    assert records[1] == {
        "id": 3,
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
    def output(self: StubLLM, request: SimpleNamespace, text: str, finished: bool) -> RequestOutput:
        sample = CompletionOutput(0, "", [], 0.0, finish_reason="error", stop_reason="the grammar has no way on")
        return RequestOutput(request.request_id, None, [1], [sample], True)

    run.stub.output = output  # type: ignore[method-assign]
    assert_one_line(run("generate", "Hi"), 1, "the grammar has no way on")


def test_verbose_tells_of_memory_speed_and_blocks(run: Run) -> None:
    result = run("generate", "--raw", "--verbose", "Hi", "there")
    assert result.exit_code == 0
    assert result.stderr.splitlines()[0] == "KV cache: 8 blocks of 4 tokens"
    last = "attention: CUDA kernels; matrices: OpenBLAS 0.3"
    assert result.stderr.splitlines()[-2:] == ["blocks 2/8 at the most", last]
    assert "prompt 7 tokens" in result.stderr and "generation 17 tokens, 1.5 tokens/s" in result.stderr
    assert result.stderr.splitlines()[-3] == "first token 3.00 s, 1388.9 ms per token, mean of 2 prompts"
    assert "KV cache" not in result.stdout


def test_the_time_per_token_of_a_stream_counts_all_of_its_pieces(run: Run) -> None:
    assert "first token 3.00 s, 1666.7 ms per token\n" in run("generate", "--raw", "--verbose", "Hi").stderr


def test_equal_samples_are_pointed_out(run: Run) -> None:
    assert "the 3 samples will be equal: --temperature" in run("generate", "-n", "3", "Hi").stderr
    assert run("generate", "-n", "3", "-q", "Hi").stderr == run("generate", "-n", "3", "--temp", "1", "Hi").stderr == ""


def test_ctrl_c_keeps_what_was_said_and_exits_130(run: Run) -> None:
    def before_output(self: StubLLM) -> None:
        if self.num_outputs == 2:
            raise KeyboardInterrupt

    run.stub.before_output = before_output
    result = run("generate", "--raw", "Once upon a time")
    assert (result.exit_code, result.stdout, result.stderr) == (130, "re: Once \n", "")


def test_ctrl_c_leaves_what_has_ended_though_an_earlier_prompt_has_not(run: Run) -> None:
    def before_output(self: StubLLM) -> None:
        if self.num_outputs == 1:
            raise KeyboardInterrupt

    run.stub.before_output = before_output
    result = run("generate", "--raw", "a much longer prompt", "short")
    assert (result.exit_code, result.stdout, result.stderr) == (130, "==> 2: short\nre: short \n", "")
    result = run("generate", "--raw", "--json", "a much longer prompt", "short")
    assert result.exit_code == 130 and json.loads(result.stdout)["id"] == 2


def cut(text: str, num_tokens: int, stop_reason: str | None = None) -> Callable[..., RequestOutput]:
    """An output that ends before it should."""

    def output(self: StubLLM, request: SimpleNamespace, _: str, finished: bool) -> RequestOutput:
        reason = "length" if stop_reason is None else "stop"
        sample = CompletionOutput(0, text, [1] * num_tokens, 0.0, finish_reason=reason, stop_reason=stop_reason)
        return RequestOutput(request.request_id, None, [1], [sample], True)

    return output


def test_an_output_that_was_cut_is_told_on_stderr_with_the_reason(run: Run) -> None:
    run.stub.output = cut("Once upon", 256)  # type: ignore[method-assign]
    result = run("generate", "Hi")
    assert (result.exit_code, result.stdout) == (0, "Once upon\n")
    assert result.stderr == "mlx-paged: the answer was cut after 256 tokens: --max-tokens allows more\n"
    assert run("generate", "-m", "300", "Hi").stderr.endswith(": the context, or the KV cache, holds no more\n")
    assert "2 of 2 answers were cut after 256 tokens" in run("generate", "--json", "Hi", "there").stderr
    assert run("generate", "-q", "Hi").stderr == ""


@pytest.mark.parametrize(
    ("form", "text", "stop_reason", "code"),
    [
        (["--json-schema"], '{"a":', None, 3),
        (["--json-schema"], '{"a":1}', None, 0),
        (["--json-schema"], '{"a":', '"b', 3),
        (["--regex", "[a-z]+"], "abc", None, 0),
        (["--regex", "[a-z]+!"], "abc", None, 3),
        (["--regex", "[a-z]+!"], "abc!", None, 0),
        (["--stop", "END"], "abc", "END", 0),
    ],
)
def test_an_output_that_has_not_its_whole_form_is_exit_code_3(
    form: list[str], text: str, stop_reason: str | None, code: int, run: Run, tmp_path: Path
) -> None:
    (tmp_path / "schema.json").write_text('{"type": "object"}')
    form += [str(tmp_path / "schema.json")] * (form == ["--json-schema"])
    run.stub.output = cut(text, 9, stop_reason)  # type: ignore[method-assign]
    result = run("generate", "--json", *form, "-m", "9", "Hi")
    assert result.exit_code == code
    if code:
        assert_one_line(result, 3, "not the whole", "--max-tokens" if stop_reason is None else "stop string")


def test_a_schema_that_max_tokens_cuts_is_exit_code_3_with_a_real_model_too(tmp_path: Path) -> None:
    (tmp_path / "schema.json").write_text(
        '{"type": "object", "properties": {"a": {"const": "Mia"}}, "required": ["a"], "additionalProperties": false}'
    )
    options = ("generate", "--json-schema", str(tmp_path / "schema.json"), "Describe a person.")
    assert_one_line(invoke(*options, "-m", "2"), 3, "not the whole JSON", "cut after 2 tokens: --max-tokens")
    result = invoke(*options, "--system", "Be brief.", "-m", "40")
    assert (result.exit_code, result.stderr) == (0, "") and isinstance(json.loads(result.stdout), dict)


def test_a_batch_with_an_empty_prompt_answers_the_others_as_json() -> None:
    result = invoke("generate", "--json", "--logprobs", "1", "--max-tokens", "4", "Once", "", "There was", "-v")
    assert result.exit_code == 1
    records = [json.loads(line) for line in result.stdout.splitlines()]
    empty, *others = sorted(records, key=lambda record: record["id"] != 2)
    assert empty == {"id": 2, "prompt": "", "error": "the prompt is empty"}
    assert {record["id"]: record["prompt"] for record in others} == {1: "Once", 3: "There was"}
    for record in others:
        (sample,) = record["outputs"]
        assert 1 <= len(sample["token_ids"]) <= 4 and len(sample["logprobs"]) == len(sample["token_ids"])
        assert sample["cumulative_logprob"] <= 0
        assert 0 <= record["metrics"]["scheduled_s"] <= record["metrics"]["first_token_s"]
        assert record["metrics"]["first_token_s"] <= record["metrics"]["finished_s"]
    lines = result.stderr.splitlines()
    assert "mlx-paged: prompt 2: the prompt is empty" in lines
    assert any(re.fullmatch(r"blocks [1-9]\d*/[1-9]\d* at the most", line) for line in lines)
    assert any(re.fullmatch(r"attention: plain MLX operations; matrices: .*(BLAS|Accel).*", line) for line in lines)


def test_several_prompts_give_what_each_gives_alone() -> None:
    together = invoke("generate", "--max-tokens", "8", "Tell me a story.", "Once upon a time").stdout
    for prompt in ("Tell me a story.", "Once upon a time"):
        alone = invoke("generate", "--max-tokens", "8", prompt).stdout
        assert alone.strip() and alone in together


def test_a_prompt_that_can_never_fit_is_one_line_with_both_numbers() -> None:
    result = invoke("generate", "--raw", "--num-kv-blocks", "2", "--block-size", "16", "a b c d " * 50)
    assert_one_line(result, 1, "16", " 2")


def test_a_small_pool_shortens_the_default_max_tokens() -> None:
    result = invoke("generate", "--raw", "--ignore-eos", "--json", "--num-kv-blocks", "2", "--block-size", "16", "Once")
    (record,) = map(json.loads, result.stdout.splitlines())
    assert record["num_prompt_tokens"] + len(record["outputs"][0]["token_ids"]) == 33  # the last is not fed back


def test_the_first_command_of_the_readme_generates_text_from_the_bundled_model() -> None:
    process = start("generate", "Once upon a time")
    out, err = process.communicate()
    assert (process.returncode, err) == (0, b"")
    assert len(out.split()) > 5 and out.endswith(b"\n") and b"\x1b" not in out


def test_a_pipe_gives_the_same_as_an_argument() -> None:
    process = start("generate", "--max-tokens", "8", stdin=subprocess.PIPE)
    out, err = process.communicate(b"Tell me a story.\n")
    assert (process.returncode, err) == (0, b"mlx-paged: the answer was cut after 8 tokens: --max-tokens allows more\n")
    assert out.decode() == invoke("generate", "--max-tokens", "8", "Tell me a story.").stdout
