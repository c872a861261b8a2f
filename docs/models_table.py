"""Prints the table of docs/models.md: what becomes of each model file of the mlx-lm that is installed, and why.

python docs/models_table.py, with --write to put it there
"""

import re
import sys
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

from mlx_paged.models.registry import FAMILIES, SAME_CODE, Family

PAGE = Path(__file__).parent / "models.md"
BEGIN, END = "<!-- docs/models_table.py --write puts here what follows -->\n\n", "\n<!-- up to here -->\n"
HEADINGS = {
    "verified": "verified: compared over block sizes, chunks, batches, orders and preemption",
    "tested": "tested: compared over one batch of prompts",
}


def model_files() -> list[str]:
    """Name the files of mlx-lm that have a model of a family; the others are what those share."""
    spec = find_spec("mlx_lm.models")
    assert spec is not None and spec.submodule_search_locations is not None
    files = Path(spec.submodule_search_locations[0]).glob("*.py")
    has_model = re.compile(r"^(class Model\b|from .* import .*\bModel\b)", re.MULTILINE)
    return sorted(file.stem for file in files if has_model.search(file.read_text()))


def table() -> str:
    """Write all families as Markdown: those that run by how well that is tested, the others by what is in the way."""
    lines = ["| families | |", "|---|---|"]
    for status, heading in HEADINGS.items():
        shown = map(_with_note, _of(status))
        lines.append(f"| {', '.join(sorted(shown, key=str.lower))} | {heading} |")
    for why in dict.fromkeys(family.note for family in _of("refused")):
        lines.append(f"| {_names(family.name for family in _of('refused') if family.note == why)} | refused: {why} |")
    if unknown := set(model_files()) - set(FAMILIES):
        lines.append(f"| {_names(unknown)} | nothing is known: tried when it is loaded |")
    same = ", ".join(f"`{name}` as `{code}`" for name, code in SAME_CODE.items())
    return "\n".join(lines) + f"\n\nFamilies that mlx-lm runs with another's code count as that one: {same}.\n"


def page() -> str:
    """Return the page with the table as it has to be."""
    before, rest = PAGE.read_text().split(BEGIN)
    return before + BEGIN + table() + END + rest.split(END)[1]


def _of(status: str) -> list[Family]:
    return [family for family in FAMILIES.values() if family.status == status]


def _names(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in sorted(names))


def _with_note(family: Family) -> str:
    return f"`{family.name}` ({family.note})" if family.note else f"`{family.name}`"


if __name__ == "__main__":
    if sys.argv[1:] == ["--write"]:
        PAGE.write_text(page())
    else:
        print(table(), end="")
