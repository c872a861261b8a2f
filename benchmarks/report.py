"""What the benchmarks share: parts that measure, tables of them in a terminal or in Markdown, and raw JSON."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx

from mlx_paged.errors import ModelError
from mlx_paged.tools.report import Columns, Row, as_text, describe_machine, markdown, terminal_table


class Part(NamedTuple):
    """A measurement, and the table of it."""

    run: Callable[[bool], list[Row]]
    """Measures, or in a quick run only does what it would measure. Its name is the part's."""
    title: str
    columns: Columns
    """Key in a row -> heading and format."""


def main(
    script: str,
    purpose: str,
    parts: Sequence[Part],
    *,
    apart: bool = False,
    own_options: Sequence[argparse.ArgumentParser] = (),
    **details: Any,
) -> None:
    """Run the command line of the benchmark `script`. A part that fails does not keep the others from being measured.

    apart: each in a process of its own. own_options: what the script has read itself, for --help. details: what the
    numbers depend on beside MLX, such as versions.
    """
    parser = argparse.ArgumentParser(description=purpose.split("\n")[0], parents=own_options)
    parser.add_argument("--quick", action="store_true", help="small sizes and few repetitions: only to see it run")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the raw numbers")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="only print the tables of such a file")
    names = [part.run.__name__ for part in parts]
    help_only = f"measure these parts of {', '.join(names)}; others that FILE has stay in it"
    parser.add_argument("--only", metavar="NAME,...", type=_names_among(names), help=help_only)
    options = parser.parse_args()
    if options.markdown:
        results = json.loads(options.markdown.read_text())["results"]
        for part in parts:
            if part.run.__name__ in results:
                print(f"{part.title}:\n\n{markdown(part.columns, results[part.run.__name__])}\n")
        return
    if apart and not options.only:
        if options.json:
            options.json.unlink(missing_ok=True)
        command = [sys.executable, *sys.argv, "--only"]
        _end(script, [name for name in names if subprocess.run([*command, name], check=False).returncode])
        return
    arguments = sys.argv[1:]
    if options.only:  # what repeats one part repeats it with the others too
        at = next(index for index, argument in enumerate(arguments) if argument.split("=")[0] == "--only")
        del arguments[at : at + 1 + (arguments[at] == "--only")]
    machine = describe_machine(" ".join([f"python benchmarks/{script}", *arguments]), **details)
    results = _results_to_keep(options.json, machine) if options.only else {}
    failed = []
    for part in parts:
        if options.only and part.run.__name__ not in options.only:
            continue
        mx.random.seed(0)
        try:
            rows = results[part.run.__name__] = part.run(options.quick)
        except KeyboardInterrupt:
            sys.exit(130)
        except Exception as error:  # the other parts may be worth having
            if isinstance(error, ModelError):
                print(f"{part.run.__name__}: {error}", file=sys.stderr)
            else:
                traceback.print_exc()
            failed.append(part.run.__name__)
            continue
        print(as_text(terminal_table(part.title, part.columns, rows)), flush=True)
        results = {name: results[name] for name in names if name in results}
        if options.json:  # after each part, so that what was measured outlives a later part's failure
            options.json.write_text(json.dumps({"machine": machine, "results": results}, indent=1) + "\n")
    _end(script, failed)


def _names_among(names: Sequence[str]) -> Callable[[str], list[str]]:
    """Make the type of an option that takes some of `names`, with commas between them."""

    def parse(value: str) -> list[str]:
        chosen = value.split(",")
        for name in chosen:
            if name not in names:
                raise argparse.ArgumentTypeError(f"there is no {name!r}: they are {', '.join(names)}")
        return chosen

    return parse


def _end(script: str, failed: list[str]) -> None:
    """End the program with an error if parts have failed."""
    if failed:
        sys.exit(f"{script}: {', '.join(failed)} failed; why is said above")


def _results_to_keep(file: Path | None, machine: dict[str, Any]) -> dict[str, list[Row]]:
    """Read what a file has so far. Ends the program if that is from another machine or another version."""
    if file is None or not file.exists():
        return {}
    content = json.loads(file.read_text())
    if content["machine"] != machine:
        differing = [name for name in machine if machine[name] != content["machine"].get(name)]
        sys.exit(f"{file} has results of another {', '.join(differing)}: give another file, or measure all parts")
    kept: dict[str, list[Row]] = content["results"]
    return kept
