"""Block stores: keep the K and V of evicted blocks in host memory or on disk, under a key that names their prefix.

What comes back is what any request with that prefix needs. A file is written elsewhere and moved when it is whole, and
says which model it belongs to. It also has a checksum, as what a disk gives back need not be what was given to it.
"""

import os
import tempfile
import warnings
import zlib
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol, cast

import mlx.core as mx
import numpy as np

from mlx_paged.cache.block_files import SUFFIX, VERSION, BlockFiles, OwnFolder, no_place
from mlx_paged.cache.kv_cache import BlockContent
from mlx_paged.config import EngineConfig, format_memory, parse_swap_space
from mlx_paged.errors import EngineWarning

_DEFAULT_SIZE = "10%"  # of the free disk, for saved prompts
_EMPTY_BYTES = 256  # what a block without any takes in memory, as where all layers are recurrent: its name


class BlockStore(Protocol):
    """Keeps the content of blocks; the least recently used go first where space is short."""

    def __contains__(self, key: object) -> bool: ...

    def put(self, key: str, content: BlockContent) -> None:
        """Keep a block. Raises OSError if there is no space for it."""

    def get(self, key: str) -> BlockContent:
        """Return the block kept under `key`. Raises OSError or ValueError if it can't be read back whole."""

    def drop(self, key: str) -> None:
        """Forget a block."""


class MemoryStore:
    """Blocks in host memory, for devices whose own memory is separate."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._bytes_available = capacity  # bytes that are left
        self._blocks: OrderedDict[str, dict[str, tuple[np.ndarray, mx.Dtype]]] = OrderedDict()

    def __contains__(self, key: object) -> bool:
        return key in self._blocks

    def put(self, key: str, content: BlockContent) -> None:
        # As bytes, since numpy has no bfloat16.
        kept = {name: (np.array(array.view(mx.uint8)), array.dtype) for name, array in content.items()}
        if _size(content) > self._capacity:
            raise OSError(no_place(_size(content), self._capacity))
        if key in self._blocks:
            self.drop(key)
        self._bytes_available -= _size(content)
        self._blocks[key] = kept
        while self._bytes_available < 0 and self._blocks:
            self.drop(next(iter(self._blocks)))

    def get(self, key: str) -> BlockContent:
        self._blocks.move_to_end(key)
        return {name: mx.array(raw).view(dtype) for name, (raw, dtype) in self._blocks[key].items()}

    def drop(self, key: str) -> None:
        self._bytes_available += _size({name: raw for name, (raw, _) in self._blocks.pop(key).items()})


class FolderStore:
    """Blocks of one model as safetensors files in a folder."""

    def __init__(self, files: BlockFiles, folder: Path, model: str, owner: OwnFolder | None = None) -> None:
        """files: those that `folder` is among. owner: is kept for as long as the store.

        model: names weights, dtype and layout; a file of another model is refused.
        """
        self._files = files
        self._folder = folder
        self._model = model
        self._owner = owner
        self._keys = {path.stem for path in folder.glob(f"*{SUFFIX}")}

    def __contains__(self, key: object) -> bool:
        return key in self._keys

    @property
    def takes_more(self) -> bool:
        """Whether blocks may be put into it now."""
        return self._files.takes_more

    def touch(self, key: str) -> bool:
        """Note that a block is used. Returns whether there is such a block."""
        try:
            if key in self._keys:
                self._files.touch(self._path(key))
                return True
        except FileNotFoundError:  # another process needed the space
            self._keys.discard(key)
        return False

    def put(self, key: str, content: BlockContent) -> None:
        partial = self._files.partial(f"{key}{SUFFIX}")
        try:
            mx.save_safetensors(str(partial), content, self._metadata(key, content))
            removed = self._files.add(partial, self._path(key))
        except (RuntimeError, OSError) as error:  # mlx reports a full disk as RuntimeError
            partial.unlink(missing_ok=True)
            raise OSError(f"{self._folder} can't take another block: {error}") from error
        self._keys.difference_update(path.stem for path in removed if path.parent == self._folder)
        self._keys.add(key)

    def get(self, key: str) -> BlockContent:
        path = self._path(key)
        self._files.touch(path)
        try:
            content, metadata = cast(tuple[BlockContent, dict[str, str]], mx.load(str(path), return_metadata=True))
            mx.eval(content)
        except (RuntimeError, OSError) as error:
            raise ValueError(f"{path} is not a whole block ({error})") from error
        expected = self._metadata(key, content)
        if metadata.get("version") != expected["version"]:
            raise ValueError(f"{path} was written by another version of mlx-paged")
        if any(metadata.get(name) != expected[name] for name in ("model", "key")):
            raise ValueError(f"{path} was written for another model or prefix")
        if metadata.get("crc32") != expected["crc32"]:
            raise ValueError(f"{path} is not what was written")
        return content

    def _metadata(self, key: str, content: BlockContent) -> dict[str, str]:
        return {"version": VERSION, "model": self._model, "key": key, "crc32": checksum(content)}

    def drop(self, key: str) -> None:
        self._keys.discard(key)
        self._files.discard(self._path(key))

    def _path(self, key: str) -> Path:
        return self._folder / f"{key}{SUFFIX}"


def open_stores(config: EngineConfig, fingerprint: Callable[[], str]) -> "BlockStores | None":
    """Open the stores that an engine is to have, if any; `fingerprint` names the model that saved blocks are of.

    Raises ValueError for a folder that can't be used. Warns of saved prompts that can only be read.
    """
    if config.swap_space is None and config.prefix_cache_dir is None:
        return None
    swap = _open_swap(config.swap_space) if config.swap_space is not None else None
    saved = None
    if config.prefix_cache_dir is not None:
        root = Path(config.prefix_cache_dir).expanduser()
        try:
            files = BlockFiles(root, config.prefix_cache_size or _DEFAULT_SIZE, spares_disk=True)
        except OSError as error:
            raise ValueError(_not_writable("prefix_cache_dir", root, error)) from error
        if files.why_read_only is not None:
            _warn(f"no prompts are saved, but those that were are used: {root} can't be written to")
        if files.outdated_bytes and not any(root.glob(f"*{VERSION}")):  # once: then this version has a folder
            _warn(
                f"{root} has {format_memory(files.outdated_bytes)} of prompts that another version of mlx-paged saved: "
                "they are not used, and go when room is needed, or after a month"
            )
        model = fingerprint()
        saved = FolderStore(files, root / f"{model}{VERSION}", model)
    return BlockStores(swap, saved)


def _open_swap(swap_space: int | str | os.PathLike[str]) -> BlockStore:
    """Open the store for blocks of preempted sequences and evicted prefixes, gone with the process.

    swap_space: a size, in host memory where the device has its own, else in files of the temporary folder, since
    unified memory would gain nothing from a second copy; or a folder for the files. Raises ValueError.
    """
    asked = parse_swap_space(swap_space)
    capacity = asked if isinstance(asked, int) else None
    if capacity is not None and mx.default_device() == mx.gpu and not mx.metal.is_available():
        return MemoryStore(capacity)
    parent = asked if isinstance(asked, Path) else Path(tempfile.gettempdir())
    try:
        owner = OwnFolder(parent, "mlx-paged-swap-")
        return FolderStore(BlockFiles(owner.path, capacity), owner.path, "this process", owner)
    except OSError as error:
        raise ValueError(_not_writable("swap_space", parent, error)) from error


def _not_writable(setting: str, folder: Path, error: OSError) -> str:
    return f"{setting}: {folder} can't be written to ({error.strerror}): give another folder"


class BlockStores:
    """The stores of an engine as one: blocks that leave the pool go to `swap`, prompts' blocks to `saved`.

    A store that fails to take a block is not asked again; a warning says so once, and what is missing is computed.
    """

    def __init__(self, swap: BlockStore | None, saved: FolderStore | None) -> None:
        self._swap = swap
        self._disk = saved
        self._has_warned = False
        self.num_swapped_blocks = self.num_swapped_states = 0

    def __contains__(self, key: object) -> bool:
        return any(key in store for store in (self._swap, self._disk) if store is not None)

    @property
    def stores_prompts(self) -> bool:
        """Whether blocks of prompts are kept for another run now."""
        return self._disk is not None and self._disk.takes_more

    @property
    def swaps(self) -> bool:
        """Whether what leaves the device is kept."""
        return self._swap is not None

    def put_evicted(self, key: str, content: BlockContent, *, is_state: bool = False) -> None:
        """Keep a block that leaves the pool, or a state."""
        if self._swap is not None:
            try:
                self._swap.put(key, content)
                self.num_swapped_blocks += not is_state
                self.num_swapped_states += is_state
            except OSError as error:
                self._swap = None
                _warn(f"swap is off, preempted requests are computed again: {error}")

    def has_prompt(self, key: str) -> bool:
        """Say whether a block, which is used now, is kept for another run; one in swap is gone with this one."""
        return self._disk is not None and self._disk.touch(key)

    def put_prompt(self, key: str, content: BlockContent) -> None:
        """Keep a block of a prompt for another run."""
        if self._disk is not None:
            try:
                self._disk.put(key, content)
            except OSError as error:
                self._disk = None
                _warn(f"prompts are not saved any more: {error}")

    def get(self, key: str) -> BlockContent | None:
        """Return the block kept under `key`, or None, with one warning, if it can't be read back any more."""
        for store in (self._swap, self._disk):
            if store is not None and key in store:
                try:
                    return store.get(key)
                except FileNotFoundError:  # another process needed the space
                    store.drop(key)
                except (OSError, ValueError) as error:
                    self.drop(key, error)
        return None

    def forget(self, key: str) -> None:
        """Give the place free of what is not wanted back."""
        if self._swap is not None and key in self._swap:
            self._swap.drop(key)

    def drop(self, key: str, error: Exception) -> None:
        """Forget a block that can't be used, with one warning."""
        for store in (self._swap, self._disk):
            if store is not None and key in store:
                store.drop(key)
        if not self._has_warned:
            _warn(f"what can't be read back is computed again: {error}")
        self._has_warned = True


def checksum(content: BlockContent) -> str:
    """Return the crc32 of the bytes of all arrays, in the order of their names."""
    crc = 0
    for name in sorted(content):
        crc = zlib.crc32(np.array(content[name].view(mx.uint8)).tobytes(), crc)
    return f"{crc:08x}"


def _size(content: Mapping[str, mx.array | np.ndarray]) -> int:
    return sum(array.nbytes for array in content.values()) or _EMPTY_BYTES


def _warn(message: str) -> None:
    warnings.warn(message, EngineWarning, stacklevel=3)
