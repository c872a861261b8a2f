"""`mlx-paged beam-search`: options, text and JSON. Most tests use a stub model; the last ones run the real thing."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers.stub_llm import METRICS, Run, StubLLM, assert_one_line, invoke

from mlx_paged.outputs import BeamHypothesis, BeamSearchOutput
from mlx_paged.sampling_params import BeamSearchParams


class BeamStub(StubLLM):
    """Finds, for every prompt, the prompt followed by a number, the best first."""

    error: str | None = None

    def output(self, request: SimpleNamespace, text: str, finished: bool) -> BeamSearchOutput:
        prompt, params = request.prompt, request.params
        num_sequences = params.num_return_sequences or params.beam_width
        sequences = [
            BeamHypothesis([1] * 9, f"{prompt} {number}", -4.5 - number, (-4.5 - number) / 9)
            for number in range(num_sequences)
        ]
        metrics = dataclasses.replace(METRICS, finished_time=21)
        sequences = [] if self.error else sequences
        ids = [1] * len(prompt)
        return BeamSearchOutput(request.request_id, prompt, ids, sequences, True, 4, metrics, 41, 160, self.error)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Run:
    run = Run(monkeypatch)
    run.stub = type("Stub", (BeamStub,), {})
    return run


def test_hypotheses_come_best_first_and_then_what_sharing_saved(run: Run) -> None:
    result = run("beam-search", "--raw", "--num-return", "2", "Once")
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout == (
        "==> hypothesis 1: score -0.5000, log-probability -4.5000\nOnce 0\n\n"
        "==> hypothesis 2: score -0.6111, log-probability -5.5000\nOnce 1\n\n"
        "blocks 41 instead of 160 (74% saved by sharing)\n"
    )


def test_several_prompts_are_told_apart_and_stay_in_order(run: Run) -> None:
    result = run("beam-search", "--raw", "--beam-width", "1", "-p", "two three", "one")
    assert result.exit_code == 0
    assert [line for line in result.stdout.splitlines() if line and "hypothesis" not in line] == [
        "==> 1: two three", "two three 0", "blocks 41 instead of 160 (74% saved by sharing)",
        "==> 2: one", "one 0", "blocks 41 instead of 160 (74% saved by sharing)",
    ]  # fmt: skip


def test_json_has_all_of_it(run: Run) -> None:
    result = run("beam-search", "--raw", "--json", "--num-return", "1", "Once", "")
    assert result.exit_code == 1
    failed, found = map(json.loads, result.stdout.splitlines())
    assert failed == {"id": 2, "prompt": "", "error": "the prompt is empty"}
    assert found == {
        "id": 1,
        "prompt": "Once",
        "sequences": [{"text": "Once 0", "token_ids": [1] * 9, "cum_logprob": -4.5, "score": -0.5}],
        "num_prompt_tokens": 4,
        "num_cached_tokens": 4,
        "num_blocks": 41,
        "num_unshared_blocks": 160,
        "metrics": {"scheduled_s": 1.0, "first_token_s": 3.0, "finished_s": 11.0, "per_token_s": 1.0},
    }


def test_options_reach_the_search(run: Run) -> None:
    run("beam-search", "Hi")
    assert run.params == BeamSearchParams(stop=()) and run.prompts == ["user:Hi"]
    options = "--beam-width 6 --max-tokens 9 --length-penalty 0.5 --early-stopping never --num-return 3 --block-size 8"
    run("beam-search", "--system", "S", *options.split(), "Hi")
    assert run.params == BeamSearchParams(
        beam_width=6, max_tokens=9, length_penalty=0.5, early_stopping="never", num_return_sequences=3, stop=()
    )
    assert run.made[-1].settings == {"block_size": 8} and run.prompts == ["system:S user:Hi"]
    for text, value in (("true", True), ("false", False)):
        run("beam-search", "--early-stopping", text, "Hi")
        assert run.params.early_stopping is value


def test_prompts_come_from_stdin_and_files_too(run: Run, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("filed\n")
    run("beam-search", "--raw", "-f", str(tmp_path / "a.txt"), "-p", "-", stdin="piped\n")
    assert run.prompts == ["filed", "piped"]
    assert_one_line(run("beam-search", stdin=""), 2, "there is no prompt")


@pytest.mark.parametrize(
    "args",
    ["--beam-width 0", "--max-tokens 0", "--length-penalty nan", "--early-stopping maybe", "--num-return 5",
     "--num-return 0", "--temperature 1", "--block-size 0", "--raw --system S"],
)  # fmt: skip
def test_a_value_out_of_range_is_bad_usage_before_a_model_is_loaded(args: str, run: Run) -> None:
    option = "--system" if "--system" in args else args.split()[0]
    assert_one_line(run("beam-search", *args.split(), "Hi"), 2, option, "beam-search --help")
    assert run.made == []


def test_a_bad_prompt_fails_alone_and_a_failed_search_is_one_line(run: Run) -> None:
    result = run("beam-search", "--raw", "good", "x" * StubLLM.context)
    assert result.exit_code == 1 and "good 0" in result.stdout
    assert result.stderr == "mlx-paged: prompt 2: the prompt has 400 tokens, the context 400\n"
    run.stub.error = "the step failed"  # type: ignore[attr-defined]
    assert_one_line(run("beam-search", "Hi"), 1, "the step failed")


def test_ctrl_c_exits_130(run: Run) -> None:
    def before_output(self: StubLLM) -> None:
        raise KeyboardInterrupt

    run.stub.before_output = before_output
    result = run("beam-search", "Hi")
    assert (result.exit_code, result.stdout, result.stderr) == (130, "", "")


def test_verbose_tells_of_time_and_blocks(run: Run) -> None:
    lines = run("beam-search", "--raw", "-v", "Hi").stderr.splitlines()
    assert lines[1].startswith("prompt 2 tokens") and "generation 36 tokens, 4.0 tokens/s" in lines[1]
    assert lines[2:4] == ["first token 3.00 s, 1000.0 ms per token", "blocks 2/8 at the most"]
    assert lines[4:] == ["attention: CUDA kernels; matrices: OpenBLAS 0.3"]


# From here on the bundled model.


def test_the_bundled_model_finds_hypotheses_that_share_blocks() -> None:
    result = invoke("beam-search", "--raw", "--max-tokens", "24", "--json", "--block-size", "4", "Once upon a time")
    assert (result.exit_code, result.stderr) == (0, "")
    record = json.loads(result.stdout)
    scores = [sequence["score"] for sequence in record["sequences"]]
    assert len(scores) == 4 and scores == sorted(scores, reverse=True)
    assert len({sequence["text"] for sequence in record["sequences"]}) == 4
    assert 0 < record["num_blocks"] < record["num_unshared_blocks"]


def test_what_sharing_saved_is_the_last_line_of_a_real_search() -> None:
    result = invoke("beam-search", "--max-tokens", "8", "Tell me a story.")
    assert result.exit_code == 0
    assert re.fullmatch(r"blocks \d+ instead of \d+( \(\d+% saved by sharing\))?", result.stdout.splitlines()[-1])
