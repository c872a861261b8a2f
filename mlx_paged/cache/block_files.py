"""Block files on disk: folders that belong to one process, and a bound on files that many processes and models share.

Knows no arrays: what is in a file is block_store.py's.
"""

import contextlib
import errno
import fcntl
import os
import shutil
import tempfile
import time
import weakref
from collections import deque
from pathlib import Path
from typing import NamedTuple

from mlx_paged import __version__
from mlx_paged.blocks.stored_states import PREFIX as STATE_PREFIX
from mlx_paged.config import format_memory, parse_memory

FORMAT = 2  # of files with saved prompts; those of 0.1.0, the first, don't say theirs
VERSION = f".v{FORMAT}-{__version__}"  # ends the names of their folders: other code may compute a layer otherwise
SUFFIX = ".safetensors"
_WRITING = "mlx-paged-writing-"  # begins the names of folders with half-written files
_LOCK = "owner.lock"
_HOUR_S = 3600.0
_OUTDATED_DAYS = 30  # for which files of another version stay that nobody uses
_SCANS = 16  # in the time in which the bound is written once: others write, too


class OwnFolder:
    """A new folder that goes with its owner, or if that is killed, when the next such folder is made beside it.

    The owner holds a lock on a file in it for as long as it lives: unlike a process id, that is never another's, nor
    does it differ between containers that share a disk.
    """

    def __init__(self, parent: Path, prefix: str) -> None:
        """Remove what owners that are gone have left in `parent`. Raises OSError if no folder can be made there."""
        parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(parent, prefix)
        self.path = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
        new = self.path / "new.lock"
        lock = os.open(new, os.O_CREAT | os.O_RDWR)
        with contextlib.suppress(OSError):  # some network file systems have no locks: then nobody removes it
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            new.rename(self.path / _LOCK)  # nobody sees it without its lock
        weakref.finalize(self, _remove, self.path, lock, os.getpid())


def _remove(folder: Path, lock: int, pid: int) -> None:
    if os.getpid() == pid:  # a fork is not the owner
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def _remove_abandoned(parent: Path, prefix: str) -> None:
    for folder in parent.glob(f"{prefix}*"):
        try:
            lock = os.open(folder / _LOCK, os.O_RDWR)
        except OSError:  # it is being made, or another user's
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
        except OSError:  # its owner lives
            pass
        finally:
            os.close(lock)


class _File(NamedTuple):
    """A file. They sort in the order in which they are to go."""

    is_current: bool
    """Whether it is of this version; all that are in swap are."""
    used_ns: int
    """When it was used last."""
    path: Path
    num_bytes: int


class BlockFiles:
    """The block files in a folder and its subfolders, of all processes.

    Those of other versions go first, then those used least recently.
    """

    def __init__(self, root: Path, capacity: int | str | None = None, *, spares_disk: bool = False) -> None:
        """capacity: most bytes of all of them, or a share of what they have and what is free; None: no bound.

        spares_disk: no more than that is written in an hour, and what other versions have left, which nobody has used
        for a month, is removed. Makes the folder; one that can't be written to is read
        only. Raises OSError if it can't be read, either.
        """
        self._root = root
        self._hour = -_HOUR_S  # when it began
        self._num_written = 0  # bytes, in this hour
        self.why_read_only: OSError | None = None
        try:
            self._own = OwnFolder(root, _WRITING)
        except OSError as error:
            os.listdir(root)
            self.why_read_only = error
        self._scan()
        free = shutil.disk_usage(root).free
        self._capacity = None if capacity is None else parse_memory(capacity, free + self._num_bytes)
        self._hourly = self._capacity if spares_disk else None
        if self._capacity is not None and self.why_read_only is None:
            if spares_disk:
                self._remove_outdated()
            self._make_room(0, self._capacity)

    @property
    def outdated_bytes(self) -> int:
        """Of files of other versions, as of the last look."""
        return sum(file.num_bytes for file in self._oldest if not file.is_current)

    def _remove_outdated(self) -> None:
        before = time.time_ns() - _OUTDATED_DAYS * 24 * 3600 * 10**9
        for file in [file for file in self._oldest if not file.is_current and file.used_ns < before]:
            self.discard(file.path)
            self._oldest.remove(file)
            with contextlib.suppress(OSError):  # of one that is not empty yet
                file.path.parent.rmdir()

    @property
    def takes_more(self) -> bool:
        """Whether files may be written now."""
        if time.monotonic() - self._hour >= _HOUR_S:
            self._hour, self._num_written = time.monotonic(), 0
        return self.why_read_only is None and (self._hourly is None or self._num_written < self._hourly)

    def partial(self, name: str) -> Path:
        """Return where a file of this name is written until it is whole."""
        return self._own.path / name

    def add(self, partial: Path, path: Path) -> list[Path]:
        """Put a whole file into its place. Returns those that had to go for it. Raises OSError if it has no place."""
        num_bytes = partial.stat().st_size
        with contextlib.suppress(FileNotFoundError):
            self.touch(path)  # one that is to be replaced goes last
        num_before = path.stat().st_size if path.exists() else 0
        removed = [] if self._capacity is None else self._make_room(num_bytes - num_before, self._capacity)
        path.parent.mkdir(exist_ok=True)
        partial.replace(path)
        self.touch(path)
        self._num_bytes += num_bytes - num_before
        self._num_unscanned += num_bytes
        self._num_written += num_bytes
        return removed

    def touch(self, path: Path) -> None:
        """Note that a file is used. Raises FileNotFoundError if it is gone."""
        now = time.time_ns()  # finer than what a file system would take
        try:
            os.utime(path, ns=(now, now))
        except FileNotFoundError:
            raise
        except OSError:  # read only
            pass

    def discard(self, path: Path) -> None:
        """Remove a file, if it is there and can be removed."""
        with contextlib.suppress(OSError):
            num_bytes = path.stat().st_size
            path.unlink()
            self._num_bytes -= num_bytes

    def _make_room(self, num_bytes: int, capacity: int) -> list[Path]:
        removed: list[Path] = []
        if num_bytes > capacity:
            raise OSError(errno.ENOSPC, no_place(num_bytes, capacity), str(self._root))
        if self._num_unscanned > capacity // _SCANS:
            self._scan()
        for _ in range(2):  # with the files as they were, then as they are
            while self._num_bytes + num_bytes > capacity and self._oldest:
                _, used_ns, path, _ = self._oldest.popleft()
                with contextlib.suppress(OSError):
                    if path.stat().st_mtime_ns == used_ns:  # not used meanwhile
                        removed.append(path)
                        self.discard(path)
            if self._num_bytes + num_bytes <= capacity:
                return removed
            self._scan()
        raise OSError(errno.ENOSPC, "files can't be removed to make room for others", str(self._root))

    def _scan(self) -> None:
        """Look at what is there."""
        files = sorted(_files(self._root))
        self._oldest = deque(files)
        self._num_bytes = sum(file.num_bytes for file in files)
        self._num_unscanned = 0  # bytes that were written since then


def no_place(num_bytes: int, capacity: int) -> str:
    """Say that something is larger than a whole store."""
    return f"a block or a state of {format_memory(num_bytes)} has no place in {format_memory(capacity)}"


def _files(root: Path) -> list[_File]:
    """The files that are whole. Other processes may remove any of them, and folders, meanwhile."""
    paths, found = [*root.glob(f"*{SUFFIX}")], []
    for folder in root.glob("*"):
        with contextlib.suppress(OSError):
            paths += () if folder.name.startswith(_WRITING) else folder.glob(f"*{SUFFIX}")
    for path in paths:
        with contextlib.suppress(OSError):
            is_current = path.parent == root or path.parent.name.endswith(VERSION)
            found.append(_File(is_current, (stat := path.stat()).st_mtime_ns, path, stat.st_size))
    return found


class SavedModel(NamedTuple):
    """What a folder of saved prompts has of a model."""

    name: str
    """The model's family, and a digest of its weights, its settings and the layout of a block."""
    num_blocks: int
    num_states: int
    """Of recurrent layers: those of prefixes."""
    num_bytes: int
    last_used: float
    """In seconds since 1970."""
    is_current: bool
    """Whether this version of mlx-paged wrote it; otherwise it does not use it."""


def saved_models(root: Path) -> list[SavedModel]:
    """List what a folder of saved prompts has, the model used last first. Raises OSError if it can't be read."""
    os.listdir(root)
    by_model: dict[str, list[_File]] = {}
    for file in _files(root):
        by_model.setdefault(file.path.parent.name, []).append(file)
    models = []
    for name, files in by_model.items():
        num_states = sum(file.path.name.startswith(STATE_PREFIX) for file in files)
        num_bytes, last_used = sum(file.num_bytes for file in files), max(files).used_ns / 1e9
        current = files[0].is_current
        models.append(
            SavedModel(name.removesuffix(VERSION), len(files) - num_states, num_states, num_bytes, last_used, current)
        )
    return sorted(models, key=lambda model: model.last_used, reverse=True)
