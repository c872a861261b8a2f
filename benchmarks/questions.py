"""Questions for lm-evaluation-harness that need no download: tasks made of the demo's stories and of licence texts.

    python benchmarks/questions.py FOLDER      writes the tasks; lm-eval finds them by --include_path FOLDER

There are 200. `paged_stories` asks for facts of a story, and how it goes on, among four each; `paged_licences` how a
passage of a licence goes on, among four; `paged_licence_text` gives passages whose likelihood is asked for, and
`paged_answers` has a fact answered in words. The stories are the same everywhere; the licences are those that the
system has, else the project's own.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import mlx_paged.models

mlx_paged.models.__path__.append(str(Path(__file__).parents[1] / "models"))  # no wheel has what the demo's text is of
from mlx_paged.models.demo.sentences import KINDS  # noqa: E402
from mlx_paged.models.demo.stories import held_out_story  # noqa: E402

Question = dict[str, Any]

COUNTS = {"paged_stories": 80, "paged_licences": 80, "paged_licence_text": 20, "paged_answers": 20}
NUM_CHOICES = 4
LICENCES = Path("/usr/share/common-licenses")  # where Debian keeps them
OWN_LICENCE = Path(__file__).parents[1] / "LICENSE"
PASSAGE_WORDS, END_WORDS = 36, 8

CHOICES = {
    "output_type": "multiple_choice",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "{{answer}}",
    "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
}
TASKS: dict[str, dict[str, Any]] = {
    "paged_stories": {"doc_to_text": "{{text}}", **CHOICES},
    "paged_licences": {"doc_to_text": "{{text}}", **CHOICES},
    "paged_licence_text": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "byte_perplexity"}],
    },
    "paged_answers": {
        "output_type": "generate_until",
        "doc_to_text": "{{text}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": [".", "\n"], "max_gen_toks": 16, "do_sample": False, "temperature": 0},
        "metric_list": [{"metric": "exact_match", "ignore_case": True, "ignore_punctuation": True}],
    },
}


def story_questions(count: int) -> Iterator[Question]:
    """Ask in turn for a fact of a story, whose wrong values come from facts of that kind, and for its last sentence."""
    for number in range(count):
        rng = random.Random(f"question {number}")
        story = held_out_story(number, min_distance_words=0, num_facts=2)
        if number % 2:
            beginning, right = _last_sentence(story.text)
            others = (
                _last_sentence(held_out_story(10_000 + 100 * number + i, min_distance_words=0, num_facts=2).text)[1]
                for i in range(99)
            )
            yield {"text": beginning} | _choices(rng, right, others)
        else:
            fact = rng.choice(story.facts)
            values = next(kind.values for kind in KINDS.values() if fact.value in kind.values)
            before, after = fact.answer.rsplit(fact.value, 1)
            text = f"{story.text}\nQuestion: {fact.question}\nAnswer: {before.rstrip()}"
            others = (f"{value}{after}" for value in rng.sample(values, len(values)))
            yield {"text": text} | _choices(rng, f"{fact.value}{after}", others)


def answers(count: int) -> Iterator[Question]:
    """Ask for a fact in words, of which the last is what has to be recalled."""
    for number in range(count):
        story = held_out_story(20_000 + number, min_distance_words=0, num_facts=2)
        fact = random.Random(f"answer {number}").choice(story.facts)
        yield {
            "text": f"{story.text}\nQuestion: {fact.question}\nAnswer:",
            "answer": f" {fact.answer.removesuffix('.')}",
        }


def licence_questions(count: int) -> Iterator[Question]:
    """Ask how a passage goes on; the wrong ends are those of other passages."""
    passages = licence_passages()
    for number, (beginning, right) in enumerate(random.Random("licences").sample(passages, count)):
        rng = random.Random(f"licence {number}")
        ends = (end for _, end in rng.sample(passages, len(passages)))
        yield {"text": beginning} | _choices(rng, right, ends)


def licence_texts(count: int) -> Iterator[Question]:
    """Give whole passages."""
    for beginning, end in random.Random("texts").sample(licence_passages(), count):
        yield {"text": f"{beginning} {end}"}


def licence_passages() -> list[tuple[str, str]]:
    """Return passages of the licences that there are, each once, as a beginning and an end."""
    files = sorted(file for file in LICENCES.glob("*") if file.is_file() and not file.is_symlink()) or [OWN_LICENCE]
    found = {}
    for text in (file.read_text(errors="replace").split() for file in files):
        for start in range(0, len(text) - PASSAGE_WORDS, PASSAGE_WORDS // 3):
            words = text[start : start + PASSAGE_WORDS]
            found[" ".join(words[:-END_WORDS])] = " ".join(words[-END_WORDS:])
    return list(found.items())


def _last_sentence(text: str) -> tuple[str, str]:
    beginning, end = text.removesuffix(".").rsplit(". ", 1)
    return f"{beginning}.", f"{end}."


def _choices(rng: random.Random, right: str, others: Iterable[str]) -> Question:
    """Return the choices, each once, with the right one anywhere among them, and its place."""
    wrong = [other for other in dict.fromkeys(others) if other != right][: NUM_CHOICES - 1]
    answer = rng.randrange(NUM_CHOICES)
    return {"choices": [*wrong[:answer], right, *wrong[answer:]], "answer": answer}


MAKERS = {
    "paged_stories": story_questions,
    "paged_licences": licence_questions,
    "paged_licence_text": licence_texts,
    "paged_answers": answers,
}


def write(folder: Path, share: float = 1.0) -> list[str]:
    """Write the tasks into a folder, or that share of each. Returns their names."""
    folder.mkdir(parents=True, exist_ok=True)
    for task, count in COUNTS.items():
        data = folder / f"{task}.jsonl"
        questions = MAKERS[task](max(1, round(count * share)))
        data.write_text("".join(json.dumps(question) + "\n" for question in questions))
        source = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data.resolve())}}}
        settings = {"task": task, "test_split": "test"} | source | TASKS[task]
        (folder / f"{task}.yaml").write_text(json.dumps(settings, indent=1) + "\n")  # JSON is YAML
    return list(COUNTS)


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        sys.exit("benchmarks/questions.py needs a folder to write into: python benchmarks/questions.py FOLDER")
    print("\n".join(write(Path(sys.argv[1]))))
