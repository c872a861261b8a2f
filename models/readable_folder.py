"""Make folders readable for mlx-lm whose text files begin with a byte order mark, as some editors write it.

And folders with brackets in their names, in which it would look for weights by a pattern.
"""

import codecs
import glob
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_TEXT = {".json", ".jinja", ".txt"}


@contextmanager
def as_readable(folder: Path) -> Iterator[Path]:
    """Yield `folder`, or while it is needed a folder of links in which the files with a mark are copies without it."""
    marked = {path.name for path in folder.iterdir() if path.suffix in _TEXT and path.is_file() and _has_mark(path)}
    if not marked and glob.escape(str(folder)) == str(folder):
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="mlx-paged-") as name:
        for path in folder.iterdir():
            copy = Path(name) / path.name
            if path.name in marked:
                copy.write_bytes(path.read_bytes().removeprefix(codecs.BOM_UTF8))
            else:
                copy.symlink_to(path.resolve())
        yield Path(name)


def _has_mark(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(codecs.BOM_UTF8)) == codecs.BOM_UTF8
