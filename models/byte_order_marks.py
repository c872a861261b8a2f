"""Make folders readable whose text files begin with a byte order mark, as some editors write it."""

import codecs
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_TEXT = {".json", ".jinja", ".txt"}


@contextmanager
def without_marks(folder: Path) -> Iterator[Path]:
    """Yield `folder`, or while it is needed a folder of links in which the files with a mark are copies without it."""
    marked = {path.name for path in folder.iterdir() if path.suffix in _TEXT and path.is_file() and _has_mark(path)}
    if not marked:
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
