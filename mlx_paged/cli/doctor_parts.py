"""The parts that `mlx-paged doctor` looks at: each a function that says what it found, or raises what is wrong."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import mlx_paged
from mlx_paged.cli.terminal import BACKEND_TITLES
from mlx_paged.config import expand_user, format_memory

_STORY = (
    "The kite was red. The key was under the bench. The basket cost nine coins. The dog was called Biscuit. The cook "
    "gave Mia soup. They walked along the river until the sun went down, and then they all went home."
)
# Each token is at least 200 times as likely as the next best one, so that no way of rounding changes it.
_ANSWERS = {
    "What colour was the kite?": [637, 492, 1149, 533, 18, 4],
    "Where was the key?": [637, 706, 1149, 555, 1147, 1065, 18, 4],
    "How much did the basket cost?": [637, 1070, 265, 511, 393, 365, 269, 87, 18, 4],
    "What was the dog called?": [637, 885, 1149, 1391, 880, 18, 4],
    "What did the cook give Mia?": [637, 742, 1400, 485, 1074, 18, 4],
}


class Finding(NamedTuple):
    """What was found of a part."""

    state: str
    """"ok"; "note": it works, and might work better; or "wrong"."""
    line: str


# -- without MLX ----------------------------------------------------------------------------------------------------


def _package() -> str | Finding:
    where = f"{mlx_paged.__version__} in {Path(mlx_paged.__file__).parent}"
    with suppress(metadata.PackageNotFoundError):
        if (installed := metadata.version("mlx-paged")) != mlx_paged.__version__:
            return Finding("note", f"{where}, installed as {installed}: pip install it again")
    return where


def _system() -> str:
    mac = platform.mac_ver()[0]
    return f"{f'macOS {mac}' if mac else f'{platform.system()} {platform.release()}'}, {platform.machine()}"


def _chip() -> str:
    name = ""
    if sys.platform == "darwin":
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        name = subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.strip()
    elif (cpuinfo := Path("/proc/cpuinfo")).exists():
        models = [line for line in cpuinfo.read_text(errors="replace").splitlines() if line.startswith("model name")]
        name = models[0].partition(":")[2].strip() if models else ""
    ram = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return f"{name or platform.processor() or 'unknown'}, {os.cpu_count()} cores, {format_memory(ram)} of RAM"


def _requirements(extra: str = "") -> list[Any]:
    """Read what this package, or an extra of it, requires here. Returns nothing where it is not installed."""
    from packaging.requirements import Requirement

    lines: list[str] = []
    with suppress(metadata.PackageNotFoundError):
        lines = metadata.requires("mlx-paged") or []
    asked = [Requirement(line) for line in lines]
    return [each for each in asked if (each.marker is not None and each.marker.evaluate({"extra": extra}) if extra
            else each.marker is None)]  # fmt: skip


def _version(requirement: Any) -> str:
    """Say which version of a package is installed. Raises ImportError if there is none, or another one is needed."""
    help = f"pip install '{requirement.name}{requirement.specifier}'"
    try:
        version = metadata.version(requirement.name)
    except metadata.PackageNotFoundError:
        raise ImportError(f"{requirement.name} is not installed: {help}") from None
    if not requirement.specifier.contains(version, prereleases=True):
        raise ImportError(f"{requirement.name} {version} is installed, and {requirement.specifier} needed: {help}")
    return f"{requirement.name} {version}"


def _version_of(name: str) -> str:
    """Say which version of a package there is, without its name. Raises ImportError as `_version` does."""
    required = [_version(each) for each in _requirements() if each.name == name]
    return required[0].split()[1] if required else metadata.version(name)


def _packages() -> str | Finding:
    known = [_version(each) for each in _requirements() if each.name not in ("mlx", "mlx-lm")]
    return ", ".join(known) if known else Finding("note", "mlx-paged is not installed: nothing says what it requires")


def _extras() -> str | Finding:
    lines, state = [], "ok"
    for extra in ("server", "structured"):
        try:
            lines.append(", ".join(map(_version, _requirements(extra))))
        except ImportError as error:
            missing = "is not installed" in str(error)
            lines.append(
                f"[{extra}]: {error if not missing else f'''none; pip install 'mlx-paged[{extra}]' adds it'''}"
            )
            state = state if missing else "wrong"
    return Finding(state, "; ".join(lines))


def folders(prefix_cache_dir: str | None) -> str:
    """Look whether swap and saved prompts have a folder that can be written to; the latter's is not made."""
    from mlx_paged.cache.block_files import BlockFiles, OwnFolder

    def describe(folder: Path, what: str, error: OSError | None) -> str:
        if error is not None:
            raise OSError(f"{folder}, for {what}, can't be written to: {error.strerror}")
        return f"{folder}, for {what}, can be written to ({format_memory(shutil.disk_usage(folder).free)} free)"

    def use(make: Callable[[], object]) -> OSError | None:
        try:
            return getattr(make(), "why_read_only", None)
        except OSError as error:
            return error

    # Where a standard library of C++ looks for a folder, and MLX through it: the first that is set.
    name = next((each for each in ("TMPDIR", "TMP", "TEMP", "TEMPDIR") if each in os.environ), "")
    if name and not Path(value := os.environ[name]).is_dir():
        raise ValueError(f"{name}={value} is not a folder, and MLX compiles there: make it, or unset {name}")
    swap = Path(tempfile.gettempdir())  # raises FileNotFoundError if no such folder can be written to
    line = describe(swap, "swap", use(lambda: OwnFolder(swap, "mlx-paged-swap-")))
    if prefix_cache_dir is None:
        return f"{line}; --prefix-cache-dir looks at a folder for prompts"
    if not prefix_cache_dir:
        raise ValueError("--prefix-cache-dir is empty: give the name of a folder")
    root = expand_user(prefix_cache_dir, "--prefix-cache-dir")
    parent = next(each for each in (root.absolute(), *root.absolute().parents) if each.exists())
    if not root.exists() and parent.is_dir():
        if not os.access(parent, os.W_OK | os.X_OK):
            raise OSError(f"{root}, for prompts, can't be made: {parent} can't be written to")
        return f"{line}; {root}, for prompts, is not there yet, and can be made"
    return f"{line}; {describe(root, 'prompts', use(lambda: BlockFiles(root)))}"


# -- with MLX, each in a process of its own -------------------------------------------------------------------------


def _mlx() -> str:
    mlx_paged._require_mlx()
    import mlx.core as mx

    if (total := mx.arange(100).sum().item()) != 4950:
        raise ValueError(f"the sum of 0 to 99 is {total} instead of 4950: the device does not compute")
    return _version_of("mlx")


def _mlx_lm() -> str:
    mlx_paged._require_mlx()
    version = _version_of("mlx-lm")
    try:
        from mlx_paged.models.patch import changed_functions
    except (ImportError, AttributeError) as error:
        raise ImportError(f"mlx-lm {version} lacks what models are patched at: {error}") from error
    for name, found, expected in changed_functions():
        raise ImportError(f"mlx-lm {version}: its {name} takes {', '.join(found)} instead of {', '.join(expected)}")
    return f"{version}, with transformers {metadata.version('transformers')}"


def _device() -> str:
    mlx_paged._require_mlx()
    import mlx.core as mx

    info = mx.device_info()
    sizes = {
        "max_recommended_working_set_size": "recommended",
        "max_buffer_length": "largest buffer",
        "memory_size": "memory",
        "total_memory": "memory",
        "free_memory": "free",
    }
    limits = [f"{title} {format_memory(int(info[name]))}" for name, title in sizes.items() if name in info]
    kind = "CPU" if mx.default_device() == mx.cpu else "GPU"
    names = dict.fromkeys(str(info[name]) for name in ("device_name", "architecture") if info.get(name))
    return f"{kind}: {', '.join([*names, *limits])}"


def _backend() -> str:
    mlx_paged._require_mlx()
    import mlx.core as mx

    from mlx_paged.attention.paged_attention import BACKENDS
    from mlx_paged.kernels import BACKEND_VARIABLE, TITLES

    available = [name for name, backend in BACKENDS.items() if backend.is_available()]
    if forced := os.environ.get(BACKEND_VARIABLE):
        if forced not in available:
            raise ValueError(f"{BACKEND_VARIABLE}={forced} is not available here; there is: {', '.join(available)}")
        return f"{forced}: {BACKEND_TITLES[forced]}, as {BACKEND_VARIABLE} says"
    why = []
    for name, title in TITLES.items():
        if name not in available:
            here = getattr(mx, name).is_available()
            why.append(f"{title} is here and not used" if here else f"there is no {title}")
    return f"{available[0]}: {BACKEND_TITLES[available[0]]}; {', '.join(why)}"


def _matrices() -> str | Finding:
    mlx_paged._require_mlx()
    from mlx_paged.cpu.blas import SLOW_BLAS, advice, blas_name

    name = blas_name() or "the GPU"
    if name == SLOW_BLAS and os.environ.get("MLX_PAGED_BLAS") == "0":
        return Finding("note", f"by {name}, as MLX_PAGED_BLAS=0 has it")
    return f"by {name}" if (help := advice()) is None else Finding("note", f"by {name}: {help}")


def _memory() -> str:
    mlx_paged._require_mlx()
    import mlx.core as mx

    from mlx_paged.runner.memory_plan import CPU_SHARE, GPU_SHARE, device_limit

    limit, what = device_limit()
    share, taken = (CPU_SHARE, "a pool takes") if mx.default_device() == mx.cpu else (
        GPU_SHARE, "weights, a step's reserve and a pool take together")  # fmt: skip
    most = f"up to {format_memory(share * limit)} ({share:.0%} of {what})"
    return f"{taken} {most}; --kv-cache-memory asks for another size, within {format_memory(limit)}"


def _generation() -> str:
    """Let the demo model answer questions about a story, at once. Raises ValueError if an answer is not the stored."""
    backends, seconds, wrong = _answers()
    if not wrong:
        num_tokens = sum(map(len, _ANSWERS.values()))
        return f"{num_tokens} tokens of the demo model are as stored, in {seconds:.2f} s, by {backends}"
    line = f"the demo model's answers are wrong, by {backends}: {wrong[0]}"
    if "kernels" in backends:
        os.environ["MLX_PAGED_BACKEND"] = "reference"
        also = "wrong too" if _answers()[2] else "right"
        line += f"; with MLX_PAGED_BACKEND=reference they are {also}"
    raise ValueError(line)


def _answers() -> tuple[str, float, list[str]]:
    """Ask the demo model. Returns what computed attention, the time it took, and how answers differ."""
    from mlx_paged import LLM, SamplingParams

    llm = LLM(num_kv_blocks=64)
    conversations = [[{"role": "user", "content": f"{_STORY}\n{question}"}] for question in _ANSWERS]
    started = time.perf_counter()
    outputs = llm.chat(conversations, SamplingParams(temperature=0, max_tokens=16))
    seconds = time.perf_counter() - started
    wrong = []
    for (question, stored), output in zip(_ANSWERS.items(), outputs, strict=True):
        answer = output.outputs[0]
        if answer.token_ids != stored:
            got = f"{answer.token_ids} ({answer.text!r}, {answer.stop_reason or answer.finish_reason})"
            wrong.append(f"to {question!r} {got} instead of {stored}")
    return ", ".join(dict.fromkeys(BACKEND_TITLES[name] for name in llm.attention_backends)), seconds, wrong


HERE: dict[str, Callable[[], str | Finding]] = {
    "mlx-paged": _package,
    "python": lambda: f"{platform.python_version()} at {sys.executable}",
    "system": _system,
    "chip": _chip,
    "packages": _packages,
    "extras": _extras,
}
APART: dict[str, Callable[[], str | Finding]] = {
    "mlx": _mlx,
    "mlx-lm": _mlx_lm,
    "device": _device,
    "backend": _backend,
    "matrices": _matrices,
    "memory": _memory,
    "generation": _generation,
}
