"""The options that commands share, and how options are made and read."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import click

from mlx_paged.config import ALLOCATORS, DTYPES
from mlx_paged.tools.random_models import SHAPES
from mlx_paged.tools.report import FORMATS

Option = Callable[[Any], Any]

DEFAULT_MAX_TOKENS = 256  # of an answer, or what fits if that is less


def options(*each: Option) -> Option:
    """Make one decorator of several options, in the order in which --help shows them."""

    def decorate(command: Any) -> Any:
        for option in reversed(each):
            command = option(command)
        return command

    return decorate


def int_option(*names: str, help: str, default: int | None = None) -> Option:
    """Make an option that is a whole number."""
    return click.option(*names, type=int, metavar="N", default=default, help=help)


def float_option(*names: str, help: str, default: float | None = None) -> Option:
    """Make an option that is a number."""
    return click.option(*names, type=float, metavar="X", default=default, help=help)


def parse_numbers(name: str, value: str) -> list[int]:
    """Read the numbers of the option `name`: "100,2000" -> [100, 2000].

    Raises click.UsageError for what is no number, and for numbers below 1.
    """
    try:
        numbers = [int(part) for part in value.split(",")]
    except ValueError:
        raise click.UsageError(f"{name} are whole numbers with commas between them, got {value!r}") from None
    if min(numbers) < 1:
        raise click.UsageError(f"{name} must be at least 1, got {min(numbers)}")
    return numbers


def text(*names: str, help: str, **kwargs: Any) -> Option:
    """Make an option that is text."""
    return click.option(*names, **{"metavar": "TEXT", "help": help, **kwargs})


def flag(*names: str, help: str, **kwargs: Any) -> Option:
    """Make an option that is given or not."""
    return click.option(*names, is_flag=True, help=help, **kwargs)


def given(settings: dict[str, Any]) -> list[str]:
    """Return the names of the options that were given, or have a default."""
    return [name for name, value in settings.items() if value is not None]


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
    flag("--json", "as_json", help="One JSON object per prompt and line."),
)  # fmt: skip


@dataclass(frozen=True)
class PromptArguments:
    """What a command was told by `prompt_options`, the model aside."""

    prompts: Sequence[str]
    more_prompts: Sequence[str]
    files: Sequence[Path]
    system: str | None
    raw: bool
    as_json: bool

    @classmethod
    def take(cls, settings: dict[str, Any]) -> PromptArguments:
        """Take them out of a command's options. Raises click.UsageError if they contradict each other."""
        arguments = cls(**{field.name: settings.pop(field.name) for field in fields(cls)})
        if arguments.system is not None and arguments.raw:
            raise click.UsageError("--system needs the chat template that --raw turns off")
        return arguments

    def read(self) -> list[str]:
        """Read the prompts of arguments, options and files, or what is piped in. Raises click.UsageError for none."""
        texts = [_read_stdin() if prompt == "-" else prompt for prompt in (*self.prompts, *self.more_prompts)]
        texts += [read_text(path) for path in self.files]
        if not texts and sys.stdin is not None and not sys.stdin.isatty():
            texts = list(filter(None, [_read_stdin()]))
        if not texts:
            raise click.UsageError("there is no prompt: give one as an argument, with -p or -f, or through a pipe")
        return texts


def read_text(path: Path) -> str:
    """Read a file, without the line end that editors put last. Raises click.UsageError if it is not UTF-8."""
    return _decode(path.read_bytes(), str(path))


def _read_stdin() -> str:
    return "" if sys.stdin is None else _decode(sys.stdin.buffer.read(), "standard input")


def _decode(content: bytes, source: str) -> str:
    try:
        return re.sub(r"\r?\n\Z", "", content.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise click.UsageError(f"{source} is not UTF-8 text") from None


engine_options: Option = options(
    int_option("--block-size", help="Tokens per block of the KV cache. Default: 16."),
    int_option("--num-kv-blocks", help="Size of the KV cache in blocks."),
    text("--kv-cache-memory", metavar="SIZE", help="Or in memory: 4GB, 512MiB, 30%."),
    int_option("--max-num-seqs", help="Sequences that run at once. Default: 64."),
    int_option("--max-num-batched-tokens", help="Tokens computed per step. Default: 2048."),
    int_option("--max-model-len", help="Longest prompt plus output. Default: the model's limit."),
    text("--dtype", metavar="|".join(DTYPES), help="Of weights and KV cache. Default: as stored; CPU: float32."),
    flag("--no-prefix-caching", help="Don't reuse the blocks of equal prefixes."),
    text("--allocator", metavar="|".join(ALLOCATORS), help="Order in which free blocks are reused. Default: lru."),
    text("--swap-space", metavar="SIZE|FOLDER", help="Where blocks of preempted requests go: 8GB, or a folder."),
    text("--prefix-cache-dir", metavar="FOLDER", help="Keep the blocks of prompts there for later runs."),
    text(
        "--prefix-cache-size",
        metavar="SIZE",
        help="Most that is there, of all models. Default: 10% of the free disk.",
    ),
)
text_options: Option = options(
    text("--stop", multiple=True, help="End before this text. Repeatable."),
    flag("--show-special-tokens", "skip_special_tokens", flag_value=False, default=True,
         help="Leave special tokens in the text."),
)  # fmt: skip
sampling_options: Option = options(
    int_option("-m", "--max-tokens", help=f"Default: {DEFAULT_MAX_TOKENS}, or what fits if that is less."),
    float_option("--temp", "--temperature", "temperature", help="0 is greedy. Default: the model's, or 0."),
    float_option("--top-p", help="Keep the likeliest tokens that make up this. Default: the model's, or 1."),
    int_option("--top-k", help="Keep this many tokens; 0: all. Default: the model's, or 0."),
    float_option("--min-p", help="Keep tokens this likely beside the likeliest. Default: the model's, or 0."),
    float_option("--repetition-penalty", help="Above 1: against tokens seen before. Default: the model's, or 1."),
    float_option("--presence-penalty", help="Against tokens of the output, once. Default: 0."),
    float_option("--frequency-penalty", help="Against tokens of the output, each time. Default: 0."),
    text_options,
    int_option("--seed", help="Makes random sampling repeatable."),
    flag("--ignore-eos", help="Run on past the model's end token."),
)
bench_options: Option = options(
    click.option("--random-weights", "shape", type=click.Choice(list(SHAPES)),
                 help="Random weights of this shape instead of a model."),
    int_option("-p", "num_prompt", default=512, help="Tokens of a prompt; 0: none are measured. Default: 512."),
    int_option("-g", "num_output", default=128, help="Tokens that are decoded; 0: none are measured. Default: 128."),
    text("-b", "batches", metavar="N,N,...", default="1", help="Batch sizes. Default: 1."),
    int_option("-n", "--repetitions", default=5, help="Times that each is measured. Default: 5."),
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
