"""The pages: their blocks, their prose and the commands that they name."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PROGRAMS = ("python", "python3", "mlx-paged", "pytest", "bash", "pip", "pre-commit", "ruff", "mypy", "git")


class Snippet(NamedTuple):
    """Something on a page that can be run, and where."""

    page: str
    line: int
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}: {self.text}"


def blocks_of(page: Path) -> Iterator[tuple[str, int, str]]:
    """The fenced blocks of a page: language, line number, text."""
    language, first, lines = None, 0, list[str]()
    for number, line in enumerate(page.read_text().splitlines(), start=1):
        if line.lstrip().startswith("```"):
            if language is None:
                language, first, lines = line.strip().removeprefix("```"), number + 1, []
            else:
                yield language, first, "\n".join(lines)
                language = None
        elif language is not None:
            lines.append(line)
    assert language is None, f"{page}: a block that does not end"


def prose_of(page: Path) -> str:
    """A page with its blocks blanked, so that line numbers stay."""
    blank = lambda match: "\n" * match[0].count("\n")  # noqa: E731
    return re.sub(r"^ *```.*?^ *```", blank, page.read_text(), flags=re.DOTALL | re.MULTILINE)


def commands() -> list[Snippet]:
    """Every command of every page, in blocks and in running text, once."""
    found: dict[str, Snippet] = {}
    for page in PAGES:
        name = str(page.relative_to(ROOT))
        for language, first, text in blocks_of(page):
            assert language in ("", "sh", "python", "mermaid", "json"), f"{name}:{first}: a block of {language!r}"
            if language == "sh":
                joined = text.replace("\\\n", "  ")
                for number, line in enumerate(joined.splitlines(), start=first):
                    command = line.split("  #")[0].strip()
                    if command and not command.startswith("#"):
                        found.setdefault(command, Snippet(name, number, command))
        prose = prose_of(page)
        for match in re.finditer(r"`([^`\n]+)`", prose):
            words = [word for word in match[1].split() if not re.match(r"[A-Z_]+=", word)]
            if len(words) > 1 and Path(words[0]).name in PROGRAMS:
                found.setdefault(match[1], Snippet(name, prose.count("\n", 0, match.start()) + 1, match[1]))
    return list(found.values())
