"""What the makers of a model recommend for sampling: its generation_config.json."""

import warnings
from pathlib import Path
from typing import Any

from mlx_paged.errors import EngineWarning
from mlx_paged.models import hub
from mlx_paged.sampling_params import SamplingParams

NAMES = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


def sampling_defaults(folder: Path) -> dict[str, float]:
    """Read the SamplingParams that a model's generation_config.json has, by name; there may be none.

    do_sample false is a temperature of 0, and true one of 1 if there is no other. Warns of a value out of range, which
    is left out. Raises ModelError for a file that is no JSON.
    """
    path = folder / "generation_config.json"
    if not path.is_file():
        return {}
    config = hub.read_json(path)
    found = {"temperature": 1.0} if config.get("do_sample") is True else {}
    for name in NAMES:
        if (value := config.get(name)) is not None:
            value = 0 if (name, value) == ("top_k", -1) else value  # another way to say all
            try:
                found[name] = getattr(SamplingParams(**dict[str, Any]({name: value})), name)
            except ValueError as error:
                warnings.warn(f"{path}: {error}; it is left out", EngineWarning, stacklevel=2)
    return found | {"temperature": 0.0} if config.get("do_sample") is False else found
