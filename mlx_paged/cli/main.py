"""The command line: commands and exit codes. What a command does is in a file of its name.

Exit codes: 0, 1 (it failed: one line on stderr), 2 (bad usage, a value out of range too), 3 (an output was cut before
it had its form), 130 (Ctrl-C, TERM, HUP). Nothing heavy is imported until a model is loaded, so that --help answers at
once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import click

from mlx_paged import __version__
from mlx_paged.cli import options
from mlx_paged.cli.batch import answer_batch
from mlx_paged.cli.bench import measure_model
from mlx_paged.cli.chat import FULL, hold_conversation, require_chat_template
from mlx_paged.cli.command import EngineGroup
from mlx_paged.cli.doctor import examine
from mlx_paged.cli.generate import answer_prompts
from mlx_paged.cli.inspect import inspect_cache
from mlx_paged.cli.loading import check_form, complete_params, load_model, model_loader
from mlx_paged.cli.models import list_models, pull_model
from mlx_paged.cli.ranks import spread_out
from mlx_paged.cli.serve import serve_model, serve_options
from mlx_paged.cli.terminal import Terminal
from mlx_paged.config import EngineConfig
from mlx_paged.models.aliases import ALIASES
from mlx_paged.sampling_params import BeamSearchParams, SamplingParams

Params = TypeVar("Params", SamplingParams, BeamSearchParams)


_ALIASES_EPILOG = "Aliases: " + ", ".join(ALIASES)


@click.group(cls=EngineGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, message="mlx-paged %(version)s")
def cli() -> None:
    """Text from language models on MLX, with a paged KV cache."""


@cli.command(epilog=_ALIASES_EPILOG)
@options.prompt_options
@options.int_option("-n", default=1, help="Samples per prompt.")
@options.sampling_options
@options.text("--json-schema", metavar="FILE", type=click.Path(exists=True, dir_okay=False, path_type=Path),
      help="The output is JSON of the form that this JSON schema gives.")  # fmt: skip
@options.text("--regex", help="The output matches this regular expression.")
@options.text("--grammar-file", "grammar", metavar="FILE", help="The output matches this grammar in Lark's syntax.",
      type=click.Path(exists=True, dir_okay=False, path_type=Path))  # fmt: skip
@options.text("--batch", metavar="FILE", help="Requests instead of prompts, each a line of JSON: prompt or messages, "
      "perhaps an id, parameters by their Python names.",
      type=click.Path(exists=True, dir_okay=False, allow_dash=True, path_type=Path))  # fmt: skip
@options.text("--output", metavar="FILE", help="With --batch: answers go there, and those that are there already stay.",
      type=click.Path(dir_okay=False, path_type=Path))  # fmt: skip
@options.int_option("--logprobs", help="With --json: the N best tokens and their log-probabilities.")
@options.engine_options
@options.profile_option
@options.report_options
@click.pass_obj
def generate(
    terminal: Terminal,
    json_schema: Path | None,
    grammar: Path | None,
    batch: Path | None,
    output: Path | None,
    **settings: Any,
) -> int:
    """Generate text for one prompt or many at once.

    Prompts are arguments, -p, -f, or piped in. A model with a chat template answers; with --raw it continues. Exit
    code 3: an answer has not the whole form that was asked for.
    """
    if settings["logprobs"] is not None and not settings["as_json"] and batch is None:
        raise click.UsageError("--logprobs are shown with --json only")
    forms = {"--json-schema": json_schema, "--regex": settings["regex"], "--grammar-file": grammar}
    if len(given := [name for name, form in forms.items() if form is not None]) > 1:
        raise click.UsageError(f"give {' or '.join(given)}, not both")
    if output is not None and batch is None:
        raise click.UsageError("--output is for the answers to a --batch; > FILE keeps those to other prompts")
    if batch is not None and settings["sources"]:
        raise click.UsageError("give --batch or prompts, not both")
    settings["json_schema"] = None if json_schema is None else options.read_schema(json_schema)
    settings["grammar"] = None if grammar is None else options.read_text(grammar)
    if batch is None:
        return _answer(SamplingParams, settings, terminal)
    return _answer(SamplingParams, settings, terminal, partial(answer_batch, batch, output))


@cli.command(epilog=_ALIASES_EPILOG)
@options.prompt_options
@options.int_option("--beam-width", default=4, help="Hypotheses kept while searching. Default: 4.")
@options.int_option("-m", "--max-tokens", default=64, help="Most tokens of a hypothesis. Default: 64.")
@options.float_option("--length-penalty", default=1.0, help="The score is log-probability / tokens**X. Default: 1.")
@click.option("--early-stopping", type=click.Choice(["false", "true", "never"]), default="false",
              help="Stop when no hypothesis is likely to get better (false), when enough are finished (true), when "
              "none can get better (never). Default: false.")  # fmt: skip
@options.int_option("--num-return", "num_return_sequences", help="Hypotheses shown, best first. Default: all of them.")
@options.text_options
@options.engine_options
@options.profile_option
@options.report_options
@click.pass_obj
def beam_search(terminal: Terminal, early_stopping: str, **settings: Any) -> int:
    """Find the likeliest texts for one prompt or many by beam search.

    Prompts are arguments, -p, -f, or piped in. After the hypotheses of a prompt, best first, comes the most blocks
    that its beams held at once, and how many they would have held without sharing any.
    """
    settings["early_stopping"] = {"false": False, "true": True}.get(early_stopping, early_stopping)
    return _answer(BeamSearchParams, settings, terminal)


def _answer(
    kind: type[Params], settings: dict[str, Any], terminal: Terminal, answer: Callable[..., int] = answer_prompts
) -> int:
    """Answer the prompts of a command with parameters of one kind. Returns the exit code."""
    model, profile = settings.pop("model"), settings.pop("profile")
    prompts = options.PromptArguments.take(settings)
    given = options.given(settings)
    params, engine = split_settings(settings, kind)
    with model_loader(model, engine, terminal, profile=profile) as load:
        return answer(prompts, load, params, terminal, given)


@cli.command(epilog=_ALIASES_EPILOG)
@options.model_option
@options.chat_options
@click.option("--context-full", type=click.Choice(FULL), default=FULL[0],
              help="At the end of the context drop the oldest turns, or stop. Default: drop.")  # fmt: skip
@options.sampling_options
@options.engine_options
@options.report_options
@click.pass_obj
def chat(terminal: Terminal, model: str | None, **settings: Any) -> int:
    """Talk with a model that remembers the conversation.

    A turn is a line, lines that are pasted, or lines with a backslash at the end; \"\"\" begins and ends a longer one.
    Commands: /file NAME, /save NAME, /load NAME, /set NAME VALUE, /reset, /exit; /help explains them.
    """
    conversation = {name: settings.pop(name) for name in ("system", "chat_template_kwargs", "context_full")}
    given = options.given(settings)
    params, engine = split_settings(settings, SamplingParams)
    llm = load_model(model, engine, terminal, require_chat_template)
    params = complete_params(params, given, llm, terminal)
    return hold_conversation(llm, params, **conversation, terminal=terminal)


@cli.command(epilog=_ALIASES_EPILOG)
@options.model_option
@serve_options
@options.engine_options
@options.report_options
@click.pass_obj
def serve(terminal: Terminal, model: str | None, **settings: Any) -> int:
    """Serve a model over HTTP, to clients of OpenAI's and of Anthropic's API.

    Ends at Ctrl-C or TERM once running requests have ended, a second time at once.
    """
    engine = engine_settings(settings)
    return serve_model(model, engine, terminal, **settings)


@cli.command(epilog=_ALIASES_EPILOG)
@click.argument("name", metavar="[MODEL]", required=False, shell_complete=options.model_values)
@options.model_option
@options.int_option("--context", help="Longest prompt plus output. Default: 8192, or the model's limit.")
@options.int_option("--concurrency", help="Requests at once. Default: 16, or as many as --lengths.")
@options.text("--lengths", metavar="N,N,...", help="Tokens of the requests, prompt and output. Default: typical ones.")
@options.int_option("--block-size", default=16, help="Tokens per block. Default: 16.")
@options.text("--memory", metavar="SIZE", help="Plan for 16GB, say, or 50%. Default: what this machine has.")
@options.dtype_option
@options.kv_cache_dtype_option
@options.flag("--json", "as_json", help="One JSON object.")
@options.text("--prefix-cache-dir", metavar="FOLDER", help="List the saved prompts of a folder instead, by model.")
@options.flag("--blocks", help="Draw the block pool of a small workload instead; --lengths are its prompts.")
@options.text("--svg", metavar="FILE", help="With --blocks: save the picture too.")
@options.report_options
def inspect(**settings: Any) -> int:
    """Show what a model's KV cache takes and wastes, draw a block pool, or list saved prompts.

    MODEL is an alias, a Hugging Face repository or a folder; without one it is the bundled demo model. Its config.json
    is enough; weights that are in a folder are measured by their headers.
    """
    return inspect_cache(**settings)


@cli.command()
@options.flag("--json", "as_json", help="One JSON list, a repository an object.")
@options.report_options
@click.pass_obj
def models(terminal: Terminal, as_json: bool) -> int:
    """List aliases, what they stand for, and which models are in the Hugging Face cache.

    Nothing is downloaded: size, context and family are known of what is in the cache.
    """
    return list_models(as_json=as_json, terminal=terminal)


@cli.command()
@click.argument("model", shell_complete=options.model_values)
@options.report_options
@click.pass_obj
def pull(terminal: Terminal, model: str) -> int:
    """Download a model ahead, or go on with a download that broke off.

    MODEL is an alias or a Hugging Face repository. What is missing, and whether its weights fit into this machine's
    memory, is said first.
    """
    return pull_model(model, terminal=terminal)


@cli.command()
@options.text("--prefix-cache-dir", metavar="FOLDER", help="Look whether prompts can be saved there, too.")
@options.flag("--json", "as_json", help="One JSON object.")
@options.report_options
def doctor(**settings: Any) -> int:
    """Say what is installed and what this machine is, and whether all of it works: the beginning of a bug report.

    A line for each part. The last one is a small generation with the bundled model, which is compared with what it has
    to be. Nothing is downloaded. Exit code 1: something is wrong.
    """
    return examine(**settings)


@cli.command(epilog=_ALIASES_EPILOG)
@options.model_option
@options.bench_options
@options.engine_options
@options.report_options
@click.pass_obj
def bench(terminal: Terminal, model: str | None, shape: str | None, **settings: Any) -> int:
    """Measure a model's speed: tokens per second of prompts (pp) and of decoding (tg), by batch size.

    Sequences decode from one token on. How long it will take is said beforehand; Ctrl-C ends it within two seconds.
    """
    if model is not None and shape is not None:
        raise click.UsageError(f"give --model {model} or --random-weights {shape}, not both")
    return measure_model(model, shape, engine_settings(settings), terminal=terminal, **settings)


def split_settings(settings: dict[str, Any], kind: type[Params]) -> tuple[Params, dict[str, Any]]:
    """Split a command's options into the request's parameters and the engine's settings. Raises click.UsageError."""
    engine = engine_settings(settings)
    with _as_usage_error():
        params = kind(**{name: settings[name] for name in options.given(settings)})
        check_form(params)
    return params, engine


def engine_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """Take the engine's settings out of a command's options. Raises click.UsageError for one out of range.

    Where they ask for several ranks, the command is run by these, and ends here.
    """
    names = {field.name for field in dataclasses.fields(EngineConfig)} - {"seed"}  # --seed is the request's
    engine = {name: value for name in names & settings.keys() if (value := settings.pop(name)) is not None}
    if settings.pop("no_prefix_caching"):
        engine["prefix_caching"] = False
    keys = {"speculative": "method", "draft_model": "model", "num_speculative_tokens": "num_speculative_tokens"}
    if given := {key: value for name, key in keys.items() if (value := settings.pop(name)) is not None}:
        if len(given.keys() & {"method", "model"}) != 1:
            wanted = "not both" if len(given) > 1 else "to have guesses that --num-speculative-tokens limits"
            raise click.UsageError(f"give --speculative ngram or --draft-model MODEL, {wanted}")
        if click.get_current_context().info_name == "beam-search":
            raise click.UsageError("beams have no guesses to verify: leave --speculative and --draft-model out")
        engine["speculative_config"] = given
    with _as_usage_error():
        spread_out(EngineConfig(**engine), engine, settings.pop("hostfile"))
    return engine


@contextmanager
def _as_usage_error() -> Iterator[None]:
    """Make a ValueError bad usage, of the options that have the names in its message."""
    try:
        yield
    except ValueError as error:
        context = click.get_current_context()
        names = options.option_names(context.command, context.params)
        raise click.UsageError(options.in_options(str(error), names)) from None


def main() -> NoReturn:
    """The console script."""
    cli.main()
