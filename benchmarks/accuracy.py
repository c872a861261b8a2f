"""Accuracy by lm-evaluation-harness, which asks this engine, its server, and mlx-lm unpaged the same 200 questions.

    python benchmarks/accuracy.py [--model MODEL] [--quick] [--json FILE]    ask, print, write raw numbers
    python benchmarks/accuracy.py --markdown FILE                            the tables of such a file

Needs `pip install 'lm-eval[api]'`; nothing is downloaded (benchmarks/questions.py makes the questions). mlx-lm is
asked through its own class for lm-eval, MLXLM; this engine through that of examples/lm_eval_model.py; and
`mlx-paged serve` through lm-eval's `local-completions`, which reads log-probabilities from echoed prompts. MLXLM leaves
out the likelihood of a text's first token; so that all three give that of whole texts, it is told the token that the
other two begin with.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

from mlx_paged import LLM  # isort: skip  # noqa: F401  (before mlx, so that it finds OpenBLAS)
import questions
import report
from report import Part, Row

from mlx_paged.cpu.blas import blas_name
from mlx_paged.models import loading
from mlx_paged.models.hub import resolve

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

PARSER = argparse.ArgumentParser(add_help=False)
PARSER.add_argument("--model", help="a folder or a name of Hugging Face; the bundled one, if not given")
PARSER.add_argument("--concurrency", type=int, default=8, metavar="N", help="requests to the server at once: 8")
PARSER.add_argument("--share", type=float, default=1.0, metavar="X", help="of the questions of each task: 1")
PARSER.add_argument("--keep", type=Path, metavar="FOLDER", help="keep answers there; what is kept is not asked again")
PARSER.add_argument("--way", help="only ask in this way, and keep the answers: mlx-lm, engine or server")
OPTIONS = PARSER.parse_known_args()[0]

TOLERANCE = 1e-3  # nats, of the log-likelihood of an answer: sums of float32 in another order differ by less
UNPAGED, ENGINE, SERVER = "mlx-lm", "engine", "server"
METRICS = ("acc", "acc_norm", "exact_match", "word_perplexity")


@contextmanager
def unpaged(model: str) -> Iterator[Any]:
    """mlx-lm's own class, over caches that are not paged."""
    from mlx_lm.evaluate import MLXLM

    class Whole(MLXLM):
        def loglikelihood_rolling(self, requests: Any) -> list[float]:
            start = self.tokenizer.bos_token or self.tokenizer.eos_token
            for request in requests:
                request.arguments = (start + request.args[0],)
            return super().loglikelihood_rolling(requests)

    lm = Whole(model, use_chat_template=True)  # which here only says that no special tokens are added
    loading.set_dtype(lm._model, None)  # as the engine does: float32 on a CPU
    yield lm


@contextmanager
def engine(model: str) -> Iterator[Any]:
    """The example's class."""
    from lm_eval_model import PagedLM

    yield PagedLM(model)


@contextmanager
def server(model: str) -> Iterator[Any]:
    """lm-eval's class for servers of OpenAI's completions, and our server."""
    from lm_eval.models.openai_completions import LocalCompletionsAPI
    from served import Ours, closing_all

    with closing_all([Ours(model, "--served-model-name", "asked")]) as (ours,):
        yield LocalCompletionsAPI(
            base_url=f"http://127.0.0.1:{ours.port}/v1/completions",
            model="asked",
            tokenizer=model,
            tokenizer_backend="huggingface",
            num_concurrent=OPTIONS.concurrency,
            max_retries=1,
            timeout=24 * 3600,  # of all that is asked at once
        )


WAYS: dict[str, Callable[[str], Any]] = {UNPAGED: unpaged, ENGINE: engine, SERVER: server}


class Found(NamedTuple):
    """What one way of asking gave, by task."""

    metrics: dict[str, dict[str, Any]]
    answers: dict[str, list[list[Any]]]
    """Per question, in their order, of each choice (log-likelihood, whether it is the greedy continuation); of a whole
    text its log-likelihood alone; of an answer in words its text."""


@cache
def ask_all(quick: bool) -> dict[str, Found]:
    """Ask all questions in all ways, one way after the other."""
    return {way: ask(way, quick) for way in WAYS}


def ask(way: str, quick: bool) -> Found:
    """Ask all questions in one way, or take its answers from where they are kept."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    kept = OPTIONS.keep and OPTIONS.keep / f"{way}{'-quick' if quick else ''}.json"
    if kept and kept.exists():
        return Found(**json.loads(kept.read_text()))
    model = str(resolve(OPTIONS.model))
    with tempfile.TemporaryDirectory() as folder, WAYS[way](model) as lm:
        tasks = questions.write(Path(folder), 0.02 if quick else OPTIONS.share)
        manager = TaskManager(include_path=folder, include_defaults=False)
        done = lm_eval.simple_evaluate(model=lm, tasks=tasks, task_manager=manager, bootstrap_iters=0)
    answers = {}
    for task in tasks:
        samples = sorted(done["samples"][task], key=lambda sample: sample["doc_id"])
        answers[task] = [[_plain(response) for (response,) in sample["resps"]] for sample in samples]
    found = Found(done["results"], answers)
    if kept:
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps(found._asdict()))
    return found


def _plain(response: Any) -> Any:
    return [float(response[0]), bool(response[1])] if isinstance(response, tuple | list) else response


def metrics(quick: bool) -> list[Row]:
    """What the harness reports."""
    rows = []
    for task, count in ((task, len(answers)) for task, answers in ask_all(quick)[UNPAGED].answers.items()):
        for metric in METRICS:
            values = {way: found.metrics[task].get(f"{metric},none") for way, found in ask_all(quick).items()}
            if values[UNPAGED] is not None:
                rows.append({"task": task, "questions": count, "metric": metric} | values)
    return rows


def differences(quick: bool) -> list[Row]:
    """How far log-likelihoods are from mlx-lm's, answer by answer, and how many other things differ."""
    rows = []
    for way, task, theirs, ours in _pairs(quick):
        if not isinstance(theirs[0], str):
            numbers = [[each[0] if isinstance(each, list) else each for each in side] for side in (theirs, ours)]
            gaps = [abs(one - other) for one, other in zip(*numbers, strict=True)]
            flags = [[each[1:] for each in side if isinstance(each, list)] for side in (theirs, ours)]
            row: Row = {"way": way, "task": task, "answers": len(gaps), "largest": max(gaps)}
            row["relative"] = max(gap / abs(number) for gap, number in zip(gaps, numbers[0], strict=True))
            rows.append(row | {"others": sum(one != other for one, other in zip(*flags, strict=True))})
    return rows


def texts(quick: bool) -> list[Row]:
    """How many answers in words are mlx-lm's to the letter."""
    return [
        {"way": way, "task": task, "answers": len(theirs), "equal": sum(map(str.__eq__, theirs, ours))}
        for way, task, theirs, ours in _pairs(quick)
        if isinstance(theirs[0], str)
    ]


def _pairs(quick: bool) -> Iterator[tuple[str, str, list[Any], list[Any]]]:
    """Yield the answers to each task in mlx-lm, and in another way, in one order."""
    found = ask_all(quick)
    for way in (ENGINE, SERVER):
        for task, expected in found[UNPAGED].answers.items():
            theirs, ours = ([answer for each in one for answer in each] for one in (expected, found[way].answers[task]))
            yield way, task, theirs, ours


def answers(quick: bool) -> list[Row]:
    """Each answer in all ways, as it came."""
    found = ask_all(quick)
    return [
        {"task": task, "question": number} | {way: each.answers[task][number] for way, each in found.items()}
        for task, asked in found[UNPAGED].answers.items()
        for number in range(len(asked))
    ]


PARTS = (
    Part(
        metrics,
        "What lm-evaluation-harness says of a model that runs in mlx-lm, in this engine and in its server",
        {"task": ("task", ""), "questions": ("questions", "d"), "metric": ("metric", "")}
        | {way: (way, ".6g") for way in WAYS},
    ),
    Part(
        differences,
        "Log-likelihoods against mlx-lm's",
        {
            "way": ("asked through", ""),
            "task": ("task", ""),
            "answers": ("answers", "d"),
            "largest": ("largest difference, nats", ".1e"),
            "relative": ("of the number itself", ".1e"),
            "others": ("other greedy choices", "d"),
        },
    ),
    Part(
        texts,
        "Answers in words against mlx-lm's",
        {
            "way": ("asked through", ""),
            "task": ("task", ""),
            "answers": ("answers", "d"),
            "equal": ("the same to the letter", "d"),
        },
    ),
    Part(
        answers, "Each answer", {"task": ("task", ""), "question": ("question", "d")} | {way: (way, "") for way in WAYS}
    ),
)


if __name__ == "__main__":
    try:
        lm_eval_version = version("lm_eval")
    except PackageNotFoundError:
        sys.exit("benchmarks/accuracy.py needs lm-evaluation-harness: pip install 'lm-eval[api]'")
    if OPTIONS.way:
        if OPTIONS.way not in WAYS or not OPTIONS.keep:
            sys.exit(f"benchmarks/accuracy.py: --way is one of {', '.join(WAYS)}, and needs --keep FOLDER")
        ask(OPTIONS.way, "--quick" in sys.argv)
        sys.exit()
    details = {"model": Path(OPTIONS.model).name if OPTIONS.model else "demo", "lm_eval": lm_eval_version}
    details |= {"blas": blas_name(), "load_at_start": round(os.getloadavg()[0], 1)}
    report.main("accuracy.py", __doc__ or "", PARTS, own_options=[PARSER], **details)
