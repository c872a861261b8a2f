"""Where compiled things are kept: a tree of directories that appear complete and never change.

Each is built under a temporary name and renamed, so processes can share the tree without locks.
"""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path


@functools.cache
def cache_directory() -> Path:
    """The root: ``METALSIM_CACHE``, else a folder in the user's cache, else, if that can't be written, in /tmp."""
    chosen = os.environ.get("METALSIM_CACHE")
    if chosen:
        return _made(Path(chosen).absolute())
    try:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        return _made(home / "mlx-paged" / "metalsim")
    except (OSError, RuntimeError):
        return _made(Path(tempfile.gettempdir()) / f"metalsim-{os.getuid()}")


def _made(path: Path) -> Path:
    """The path, an existing directory of this user's that files can be written to."""
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    if path.stat().st_uid != os.getuid():
        raise PermissionError(f"{path} belongs to somebody else: set METALSIM_CACHE to a directory of yours")
    with tempfile.TemporaryFile(dir=path):
        return path


def publish(target: Path, build: Callable[[Path], None]) -> bool:
    """Makes the directory `target` if it does not exist; returns whether this call did.

    `build` fills a temporary directory. If another process is faster, its directory stays.
    """
    if target.is_dir():
        return False
    target.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix="building-", dir=target.parent))
    try:
        build(work)
        work.rename(target)
        return True
    except OSError:
        if not target.is_dir():
            raise
        return False
    finally:
        shutil.rmtree(work, ignore_errors=True)


def digest(*parts: str | bytes) -> str:
    """A name for a directory that depends on these contents."""
    state = hashlib.sha256()
    for part in parts:
        state.update(part if isinstance(part, bytes) else part.encode())
        state.update(b"\0")
    return state.hexdigest()[:20]
