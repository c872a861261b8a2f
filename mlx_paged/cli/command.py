"""What all commands have in common: prompts in the order in which they were typed, and failures in one line."""

from __future__ import annotations

import os
import sys
import traceback
from typing import Any, NoReturn

import click

from mlx_paged.cli import options
from mlx_paged.cli.loading import ending_signals
from mlx_paged.cli.ranks import lost_rank
from mlx_paged.cli.terminal import INTERRUPTED, Terminal, one_line
from mlx_paged.cpu.blas import advice


class EngineCommand(click.Command):
    """A command whose object is its Terminal, and whose failures are one line.

    ValueError, ImportError and OSError speak for themselves.
    """

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse the command line, and put prompts and files of prompts into one list, `sources`, as they were typed."""
        order = options.typed_order(self, args)
        rest = super().parse_args(ctx, args)
        if "more_prompts" in ctx.params and not ctx.resilient_parsing:
            values = {name: iter(ctx.params.pop(name)) for name in ("prompts", "more_prompts", "files")}
            ctx.params["sources"] = [next(values[name]) for name in order]
        return rest

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; returns its exit code."""
        names = options.option_names(self, ctx.params)
        terminal = Terminal(verbose=ctx.params.pop("verbose"), quiet=ctx.params.pop("quiet"), option_names=names)
        ctx.obj = terminal
        try:
            code = super().invoke(ctx)
            if code == 0 and "mlx_paged.llm" in sys.modules and (line := advice()) is not None:
                terminal.note(line)
            return code
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except BrokenPipeError:  # the reader of a pipe has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        except Exception as error:
            if (lost := lost_rank(error)) is not None:
                return lost
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
            with ending_signals():
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
