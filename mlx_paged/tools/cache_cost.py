"""What KV caches cost: bytes per token from a model's configuration, and the waste of three ways to hold them.

No weights are read and nothing is run: mlx-lm's model is built from its config.json, or loaded where its weights are,
which MLX leaves unevaluated; of files the headers are read, and shapes are all that is looked at. The comparison is
that of Kwon et al. 2023, section 3.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from mlx_paged.config import DTYPES
from mlx_paged.errors import ModelError, one_line

if TYPE_CHECKING:
    import mlx.core as mx
    import mlx.nn as nn

    from mlx_paged.cache.layer_spec import LayerSpec

TYPICAL_PROMPT, TYPICAL_OUTPUT = 161, 338  # mean tokens of ShareGPT's conversations, Kwon et al. 2023, figure 11
_SPREAD = 1.0  # standard deviation of the logarithm of a typical length
_GROWTH = 256  # tokens by which mlx-lm's caches grow


class LayerGroup(NamedTuple):
    """Layers that are alike."""

    num_layers: int
    shape: LayerSpec
    """What each of them stores per token."""
    window: int | None
    """The most tokens that a query of theirs sees; None: all."""
    chunked: bool = False
    """Whether it sees those from the last multiple of the window on, and not always as many."""

    @property
    def bytes_per_token(self) -> int:
        """Bytes of K and V that a token takes in all of these layers."""
        return self.num_layers * self.shape.bytes_per_token

    def visible(self, num_tokens: int) -> int:
        """Count those of `num_tokens` that a query can still see."""
        if self.window is None:
            return num_tokens
        return (num_tokens - 1) % self.window + 1 if self.chunked else self.most_visible(num_tokens)

    def most_visible(self, num_tokens: int) -> int:
        """Count the most that any of `num_tokens` queries has seen."""
        return num_tokens if self.window is None else min(num_tokens, self.window)


class ModelSize(NamedTuple):
    """What a model takes, by its configuration."""

    family: str
    dtype: str
    """Of K and V, or of the weights if there are none."""
    groups: list[LayerGroup]
    state_bytes: int
    """Of the states of recurrent layers, of one sequence."""
    weights: dict[str, int]
    """Their bytes by type, most first."""
    is_measured: bool
    """Whether the weights are those in the folder's files; otherwise those that its configuration describes."""
    unknown_quantization: str | None
    """A kind that is named in a form which mlx-lm converts while loading, so that a description does not have it."""
    context: int | None
    """The longest that the configuration names, in tokens."""

    @property
    def weight_bytes(self) -> int:
        return sum(self.weights.values())


class Reservation(NamedTuple):
    """A way to hold the KV cache of some requests."""

    name: str
    num_requests: int
    taken: int
    """Bytes that it takes."""
    needed: int
    """Bytes of them that hold tokens which a query can still see."""

    @property
    def waste(self) -> float:
        """Share of the bytes that hold no such token, from 0 to 1."""
        return 1 - self.needed / self.taken

    def fitting(self, room: int) -> int:
        """Count how many such requests fit into `room` bytes."""
        return max(0, room) * self.num_requests // self.taken


def compare(
    groups: Sequence[LayerGroup], lengths: Sequence[int], context: int, block_size: int, state_bytes: int = 0
) -> list[Reservation]:
    """Compare three ways to hold requests of `lengths` tokens, prompt and output: reserved, padded, in blocks.

    Reserved: room for `context` tokens each. Padded: mlx-lm's batch, every row as long as the longest, which grows by
    256 tokens at a time; the second copy that it makes while growing is not counted. In blocks: every block that
    holds a visible token. However they are held, each has a state of `state_bytes`.
    """
    padded = -(-max(lengths) // _GROWTH) * _GROWTH

    def in_blocks(group: LayerGroup, num_tokens: int) -> int:
        first_visible = num_tokens - group.visible(num_tokens)
        return ((num_tokens - 1) // block_size - first_visible // block_size + 1) * block_size

    def total(tokens: Iterable[tuple[LayerGroup, int]]) -> int:
        return len(lengths) * state_bytes + sum(group.bytes_per_token * num_tokens for group, num_tokens in tokens)

    pairs = [(group, length) for group in groups for length in lengths]
    needed = total((group, group.visible(length)) for group, length in pairs)
    taken = {
        "reserved": total((group, group.most_visible(context)) for group, _ in pairs),
        "padded": total((group, group.most_visible(padded)) for group, _ in pairs),
        "blocks": total((group, in_blocks(group, length)) for group, length in pairs),
    }
    return [Reservation(name, len(lengths), num_bytes, needed) for name, num_bytes in taken.items()]


def typical_lengths(num_requests: int, context: int, seed: int = 0) -> list[int]:
    """Draw typical lengths: tokens of prompt and output together, log-normal, with ShareGPT's means, at most `context`.

    Returns the same for the same seed.
    """
    draw = random.Random(seed)

    def log_normal(mean: int) -> int:
        return max(1, round(draw.lognormvariate(math.log(mean) - _SPREAD**2 / 2, _SPREAD)))

    return [min(context, log_normal(TYPICAL_PROMPT) + log_normal(TYPICAL_OUTPUT)) for _ in range(num_requests)]


def read_model(folder: Path, dtype: str | None = None, kv_cache_dtype: str | None = None) -> ModelSize:
    """Measure the model whose config.json, and perhaps whose weights, are in `folder`, as it would run on this machine.

    dtype: of weights and cache; None: as stored, float32 on a CPU. kv_cache_dtype: as in `EngineConfig`. Raises
    ModelError if mlx-lm can't build the model, its weights are there and not whole, or its cache can't be paged,
    ValueError if it can't be quantised.
    """
    from mlx.utils import tree_flatten
    from mlx_lm.utils import load_config, load_model

    from mlx_paged.models import hub, loading, registry
    from mlx_paged.models.patch import patch_model
    from mlx_paged.models.refusals import cannot_load

    registry.require_paged(str(hub.read_json(folder / "config.json").get("model_type")))
    is_measured = any(folder.glob("model*.safetensors")) and bool(hub.check_weights(folder))
    try:
        config = load_config(folder)
        model = load_model(folder, lazy=True)[0] if is_measured else _build(config)
    except Exception as error:  # a configuration can be wrong in many ways
        if is_measured:
            raise cannot_load(folder, error) from error
        reason = f"it lacks {error}" if isinstance(error, KeyError) else one_line(error)
        raise ModelError(f"{folder / 'config.json'} describes no model that mlx-lm can build: {reason}") from error
    loading.set_dtype(model, dtype)
    patched = patch_model(model, hub.context_of(config))
    patched = patched if kv_cache_dtype is None else patched.quantised(kv_cache_dtype)
    stored = config.get("quantization_config")
    layers = sorted(zip(patched.layers, patched.windows, strict=True), key=lambda layer: layer[1] or 0)
    counts = Counter((shape, window) for shape, window in layers if shape is not None)
    groups = [LayerGroup(count, shape, window, patched.chunked) for (shape, window), count in counts.items()]
    counted: Counter[str] = Counter()
    for array in dict(tree_flatten(model.parameters())).values():
        counted[_name(array.dtype)] += array.nbytes
    weights = dict(counted.most_common())
    return ModelSize(
        family=str(config["model_type"]),
        dtype=_name(groups[0].shape.dtype) if groups else next(iter(weights)),
        groups=groups,
        state_bytes=patched.state_bytes,
        weights=weights,
        is_measured=is_measured,
        unknown_quantization=None
        if is_measured or not stored or config.get("quantization")
        else stored.get("quant_method"),
        context=hub.context_of(config),
    )


def _name(dtype: mx.Dtype) -> str:
    return str(dtype).removeprefix("mlx.core.")


def _build(config: dict[str, Any]) -> nn.Module:
    """Build an mlx-lm model with the parameters that its configuration describes, none of them evaluated."""
    import mlx.core as mx
    import mlx.nn as nn
    from mlx_lm.utils import _get_classes

    model_class, args_class = _get_classes(config)
    model = model_class(args_class.from_dict(config))
    inner = getattr(model, "language_model", model)
    if config.get("tie_word_embeddings", True) and getattr(inner, "tie_word_embeddings", None) is False:
        inner.tie_word_embeddings = True  # gemma3 learns it from the weights
        inner.pop("lm_head")
    text_config = config.get("text_config") or {}
    names = [section.get(name) for section in (config, text_config) for name in ("dtype", "torch_dtype")]
    model.set_dtype(getattr(mx, next((name for name in names if name in DTYPES), "bfloat16")))
    if quantization := config.get("quantization"):
        group_size = quantization["group_size"]

        def parameters(path: str, module: nn.Module) -> Any:
            if path in quantization:
                return quantization[path]
            return hasattr(module, "to_quantized") and module.weight.shape[-1] % group_size == 0

        mode = quantization.get("mode", "affine")
        nn.quantize(model, group_size, quantization["bits"], mode=mode, class_predicate=parameters)
    return model
