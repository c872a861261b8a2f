"""`mlx-paged doctor`: what is installed, what this machine is, and whether it computes what it should.

What loads MLX runs in a process of its own with a limit of time: a library that crashes, or a device that hangs, is a
line like any other.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import mlx_paged
from mlx_paged.cli import doctor_parts
from mlx_paged.cli.doctor_parts import Finding
from mlx_paged.cli.terminal import one_line
from mlx_paged.errors import EngineWarning

_LIMIT_S = 120.0  # of a part that has a process of its own; the first use of a GPU's kernels compiles them


def examine(*, prefix_cache_dir: str | None, as_json: bool) -> int:
    """Look at all parts, one after the other, and say what each is. Returns the exit code."""
    found: dict[str, Finding] = {}
    parts = {**doctor_parts.HERE, "folders": lambda: doctor_parts.folders(prefix_cache_dir)}
    for name in (*parts, *doctor_parts.APART):
        if name in parts:
            found[name] = _guarded(parts[name])
        elif name != "mlx" and found["mlx"].state == "wrong":
            found[name] = Finding("wrong", "needs mlx")
        else:
            found[name] = _guarded(partial(run_apart, name))
        if not as_json:
            sys.stdout.write(f"{found[name].state:<6} {name:<10} {found[name].line}\n")
            sys.stdout.flush()
    wrong = [name for name, finding in found.items() if finding.state == "wrong"]
    if as_json:
        report = {"ok": not wrong, "parts": {name: finding._asdict() for name, finding in found.items()}}
        sys.stdout.write(json.dumps(report) + "\n")
    else:
        sys.stdout.write(f"wrong: {', '.join(wrong)}\n" if wrong else "nothing is wrong\n")
    return 1 if wrong else 0


def _guarded(part: Callable[[], str | Finding]) -> Finding:
    """Examine a part. What it raises is what is wrong, what it warns of is noted."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", EngineWarning)
        try:
            result = part()
        except Exception as error:
            kind = "" if isinstance(error, ValueError | ImportError | OSError) and str(error) else type(error).__name__
            return Finding("wrong", one_line(": ".join(filter(None, (kind, str(error))))))
    state, line = ("ok", result) if isinstance(result, str) else result
    told = [str(each.message) for each in caught if issubclass(each.category, EngineWarning)]
    return Finding("note" if told and state == "ok" else state, one_line("; ".join([line, *told])))


def run_apart(name: str, limit_s: float = _LIMIT_S) -> Finding:
    """Examine a part in a process of its own, which is ended after `limit_s` seconds.

    Raises OSError if no process can be started.
    """
    root = str(Path(mlx_paged.__file__).parents[1])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))}
    code = f"from mlx_paged.cli import doctor; doctor.examine_apart({name!r})"
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", code], env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, encoding="utf-8", errors="replace",
    )  # fmt: skip
    try:
        printed, said = process.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired:
        return Finding("wrong", f"did not end within {limit_s:g} seconds, and was ended")
    finally:
        if process.poll() is None:
            process.kill()
            with suppress(subprocess.TimeoutExpired):
                process.communicate(timeout=5)
    with suppress(ValueError, IndexError, TypeError):
        return Finding(**json.loads(printed.splitlines()[-1]))
    with suppress(ValueError):
        return Finding("wrong", f"crashed: {signal.Signals(-process.returncode).name}; {_last_line(said)}")
    return Finding("wrong", f"ended with exit code {process.returncode}; {_last_line(said)}")


def examine_apart(name: str) -> None:
    """Examine a part in this process, and print what was found as JSON."""
    finding = _guarded(doctor_parts.APART[name])
    print(f"\n{json.dumps(finding._asdict())}", flush=True)
    os._exit(0)  # what a library does at the end of a process is not the question


def _last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return one_line(lines[-1]) if lines else "it said nothing"
