"""MLX-native inference with a paged KV cache.

The public names are imported when they are first used, so that `import mlx_paged` and the command line's help don't
load mlx.
"""

import importlib
import pathlib
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

if not (pathlib.Path(__file__).parent / "models").is_dir():
    # A source checkout: metal, cuda and models are folders beside the package.
    __path__.append(str(pathlib.Path(__file__).parent.parent))

if TYPE_CHECKING:
    from mlx_paged.async_llm import AsyncLLM as AsyncLLM
    from mlx_paged.attention.paged_attention import paged_attention as paged_attention
    from mlx_paged.blocks.block_manager import BlockManager as BlockManager
    from mlx_paged.config import EngineConfig as EngineConfig
    from mlx_paged.errors import ModelError as ModelError
    from mlx_paged.errors import OutOfBlocks as OutOfBlocks
    from mlx_paged.llm import LLM as LLM
    from mlx_paged.sampling_params import BeamSearchParams as BeamSearchParams
    from mlx_paged.sampling_params import SamplingParams as SamplingParams

_HOME = {
    "LLM": "llm",
    "AsyncLLM": "async_llm",
    "SamplingParams": "sampling_params",
    "BeamSearchParams": "sampling_params",
    "EngineConfig": "config",
    "BlockManager": "blocks.block_manager",
    "OutOfBlocks": "errors",
    "ModelError": "errors",
    "paged_attention": "attention.paged_attention",
}
__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'mlx_paged' has no attribute {name!r}")
    from mlx_paged.cpu.blas import load_openblas

    load_openblas()  # whatever the name: MLX may be imported next, and then it is too late
    if name in ("LLM", "AsyncLLM", "paged_attention"):
        _require_mlx()
    value = getattr(importlib.import_module(f"mlx_paged.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def _require_mlx() -> None:
    """Import mlx, with OpenBLAS where that helps.

    Raises ImportError, in one line, where mlx has no backend (pip installs none on Linux) or one that can't start.
    """
    from mlx_paged.cpu.blas import load_openblas

    load_openblas()
    try:
        import mlx.core  # noqa: F401
    except ImportError as error:
        reason = str(error).splitlines()[0]
        if "cuda" in reason.lower():  # libcuda.so.1 is missing, or a first call of CUDA's runtime failed
            raise ImportError(
                "MLX's CUDA backend can't use a GPU here: there is none, or NVIDIA's driver is missing or too old for "
                "CUDA 13 (nvidia-smi shows both); for the CPU install 'mlx-paged[cpu]' in an environment of its own "
                f"({reason})"
            ) from None
        raise ImportError(
            "mlx has no backend here: install mlx-paged with one, pip install 'mlx-paged[cpu]' or 'mlx-paged[cuda]' "
            f"({reason})"
        ) from None
