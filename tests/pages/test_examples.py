"""Each example runs with the demo model and shows what it says it does."""

from __future__ import annotations

import os
import re
import runpy
import sys
from pathlib import Path

import mlx.core as mx
import pytest

FOLDER = Path(__file__).parents[2] / "examples"
TESTED_ELSEWHERE = {
    "block_picture",
    "openai_client",
    "anthropic_client",
    "lm_eval_model",
}  # in test_block_picture.py, test_client_examples.py, test_lm_eval_model.py


def test_every_example_is_short_and_has_a_test() -> None:
    examples = {path.stem: path.read_text() for path in FOLDER.glob("*.py")}
    tested = {name.removeprefix("test_the_example_") for name in globals() if name.startswith("test_the_example_")}
    assert set(examples) == tested | TESTED_ELSEWHERE
    for name, source in examples.items():
        assert source.startswith('"""'), name
        assert source.count("\n") < 50, name


@pytest.fixture
def output_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], request: pytest.FixtureRequest
) -> list[str]:
    """The lines that the example which the test is named for prints; on stderr there is nothing."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(FOLDER.parent), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setattr(sys, "argv", ["example"])
    name = request.node.name.removeprefix("test_the_example_")
    runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
    captured = capfd.readouterr()
    assert captured.err == ""
    assert list(tmp_path.iterdir()) == []
    return captured.out.splitlines()


def numbers(line: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", line)]


def test_the_example_generate(output_of: list[str]) -> None:
    assert output_of[0].startswith("KV cache: ")
    prompts = ("Once upon a time", "Long ago", "In a small town")
    for prompt, text, note in zip(prompts, output_of[2::3], output_of[3::3], strict=True):
        assert text.startswith(prompt) and len(text.split()) > 20
        assert note == "  [40 tokens, length]"


def test_the_example_stream(output_of: list[str]) -> None:
    text, _, note = output_of
    assert text.startswith("Once upon a time") and text.count(".") == 3
    steps, num_free, num_blocks = numbers(note)
    assert steps < 100 and num_free == num_blocks


def test_the_example_mixed_batch(output_of: list[str]) -> None:
    answers: dict[str, list[str]] = {}
    for line in output_of:
        if line.endswith(" ..."):
            answers[line.removesuffix(" ...")] = []
        elif line:
            answers[list(answers)[-1]].append(line)
    assert [len(samples) for samples in answers.values()] == [1, 1, 1, 1, 3]
    assert "." not in answers["Long ago"][0]
    samples = answers["There was once a boy named"]
    assert len(set(samples)) == 3 and all(" [log-probability -" in sample for sample in samples)


def test_the_example_chat(output_of: list[str]) -> None:
    for answer in ("The dog was called Biscuit.", "The key was under the bench.", "The kite was red."):
        assert answer in output_of
    cached = [numbers(line) for line in output_of if line.startswith("  [")]
    assert [part for part, _ in cached] == [0, 32, 48]
    assert all(part < whole for part, whole in cached)


def test_the_example_shared_prompt(output_of: list[str]) -> None:
    assert "What colour was the kite? The kite was red." in output_of
    assert "Where was the key? The key was under the bench." in output_of
    assert "What was the dog called? The dog was called Biscuit." in output_of
    tables = [line.split()[4:] for line in output_of if re.match(r"[ABC]  \d", line)]
    assert len(tables) == 3 and tables[0][:3] == tables[1][:3] == tables[2][:3]
    assert len({block for table in tables for block in table}) == 3 + 3 * 2
    shared, asked = numbers(output_of[-1])
    assert shared == 2 * 3 * 8 < asked


def test_the_example_beam_search(output_of: list[str]) -> None:
    tables = [line.split()[5:] for line in output_of if re.match(r"[A-D]  beam \d", line)]
    assert len(tables) == 4 and len({table[0] for table in tables}) == 1
    scores = [float(line.split()[0]) for line in output_of if re.match(r" +-\d\.\d{3}  ", line)]
    assert len(scores) == 4 and scores == sorted(scores, reverse=True)
    most, unshared, *_ = numbers(output_of[-1])
    assert most < unshared


def test_the_example_n_best(output_of: list[str]) -> None:
    samples = [line for line in output_of if re.match(r"(yes|no) +-", line)]
    accepted = [line for line in samples if line.startswith("yes")]
    assert len(samples) == 16 and 0 < len(accepted) < 16
    assert samples[: len(accepted)] == accepted
    assert "the best: The key was under the bench." in output_of
    assert output_of[-1].startswith("15 blocks were copied")


def test_the_example_structured_output(output_of: list[str]) -> None:
    assert output_of == ["schema: {'answer': 'The dog was called Biscuit.'}", "regex:  The dog was called Biscuit."]


def test_the_example_attention_kernel(output_of: list[str]) -> None:
    errors = [float(re.findall(r"at most (\S+) from", line)[0]) for line in output_of]
    assert len(errors) == 2 and max(errors) < 2e-5


def test_the_example_memory_plan(output_of: list[str]) -> None:
    plans = [line for line in output_of if line.startswith("contexts up to ")]
    assert len(plans) == 3
    for plan in plans:
        reserved, padded, blocks = numbers(plan.split(" fit ")[1].replace(",", ""))
        assert reserved <= padded < blocks
    assert any(line.startswith("blocks of 16") for line in output_of)


def test_the_example_own_model(output_of: list[str]) -> None:
    paged, unpaged = (line.split(":", 1)[1].split() for line in output_of)
    assert len(paged) > 20
    alike = 5 if mx.metal.is_available() else len(paged)  # in half types on a GPU near ties may fall either way later
    assert paged[:alike] == unpaged[:alike]
