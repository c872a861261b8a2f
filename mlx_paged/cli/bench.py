"""`mlx-paged bench`: the speed of one model, and comparisons with mlx-lm."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from mlx_paged.cli.options import parse_numbers
from mlx_paged.cli.terminal import Terminal
from mlx_paged.tools import report as bench_report
from mlx_paged.tools import speed as bench
from mlx_paged.tools.report import Columns, Row

if TYPE_CHECKING:
    from mlx_paged.models.loading import LoadedModel

Made = TypeVar("Made")
Loading = Callable[[Callable[[], Made]], Made]  # calls a function that loads a model


def run(
    model: str | None,
    shape: str | None,
    engine: dict[str, Any],
    while_loading: Loading[Any],
    *,
    num_prompt: int,
    num_output: int,
    batches: str,
    repetitions: int,
    output: str,
    save: Path | None,
    terminal: Terminal,
) -> int:
    """Measures the speed of one model; returns the exit code. Raises click.UsageError."""
    batch_sizes = parse_numbers("-b", batches)
    _at_least(1, {"-n": repetitions})
    _at_least(0, {"-p": num_prompt, "-g": num_output})
    if not num_prompt and not num_output:
        raise click.UsageError("-p 0 and -g 0 leave nothing to measure")
    most, longest = max(batch_sizes), max(num_prompt, num_output) + 1
    if engine.setdefault("max_num_seqs", max(64, most)) < most:
        raise click.UsageError(f"a batch of {most} needs --max-num-seqs of at least that, not {engine['max_num_seqs']}")
    engine.setdefault("prefix_caching", False)  # prompts are random: nothing is ever hit
    if "num_kv_blocks" not in engine and "kv_cache_memory" not in engine:
        engine["num_kv_blocks"] = most * -(-longest // engine.get("block_size", 16))

    def start() -> Any:
        from mlx_paged import LLM

        loaded = _load(model, shape, engine.get("dtype"))
        if loaded.max_model_len is not None and longest > loaded.max_model_len:
            raise ValueError(f"{longest} tokens are more than the {loaded.max_model_len} the model was made for")
        return LLM.from_model(loaded.model, **engine)

    llm = while_loading(start)
    terminal.note(llm.describe_memory())
    try:
        rows = list(bench.measure_speed(llm, num_prompt, num_output, batch_sizes, repetitions, terminal.progress))
    finally:
        terminal.progress("")
    _report(output, save, {"speed": (_name(model, shape), bench.COLUMNS)}, {"speed": rows})
    return 0


def compare(
    model: str | None,
    shape: str | None,
    dtype: str | None,
    while_loading: Loading[Any],
    *,
    names: str | None,
    scale: int,
    repetitions: int,
    output: str,
    save: Path | None,
    terminal: Terminal,
) -> int:
    """Runs workloads, here and in mlx-lm; returns the exit code. Raises click.UsageError."""
    from mlx_paged.workloads import WORKLOADS

    _at_least(1, {"-n": repetitions, "--scale": scale})
    chosen = list(WORKLOADS) if names is None else names.upper().split(",")
    for name in chosen:
        if name not in WORKLOADS:
            raise click.UsageError(f"there is no workload {name!r}: they are {', '.join(WORKLOADS)}")

    def start() -> LoadedModel:
        return _load(model, shape, dtype)

    loaded = while_loading(start)
    from mlx_paged.compare import COLUMNS, compare

    results: dict[str, list[Row]] = {}
    try:
        for name in chosen:
            cases = WORKLOADS[name].cases(scale)
            results[name] = [row for case in cases for row in compare(case, loaded, repetitions, terminal.progress)]
    finally:
        terminal.progress("")
    titles = {name: (f"{name}, {WORKLOADS[name].about}: {_name(model, shape)}", COLUMNS) for name in chosen}
    _report(output, save, titles, results)
    return 0


def _load(model: str | None, shape: str | None, dtype: str | None) -> LoadedModel:
    from mlx_paged import _require_mlx

    _require_mlx()
    from mlx_paged.models import loading
    from mlx_paged.tools.random_models import make_random_model

    return loading.load(model, dtype) if shape is None else make_random_model(shape, dtype)


def _name(model: str | None, shape: str | None) -> str:
    return f"random weights, {shape}" if shape is not None else model or "the demo model"


def _at_least(least: int, options: dict[str, int]) -> None:
    for option, value in options.items():
        if value < least:
            raise click.UsageError(f"{option} must be at least {least}, got {value}")


def _report(
    output: str, save: Path | None, tables: Mapping[str, tuple[str, Columns]], results: Mapping[str, list[Row]]
) -> None:
    """Print results, and write them as JSON."""
    import mlx_lm

    command = shlex.join(["mlx-paged", *sys.argv[1:]])
    machine = bench_report.describe_machine(command, mlx_lm=mlx_lm.__version__)
    sys.stdout.write(bench_report.render(output, tables, results, machine))
    if save is not None:
        save.write_text(bench_report.render("json", tables, results, machine))
