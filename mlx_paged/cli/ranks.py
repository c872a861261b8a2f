"""Commands on several ranks: the process that was started starts one for each, and they end together."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import click

from mlx_paged.cli.terminal import Terminal
from mlx_paged.config import EngineConfig
from mlx_paged.distributed.launch import LIFELINE, LOST, STDERR, hold_lifeline, plan_starts, run_ranks
from mlx_paged.errors import LostRanks


def spread_out(config: EngineConfig, engine: dict[str, Any], hostfile: Path | None) -> None:
    """Run this very command on several ranks, if it asks for that and is not one of them. Ends it then.

    Raises click.UsageError for a file of hosts that is wrong, or of no use.
    """
    if config.num_ranks == 1:
        if hostfile is not None:
            raise click.UsageError("--hostfile names the hosts of ranks: give --tensor-parallel-size, too")
        return
    if "MLX_RANK" in os.environ:
        return
    context = click.get_current_context()
    terminal: Terminal = context.obj
    model = {name: context.params.get(name) for name in ("model", "shape")}
    if model["model"] is not None and Path(model["model"]).exists():
        model["model"] = str(Path(model["model"]).resolve())
    told = json.dumps(model | {"engine": engine})
    setting = "--tensor-parallel-size" if config.tensor_parallel_size > 1 else "--pipeline-parallel-size"
    try:
        starts = plan_starts(config.num_ranks, setting, hostfile, [sys.executable, "-m", "mlx_paged.cli.follow", told])
    except (ValueError, OSError) as error:
        raise click.UsageError(f"--hostfile: {error}" if hostfile is not None else str(error)) from None
    code, said = run_ranks(starts, [sys.executable, "-m", "mlx_paged", *sys.argv[1:]])
    if said:
        terminal.failure(said)
    context.exit(code)


def take_rank() -> None:
    """In rank 0 of a command: end with the process that started it, and write to the command's own stderr.

    Descriptor 2 is where libraries write, of which that process passes on what is worth reading.
    """
    if LIFELINE in os.environ:
        hold_lifeline(int(os.environ[LIFELINE]))
        sys.stderr = open(int(os.environ[STDERR]), "w", buffering=1, encoding=sys.stderr.encoding)  # noqa: SIM115


def lost_rank(error: Exception) -> int | None:
    """The exit code for an error of which another process says what has happened; None if that is to be said here."""
    return LOST if isinstance(error, LostRanks) and LIFELINE in os.environ else None
