"""From a model's name to an mlx-lm model and tokenizer in memory."""

import os
import warnings
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model, load_tokenizer

from mlx_paged.config import excerpt
from mlx_paged.errors import EngineWarning, ModelError, one_line
from mlx_paged.models import hub, registry
from mlx_paged.models.adapters import add_adapter, check_adapter
from mlx_paged.models.generation_config import sampling_defaults
from mlx_paged.models.readable_folder import as_readable
from mlx_paged.models.refusals import cannot_load
from mlx_paged.sampling_params import as_int


class LoadedModel(NamedTuple):
    """An mlx-lm model in memory, not patched yet."""

    model: nn.Module
    tokenizer: Any
    """mlx-lm's TokenizerWrapper."""
    max_model_len: int | None
    """The longest context it was made for, in tokens; None if it does not say."""
    sampling_defaults: dict[str, float]
    """SamplingParams that its makers recommend, by name."""


def load(name: str | Path | None, dtype: str | None, adapter_path: str | os.PathLike[str] | None = None) -> LoadedModel:
    """Load an alias, a Hugging Face repository, a folder, or None for the bundled demo model.

    dtype is that of the weights; None keeps them as stored, except that a CPU gets float32. adapter_path: a folder with
    what is put onto them. Raises ModelError. Warns of a family that was not tested.
    """
    adapter = check_adapter(adapter_path)
    # What is known to fail is refused before gigabytes of weights are fetched in vain.
    kind = str(hub.read_json(hub.resolve(name, config_only=True) / "config.json").get("model_type"))
    registry.require_paged(kind)
    folder = hub.resolve(name)
    hub.check_files(folder)
    defaults = sampling_defaults(folder)
    with as_readable(folder) as readable:
        try:
            model, config = load_model(readable, lazy=True)
        except Exception as error:  # mlx-lm reports what it can't read in many ways
            raise cannot_load(folder, error) from error
        end_tokens = _end_tokens(folder, config.get("eos_token_id"))
        try:
            tokenizer = load_tokenizer(readable, eos_token_ids=end_tokens)
        except Exception as error:
            raise ModelError(f"{folder} has no tokenizer that can be read: {one_line(error)}") from error
    if not tokenizer.encode("a", add_special_tokens=False):
        raise ModelError(f"{folder} has no tokenizer that can be read: it makes no token of a letter")
    if not (folder / "tokenizer_config.json").is_file():
        message = f"{folder} has no tokenizer_config.json: prompts get no chat template, and special tokens are a guess"
        warnings.warn(message, EngineWarning, stacklevel=2)
    if registry.is_untested(kind):
        warnings.warn(f"model family {kind!r} is not among those that were tested", EngineWarning, stacklevel=2)
    add_adapter(model, adapter)
    set_dtype(model, dtype)
    return LoadedModel(model, tokenizer, hub.context_of(config), defaults)


def _end_tokens(folder: Path, value: Any) -> list[int] | None:
    """Read what a model's configuration says of its end tokens. Raises ModelError if that is none."""
    token_ids = [as_int(each) for each in (value if isinstance(value, list) else [value])]
    if value is not None and None in token_ids:
        raise ModelError(
            f"{folder}: eos_token_id must be a token id or a list of them, in config.json and in "
            f"generation_config.json, which counts where there are both, got {excerpt(value)}"
        )
    return None if value is None else [each for each in token_ids if each is not None]


def is_model(model: Any) -> bool:
    """Say whether something is an mlx-lm model in memory."""
    return isinstance(model, nn.Module) and hasattr(model, "layers")


def check_model(model: Any) -> None:
    """Raise ModelError for what is no mlx-lm model in memory."""
    if not is_model(model):
        raise ModelError(f"model must be an mlx-lm model that is already loaded, got {excerpt(model)}")


def check_tokenizer(tokenizer: Any) -> None:
    """Raise ModelError for what is no tokenizer as mlx-lm loads them; None is no tokenizer at all."""
    if tokenizer is not None and not isinstance(getattr(tokenizer, "eos_token_ids", None), Collection):
        kind = type(tokenizer).__name__
        raise ModelError(f"tokenizer must be mlx-lm's TokenizerWrapper, as mlx_lm.load returns it, got a {kind}")


def set_dtype(model: nn.Module, dtype: str | None) -> None:
    """Convert a model's floating-point weights to `dtype`; None: float32 on a CPU, elsewhere as they are."""
    if dtype is None and mx.default_device() == mx.cpu:
        dtype = "float32"
    if dtype is not None:
        model.set_dtype(getattr(mx, dtype))


def context_of_model(model: nn.Module) -> int | None:
    """Find the longest context, in tokens, that a model in memory was made for. Returns None if it does not say."""
    args = getattr(model, "args", None)
    return hub.context_of({} if args is None else vars(args))


def weight_bytes(model: nn.Module) -> int:
    """Sum the bytes of a model's weights, by their shapes: nothing is evaluated."""
    return sum(array.nbytes for array in dict(tree_flatten(model.parameters())).values())
