"""Dependencies point one way, and nothing heavy is loaded before it is needed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = ("mlx", "mlx_lm", "numpy", "transformers", "huggingface_hub", "torch")

BELOW_THE_ENGINE = (
    "allocator",
    "block_manager",
    "config",
    "errors",
    "outputs",
    "prefix_cache",
    "sampling_params",
)
WITH_NUMPY = ("beam_search", "rows", "scheduler", "sequence")


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


@pytest.mark.parametrize("module", BELOW_THE_ENGINE)
def test_what_lies_below_the_engine_imports_no_arrays(module: str) -> None:
    loaded = loaded_after(f"import mlx_paged.{module}")
    assert "mlx_paged" in loaded
    assert loaded.isdisjoint(HEAVY)


@pytest.mark.parametrize("module", WITH_NUMPY)
def test_what_keeps_its_state_in_host_arrays_imports_no_others(module: str) -> None:
    assert loaded_after(f"import mlx_paged.{module}").isdisjoint(set(HEAVY) - {"numpy"})


def test_importing_the_package_and_its_plain_names_loads_no_mlx() -> None:
    loaded = loaded_after(
        "import mlx_paged\nfrom mlx_paged import BlockManager, EngineConfig, ModelError, OutOfBlocks, SamplingParams"
    )
    assert loaded.isdisjoint(HEAVY)


def test_forms_of_output_need_no_mlx_and_load_llguidance_only_when_one_is_asked_for() -> None:
    assert loaded_after("import mlx_paged.structured_output").isdisjoint(
        {"mlx", "mlx_lm", "transformers", "llguidance"}
    )


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
