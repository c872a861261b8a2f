"""What an engine can be told at start, validated: EngineConfig, and sizes of memory written as text."""

import difflib
import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Any, Self

_UNITS = {"": 1, "B": 1}
_UNITS |= {f"{prefix}B": 1000**power for power, prefix in enumerate("KMGT", start=1)}
_UNITS |= {f"{prefix}IB": 1024**power for power, prefix in enumerate("KMGT", start=1)}
_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*|%)")

ALLOCATORS = ("lru", "fifo", "buddy")
DTYPES = ("float32", "float16", "bfloat16")
KV_CACHE_DTYPES = ("int8", "k8v4", "fp8")
PIPELINING = ("auto", "submit", "build", "off")
SPECULATIVE_METHODS = ("ngram", "draft_model")
_COUNTS = ["block_size", "num_kv_blocks", "max_num_seqs", "max_num_batched_tokens", "max_model_len"]
_COUNTS += ["tensor_parallel_size", "pipeline_parallel_size"]
_CHOICES = {"allocator": ALLOCATORS, "dtype": DTYPES, "kv_cache_dtype": KV_CACHE_DTYPES, "pipelining": PIPELINING}


def parse_memory(size: int | str, total: int | None = None, *, name: str = "memory size") -> int:
    """Read a size of memory: a count of bytes, "4GB" (4e9), "4GiB" (2**32), or "30%" of `total` bytes.

    name: what messages call it. Returns bytes. Raises ValueError if the size can't be read, is not positive, or is a
    share above 100% or of an unknown total.
    """
    match = _SIZE.fullmatch(str(size).strip())
    unit = match.group(2).upper() if match else ""
    if match is None or not (unit == "%" or unit in _UNITS) or float(match.group(1)) <= 0:
        raise ValueError(f"{name} {size!r}: write it as 4GB, 512MiB, 30% or a positive number of bytes")
    number = float(match.group(1))
    if unit != "%":
        return int(number * _UNITS[unit])
    if number > 100:
        raise ValueError(f"{name} {size!r}: a share is at most 100%")
    if total is None:
        raise ValueError(f"{name} {size!r}: a share needs a whole; give it in bytes, like 64MB")
    return int(total * number / 100)


def parse_swap_space(swap_space: int | str | os.PathLike[str]) -> int | Path:
    """Read `EngineConfig.swap_space`. Returns a size in bytes, or a folder.

    Raises ValueError for what is neither: the name of a folder that isn't there yet contains a "/".
    """
    if not isinstance(swap_space, os.PathLike):
        try:
            return parse_memory(swap_space, name="swap_space")
        except ValueError:
            if not isinstance(swap_space, str) or (swap_space[:1].isdigit() and "/" not in swap_space):
                raise
            if not swap_space or not ("/" in swap_space or expand_user(swap_space, "swap_space").is_dir()):
                raise ValueError(
                    f"swap_space {swap_space!r} is neither a size, like 8GB, nor a folder that is there; "
                    "a new one is written with a /, as in ./swap"
                ) from None
    return expand_user(swap_space, "swap_space")


def expand_user(path: str | os.PathLike[str], name: str) -> Path:
    """Write a folder with the home folder for "~". Raises ValueError for a user that is not there."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise ValueError(f"{name} {excerpt(os.fspath(path))}: there is no user of that name here") from None


def format_memory(num_bytes: float) -> str:
    """Write bytes for people, in decimal units: 1536000 -> "1.54 MB"."""
    units = ["B", "KB", "MB", "GB", "TB"]
    while num_bytes >= 999.5 and len(units) > 1:
        num_bytes /= 1000
        units.pop(0)
    return f"{num_bytes:.3g} {units[0]}"


def excerpt(value: object, limit: int = 200) -> str:
    """Write a value for a message: its repr, on one line and not longer than `limit`."""
    try:
        text = " ".join(repr(value).split())
    except Exception:  # an int of more digits than Python writes, somebody's own __repr__
        text = f"a value of type {type(value).__name__}"
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


class Settings:
    """A dataclass that tells a mistyped argument which one may be meant."""

    def __new__(cls, *_: Any, **given: Any) -> Self:
        known: dict[str, Any] = vars(cls).get("__dataclass_fields__", {})
        for name in given.keys() - known:
            raise TypeError(f"there is no argument {name!r}: {meant_of(name, known)}")
        return super().__new__(cls)


def meant_of(name: str, known: Collection[str]) -> str:
    """Say what a mistyped name may mean, or what there is."""
    close = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {close[0]}?" if close else f"there are {', '.join(known)}"


@dataclass(frozen=True)
class SpeculativeConfig(Settings):
    """How tokens are guessed for a step to verify, with vLLM's keys. Raises ValueError for a value out of range."""

    method: str | None = None
    """"ngram": what followed the last tokens earlier in the prompt or the output. "draft_model": what `model` draws.
    None: the latter if there is a `model`."""
    model: Any = None
    """A smaller model of the same vocabulary: a name or a folder, or an mlx-lm model that is already loaded."""
    num_speculative_tokens: int = 4
    """The most guesses of a sequence in a step."""
    prompt_lookup_max: int = 5
    """Tokens of the longest n-gram that is looked up."""
    prompt_lookup_min: int = 2
    """Of the shortest."""
    adaptive: bool = True
    """Guess only where that is likely to be faster; if not, always."""

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Self:
        """Read what `LLM` is given. Raises ValueError for what is not known or out of range."""
        known = ", ".join(vars(cls)["__dataclass_fields__"])
        if not isinstance(given, Mapping) or not all(isinstance(name, str) for name in given):
            raise ValueError(f"speculative_config must be a dictionary with some of {known}, got {excerpt(given)}")
        try:
            return cls(**given)
        except (TypeError, ValueError) as error:
            raise ValueError(f"speculative_config: {error}") from None

    def __post_init__(self) -> None:
        if self.method is None:
            object.__setattr__(self, "method", "ngram" if self.model is None else "draft_model")
        if self.method not in SPECULATIVE_METHODS:
            raise ValueError(f"method must be {' or '.join(SPECULATIVE_METHODS)}, got {excerpt(self.method)}")
        if (self.method == "draft_model") != (self.model is not None):
            wanted = "takes no model" if self.model is not None else "needs a model: a name or a folder"
            raise ValueError(f"method {self.method} {wanted}")
        if isinstance(self.model, str) and not self.model.strip():
            raise ValueError("the model's name is empty: give a name or a folder")
        for name in ("num_speculative_tokens", "prompt_lookup_max", "prompt_lookup_min"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {excerpt(value)}")
        if self.prompt_lookup_min > self.prompt_lookup_max:
            least, most = self.prompt_lookup_min, self.prompt_lookup_max
            raise ValueError(f"prompt_lookup_min ({least}) is more than prompt_lookup_max ({most})")
        if not isinstance(self.adaptive, bool):
            raise ValueError(f"adaptive must be True or False, got {excerpt(self.adaptive)}")


@dataclass(frozen=True)
class EngineConfig(Settings):
    """Everything `LLM` takes beside the model. Raises ValueError for a value out of range."""

    block_size: int = 16
    """Tokens per block."""
    num_kv_blocks: int | None = None
    """Blocks in the pool. With neither this nor kv_cache_memory the pool gets a share of the device's memory."""
    kv_cache_memory: int | str | None = None
    """Size of the pool instead: bytes, "4GB", or "30%" of what the device recommends (a CPU: of its RAM)."""
    max_num_seqs: int = 64
    """Sequences that run at once."""
    max_num_batched_tokens: int = 2048
    """Most tokens computed per step, so also the largest chunk of a prompt."""
    max_step_ms: float | None = None
    """What a step may take, in milliseconds, while requests stream their tokens: prompts that come meanwhile are
    computed in smaller chunks, of a block at least. 0: any time. None: as long as five steps without prompts, or as 64
    tokens of a prompt, 500 ms at most, if that is more; 50 ms at least."""
    max_model_len: int | None = None
    """Longest prompt plus output, in tokens; None: the model's own limit."""
    prefix_caching: bool = True
    """Reuse the blocks of equal prefixes."""
    allocator: str = "lru"
    """Order in which free blocks are reused: "lru", "fifo" or "buddy"."""
    swap_space: int | str | os.PathLike[str] | None = None
    """Where blocks of preempted requests and evicted prefixes go, with states of recurrent layers: a size of host
    memory ("8GB") or a folder. The name of a folder that isn't there yet contains a "/"."""
    prefix_cache_dir: str | os.PathLike[str] | None = None
    """A folder in which the blocks of prompts, and states of recurrent layers, outlive the process."""
    prefix_cache_size: int | str | None = None
    """The most that is kept there, of all models together, and written there in an hour: bytes, "20GB", or a share of
    the disk's free space, this folder's included; None: 10%. The blocks used least recently go first."""
    dtype: str | None = None
    """Of weights and cache: "float32", "float16" or "bfloat16"; None: as stored, and float32 on a CPU."""
    kv_cache_dtype: str | None = None
    """What K and V are quantised to: "int8", "k8v4" (V in 4 bits) or "fp8"; None: they are kept in `dtype`."""
    adapter_path: str | os.PathLike[str] | None = None
    """A folder with an adapter for the model: LoRA or DoRA, as mlx-lm trains and loads them."""
    seed: int = 0
    """Decides the random numbers of requests that have no seed of their own."""
    check_invariants: bool = False
    """Verify the block manager after every step (slow)."""
    max_staging: int | str = "64MB"
    """Most bytes that copying blocks may hold beside the pool."""
    pipelining: str = "auto"
    """What happens while a step runs on the device: the next one is built and submitted ("submit"), only built
    ("build"), or neither ("off"). "auto" tries at start whether submitting is safe here: it must copy no pool."""
    speculative_config: Mapping[str, Any] | None = None
    """Guess next tokens, to verify several in a step: a dictionary of `SpeculativeConfig`'s fields."""
    tensor_parallel_size: int = 1
    """Processes that each run a part of every layer, started by `mlx.launch` or by a command of `mlx-paged`."""
    pipeline_parallel_size: int = 1
    """Processes that each run some of the layers instead."""
    profile: bool = False
    """Keep where each step's time goes, for `LLM.profile`."""

    def __post_init__(self) -> None:
        if self.speculative_config is not None:
            SpeculativeConfig.of(self.speculative_config)
        for name in _COUNTS:
            value = getattr(self, name)
            if value is None and name in ("num_kv_blocks", "max_model_len"):
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
        limit = self.max_step_ms
        if limit is not None and (
            isinstance(limit, bool) or not isinstance(limit, int | float) or not 0 <= limit < inf
        ):
            raise ValueError(f"max_step_ms must be a number of milliseconds, or 0 for no limit, got {limit!r}")
        if self.num_kv_blocks is not None and self.kv_cache_memory is not None:
            raise ValueError("give num_kv_blocks or kv_cache_memory, not both: each of them sets the pool's size")
        if self.kv_cache_memory is not None:
            parse_memory(self.kv_cache_memory, total=1 << 40, name="kv_cache_memory")
        if "%" in str(self.max_staging):
            raise ValueError(f"max_staging is a size such as 64MB, got {self.max_staging!r}")
        parse_memory(self.max_staging, name="max_staging")
        if self.swap_space is not None:
            parse_swap_space(self.swap_space)
        if self.prefix_cache_dir is not None:
            if not os.fspath(self.prefix_cache_dir):
                raise ValueError("prefix_cache_dir is empty: give the name of a folder")
            expand_user(self.prefix_cache_dir, "prefix_cache_dir")
        if self.prefix_cache_size is not None:
            if self.prefix_cache_dir is None:
                raise ValueError("prefix_cache_size is the size of a folder: give prefix_cache_dir, too")
            parse_memory(self.prefix_cache_size, total=1 << 40, name="prefix_cache_size")
        if not self.prefix_caching and (self.swap_space is not None or self.prefix_cache_dir is not None):
            raise ValueError("swap_space and prefix_cache_dir find blocks by prefixes: not with prefix_caching=False")
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            if value not in choices and (value is not None or "dtype" not in name):
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
        if self.num_ranks > 1:
            self._check_ranks()
        if not isinstance(self.seed, int):
            raise ValueError(f"seed must be a whole number, got {self.seed!r}")

    @property
    def num_ranks(self) -> int:
        """Processes that the model is divided among."""
        return self.tensor_parallel_size * self.pipeline_parallel_size

    def _check_ranks(self) -> None:
        """Raise ValueError for what one process alone can do."""
        if min(self.tensor_parallel_size, self.pipeline_parallel_size) > 1:
            raise ValueError("give tensor_parallel_size or pipeline_parallel_size, not both: MLX can't divide its ring")
        name = "tensor_parallel_size" if self.tensor_parallel_size > 1 else "pipeline_parallel_size"
        for other in ("swap_space", "prefix_cache_dir", "adapter_path"):
            if getattr(self, other) is not None:
                raise ValueError(f"{other} can't be used with {name}: leave one of them out")
