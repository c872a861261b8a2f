"""The options that commands share, and how options are made and read."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem

from mlx_paged.config import ALLOCATORS, DTYPES, KV_CACHE_DTYPES
from mlx_paged.models.aliases import ALIASES
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


def completing(*values: str, kind: str | None = None) -> Callable[..., list[CompletionItem]]:
    """Make what completes an option in a shell: with values, and where none fits with names of files or folders."""

    def complete(ctx: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
        items = [CompletionItem(incomplete, type=kind)] if kind is not None else []
        return items + [CompletionItem(value) for value in values if value.startswith(incomplete)]

    return complete


def text(*names: str, help: str, **kwargs: Any) -> Option:
    """Make an option that is text."""
    return click.option(*names, **{"metavar": "TEXT", "help": help, **kwargs})


def flag(*names: str, help: str, **kwargs: Any) -> Option:
    """Make an option that is given or not."""
    return click.option(*names, is_flag=True, help=help, **kwargs)


def given(settings: dict[str, Any]) -> list[str]:
    """Return the names of the options that were given, or have a default."""
    return [name for name, value in settings.items() if value is not None]


model_values = completing(*ALIASES, kind="dir")
model_option: Option = text(
    "--model", metavar="MODEL", help="Alias, Hugging Face repository or folder. Default: the bundled demo model.",
    shell_complete=model_values,
)  # fmt: skip
dtype_option: Option = text(
    "--dtype", metavar="|".join(DTYPES), help="Of weights and KV cache. Default: as stored; CPU: float32.",
    shell_complete=completing(*DTYPES),
)  # fmt: skip
kv_cache_dtype_option: Option = text(
    "--kv-cache-dtype", metavar="|".join(KV_CACHE_DTYPES), shell_complete=completing(*KV_CACHE_DTYPES),
    help="Quantise K and V, to about half of what they take in 16 bits. Default: as --dtype.",
)  # fmt: skip


def _read_kwargs(ctx: click.Context, parameter: click.Parameter, value: str | None) -> dict[str, Any] | None:
    """Read an option that is a JSON object. Raises click.BadParameter for anything else."""
    if value is None:
        return None
    try:
        kwargs = json.loads(value)
    except (ValueError, RecursionError) as error:
        raise click.BadParameter(f"{value!r} is not JSON: {error}") from None
    if not isinstance(kwargs, dict):
        raise click.BadParameter(f'a JSON object is expected, like {{"enable_thinking": false}}, not {value!r}')
    return kwargs


chat_options: Option = options(
    text("--system", help="System message of the chat template."),
    text("--chat-template-kwargs", metavar="JSON", callback=_read_kwargs,
         help='What else the chat template takes: {"enable_thinking": false}, say.'),
)  # fmt: skip
prompt_options: Option = options(
    click.argument("prompts", nargs=-1),
    text("-p", "--prompt", "more_prompts", multiple=True, help='A prompt; "-" is stdin. Repeatable.'),
    text("-f", "--file", "files", multiple=True, metavar="FILE", help="A file that is one prompt. Repeatable.",
         type=click.Path(exists=True, dir_okay=False, path_type=Path)),
    model_option,
    chat_options,
    flag("--raw", help="Continue the prompt as it is, without the chat template."),
    flag("--json", "as_json", help="One JSON object per prompt and line."),
)  # fmt: skip


@dataclass(frozen=True)
class PromptArguments:
    """What a command was told by `prompt_options`, the model aside."""

    sources: Sequence[str | Path]
    """Prompts, "-" for stdin, and files that are one, in the order typed."""
    system: str | None
    raw: bool
    as_json: bool
    chat_template_kwargs: Mapping[str, Any] | None = None

    @classmethod
    def take(cls, settings: dict[str, Any]) -> PromptArguments:
        """Take them out of a command's options. Raises click.UsageError if they contradict each other."""
        arguments = cls(**{field.name: settings.pop(field.name) for field in fields(cls)})
        if arguments.system is not None and arguments.raw:
            raise click.UsageError("--system needs the chat template that --raw turns off")
        if arguments.chat_template_kwargs is not None and arguments.raw:
            raise click.UsageError("--chat-template-kwargs needs the chat template that --raw turns off")
        return arguments

    def read(self) -> list[str]:
        """Read the prompts of arguments, options and files, or what is piped in. Raises click.UsageError for none."""
        texts = [
            read_text(each) if isinstance(each, Path) else read_stdin() if each == "-" else each
            for each in self.sources
        ]
        if not texts and sys.stdin is not None and not sys.stdin.isatty():
            texts = list(filter(None, [read_stdin()]))
        if not texts:
            raise click.UsageError("there is no prompt: give one as an argument, with -p or -f, or through a pipe")
        return texts


def read_text(path: Path) -> str:
    """Read a file, without the line end that editors put last. Raises click.UsageError if it is not UTF-8."""
    return _decode(path.read_bytes(), str(path))


def read_schema(path: Path) -> dict[str, Any] | bool:
    """Read the JSON schema in a file. Raises click.UsageError for anything else."""
    try:
        schema = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise click.UsageError(f"--json-schema: {path} is not JSON: {error}") from None
    if not isinstance(schema, dict | bool):
        raise click.UsageError(f"--json-schema: {path} is JSON, but no JSON schema: that is an object")
    return schema


def read_stdin() -> str:
    """Read what is piped in."""
    return "" if sys.stdin is None else _decode(sys.stdin.buffer.read(), "standard input")


def _decode(content: bytes, source: str) -> str:
    try:
        return re.sub(r"\r?\n\Z", "", content.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise click.UsageError(f"{source} is not UTF-8 text") from None


engine_options: Option = options(
    text("--adapter-path", metavar="FOLDER", help="LoRA or DoRA that mlx-lm trained, put onto the model.",
         type=click.Path(exists=True, file_okay=False), shell_complete=completing(kind="dir")),
    int_option("--block-size", help="Tokens per block of the KV cache. Default: 16."),
    int_option("--num-kv-blocks", help="Size of the KV cache in blocks."),
    text("--kv-cache-memory", metavar="SIZE",
         help="Or in memory: 4GB, 512MiB, 30%. Default: with the weights 75% of a GPU's memory, without them 10% of a "
         "CPU's; generate and beam-search take what their prompts need, if that is less."),
    int_option("--max-num-seqs", help="Sequences that run at once. Default: 64."),
    int_option("--max-num-batched-tokens", help="Tokens computed per step. Default: 2048."),
    float_option("--max-step-ms", help="What a step may take while answers stream: it sets the chunks of "
                 "prompts. 0: any time. Default: five steps without."),
    int_option("--max-model-len", help="Longest prompt plus output. Default: the model's limit."),
    dtype_option,
    kv_cache_dtype_option,
    text("--speculative", type=click.Choice(["ngram"]),
         help="Guess next tokens from earlier text, where that is faster; answers stay the same."),
    text("--draft-model", metavar="MODEL", shell_complete=model_values,
         help="Or let a smaller model of the same vocabulary guess them."),
    int_option("--num-speculative-tokens", help="Most guesses of a sequence in a step. Default: 4."),
    flag("--no-prefix-caching", help="Don't reuse the blocks of equal prefixes."),
    text("--allocator", metavar="|".join(ALLOCATORS), help="Order in which free blocks are reused. Default: lru.",
         shell_complete=completing(*ALLOCATORS)),
    int_option("--tensor-parallel-size", help="Divide each layer among N processes, which are started. Default: 1."),
    int_option("--pipeline-parallel-size", help="Or divide the layers among N processes. Default: 1."),
    text("--hostfile", metavar="FILE", help="Hosts for them, as mlx.launch reads it; the first is this one.",
         type=click.Path(exists=True, dir_okay=False, path_type=Path)),
    text("--swap-space", metavar="SIZE|FOLDER", help="Where blocks of preempted requests go: 8GB, or a folder.",
         shell_complete=completing(kind="dir")),
    text("--prefix-cache-dir", metavar="FOLDER", help="Keep the blocks of prompts there for later runs.",
         shell_complete=completing(kind="dir")),
    text("--prefix-cache-size", metavar="SIZE",
         help="Most that is there, of all models. Default: 10% of the free disk."),
)  # fmt: skip
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
    int_option("--min-tokens", help="End at no end token before. Default: 0."),
    text(
        "--bad-words",
        multiple=True,
        help="Never write this text. Repeatable.",
        callback=lambda _, __, words: words or None,
    ),
    int_option("--max-thinking-tokens", help="Most that an answer thinks, of models that mark it. Default: no limit."),
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
    flag("-v", "--verbose", help="Timing and memory on stderr, tracebacks of failures; of serve, why prompts were not "
         "cached; of bench, which shared prefixes are computed once, and why."),
    flag("-q", "--quiet", help="Nothing on stderr but failures."),
)  # fmt: skip
profile_option: Option = text(
    "--profile", metavar="FILE", type=click.Path(path_type=Path),
    help="Where each step's time goes: a table on stderr, and a trace for Chrome or Perfetto in this file.",
)  # fmt: skip


def typed_order(command: click.Command, args: Sequence[str]) -> list[str]:
    """Tell in which order a command's arguments and its -p and -f were typed, which click does not.

    Returns the parameter's name for each of them.
    """
    known = {name: each for each in command.params if isinstance(each, click.Option) for name in each.opts}
    order: list[str] = []
    rest = iter(args)
    for arg in rest:
        if arg == "--":
            return order + ["prompts" for _ in rest]
        if arg == "-" or not arg.startswith("-"):
            order.append("prompts")
            continue
        name, has_value, _ = arg.partition("=")
        option = known.get(name)
        if not arg.startswith("--"):  # letters of flags, and last perhaps one with its value
            letters = range(1, len(arg))
            last = next((i for i in letters if (it := known.get(f"-{arg[i]}")) and not it.is_flag), len(arg) - 1)
            option, has_value = known.get(f"-{arg[last]}"), arg[last + 1 :]
        if option is not None and not option.is_flag:
            if not has_value:
                next(rest, None)
            if option.name in ("more_prompts", "files"):
                order.append(option.name)
    return order


def option_names(command: click.Command, params: Mapping[str, Any]) -> dict[str, str]:
    """Tell how settings are written as options of a command: "max_tokens" -> "--max-tokens".

    params: what it was given, where several options are one setting.
    """
    names = {str(each.name): each.opts[-1] for each in command.params if isinstance(each, click.Option)}
    if "speculative" in names:
        names["speculative_config"] = names["speculative" if params.get("draft_model") is None else "draft_model"]
    if "no_prefix_caching" in names:
        names["prefix_caching=False"] = names["no_prefix_caching"]
    return names


def in_options(message: str, names: Mapping[str, str]) -> str:
    """Write the settings that a message names as options; a single word only where it can be nothing else."""

    def as_option(match: re.Match[str]) -> str:
        name = match["long"] or match["short"]
        value = match[0][len(name) :]
        if match[0] in names or name not in names:
            return names.get(match[0], match[0])
        return names[name] + (" " if value == "=" else value)

    long = r"(?P<long>\b[a-z]+(?:_[a-z]+)+\b)(?:=False\b|=)?"
    return re.sub(rf"{long}|^(?P<short>[a-z]+)(?:=|(?= (?:must|can't) ))", as_option, message)
