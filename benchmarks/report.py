"""What the benchmarks share: parts that measure, tables of them in a terminal or in Markdown, and raw JSON."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
from limited import run_limited

from mlx_paged.errors import ModelError
from mlx_paged.tools.report import Columns, Row, as_text, describe_machine, markdown, terminal_table

Content = dict[str, Any]  # of a file of results: `machine`, `results`, and of parts that run apart `parts`

_OUTPUT_KEPT = 20_000  # characters, the last, of what a part that failed or was cut off has written


class Part(NamedTuple):
    """A measurement, and the table of it."""

    run: Callable[[bool], Iterable[Row]]
    """Measures, or in a quick run only does what it would measure. Its name is the part's. Of one that yields its rows
    those are kept that it has when it fails or is interrupted."""
    title: str
    columns: Columns
    """Key in a row -> heading and format."""
    question: str = ""
    """What its rows answer, in a line."""
    limit_s: float = 600
    """Of wall time, in scripts whose parts run apart."""


def main(
    script: str,
    purpose: str,
    parts: Sequence[Part],
    *,
    apart: bool = False,
    own_options: Sequence[argparse.ArgumentParser] = (),
    file: Path | None = None,
    **details: Any,
) -> None:
    """Run the command line of the benchmark `script`. A part that fails does not keep the others from being measured.

    apart: each in a process of its own, with a limit. own_options: what the script has read itself, for --help. file:
    where the raw numbers go without --json. details: what the numbers depend on beside MLX, such as versions.
    """
    parser = argparse.ArgumentParser(description=purpose.split("\n")[0], parents=own_options)
    parser.add_argument("--quick", action="store_true", help="small sizes and few repetitions: only to see it run")
    to = f"; without it they go to {file.name}" if file else ""
    parser.add_argument("--json", type=Path, metavar="FILE", default=file, help=f"write the raw numbers{to}")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="only print the tables of such a file")
    names = [part.run.__name__ for part in parts]
    help_only = f"measure these parts of {', '.join(names)}; others that FILE has stay in it"
    parser.add_argument("--only", metavar="NAME,...", help=help_only)
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)  # this is the process of a part
    options = parser.parse_args()
    if options.markdown:
        results = json.loads(options.markdown.read_text())["results"]
        for part in parts:
            if part.run.__name__ in results:
                print(f"{part.title}:\n\n{markdown(part.columns, results[part.run.__name__])}\n")
        return
    chosen = options.only.split(",") if options.only else names
    if unknown := [name for name in chosen if name not in names]:
        sys.exit(f"{script}: there is no part {', '.join(map(repr, unknown))}: they are {', '.join(names)}")
    parts = [part for part in parts if part.run.__name__ in chosen]
    machine = describe_machine(shlex.join(["python", f"benchmarks/{script}", *_lasting(sys.argv[1:])]), **details)
    content = _content_to_keep(options.json, machine) if options.only else {"machine": machine, "results": {}}
    if apart and not options.here:
        _run_apart(script, parts, content, options.json, _lasting(sys.argv[1:]))
        return
    failed = []
    for part in parts:
        name, rows = part.run.__name__, []
        mx.random.seed(0)
        try:
            for row in part.run(options.quick):
                rows.append(row)
        except KeyboardInterrupt:
            _keep(options.json, content, names, part, rows)
            sys.exit(130)
        except Exception as error:  # the other parts may be worth having
            if isinstance(error, ModelError):
                print(f"{name}: {error}", file=sys.stderr)
            else:
                traceback.print_exc()
            failed.append(name)
        # After each part, so that what was measured outlives a later part's failure.
        _keep(options.json, content, names, part, rows)
    if failed:
        sys.exit(f"{script}: {', '.join(failed)} failed; why is said above")


def _lasting(arguments: list[str]) -> list[str]:
    """Leave out what chooses parts: what repeats one part repeats it with the others too."""
    kept = [argument for argument in arguments if argument != "--here"]
    while at := [index for index, argument in enumerate(kept) if argument.split("=")[0] == "--only"]:
        del kept[at[0] : at[0] + 1 + (kept[at[0]] == "--only")]
    return kept


def _keep(file: Path | None, content: Content, names: Sequence[str], part: Part, rows: list[Row]) -> None:
    """Print the table of a part and write down its rows, if it has any."""
    if not rows:
        return
    print(as_text(terminal_table(part.title, part.columns, rows)), flush=True)
    results = content["results"] | {part.run.__name__: rows}
    content["results"] = {name: results[name] for name in names if name in results}
    _write(file, content)


def _write(file: Path | None, content: Content) -> None:
    if file:  # at one blow: the process may be ended while it writes
        new = file.with_name(f"{file.name}.new")
        new.write_text(json.dumps(content, indent=1) + "\n")
        new.replace(file)


def _content_to_keep(file: Path | None, machine: dict[str, Any]) -> Content:
    """Read what a file has so far. Ends the program if that is from another machine or another version."""
    if file is None or not file.exists():
        return {"machine": machine, "results": {}}
    try:
        content: Content = json.loads(file.read_text())
        found = content["machine"]
    except (ValueError, TypeError, KeyError):
        sys.exit(f"{file} is no file of results: give another file, or measure all parts")
    if found != machine:
        differing = [name for name in machine if machine[name] != found.get(name)]
        sys.exit(f"{file} has results of another {', '.join(differing)}: give another file, or measure all parts")
    return content


def _run_apart(script: str, parts: Sequence[Part], content: Content, file: Path | None, arguments: list[str]) -> None:
    """Run each part in a process of its own, and say at the end what came of them, and which file has it.

    The file is there from the start. How each part has ended is in its `parts`, with its output unless that is whole.
    """
    try:
        _write(file, content)
    except OSError as error:
        sys.exit(f"{script}: {file} can't be written: {error.strerror}")
    lines, words = [], {}
    for part in parts:
        name = part.run.__name__
        print(f"\n==> {name}, within {part.limit_s:.0f} s: {part.question or part.title}", flush=True)
        command = [sys.executable, sys.argv[0], *arguments, "--only", name, "--here"]
        try:
            ended = run_limited(command, part.limit_s)
        except KeyboardInterrupt:
            sys.exit(130)
        if file:
            content = json.loads(file.read_text())
            status: Row = {"question": part.question, "ended": ended.word}
            status |= {"seconds": round(ended.seconds, 1), "limit_s": part.limit_s}
            status |= {} if ended.exit_code == 0 else {"output": ended.output[-_OUTPUT_KEPT:]}
            content["parts"] = content.get("parts", {}) | {name: status}
            _write(file, content)
        words[name] = ended.word
        lines.append(f"{ended.word:8} {name:20} {ended.seconds:4.0f} s  {part.question or part.title}")
    print("\n" + "\n".join(lines))
    ends = {word: [name for name in words if words[name] == word] for word in ("failed", "cut off")}
    said = "; ".join(f"{', '.join(found)} {word}" for word, found in ends.items() if found)
    if file:
        print(f"Please send back this file: {file.resolve()}", flush=True)
    if said:
        sys.exit(f"{script}: {said}; why is said above{' and in the file' if file else ''}")
