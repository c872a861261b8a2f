"""The command line: commands, exit codes, and what bad input is told. What a command does is in a file of its name.

Exit codes: 0, 1 (it failed: one line on stderr), 2 (bad usage, a value out of range too), 130 (Ctrl-C). Nothing heavy
is imported until a model is loaded, so that --help answers at once.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import click

from mlx_paged import __version__
from mlx_paged.cli.bench import measure_model
from mlx_paged.cli.chat import hold_conversation
from mlx_paged.cli.generate import answer_prompts
from mlx_paged.cli.inspect import inspect_cache
from mlx_paged.cli.loading import load_model, model_loader
from mlx_paged.cli.options import (
    PromptArguments,
    bench_options,
    engine_options,
    flag,
    float_option,
    int_option,
    model_option,
    profile_option,
    prompt_options,
    read_text,
    report_options,
    sampling_options,
    system_option,
    text,
)
from mlx_paged.cli.terminal import INTERRUPTED, Terminal, one_line
from mlx_paged.config import DTYPES, EngineConfig
from mlx_paged.models.aliases import ALIASES
from mlx_paged.sampling_params import BeamSearchParams, SamplingParams

Params = TypeVar("Params", SamplingParams, BeamSearchParams)

_OPTION_NAMES = {  # of settings
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
            code = INTERRUPTED
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
@int_option("-n", default=1, help="Samples per prompt.")
@sampling_options
@text("--json-schema", metavar="FILE", type=click.Path(exists=True, dir_okay=False, path_type=Path),
      help="The output is JSON of the form that this JSON schema gives.")  # fmt: skip
@text("--regex", help="The output matches this regular expression.")
@int_option("--logprobs", help="With --json: the N best tokens and their log-probabilities.")
@engine_options
@profile_option
@report_options
def generate(json_schema: Path | None, **settings: Any) -> int:
    """Generate text for one prompt or many at once.

    Prompts are arguments, -p, -f, or piped in. A model with a chat template answers; with --raw it continues.
    """
    if settings["logprobs"] is not None and not settings["as_json"]:
        raise click.UsageError("--logprobs are shown with --json only")
    if json_schema is not None and settings["regex"] is not None:
        raise click.UsageError("give --json-schema or --regex, not both")
    settings["json_schema"] = None if json_schema is None else _read_schema(json_schema)
    return _answer(SamplingParams, settings)


@cli.command(epilog=_ALIASES_EPILOG)
@prompt_options
@int_option("--beam-width", default=4, help="Hypotheses kept while searching. Default: 4.")
@int_option("-m", "--max-tokens", default=64, help="Most tokens of a hypothesis. Default: 64.")
@float_option("--length-penalty", default=1.0, help="The score is log-probability / tokens**X. Default: 1.")
@click.option("--early-stopping", type=click.Choice(["false", "true", "never"]), default="false",
              help="Stop when no hypothesis is likely to get better (false), when enough are finished (true), when "
              "none can get better (never). Default: false.")  # fmt: skip
@int_option("--num-return", "num_return_sequences", help="Hypotheses shown, best first. Default: all of them.")
@engine_options
@profile_option
@report_options
def beam_search(early_stopping: str, **settings: Any) -> int:
    """Find the likeliest texts for one prompt or many by beam search.

    Prompts are arguments, -p, -f, or piped in. After the hypotheses of a prompt, best first, comes the most blocks
    that its beams held at once, and how many they would have held without sharing any.
    """
    settings["early_stopping"] = {"false": False, "true": True}.get(early_stopping, early_stopping)
    return _answer(BeamSearchParams, settings)


def _answer(kind: type[Params], settings: dict[str, Any]) -> int:
    """Answer the prompts of a command with parameters of one kind. Returns the exit code."""
    model, profile, verbose, quiet = map(settings.pop, ("model", "profile", "verbose", "quiet"))
    prompts = PromptArguments.take(settings)
    params, engine = split_settings(settings, kind)
    terminal = Terminal(verbose=verbose, quiet=quiet)
    with model_loader(model, engine, terminal, profile=profile) as load:
        return answer_prompts(prompts, load, params, terminal)


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
    return hold_conversation(load_model(model, engine, terminal), params, system=system, terminal=terminal)


@cli.command(epilog=_ALIASES_EPILOG)
@click.argument("name", metavar="[MODEL]", required=False)
@model_option
@int_option("--context", help="Longest prompt plus output. Default: 8192, or the model's limit.")
@int_option("--concurrency", help="Requests at once. Default: 16, or as many as --lengths.")
@text("--lengths", metavar="N,N,...", help="Tokens of the requests, prompt and output. Default: typical ones.")
@int_option("--block-size", default=16, help="Tokens per block. Default: 16.")
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
    return inspect_cache(**settings)


@cli.command(epilog=_ALIASES_EPILOG)
@model_option
@bench_options
@engine_options
@report_options
def bench(model: str | None, shape: str | None, verbose: bool, quiet: bool, **settings: Any) -> int:
    """Measure a model's speed: tokens per second of prompts (pp) and of decoding (tg), by batch size.

    Sequences decode from one token on.
    """
    if model is not None and shape is not None:
        raise click.UsageError(f"give --model {model} or --random-weights {shape}, not both")
    engine = engine_settings(settings)
    return measure_model(model, shape, engine, terminal=Terminal(verbose=verbose, quiet=quiet), **settings)


def split_settings(settings: dict[str, Any], kind: type[Params]) -> tuple[Params, dict[str, Any]]:
    """Split a command's options into the request's parameters and the engine's settings. Raises click.UsageError."""
    engine = engine_settings(settings)
    with _as_usage_error():
        return kind(**settings), engine


def engine_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """Take the engine's settings out of a command's options. Raises click.UsageError for one out of range."""
    names = {field.name for field in dataclasses.fields(EngineConfig)} - {"seed"}  # --seed is the request's
    engine = {name: settings.pop(name) for name in names & settings.keys()}
    engine = {name: value for name, value in engine.items() if value is not None}
    if settings.pop("no_prefix_caching"):
        engine["prefix_caching"] = False
    with _as_usage_error():
        EngineConfig(**engine)
    return engine


@contextmanager
def _as_usage_error() -> Iterator[None]:
    """Make a ValueError bad usage, of the options that have the names in its message."""
    try:
        yield
    except ValueError as error:
        message = re.sub(
            r"^n\b|\b[a-z]+(_[a-z]+)+\b|^\w+\b", lambda name: _OPTION_NAMES.get(name[0], name[0]), str(error)
        )
        raise click.UsageError(message) from None


def _read_schema(path: Path) -> dict[str, Any] | bool:
    """Read the JSON schema in a file. Raises click.UsageError for anything else."""
    try:
        schema = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise click.UsageError(f"--json-schema: {path} is not JSON: {error}") from None
    if not isinstance(schema, dict | bool):
        raise click.UsageError(f"--json-schema: {path} is JSON, but no JSON schema: that is an object")
    return schema


def main() -> NoReturn:
    """The console script."""
    cli.main()


if __name__ == "__main__":
    main()
