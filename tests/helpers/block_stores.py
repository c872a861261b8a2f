"""Contents of blocks to put into stores."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx

from mlx_paged.cache.block_files import BlockFiles
from mlx_paged.cache.block_store import FolderStore
from mlx_paged.cache.kv_cache import BlockContent


def content(seed: int, dtype: mx.Dtype = mx.bfloat16) -> BlockContent:
    key = mx.random.key(seed)
    return {name: mx.random.normal((4, 2, 8), key=key).astype(dtype) for name in ("k0", "v0")}


def same_bits(one: BlockContent, other: BlockContent) -> bool:
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and mx.array_equal(one[name].view(mx.uint8), other[name].view(mx.uint8))
        for name in one
    )


def folder_store(folder: Path, model: str = "a model", capacity: int | None = None) -> FolderStore:
    """A store of one model's blocks in a folder."""
    return FolderStore(BlockFiles(folder, capacity), folder, model)
