"""`mlx-paged bench`: the speed of one model."""

import shlex
import sys
from pathlib import Path
from typing import Any

import click

from mlx_paged.cli.ctrl_c import ends_soon
from mlx_paged.cli.loading import find_models, loading
from mlx_paged.cli.options import parse_numbers
from mlx_paged.cli.terminal import Terminal, describe_drafts
from mlx_paged.tools import report
from mlx_paged.tools.speed import COLUMNS, estimate_duration, measure_speed


@ends_soon()
def measure_model(
    model: str | None,
    shape: str | None,
    engine: dict[str, Any],
    *,
    num_prompt: int,
    num_output: int,
    batches: str,
    repetitions: int,
    output: str,
    save: Path | None,
    terminal: Terminal,
) -> int:
    """Measure the speed of a model, or of random weights of a shape. Returns the exit code; raises click.UsageError."""
    batch_sizes = parse_numbers("-b", batches)
    for option, value, least in (("-n", repetitions, 1), ("-p", num_prompt, 0), ("-g", num_output, 0)):
        if value < least:
            raise click.UsageError(f"{option} must be at least {least}, got {value}")
    if not num_prompt and not num_output:
        raise click.UsageError("-p 0 and -g 0 leave nothing to measure")
    most, longest = max(batch_sizes), max(num_prompt, num_output) + 1
    if engine.setdefault("max_num_seqs", max(64, most)) < most:
        raise click.UsageError(f"a batch of {most} needs --max-num-seqs of at least that, not {engine['max_num_seqs']}")
    engine.setdefault("prefix_caching", False)  # prompts are random: nothing is ever hit
    if "num_kv_blocks" not in engine and "kv_cache_memory" not in engine:
        engine["num_kv_blocks"] = most * -(-longest // engine.get("block_size", 16))
    with loading(terminal):
        find_models(model if shape is None else None, engine)
        from mlx_paged import LLM
        from mlx_paged.models.loading import load
        from mlx_paged.tools.random_models import make_random_model

        dtype = engine.get("dtype")
        loaded = load(model, dtype) if shape is None else make_random_model(shape, dtype)
        if loaded.max_model_len is not None and longest > loaded.max_model_len:
            raise ValueError(f"{longest} tokens are more than the {loaded.max_model_len} the model was made for")
        llm = LLM.from_model(loaded.model, loaded.tokenizer, **engine)
    terminal.note(llm.describe_memory(), *(llm.describe_shared_prefixes() if terminal.verbose else ()))
    sizes = num_prompt, num_output, batch_sizes, repetitions
    try:
        terminal.progress("a short run, to see how long it will take ...")
        terminal.note(f"this will take about {_duration(estimate_duration(llm, *sizes))}")
        rows = list(measure_speed(llm, *sizes, terminal.progress))
    finally:
        terminal.progress("")
    terminal.note(*describe_drafts(llm))
    import mlx_lm

    machine = report.describe_machine(shlex.join(["mlx-paged", *sys.argv[1:]]), mlx_lm=mlx_lm.__version__)
    name = f"random weights, {shape}" if shape is not None else model or "the demo model"
    tables, results = {"speed": (name, COLUMNS)}, {"speed": rows}
    sys.stdout.write(report.render(output, tables, results, machine))
    if save is not None:
        save.write_text(report.render("json", tables, results, machine))
    return 0


def _duration(seconds: float) -> str:
    """Write a rough duration: 3 s, 40 s, 12 min, 2.5 h."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"
