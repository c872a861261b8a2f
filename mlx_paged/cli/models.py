"""`mlx-paged models` and `mlx-paged pull`: which models there are by name, here already or not, and getting one."""

from __future__ import annotations

import json
import shutil
import sys
from collections import defaultdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click

from mlx_paged.cli.loading import loading
from mlx_paged.cli.terminal import Terminal
from mlx_paged.config import format_memory
from mlx_paged.errors import ModelError
from mlx_paged.models import hub, registry
from mlx_paged.models.aliases import ALIASES


def list_models(*, as_json: bool, terminal: Terminal) -> int:
    """List the repositories that aliases stand for, and after them other models in the cache. Returns the exit code.

    Nothing is downloaded: of a repository that is not in the cache only the name is known.
    """
    with loading(terminal):
        cached = hub.cached_models()
    aliases = defaultdict[str, list[str]](list)
    for alias, repository in ALIASES.items():
        aliases[repository].append(alias)
    rows = [_row(repository, aliases[repository], cached.get(repository)) for repository in [*aliases, *sorted(cached)]]
    rows = [row for place, row in enumerate(rows) if place < len(aliases) or not row["aliases"]]
    if as_json:
        sys.stdout.write(json.dumps(rows) + "\n")
        return 0
    from rich.table import Table

    from mlx_paged.tools.report import as_text

    table = Table(box=None, pad_edge=False)
    for heading in ("alias", "repository", "in the cache", "size", "context", "family"):
        table.add_column(heading, justify="right" if heading in ("size", "context") else "left", no_wrap=True)
    for row in rows:
        size = "" if row["num_bytes"] is None else format_memory(row["num_bytes"])
        context = "" if row["context"] is None else f"{row['context']:,}"
        family = row["family"] or ""
        if row["runs"] not in (None, "verified", "tested"):
            family += f" ({row['runs']})"
        table.add_row(", ".join(row["aliases"]), row["repository"], row["in_cache"], size, context, family)
    sys.stdout.write(as_text(table))
    return 0


def _row(repository: str, aliases: list[str], cached: Any) -> dict[str, Any]:
    """Put together what is known of a repository."""
    row: dict[str, Any] = {"aliases": aliases, "repository": repository, "in_cache": "no", "folder": None}
    row |= dict.fromkeys(("num_bytes", "context", "family", "runs"))
    if cached is None:
        return row
    kind = str(cached.config["model_type"])
    family = registry.family_of(kind)
    return row | {
        "in_cache": "yes" if cached.is_whole else "partly",
        "folder": str(cached.folder),
        "num_bytes": cached.num_bytes,
        "context": hub.context_of(cached.config),
        "family": kind,
        "runs": "untested" if family is None else family.status,
    }


def pull_model(model: str, *, terminal: Terminal) -> int:
    """Download a model, or what is missing of it, and say before what it takes. Returns the exit code.

    Raises ModelError if there is no such model, it can't be paged or had now, or the disk has no room for it.
    """
    with loading(terminal):
        config_folder = hub.resolve(model, config_only=True)
        if model not in ALIASES and Path(model).expanduser().is_dir():
            raise click.UsageError(f"{model} is a folder: there is nothing to download")
        registry.require_paged(str(hub.read_json(config_folder / "config.json").get("model_type")))
        fit = _fit(config_folder)
        size = hub.download_size(model)
    if size is not None:
        parts = f"{format_memory(size.missing)} to download of {format_memory(size.total)}"
        terminal.answer(f"{model}: {parts}; {fit}\n")
        if size.missing > size.free:
            raise ModelError(
                f"the disk has {format_memory(size.free)} free, and {format_memory(size.missing)} of {model} are "
                "missing; free some space, or point HF_HOME at another disk"
            )
    with loading(terminal):
        folder = hub.resolve(model)
        hub.check_files(folder)
    terminal.answer(f"{model} is in {folder}\n")
    return 0


def _fit(folder: Path) -> str:
    """Say whether a model's weights fit into this machine's memory, by its configuration. Raises ModelError."""
    from mlx_paged import _require_mlx

    _require_mlx()
    from mlx_paged.runner.memory_plan import device_limit
    from mlx_paged.tools.cache_cost import read_model

    limit, device = device_limit()
    with TemporaryDirectory() as bare:  # of the weights in `folder` some may be missing yet
        shutil.copy(folder / "config.json", bare)
        size = read_model(Path(bare))
    without = f", without their {size.unknown_quantization} quantisation," if size.unknown_quantization else ""
    fits = "fit" if size.weight_bytes < limit else "do not fit"
    weights = f"about {format_memory(size.weight_bytes)} here{without}"
    return f"its weights, {weights} {fits} into {format_memory(limit)} of {device}"
