"""`mlx-paged generate --batch FILE`: a request in each line; answers in lines of a file, taken up where a run ended."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import click

from mlx_paged.cli.answers import JsonAnswers, Question
from mlx_paged.cli.generate import answer
from mlx_paged.cli.loading import Requests, check_form
from mlx_paged.cli.options import PromptArguments, read_stdin, read_text
from mlx_paged.cli.terminal import Terminal
from mlx_paged.config import meant_of
from mlx_paged.sampling_params import SamplingParams

if TYPE_CHECKING:
    from mlx_paged.llm import LLM

_START = b'{"id": '  # of each answer
_SETTINGS = {field.name for field in dataclasses.fields(SamplingParams)} - {"logits_processors"}  # no JSON has these


def answer_batch(
    batch: Path,
    output: Path | None,
    prompts: PromptArguments,
    load: Callable[[Requests], LLM],
    params: SamplingParams,
    terminal: Terminal,
    given: Collection[str],
) -> int:
    """Answer the requests of a file that the output file does not answer yet. Returns the exit code, as `answer` does.

    batch: lines of JSON, each with "prompt" or "messages", perhaps an "id" (else the line's number is), and parameters
    by their Python names, which go before those of `params`; "-" is stdin. output: gets a line for each as it ends;
    None: stdout does. given: as in `answer_prompts`. Raises click.UsageError for files that are not of this form.
    """
    questions = read_batch(read_stdin() if str(batch) == "-" else read_text(batch), str(batch), params)
    done = set() if output is None else _ids_of(output)
    left = [question for question in questions if question.id not in done]
    if len(left) < len(questions):
        terminal.note(f"{len(questions) - len(left)} of {len(questions)} requests are answered in {output} already")
    terminal.keep_names(_SETTINGS)  # as a line has them
    with _opened(output) as file:
        return answer(left, prompts, load, params, JsonAnswers(left, terminal, file), terminal, given)


def read_batch(text: str, source: str, defaults: SamplingParams) -> list[Question]:
    """Read the requests of a batch. Raises click.UsageError for a line that is no request with an id of its own."""
    questions: dict[int | str, Question] = {}
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise click.UsageError(f"--batch: line {number} of {source} is not JSON: {error}") from None
        if not isinstance(record, dict):
            raise click.UsageError(f"--batch: line {number} of {source} is JSON, but no object")
        name = record.pop("id", number)
        if not isinstance(name, int | str) or isinstance(name, bool):
            raise click.UsageError(f"--batch: the id in line {number} of {source} is neither text nor a whole number")
        if name in questions:
            raise click.UsageError(f"--batch: line {number} of {source} has the id {name!r}, as one before it has")
        questions[name] = _question(name, record, defaults)
    if not questions:
        raise click.UsageError(f"--batch: there is no request in {source}")
    return list(questions.values())


def _question(name: int | str, record: Mapping[str, Any], defaults: SamplingParams) -> Question:
    """Make a question of a line. What is wrong with it is its `error`."""
    asked = [key for key in ("prompt", "messages") if key in record]
    prompt: str | Sequence[Mapping[str, Any]] = record[asked[0]] if asked else ""
    settings = {key: value for key, value in record.items() if key not in ("prompt", "messages")}
    error = None
    if unknown := sorted(settings.keys() - _SETTINGS):
        error = f"there is no parameter {unknown[0]!r}: {meant_of(unknown[0], sorted(_SETTINGS))}"
    elif len(asked) != 1:
        error = "give one of prompt and messages"
    elif asked == ["prompt"] and not (isinstance(prompt, str) and prompt.strip()):
        error = "the prompt is empty" if prompt == "" else f"prompt must be text that is not blank, got {prompt!r}"
    elif asked == ["messages"] and not (isinstance(prompt, list) and all(isinstance(each, dict) for each in prompt)):
        error = f'messages must be a list of objects, like {{"role": "user", "content": "Hello"}}, got {prompt!r}'
    else:
        try:
            json.dumps(record, ensure_ascii=False).encode()
            check_form(dataclasses.replace(defaults, **settings))
        except UnicodeEncodeError:
            error = "it holds half of a surrogate pair (\\ud800 to \\udfff alone), which is no text"
        except (TypeError, ValueError) as wrong:
            error = str(wrong)
    return Question(name, prompt, settings, error)


def _ids_of(output: Path) -> set[int | str]:
    """Read which ids a file has answers of. What it says of errors is taken out: those are asked again.

    So is a last line that was cut. Raises click.UsageError for a file of something else.
    """
    if not output.exists():
        return set()
    content = output.read_bytes()
    whole, _, cut = content.rpartition(b"\n")
    lines = whole.split(b"\n") if whole else []
    ids, kept = set(), []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            name = record["id"]
            if "error" not in record:
                ids.add(name)
                kept.append(line)
        except (ValueError, TypeError, KeyError, RecursionError):
            raise click.UsageError(
                f"--output: line {number} of {output} is no answer with an id: give a new file, or one that this wrote"
            ) from None
    if cut and not cut.startswith(_START[: len(cut)]):
        raise click.UsageError(f"--output: the last line of {output} is no answer with an id: give a new file")
    if cut or len(kept) < len(lines):
        whole_file = output.resolve()
        partial = whole_file.with_name(f"{whole_file.name}.partial")
        partial.write_bytes(b"".join(line + b"\n" for line in kept))
        os.replace(partial, whole_file)
    return ids


@contextmanager
def _opened(output: Path | None) -> Iterator[TextIO | None]:
    """Open the file of answers to add to it. Raises click.UsageError if it can't be written."""
    if output is None:
        yield None
        return
    try:
        file = output.open("a", encoding="utf-8")
    except OSError as error:
        raise click.UsageError(f"--output: {error.strerror}: {output}") from None
    with file:
        yield file
