"""Imports point one way, down the list of rooms; no file is long; nothing heavy is loaded before it is needed."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HEAVY = ("mlx", "mlx_lm", "numpy", "transformers", "huggingface_hub", "torch")
MAX_LINES = 350

# From the top down: a file imports from its own room and from those after it.
ROOMS = (
    "cli",
    "server",
    "tools",
    "async_llm",
    "engine_thread",
    "llm",
    "engine",
    "speculation",
    "runner",
    "distributed",
    "scheduler",
    "models",
    "attention",
    "cache",
    "request",
    "sampling",
    "blocks",
    "kernels",
    "cpu",
    "progress",
    "outputs",
    "sampling_params",
    "config",
    "errors",
)
WITHOUT_MLX = ("scheduler", "request", "blocks", "outputs", "sampling_params", "config", "progress", "errors")
NOT_THE_SERVERS = ("llm", "engine", "runner", "scheduler", "models", "attention", "cache", "blocks")
WITHOUT_NUMPY = ("blocks", "outputs", "sampling_params", "config", "errors")


def modules() -> dict[str, Path]:
    """The file of each module of the package, by its name without `mlx_paged.`."""
    files = [*(ROOT / "mlx_paged").rglob("*.py"), *(ROOT / "models").glob("*.py")]
    found = {}
    for file in files:
        relative = file.relative_to(ROOT / "mlx_paged" if "mlx_paged" in file.relative_to(ROOT).parts else ROOT)
        found[".".join(relative.with_suffix("").parts).removesuffix(".__init__")] = file
    return {name: file for name, file in found.items() if name not in ("__init__", "__main__")}


def imports(name: str) -> set[str]:
    """The modules of the package that a module imports anywhere, TYPE_CHECKING and functions included."""
    known, found = modules(), set()
    for node in ast.walk(ast.parse(known[name].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: imports are absolute"
            found |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    inside = {each.removeprefix("mlx_paged.") for each in found if each.startswith("mlx_paged.")}
    exact = inside & set(known)
    packages = {each for each in exact if any(other.startswith(f"{each}.") for other in exact)}
    return exact - packages - {name}


def room_of(name: str) -> int:
    return ROOMS.index(name.split(".")[0])


def test_every_module_is_in_a_room() -> None:
    assert {name.split(".")[0] for name in modules()} <= set(ROOMS)


def test_imports_point_down_the_list_of_rooms() -> None:
    upward = {f"{name} imports {each}" for name in modules() for each in imports(name) if room_of(each) < room_of(name)}
    assert not upward


def test_the_server_knows_neither_the_engine_nor_the_models_it_runs() -> None:
    below = {each for name in _of(("server",)) for each in imports(name)}
    assert not {each for each in below if each.split(".")[0] in NOT_THE_SERVERS}
    for file in (ROOT / "mlx_paged" / "server").glob("*.py"):
        assert not re.search(r"^\s*(import|from) mlx\b(?!_)", file.read_text(), re.MULTILINE), file


def test_no_modules_import_each_other_in_a_circle() -> None:
    TopologicalSorter({name: imports(name) for name in modules()}).prepare()


def test_no_file_is_long() -> None:
    files = [*modules().values(), *(ROOT / "tests").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")]
    long = {str(file.relative_to(ROOT)): len(file.read_text().splitlines()) for file in files}
    assert not {file: lines for file, lines in long.items() if lines > MAX_LINES}


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    """Run `code` in a fresh interpreter that can import this package."""
    import mlx_paged

    root = str(Path(next(iter(mlx_paged.__path__))).parent)
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=False)


def loaded_after(statement: str) -> set[str]:
    """The top-level modules in memory after a statement in a fresh interpreter."""
    result = run_python(f"import sys\n{statement}\nprint(*{{name.split('.')[0] for name in sys.modules}})")
    assert result.returncode == 0, result.stderr
    return set(result.stdout.split())


def _of(rooms: tuple[str, ...]) -> list[str]:
    return sorted(name for name in modules() if name.split(".")[0] in rooms)


def test_what_lies_below_the_engine_imports_no_arrays_of_a_device() -> None:
    statement = "import " + ", ".join(f"mlx_paged.{name}" for name in _of(WITHOUT_MLX))
    assert loaded_after(statement).isdisjoint(set(HEAVY) - {"numpy"})


def test_blocks_and_plain_nouns_import_no_arrays() -> None:
    statement = "import " + ", ".join(f"mlx_paged.{name}" for name in _of(WITHOUT_NUMPY))
    assert loaded_after(statement).isdisjoint(HEAVY)


def test_importing_the_package_and_its_plain_names_loads_no_mlx() -> None:
    loaded = loaded_after(
        "import mlx_paged\nfrom mlx_paged import BlockManager, EngineConfig, ModelError, OutOfBlocks, SamplingParams"
    )
    assert loaded.isdisjoint(HEAVY)


def test_grammars_need_no_mlx_and_load_llguidance_only_when_one_is_asked_for() -> None:
    assert loaded_after("import mlx_paged.sampling.grammar").isdisjoint({"mlx", "mlx_lm", "transformers", "llguidance"})


def test_the_model_and_the_attention_load_mlx() -> None:
    assert "mlx" in loaded_after("from mlx_paged import paged_attention")


def test_every_public_name_can_be_imported() -> None:
    import mlx_paged

    for name in mlx_paged.__all__:
        assert getattr(mlx_paged, name).__module__.startswith("mlx_paged.")


def test_a_name_that_does_not_exist_is_an_attribute_error() -> None:
    import mlx_paged

    with pytest.raises(AttributeError, match="PagedLLM"):
        mlx_paged.PagedLLM  # noqa: B018


@pytest.mark.parametrize("name", ["LLM", "AsyncLLM", "paged_attention"])
def test_without_a_backend_of_mlx_one_line_says_what_to_install(name: str) -> None:
    result = run_python(f"import sys\nsys.modules['mlx.core'] = None\nfrom mlx_paged import {name}")
    assert result.returncode == 1
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: ")
    assert "mlx-paged[cpu]" in last and "mlx-paged[cuda]" in last
    assert "During handling" not in result.stderr and "direct cause" not in result.stderr


def test_without_a_backend_of_mlx_what_needs_none_still_works() -> None:
    result = run_python(
        "import sys\nsys.modules['mlx.core'] = None\nfrom mlx_paged import BlockManager\n"
        "print(BlockManager(4, 2).allocate('a', [1, 2, 3]))"
    )
    assert (result.returncode, result.stdout.strip()) == (0, "0")
