"""Put an adapter onto a model: what mlx-lm's LoRA and DoRA trained, from the folder that it wrote.

mlx-lm's own layers compute it, so what it can't convert is refused here too, in one line that names the folder.
"""

import os
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_paged.config import expand_user
from mlx_paged.errors import ModelError, one_line
from mlx_paged.models import hub

_LEAVES = ("lora_a", "lora_b", "m")


def check_adapter(path: str | os.PathLike[str] | None) -> Path | None:
    """Check that a folder has what an adapter consists of, before a model is fetched. Raises ModelError.

    Returns the folder; None if there is none to put on.
    """
    if path is None:
        return None
    folder = expand_user(path, "adapter_path")
    if not os.fspath(path) or not folder.is_dir():
        raise ModelError(f"there is no adapter folder {os.fspath(path)!r}: give the one that mlx_lm.lora has written")
    missing = [name for name in ("adapter_config.json", "adapters.safetensors") if not (folder / name).is_file()]
    if (folder / "adapter_model.safetensors").is_file() and missing:
        raise ModelError(f"{folder} has an adapter in PEFT's form; mlx-lm reads only those that it has trained itself")
    if missing:
        raise ModelError(f"{folder} has no adapter in it: it lacks {' and '.join(missing)}")
    config = hub.read_json(folder / "adapter_config.json")
    if config.get("fine_tune_type", "lora") != "full":
        lora = config.get("lora_parameters")
        found = lora if isinstance(lora, dict) else {}
        needed = [name for name in ("rank", "scale", "dropout") if not isinstance(found.get(name), int | float)]
        if type(config.get("num_layers")) is not int or needed:
            lacks = f"lora_parameters with numbers for {', '.join(needed)}" if needed else "num_layers, a whole number"
            raise ModelError(f"{folder / 'adapter_config.json'} lacks {lacks}; take the file that mlx_lm.lora wrote")
    return folder


def add_adapter(model: nn.Module, folder: Path | None) -> None:
    """Put an adapter that `check_adapter` has found onto a model, whose layers are replaced. None: change nothing.

    Raises ModelError if it is broken, or was made for another model.
    """
    if folder is None:
        return
    from mlx_lm.tuner.utils import load_adapters

    config, before = hub.read_json(folder / "adapter_config.json"), dict(tree_flatten(model.parameters()))
    try:
        stored = mx.load(str(folder / "adapters.safetensors"))
    except Exception as error:
        raise ModelError(f"{folder / 'adapters.safetensors'} can't be read ({one_line(error)})") from error
    try:
        load_adapters(model, str(folder))
    except Exception as error:  # mlx-lm reports what does not fit in many ways, and each tensor in a line
        lines = str(error).splitlines()[1:]
        reason = f"{lines[0].strip()} ({len(lines)} such)" if lines else one_line(error)
        made_for = f"; it was made for {config['model']}" if isinstance(config.get("model"), str) else ""
        raise ModelError(f"the adapter in {folder} does not fit this model: {reason}{made_for}") from error
    parameters = dict(tree_flatten(model.parameters()))
    if config.get("fine_tune_type", "lora") != "full":
        needed = {name for name in parameters.keys() - before if name.rsplit(".", 1)[-1] in _LEAVES}
        if absent := sorted(needed - set(stored)):
            count = f"{len(absent)} of {len(needed)} tensors"
            raise ModelError(f"{folder / 'adapters.safetensors'} lacks {count} of its adapter, {absent[0]} first")
    model.eval()
