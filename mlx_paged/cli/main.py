"""The command line: commands, exit codes, and what bad input is told. What the commands do is in cli_*.py.

Exit codes: 0, 1 (it failed: one line on stderr), 2 (bad usage, a value out of range too), 130 (Ctrl-C). Nothing heavy
is imported until a model is loaded, so that --help answers at once.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import re
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import click
from click.core import ParameterSource

from mlx_paged import __version__
from mlx_paged.cli import batch as cli_batch
from mlx_paged.cli import beam_search as cli_beam_search
from mlx_paged.cli import bench as cli_bench
from mlx_paged.cli import chat as cli_chat
from mlx_paged.cli import generate as cli_generate
from mlx_paged.cli import inspect as cli_inspect
from mlx_paged.cli.options import (
    bench_options,
    decimal,
    engine_options,
    flag,
    model_option,
    profile_option,
    prompt_options,
    random_weights_option,
    report_options,
    sampling_options,
    system_option,
    text,
    whole,
)
from mlx_paged.cli.terminal import Terminal, one_line
from mlx_paged.config import DTYPES, EngineConfig
from mlx_paged.errors import EngineWarning
from mlx_paged.models.aliases import ALIASES
from mlx_paged.sampling_params import BeamSearchParams, SamplingParams

if TYPE_CHECKING:
    from mlx_paged.llm import LLM

Params = TypeVar("Params", SamplingParams, BeamSearchParams)
Made = TypeVar("Made")

_FLAGS = {
    field.name: "--" + field.name.replace("_", "-")
    for settings in (EngineConfig, SamplingParams, BeamSearchParams)
    for field in dataclasses.fields(settings)
} | {"n": "-n", "num_return_sequences": "--num-return"}


class EngineCommand(click.Command):
    """A command whose failures are one line; ValueError, ImportError and OSError speak for themselves."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; returns its exit code."""
        terminal = Terminal(verbose=ctx.params["verbose"], quiet=ctx.params["quiet"])
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except BrokenPipeError:  # the reader of a pipe has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        except Exception as error:
            if terminal.verbose:
                traceback.print_exc()
            if isinstance(error, ValueError | ImportError | OSError):
                terminal.failure(str(error) or type(error).__name__)
            else:
                hint = "" if terminal.verbose else "; run with --verbose for the traceback"
                terminal.failure(f"unexpected {type(error).__name__}: {error}{hint}")
            return 1


class EngineSubgroup(EngineCommand, click.Group):
    """A command that has commands of its own beside what it does itself."""

    command_class = EngineCommand


class EngineGroup(click.Group):
    """The top command: says what is wrong with a command line in one line."""

    command_class = EngineCommand

    def main(self, *args: Any, **extra: Any) -> NoReturn:
        """Run a command and exit with its code."""
        for name in ("stdout", "stderr"):
            if getattr(sys, name) is None:  # closed by whoever started this
                setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
            elif hasattr(getattr(sys, name), "reconfigure"):  # answers may hold what the encoding can't show
                getattr(sys, name).reconfigure(errors="replace")
        try:
            code = super().main(*args, **{**extra, "prog_name": "mlx-paged", "standalone_mode": False})
        except click.exceptions.NoArgsIsHelpError as error:
            error.show()
            code = error.exit_code
        except click.ClickException as error:
            ctx = getattr(error, "ctx", None)
            hint = f" ({ctx.command_path} --help shows the options)" if ctx else ""
            click.echo(f"mlx-paged: {one_line(error.format_message())}{hint}", err=True)
            code = error.exit_code
        except click.Abort:
            code = cli_batch.INTERRUPTED
        except OSError as error:  # --help > /dev/full
            Terminal().failure(str(error))
            code = 1
        sys.exit(code)


_ALIASES_EPILOG = "Aliases: " + ", ".join(ALIASES)


def _show_version(ctx: click.Context, _: click.Parameter, asked: bool) -> None:
    if asked:
        click.echo(f"mlx-paged {__version__}")
        ctx.exit()


@click.group(cls=EngineGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@flag("--version", is_eager=True, expose_value=False, callback=_show_version, help="Show the version and exit.")
def cli() -> None:
    """Text from language models on MLX, with a paged KV cache."""


@cli.command(epilog=_ALIASES_EPILOG)
@prompt_options
@whole("-n", default=1, help="Samples per prompt.")
@sampling_options
@text("--json-schema", metavar="FILE", type=click.Path(exists=True, dir_okay=False, path_type=Path),
      help="The output is JSON of the form that this JSON schema gives.")  # fmt: skip
@text("--regex", help="The output matches this regular expression.")
@flag("--json", "as_json", help="One JSON object per prompt and line.")
@whole("--logprobs", help="With --json: the N best tokens and their log-probabilities.")
@engine_options
@profile_option
@report_options
def generate(
    prompts: tuple[str, ...],
    more_prompts: tuple[str, ...],
    files: tuple[Path, ...],
    model: str | None,
    system: str | None,
    raw: bool,
    json_schema: Path | None,
    as_json: bool,
    profile: Path | None,
    verbose: bool,
    quiet: bool,
    **settings: Any,
) -> int:
    """Generate text for one prompt or many at once.

    Prompts are arguments, -p, -f, or piped in. A model with a chat template answers; with --raw it continues.
    """
    _check_system(system, raw)
    if settings["logprobs"] is not None and not as_json:
        raise click.UsageError("--logprobs are shown with --json only")
    if json_schema is not None and settings["regex"] is not None:
        raise click.UsageError("give --json-schema or --regex, not both")
    settings["json_schema"] = None if json_schema is None else _read_schema(json_schema)
    params, engine = split_settings(settings, SamplingParams)
    texts = read_prompts(prompts, more_prompts, files)
    terminal = Terminal(verbose=verbose, quiet=quiet)
    with profiled(lambda more: load(model, engine | more, terminal), profile, terminal) as load_model:
        return cli_generate.run(texts, load_model, params, system=system, raw=raw, as_json=as_json, terminal=terminal)


@cli.command(epilog=_ALIASES_EPILOG)
@prompt_options
@whole("--beam-width", default=4, help="Hypotheses kept while searching. Default: 4.")
@whole("-m", "--max-tokens", default=64, help="Most tokens of a hypothesis. Default: 64.")
@decimal("--length-penalty", default=1.0, help="The score is log-probability / tokens**X. Default: 1.")
@click.option("--early-stopping", type=click.Choice(["false", "true", "never"]), default="false",
              help="Stop when no hypothesis is likely to get better (false), when enough are finished (true), when "
              "none can get better (never). Default: false.")  # fmt: skip
@whole("--num-return", "num_return_sequences", help="Hypotheses shown, best first. Default: all of the beam width.")
@flag("--json", "as_json", help="One JSON object per prompt and line.")
@engine_options
@profile_option
@report_options
def beam_search(
    prompts: tuple[str, ...],
    more_prompts: tuple[str, ...],
    files: tuple[Path, ...],
    model: str | None,
    system: str | None,
    raw: bool,
    early_stopping: str,
    as_json: bool,
    profile: Path | None,
    verbose: bool,
    quiet: bool,
    **settings: Any,
) -> int:
    """Find the likeliest texts for one prompt or many by beam search.

    Prompts are arguments, -p, -f, or piped in. After the hypotheses of a prompt, best first, comes the most blocks
    that its beams held at once, and how many they would have held without sharing any.
    """
    _check_system(system, raw)
    settings["early_stopping"] = {"false": False, "true": True}.get(early_stopping, early_stopping)
    params, engine = split_settings(settings, BeamSearchParams)
    texts = read_prompts(prompts, more_prompts, files)
    terminal = Terminal(verbose=verbose, quiet=quiet)
    with profiled(lambda more: load(model, engine | more, terminal), profile, terminal) as load_model:
        return cli_beam_search.run(
            texts, load_model, params, system=system, raw=raw, as_json=as_json, terminal=terminal
        )


@cli.command(epilog=_ALIASES_EPILOG)
@model_option
@system_option
@sampling_options
@engine_options
@report_options
def chat(model: str | None, system: str | None, verbose: bool, quiet: bool, **settings: Any) -> int:
    """Talk with a model that remembers the conversation; /help shows what else can be typed."""
    params, engine = split_settings(settings, SamplingParams)
    terminal = Terminal(verbose=verbose, quiet=quiet)
    return cli_chat.run(load(model, engine, terminal), params, system=system, terminal=terminal)


@cli.command(epilog=_ALIASES_EPILOG)
@click.argument("name", metavar="[MODEL]", required=False)
@model_option
@whole("--context", help="Longest prompt plus output. Default: 8192, or the model's limit.")
@whole("--concurrency", help="Requests at once. Default: 16, or as many as --lengths.")
@text("--lengths", metavar="N,N,...", help="Tokens of the requests, prompt and output. Default: typical ones.")
@whole("--block-size", default=16, help="Tokens per block. Default: 16.")
@text("--memory", metavar="SIZE", help="Plan for 16GB, say, or 50%. Default: what this machine has.")
@text("--dtype", metavar="|".join(DTYPES), help="Of weights and KV cache. Default: as stored; CPU: float32.")
@flag("--json", "as_json", help="One JSON object.")
@flag("--blocks", help="Draw the block pool of a small workload instead; --lengths are its prompts.")
@text("--svg", metavar="FILE", help="With --blocks: save the picture too.")
@report_options
def inspect(verbose: bool, quiet: bool, **settings: Any) -> int:
    """Show what a model's KV cache takes and wastes, from its config.json alone, or draw a block pool.

    MODEL is an alias, a Hugging Face repository or a folder; without one it is the bundled demo model.
    """
    return cli_inspect.run(**settings)


@cli.group(cls=EngineSubgroup, invoke_without_command=True, epilog=_ALIASES_EPILOG)
@model_option
@random_weights_option
@whole("-p", "num_prompt", default=512, help="Tokens of a prompt; 0: none are measured. Default: 512.")
@whole("-g", "num_output", default=128, help="Tokens that are decoded; 0: none are measured. Default: 128.")
@text("-b", "batches", metavar="N,N,...", default="1", help="Batch sizes. Default: 1.")
@bench_options
@engine_options
@report_options
@click.pass_context
def bench(
    ctx: click.Context, model: str | None, shape: str | None, verbose: bool, quiet: bool, **settings: Any
) -> int | None:
    """Measure a model's speed: tokens per second of prompts (pp) and of decoding (tg), by batch size.

    Sequences decode from one token on. `mlx-paged bench compare` runs workloads, here and in mlx-lm.
    """
    if ctx.invoked_subcommand is not None:
        given = [param for param in ctx.params if ctx.get_parameter_source(param) is not ParameterSource.DEFAULT]
        if given:
            raise click.UsageError(f"options of {ctx.invoked_subcommand} come after its name")
        return None
    _check_one_model(model, shape)
    engine = engine_settings(settings)
    terminal = Terminal(verbose=verbose, quiet=quiet)
    return cli_bench.run(
        model, shape, engine, functools.partial(while_loading, terminal), terminal=terminal, **settings
    )


@bench.command(epilog=_ALIASES_EPILOG)
@model_option
@random_weights_option
@text("--dtype", metavar="|".join(DTYPES), help="Of weights and KV cache. Default: as stored; CPU: float32.")
@text("-w", "--workloads", "names", metavar="W1,W2,...", help="Default: all of them.")
@whole("--scale", default=1, help="Divide numbers of tokens by this, to try it out. Default: 1.")
@bench_options
@report_options
def compare(
    model: str | None, shape: str | None, dtype: str | None, verbose: bool, quiet: bool, **settings: Any
) -> int:
    """Run workloads in this engine and in mlx-lm's BatchGenerator: the same weights, in the same process.

    W1 equal lengths, W2 mixed ones, W3 a fixed budget of memory, W4 a shared prefix, W5 several samples and beams, W6
    long contexts, W7 more requests than fit, W8 block sizes. Medians; the systems take turns to be first.
    """
    _check_one_model(model, shape)
    engine_settings({"dtype": dtype, "no_prefix_caching": False})
    terminal = Terminal(verbose=verbose, quiet=quiet)
    return cli_bench.compare(
        model, shape, dtype, functools.partial(while_loading, terminal), terminal=terminal, **settings
    )


def read_prompts(prompts: Sequence[str], more_prompts: Sequence[str], files: Sequence[Path]) -> list[str]:
    """The prompts of arguments, options and files, or what is piped in; none at all is bad usage."""
    texts = [_stdin_text() if prompt == "-" else prompt for prompt in (*prompts, *more_prompts)]
    texts += [_as_text(path.read_bytes(), str(path)) for path in files]
    if not texts and sys.stdin is not None and not sys.stdin.isatty():
        texts = list(filter(None, [_stdin_text()]))
    if not texts:
        raise click.UsageError("there is no prompt: give one as an argument, with -p or -f, or through a pipe")
    return texts


def split_settings(settings: dict[str, Any], kind: type[Params]) -> tuple[Params, dict[str, Any]]:
    """The request's parameters and the engine's settings among a command's options; out of range is bad usage."""
    engine = engine_settings(settings)
    with _in_terms_of_options():
        return kind(**settings), engine


def engine_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """Takes the engine's settings from a command's options; out of range is bad usage."""
    names = {field.name for field in dataclasses.fields(EngineConfig)} - {"seed"}  # --seed is the request's
    engine = {name: settings.pop(name) for name in names & settings.keys()}
    engine = {name: value for name, value in engine.items() if value is not None}
    if settings.pop("no_prefix_caching"):
        engine["prefix_caching"] = False
    with _in_terms_of_options():
        EngineConfig(**engine)
    return engine


@contextmanager
def _in_terms_of_options() -> Iterator[None]:
    """A value out of range is bad usage, of the option that has its name."""
    try:
        yield
    except ValueError as error:
        message = re.sub(r"^n\b|\b[a-z]+(_[a-z]+)+\b|^\w+\b", lambda name: _FLAGS.get(name[0], name[0]), str(error))
        raise click.UsageError(message) from None


def load(model: str | None, engine: dict[str, Any], terminal: Terminal) -> LLM:
    """The model, with a note on what its KV cache takes."""

    def start() -> LLM:
        from mlx_paged import LLM

        return LLM(model, **engine)

    llm = while_loading(terminal, start)
    terminal.note(llm.describe_memory())
    return llm


def while_loading(terminal: Terminal, start: Callable[[], Made]) -> Made:
    """What `start` returns, which loads a model: warnings are set up, and Ctrl-C ends the process at once."""
    if not terminal.verbose:  # other libraries' warnings
        warnings.simplefilter("ignore")
        os.environ.setdefault("HF_HUB_VERBOSITY", "error")
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    warnings.simplefilter("always", EngineWarning)
    warnings.showwarning = lambda message, *_: None if terminal.quiet else terminal.say(f"mlx-paged: {message}")
    if not terminal.talks:
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    terminal.progress("loading ...")
    previous = signal.getsignal(signal.SIGINT)
    if previous is signal.default_int_handler:
        signal.signal(signal.SIGINT, _leave)
    try:
        return start()
    finally:
        signal.signal(signal.SIGINT, previous)
        terminal.progress("")


@contextmanager
def profiled(
    load: Callable[[dict[str, Any]], LLM], file: Path | None, terminal: Terminal
) -> Iterator[Callable[[], LLM]]:
    """The function that loads a model; what the model has done is written to a file at the end, if there is one.

    load: takes further settings of the engine. Whether the file can be written is found out at once.
    """
    loaded: list[LLM] = []

    def load_profiled() -> LLM:
        loaded.append(load({} if file is None else {"profile": True}))
        return loaded[0]

    if file is not None:
        try:
            file.open("a").close()
        except OSError as error:
            raise click.UsageError(f"--profile: {error.strerror}: {file}") from None
    try:
        yield load_profiled
    finally:
        if file is not None and loaded and (profile := loaded[0].profile) is not None:
            if not terminal.quiet:
                terminal.say(profile.table())
            profile.write(file)


def _leave(*_: object) -> NoReturn:
    """End the process at once: after a KeyboardInterrupt a download's threads would first finish their files."""
    os.write(2, b"\n")
    os._exit(cli_batch.INTERRUPTED)


def _check_one_model(model: str | None, shape: str | None) -> None:
    if model is not None and shape is not None:
        raise click.UsageError(f"give --model {model} or --random-weights {shape}, not both")


def _check_system(system: str | None, raw: bool) -> None:
    if system is not None and raw:
        raise click.UsageError("--system needs the chat template that --raw turns off")


def _read_schema(path: Path) -> dict[str, Any] | bool:
    """The JSON schema in a file; anything else is bad usage."""
    try:
        schema = json.loads(_as_text(path.read_bytes(), str(path)))
    except (ValueError, RecursionError) as error:
        raise click.UsageError(f"--json-schema: {path} is not JSON: {error}") from None
    if not isinstance(schema, dict | bool):
        raise click.UsageError(f"--json-schema: {path} is JSON, but no JSON schema: that is an object")
    return schema


def _stdin_text() -> str:
    return "" if sys.stdin is None else _as_text(sys.stdin.buffer.read(), "standard input")


def _as_text(content: bytes, source: str) -> str:
    """A file's text, without the line end that editors and echo put last."""
    try:
        return re.sub(r"\r?\n\Z", "", content.decode("utf-8"))
    except UnicodeDecodeError:
        raise click.UsageError(f"{source} is not UTF-8 text") from None


def main() -> NoReturn:
    """The console script."""
    cli.main()


if __name__ == "__main__":
    main()
