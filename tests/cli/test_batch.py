"""`mlx-paged generate --batch`: lines of requests, lines of answers, and taking up where a run ended."""

import json
from pathlib import Path
from typing import Any

import pytest
from helpers.stub_llm import Run, StubLLM, assert_one_line, invoke

from mlx_paged.sampling_params import SamplingParams


def write(path: Path, *records: object) -> Path:
    path.write_text("".join((each if isinstance(each, str) else json.dumps(each)) + "\n" for each in records))
    return path


def answers(path: Path) -> dict[Any, Any]:
    return {record["id"]: record for record in map(json.loads, path.read_text().splitlines())}


def test_each_line_is_a_request_with_its_own_parameters_and_gets_a_line_with_its_id(run: Run, tmp_path: Path) -> None:
    requests = write(
        tmp_path / "requests.jsonl",
        {"id": "a", "prompt": "Hi", "temperature": 0.5, "max_tokens": 7},
        "",
        {"prompt": "Ho"},
        {"id": 9, "messages": [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]},
    )
    result = run("generate", "--batch", str(requests), "--output", str(tmp_path / "out"), "-m", "9", "--system", "S")
    assert (result.exit_code, result.stdout, result.stderr) == (0, "", "")
    params = {request.prompt: request.params for request in run.made[-1].requests}
    assert params == {
        "system:S user:Hi": SamplingParams(temperature=0.5, max_tokens=7, stop=()),
        "system:S user:Ho": SamplingParams(temperature=0, max_tokens=9, stop=()),
        "user:one assistant:two": SamplingParams(temperature=0, max_tokens=9, stop=()),
    }
    found = answers(tmp_path / "out")
    assert set(found) == {"a", 3, 9}
    assert found["a"]["prompt"] == "Hi" and found["a"]["outputs"][0]["text"] == "re: system:S user:Hi "
    assert found[9]["messages"][1] == {"role": "assistant", "content": "two"}


def test_a_line_says_what_the_model_would_decide_and_the_command_line_what_no_line_says(
    run: Run, tmp_path: Path
) -> None:
    run.stub.sampling_defaults = {"temperature": 0.6, "top_p": 0.9, "top_k": 20}
    lines = [{"prompt": "Hi", "temperature": 1.0, "top_k": 0}, {"prompt": "Ho"}]
    run("generate", "--raw", "--batch", str(write(tmp_path / "requests.jsonl", *lines)), "--top-p", "1")
    own, other = (request.params for request in run.made[-1].requests)
    assert (own.temperature, own.top_p, own.top_k) == (1.0, 1.0, 0)
    assert (other.temperature, other.top_p, other.top_k) == (0.6, 1.0, 20)


def test_without_an_output_file_answers_go_to_stdout_and_requests_may_be_piped_in(run: Run) -> None:
    result = run("generate", "--batch", "-", stdin='{"prompt": "Hi"}\n')
    assert result.exit_code == 0 and json.loads(result.stdout)["id"] == 1


def test_what_is_wrong_with_a_line_is_its_answer_and_in_the_words_of_the_file(run: Run, tmp_path: Path) -> None:
    requests = write(
        tmp_path / "requests.jsonl",
        {"id": "hot", "prompt": "Hi", "temperature": -1},
        {"id": "odd", "prompt": "Hi", "max_token": 3},
        {"id": "none"},
        {"id": "both", "prompt": "Hi", "messages": []},
        {"id": "ids", "prompt": [1, 2]},
        {"id": "text", "messages": "Hi"},
        {"id": "form", "prompt": "Hi", "regex": "[a"},
        {"id": "half", "prompt": "\ud83d"},
        {"id": "long", "prompt": "x" * StubLLM.context},
        {"id": "good", "prompt": "Hi"},
    )
    result = run("generate", "--raw", "--batch", str(requests), "--output", str(tmp_path / "out"))
    assert result.exit_code == 1
    found = answers(tmp_path / "out")
    assert found["hot"]["error"] == "temperature must be a finite number, 0 or more, got -1"
    assert found["odd"]["error"].startswith("there is no parameter 'max_token': did you mean max_tokens?")
    assert found["none"]["error"] == found["both"]["error"] == "give one of prompt and messages"
    assert "[1, 2]" in found["ids"]["error"] and "list of objects" in found["text"]["error"]
    assert "surrogate" in found["half"]["error"]
    assert found["form"]["error"].startswith("regex can't be used") and "context 400" in found["long"]["error"]
    assert [each for each, answer in found.items() if "error" not in answer] == ["good"]
    assert "mlx-paged: prompt hot: temperature must be a finite number, 0 or more, got -1\n" in result.stderr


@pytest.mark.parametrize(
    ("lines", "word"),
    [(['{"prompt": "Hi"'], "line 1"), (['{"prompt": "Hi"}', "[1]"], "line 2"), ([""], "no request"),
     (['{"id": 2, "prompt": "Hi"}', '{"prompt": "Ho"}'], "id 2"), (['{"id": [1], "prompt": "Hi"}'], "id in line 1")],
)  # fmt: skip
def test_a_file_without_requests_that_can_be_told_apart_is_bad_usage(
    lines: list[str], word: str, run: Run, tmp_path: Path
) -> None:
    requests = write(tmp_path / "requests.jsonl", *lines)
    assert_one_line(run("generate", "--batch", str(requests)), 2, "--batch", word, str(requests))
    assert run.made == []


def test_options_that_contradict_a_batch_are_bad_usage(run: Run, tmp_path: Path) -> None:
    requests = str(write(tmp_path / "requests.jsonl", {"prompt": "Hi"}))
    assert_one_line(run("generate", "--batch", requests, "Hi"), 2, "--batch or prompts")
    assert_one_line(run("generate", "--output", "x", "Hi"), 2, "--output", "--batch")
    assert_one_line(run("generate", "--batch", requests, "--output", "/nowhere/x"), 2, "--output", "No such file")


def test_a_batch_that_was_interrupted_is_taken_up_where_it_ended(run: Run, tmp_path: Path) -> None:
    lengths = {"a": 3, "b": 1, "c": 2}
    lines = [{"id": each, "prompt": "x " * length} for each, length in lengths.items()]
    requests = write(tmp_path / "requests.jsonl", *lines)
    options = ("generate", "--raw", "--batch", str(requests), "--output", str(tmp_path / "out"))

    def before_output(self: StubLLM) -> None:
        assert len(answers(tmp_path / "out")) == self.num_outputs  # whatever ends the process now
        if self.num_outputs == 2:
            raise KeyboardInterrupt

    run.stub.before_output = before_output
    assert run(*options).exit_code == 130
    assert list(answers(tmp_path / "out")) == ["b", "c"]
    with (tmp_path / "out").open("a") as file:
        file.write('{"id": "a", "prompt": "x')  # as a process leaves it that was killed
    run.stub.before_output = None
    assert run(*options).exit_code == 0
    assert run.prompts == ["x x x "]
    assert list(answers(tmp_path / "out")) == ["b", "c", "a"]
    assert "3 of 3 requests are answered" in run(*options, "-v").stderr
    assert len(run.made) == 2


def test_what_was_an_error_is_asked_again_and_its_line_goes(run: Run, tmp_path: Path) -> None:
    out, wrong = tmp_path / "out", {"id": "odd", "prompt": "Hi", "max_token": 3}
    for line in (wrong, {"id": "odd", "prompt": "Hi", "max_tokens": 3}):
        requests = write(tmp_path / "requests.jsonl", {"id": "good", "prompt": "Ho"}, line)
        result = run("generate", "--raw", "--batch", str(requests), "--output", str(out))
        assert result.exit_code == ("max_token" in line)
        assert list(answers(out)) == ["odd", "good"] if "max_token" in line else ["good", "odd"]
    assert run.prompts == ["Hi"] and "error" not in answers(out)["odd"]
    assert not out.with_name("out.partial").exists()


@pytest.mark.parametrize("content", ["notes\n", "notes", '{"id": "a"}\n{"text": 1}\n', '{"ix'])
def test_a_file_of_something_else_is_not_written_to(content: str, run: Run, tmp_path: Path) -> None:
    requests = write(tmp_path / "requests.jsonl", {"prompt": "Hi"})
    (tmp_path / "out").write_text(content)
    assert_one_line(run("generate", "--batch", str(requests), "--output", str(tmp_path / "out")), 2, "--output")
    assert (tmp_path / "out").read_text() == content


def test_a_real_batch_gives_each_request_what_it_gets_alone(tmp_path: Path) -> None:
    prompts = ("Tell me a story.", "Once upon a time")
    requests = write(tmp_path / "requests.jsonl", *({"id": each, "prompt": each, "max_tokens": 8} for each in prompts))
    result = invoke("generate", "--batch", str(requests), "--output", str(tmp_path / "out"))
    assert result.exit_code == 0 and "2 of 2 answers were cut after 8 tokens" in result.stderr
    for prompt, answer in answers(tmp_path / "out").items():
        alone = invoke("generate", "--max-tokens", "8", prompt).stdout
        assert alone == answer["outputs"][0]["text"] + "\n"
