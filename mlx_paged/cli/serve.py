"""The command `serve`: a model behind HTTP, from its options to the end of the process."""

from __future__ import annotations

import ipaddress
import logging
import math
import os
import re
import socket
import tomllib
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlx_paged.cli import options
from mlx_paged.cli.loading import find_models, loading
from mlx_paged.cli.terminal import INTERRUPTED, Terminal
from mlx_paged.config import EngineConfig, parse_memory

if TYPE_CHECKING:
    from mlx_paged.async_llm import AsyncLLM

LOG = logging.getLogger("mlx_paged.server")

KEY_VARIABLE = "MLX_PAGED_API_KEY"
_HOST = re.compile(r"\*|[^\s/:\[\]]+|(?:[0-9a-fA-F]*:){2,}[0-9a-fA-F]*")  # "*", a name, an address
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^\s/?#@]+")
LEVELS = ("debug", "info", "warning", "error")


def _read_config(ctx: click.Context, param: click.Parameter, path: Path | None) -> None:
    """Make the settings of a TOML file the defaults of the options that have their names."""
    if path is None:
        return
    try:
        settings = tomllib.loads(path.read_text("utf-8-sig"))
    except (ValueError, OSError) as error:
        raise click.UsageError(f"--config: {path} can't be read: {error}") from None
    names = {name.lstrip("-").replace("-", "_"): each for each in ctx.command.params for name in each.opts}
    defaults = {}
    for key, value in settings.items():
        option = names.get(key.replace("-", "_"))
        if option is None or option.name in (None, "config"):
            raise click.UsageError(f"--config: {path} sets {key!r}, and serve has no option --{key}")
        defaults[str(option.name)] = [value] if option.multiple and not isinstance(value, list) else value
    ctx.default_map = defaults


serve_options: options.Option = options.options(
    options.text("--config", metavar="FILE", expose_value=False, is_eager=True, callback=_read_config,
                 type=click.Path(exists=True, dir_okay=False, path_type=Path),
                 help="TOML whose keys are these options' names; what is typed wins."),
    options.text("--host", default="127.0.0.1", help="Address to listen at. Another than this machine's own needs a "
                 "key. Default: 127.0.0.1."),
    click.option("--port", type=click.IntRange(0, 65535), metavar="N", default=8000, help="Default: 8000; 0: any."),
    options.text("--served-model-name", "names", multiple=True, metavar="NAME",
                 help="What clients call the model; repeated: aliases. Default: as it is called here."),
    options.text("--api-key-file", metavar="FILE", type=click.Path(exists=True, dir_okay=False, path_type=Path),
                 help=f"A key a line, one of which clients must send. Or one in {KEY_VARIABLE}."),
    click.option("--max-waiting", type=click.IntRange(0), metavar="N", default=256,
                 help="Requests that may wait; more are told to come back (429). Default: 256."),
    options.text("--max-body", metavar="SIZE", default="32MiB", help="Largest request. Default: 32MiB."),
    click.option("--drain-timeout", type=click.FloatRange(0), metavar="SECONDS", default=30.0,
                 help="What running requests get at the end. Default: 30."),
    click.option("--idle-unload", type=click.FloatRange(0, min_open=True), metavar="SECONDS",
                 help="Unload the model when nobody has asked for so long; the next request loads it. Default: never."),
    options.text("--cors-origin", "origins", multiple=True, metavar="ORIGIN",
                 help='Web pages that may ask: https://example.org, or "*". Repeatable. Default: none.'),
    options.text("--allowed-host", "hosts", multiple=True, metavar="NAME",
                 help="Other names of this server in requests' Host header. Repeatable."),
    click.option("--default-max-tokens", type=click.IntRange(1), metavar="N",
                 help="Of an answer whose client does not say. Default: what fits; of completions 16."),
    click.option("--max-thinking-tokens", type=click.IntRange(0), metavar="N",
                 help="Most that an answer thinks, of models that mark it. Default: as clients say."),
    options.flag("--log-prompts", help="Let the log have what clients write."),
    click.option("--log-level", type=click.Choice(LEVELS), default="info", help="Default: info."),
)  # fmt: skip


def serve_model(
    model: str | None,
    engine: dict[str, Any],
    terminal: Terminal,
    *,
    host: str,
    port: int,
    names: Sequence[str],
    api_key_file: Path | None,
    max_waiting: int,
    max_body: str,
    drain_timeout: float,
    idle_unload: float | None,
    origins: Sequence[str],
    hosts: Sequence[str],
    default_max_tokens: int | None,
    max_thinking_tokens: int | None,
    log_prompts: bool,
    log_level: str,
) -> int:
    """Load a model and serve it until a signal ends that. Returns the exit code."""
    _require_sense(names, hosts, origins, idle_unload, drain_timeout)
    if idle_unload is not None and EngineConfig(**engine).num_ranks > 1:
        raise click.UsageError("--idle-unload gives back the memory of one process: leave it out with several ranks")
    keys = _read_keys(api_key_file)
    if not keys and not _is_loopback(host):
        raise click.UsageError(
            f"--host {host} is open to others: give --api-key-file or {KEY_VARIABLE}, or listen at 127.0.0.1"
        )
    try:
        body_size = parse_memory(max_body, name="--max-body")
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    try:
        import prometheus_client  # noqa: F401
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise ImportError(f"serve needs {error.name}: pip install 'mlx-paged[server]'") from None
    with loading(terminal):
        find_models(model, engine)
    from mlx_paged import LLM, AsyncLLM  # before whatever else imports mlx: it sees to MLX's BLAS
    from mlx_paged.server.answer_parts import require_readable
    from mlx_paged.server.guard import LOOPBACK, Access
    from mlx_paged.server.lifetime import Ending, serve
    from mlx_paged.server.service import ServerOptions

    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=log_level.upper())
    for noisy in ("uvicorn", "httpx", "httpcore", "huggingface_hub", "filelock"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    called = list(names) or [_name_of(model)]
    served = ServerOptions(
        called,
        default_max_tokens=default_max_tokens,
        max_thinking_tokens=max_thinking_tokens,
        max_body=body_size,
        drain_timeout_s=drain_timeout,
        idle_unload_s=idle_unload,
        log_prompts=log_prompts,
        log_matches=terminal.verbose,
    )
    access = Access((*LOOPBACK, *map(str.lower, (host, *hosts))), tuple(origins), keys)
    with closing(_listen(host, port)) as listener:
        address = listener.getsockname()
        url = f"http://{'[' + host + ']' if ':' in host else host}:{address[1]}"

        def before_weights(llm: LLM) -> None:
            require_readable(llm.tokenizer)

        def load() -> AsyncLLM:
            llm = AsyncLLM.from_loader(lambda: LLM.for_requests(model, before_weights, **engine))
            llm.max_waiting = max_waiting
            return llm

        with loading(terminal):
            llm = load()
        _log_abilities(llm, max_thinking_tokens)

        def say_ready() -> None:
            if not terminal.quiet:
                key, memory = "the key" if keys else "any", "; ".join(llm.memory.splitlines())  # a line of each rank
                terminal.answer(f"{called[0]} is served at {url}/v1; {memory}\n")
                terminal.answer(f"OPENAI_BASE_URL={url}/v1 ANTHROPIC_BASE_URL={url} model={called[0]} key={key}\n")

        ending = serve(llm, load, served, access, listener, say_ready)
    if ending is Ending.BROKEN:
        terminal.failure("the engine broke: see the log")
    return {Ending.DRAINED: 0, Ending.CUT: INTERRUPTED, Ending.BROKEN: 1}[ending]


def _require_sense(names: Sequence[str], hosts: Sequence[str], origins: Sequence[str], *seconds: float | None) -> None:
    """Raise UsageError for names, hosts, origins and times that nothing could match."""
    if not all(name.strip() for name in names):
        raise click.UsageError("--served-model-name is empty: give the name that clients call the model by")
    for host in hosts:
        if not _HOST.fullmatch(host):
            raise click.UsageError(f"--allowed-host {host!r} is no name as my-mac.local, without a port")
    for origin in origins:
        if origin != "*" and not _ORIGIN.fullmatch(origin):
            raise click.UsageError(
                f'--cors-origin {origin!r} is neither "*" nor as https://example.org, without a path'
            )
    if any(math.isnan(each) for each in seconds if each is not None):
        raise click.UsageError("--idle-unload and --drain-timeout take seconds, and nan is no number")


def _log_abilities(llm: AsyncLLM, max_thinking_tokens: int | None) -> None:
    """Log what clients and options may ask of this model in vain."""
    tokenizer = llm.tokenizer
    if not llm.knows_tools:
        LOG.info("the chat template knows no tools: the model is not told of them unless tool_choice asks for a call")
    elif not tokenizer.has_tool_calling:
        LOG.info("how this model calls tools is not known: unless tool_choice asks for a call, its calls are text")
    if max_thinking_tokens is not None and not tokenizer.has_thinking:
        LOG.warning("--max-thinking-tokens changes nothing: this model does not mark its thinking")


def _read_keys(path: Path | None) -> tuple[bytes, ...]:
    try:
        lines = [] if path is None else path.read_text("utf-8-sig").splitlines()
    except (UnicodeDecodeError, OSError) as error:
        raise click.UsageError(f"--api-key-file: {path} can't be read: {error}") from None
    keys = [line.strip() for line in (*lines, os.environ.get(KEY_VARIABLE, "")) if line.strip()]
    if path is not None and not any(line.strip() for line in lines):
        raise click.UsageError(f"--api-key-file: {path} has no key in it")
    return tuple(key.encode() for key in keys)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _listen(host: str, port: int) -> socket.socket:
    """Take the port before the model is loaded in vain. Raises OSError in one line."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise OSError(f"can't listen at {host}, --port {port}: {error.strerror or error}") from None
    return listener


def _name_of(model: str | None) -> str:
    """What a model is called: never a path."""
    if model is None:
        return "demo"
    return Path(model).resolve().name if Path(model).exists() else model
