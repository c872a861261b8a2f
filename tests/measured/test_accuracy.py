"""Accuracy by lm-evaluation-harness: the questions are what they say, and the committed runs give mlx-lm's numbers."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
from helpers.run_benchmark import RESULTS, check_machine

WAYS = ("mlx-lm", "engine", "server")
FILES = sorted(file.name for file in RESULTS.glob("accuracy-*.json"))


def committed(file: str) -> dict[str, Any]:
    return json.loads((RESULTS / file).read_text())


@pytest.mark.parametrize("file", FILES)
def test_the_harness_says_the_same_of_the_engine_and_of_its_server_as_of_mlx_lm(file: str) -> None:
    content = committed(file)
    check_machine(content, "accuracy.py", "model", "lm_eval", "blas", "load_at_start")
    tolerance = importlib.import_module("accuracy").TOLERANCE
    rows = content["results"]["metrics"]
    assert {row["metric"] for row in rows} == {"acc", "acc_norm", "exact_match", "word_perplexity"}
    for row in rows:
        exact = row["metric"] != "word_perplexity"
        for way in WAYS[1:]:
            assert row[way] == row["mlx-lm"] if exact else row[way] == pytest.approx(row["mlx-lm"], rel=1e-4)
    num_asked = num_equal = 0
    for row in content["results"]["answers"]:
        for theirs, *others in zip(*(row[way] for way in WAYS), strict=True):
            num_asked += 1
            if isinstance(theirs, str):
                num_equal += others == [theirs] * 2
            else:
                logprobs = [each[0] if isinstance(each, list) else each for each in (theirs, *others)]
                assert logprobs[1:] == pytest.approx([logprobs[0]] * 2, abs=tolerance)
                num_equal += len({each[1] for each in (theirs, *others) if isinstance(each, list)}) <= 1
    assert num_equal == num_asked
    assert all(row["largest"] < tolerance and row["others"] == 0 for row in content["results"]["differences"])
    assert all(row["equal"] == row["answers"] for row in content["results"]["texts"])


def test_two_hundred_questions_are_made_without_a_download_and_each_has_its_answer_among_its_choices(
    tmp_path: Path,
) -> None:
    questions = importlib.import_module("questions")
    tasks = questions.write(tmp_path)
    asked = {task: [json.loads(line) for line in (tmp_path / f"{task}.jsonl").open()] for task in tasks}
    assert sum(map(len, asked.values())) == 200
    for each in (*asked["paged_stories"], *asked["paged_licences"]):
        assert len(set(each["choices"])) == 4 and each["choices"][each["answer"]]
    for each in asked["paged_stories"][::2]:  # the fact is told before it is asked for
        told, asked_for = each["text"].split("\nQuestion: ")
        sentence = f"{asked_for.split('Answer: ')[1]} {each['choices'][each['answer']]}"
        assert sentence in told
        assert not any(sentence.replace(each["choices"][each["answer"]], other) in told for other in _wrong(each))
    for each in asked["paged_answers"]:
        assert f"{each['answer']}." in each["text"]
    assert {path.suffix for path in tmp_path.iterdir()} == {".yaml", ".jsonl"}
    assert re.fullmatch(r"paged_\w+", json.loads((tmp_path / "paged_answers.yaml").read_text())["task"])


def _wrong(question: dict[str, Any]) -> list[str]:
    return [choice for number, choice in enumerate(question["choices"]) if number != question["answer"]]
