"""The options that commands share, and how options are made."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from mlx_paged.cli import batch as cli_batch
from mlx_paged.config import ALLOCATORS, DTYPES
from mlx_paged.tools.random_models import SHAPES
from mlx_paged.tools.report import FORMATS

Option = Callable[[Any], Any]


def options(*each: Option) -> Option:
    """Several options as one decorator, in the order in which --help shows them."""

    def decorate(command: Any) -> Any:
        for option in reversed(each):
            command = option(command)
        return command

    return decorate


def whole(*names: str, help: str, default: int | None = None) -> Option:
    """An option that is a whole number."""
    return click.option(*names, type=int, metavar="N", default=default, help=help)


def decimal(*names: str, help: str, default: float) -> Option:
    """An option that is a number."""
    return click.option(*names, type=float, metavar="X", default=default, help=help)


def parse_numbers(name: str, value: str) -> list[int]:
    """ "100,2000" -> [100, 2000]. name: of the option. Raises click.UsageError, also for numbers below 1."""
    try:
        numbers = [int(part) for part in value.split(",")]
    except ValueError:
        raise click.UsageError(f"{name} are whole numbers with commas between them, got {value!r}") from None
    if min(numbers) < 1:
        raise click.UsageError(f"{name} must be at least 1, got {min(numbers)}")
    return numbers


def text(*names: str, help: str, **kwargs: Any) -> Option:
    """An option that is text."""
    return click.option(*names, **{"metavar": "TEXT", "help": help, **kwargs})


def flag(*names: str, help: str, **kwargs: Any) -> Option:
    """An option that is given or not."""
    return click.option(*names, is_flag=True, help=help, **kwargs)


model_option: Option = text(
    "--model", metavar="MODEL", help="Alias, Hugging Face repository or folder. Default: the bundled demo model."
)
system_option: Option = text("--system", help="System message of the chat template.")
prompt_options: Option = options(
    click.argument("prompts", nargs=-1),
    text("-p", "--prompt", "more_prompts", multiple=True, help='A prompt; "-" is stdin. Repeatable.'),
    text("-f", "--file", "files", multiple=True, metavar="FILE", help="A file that is one prompt. Repeatable.",
         type=click.Path(exists=True, dir_okay=False, path_type=Path)),
    model_option,
    system_option,
    flag("--raw", help="Continue the prompt as it is, without the chat template."),
)  # fmt: skip
engine_options: Option = options(
    whole("--block-size", help="Tokens per block of the KV cache. Default: 16."),
    whole("--num-kv-blocks", help="Size of the KV cache in blocks."),
    text("--kv-cache-memory", metavar="SIZE", help="Or in memory: 4GB, 512MiB, 30%."),
    whole("--max-num-seqs", help="Sequences that run at once. Default: 64."),
    whole("--max-num-batched-tokens", help="Tokens computed per step. Default: 2048."),
    whole("--max-model-len", help="Longest prompt plus output. Default: the model's limit."),
    text("--dtype", metavar="|".join(DTYPES), help="Of weights and KV cache. Default: as stored; CPU: float32."),
    flag("--no-prefix-caching", help="Don't reuse the blocks of equal prefixes."),
    text("--allocator", metavar="|".join(ALLOCATORS), help="Order in which free blocks are reused. Default: lru."),
    text("--swap-space", metavar="SIZE|FOLDER", help="Where blocks of preempted requests go: 8GB, or a folder."),
    text("--prefix-cache-dir", metavar="FOLDER", help="Keep the blocks of prompts there for later runs."),
)
sampling_options: Option = options(
    whole("-m", "--max-tokens", help=f"Default: {cli_batch.DEFAULT_MAX_TOKENS}, or what fits if that is less."),
    decimal("--temp", "--temperature", "temperature", default=0.0, help="Default: 0, greedy."),
    decimal("--top-p", default=1.0, help="Keep the likeliest tokens that make up this probability."),
    whole("--top-k", default=0, help="Keep this many tokens. Default: 0, all."),
    decimal("--min-p", default=0.0, help="Keep tokens at least this likely beside the likeliest."),
    decimal("--repetition-penalty", default=1.0, help="Above 1: against tokens seen before."),
    decimal("--presence-penalty", default=0.0, help="Against tokens of the output, once."),
    decimal("--frequency-penalty", default=0.0, help="Against tokens of the output, each time."),
    text("--stop", multiple=True, help="End before this text. Repeatable."),
    whole("--seed", help="Makes random sampling repeatable."),
    flag("--ignore-eos", help="Run on past the model's end token."),
)
random_weights_option: Option = click.option(
    "--random-weights",
    "shape",
    type=click.Choice(list(SHAPES)),
    help="Random weights of this shape instead of a model.",
)
bench_options: Option = options(
    whole("-n", "--repetitions", default=5, help="Times that each is measured. Default: 5."),
    click.option("-o", "--output", type=click.Choice(FORMATS), default="table", help="Default: table."),
    text("--save", metavar="FILE", type=click.Path(dir_okay=False, writable=True, path_type=Path),
         help="Write the JSON there too."),
)  # fmt: skip
report_options: Option = options(
    flag("-v", "--verbose", help="Timing and memory on stderr, tracebacks of failures."),
    flag("-q", "--quiet", help="Nothing on stderr but failures."),
)
profile_option: Option = text(
    "--profile", metavar="FILE", type=click.Path(path_type=Path),
    help="Where each step's time goes: a table on stderr, and a trace for Chrome or Perfetto in this file.",
)  # fmt: skip
