"""Start the processes of a command that runs on several ranks, with mlx.launch's machinery, and end them together.

This process runs no model: rank 0 is a child that has its terminal, and prints what the command prints; the other
ranks, here or on other hosts, follow it. Whichever of them dies, all end.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple
from unittest import mock

from mlx_paged.config import excerpt
from mlx_paged.errors import one_line

LIFELINE, STDERR = "MLX_PAGED_LIFELINE", "MLX_PAGED_STDERR"
"""Where rank 0 finds the descriptors of a pipe that ends with this process, and of the stderr of the command."""
LOST = 74
"""The exit code of a rank that can't go on because another one has gone: what to say of it is the other's."""
_COME_LATER = {LOST: 2, -signal.SIGSEGV: 1, -signal.SIGABRT: 1, -signal.SIGPIPE: 1}
"""How likely an end is the consequence of another rank's: MLX does not always survive that either."""
_HOST = '{"ssh": NAME, "ips": [ADDRESS]}'
_SSH_FAILED = 255  # ssh's own exit code, and mlx.launch keeps it from saying why
_BY_THEMSELVES_S = 5.0  # that the others have to end after rank 0
_FIRST_WORD_S = 2.0  # that a rank has to say what went wrong, when another has died
_GRACE_S = 3.0  # between TERM and KILL


class Start(NamedTuple):
    """How mlx.launch would start a rank: what its RemoteProcess takes."""

    rank: int
    host: str
    python: str | None
    cwd: str | None
    files: dict[str, str]
    """Contents of files, by the variables that say where these are."""
    env: list[str]
    command: list[str]


def plan_starts(size: int, setting: str, hostfile: Path | None, command: Sequence[str]) -> list[Start]:
    """Ask mlx.launch how it would start a command on so many ranks. Raises ValueError for a file that is wrong."""
    from mlx._distributed_utils import launch

    hosts = [] if hostfile is None else _read_hosts(hostfile)
    if hostfile is not None and len(hosts) != size:
        raise ValueError(f"{setting}={size}, and {hostfile} names {len(hosts)} hosts: it takes one for each rank")
    starts: list[Start] = []

    def take(_: Any, arguments: Sequence[tuple[tuple[Any, ...], Any]], __: bool) -> None:
        starts.extend(Start(*each) for each, _ in arguments)

    where = ["-n", str(size)] if hostfile is None else ["--hostfile", str(hostfile)]
    ports = free_ports(size + 1)
    arguments = ["mlx.launch", *where, "--starting-port", str(ports), "--nccl-port", str(ports + size), "--", *command]
    said = io.StringIO()
    with mock.patch.multiple(launch, _launch_with_io=take, launch_mpi=lambda *_: None):
        try:
            with mock.patch.object(sys, "argv", arguments), contextlib.redirect_stderr(said):
                launch.main()
        except SystemExit:
            if not (lines := said.getvalue().strip().splitlines()):  # a signal that ends this process
                raise
            raise ValueError(f"mlx.launch: {lines[-1].removeprefix('mlx.launch: error: ')}") from None
    if not starts:
        raise ValueError(f"{hostfile}: its backend is not one of those that mlx.launch starts by itself: take ring")
    if hosts and not _is_here(hosts[0]):
        raise ValueError(
            f"{hostfile}: the first host has to be the machine that runs the command, and none of its addresses is "
            f"{hosts[0]['ips'][0]}"
        )
    return starts


def _read_hosts(hostfile: Path) -> list[dict[str, Any]]:
    """Return the hosts in a file that mlx.launch is to read. Raises ValueError for one of another form."""
    try:
        told = json.loads(hostfile.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{hostfile} is not JSON: {one_line(error)}") from None
    hosts, envs = (told.get("hosts"), told.get("envs", [])) if isinstance(told, dict) else (told, [])
    if not isinstance(hosts, list):
        raise ValueError(f'{hostfile}: a list of hosts is expected, or an object with one as "hosts"; each is {_HOST}')
    for host in hosts:
        addresses = host.get("ips", []) if isinstance(host, dict) else None
        if not isinstance(addresses, list) or not all(isinstance(each, str) for each in (host.get("ssh"), *addresses)):
            raise ValueError(f"{hostfile}: a host is {_HOST}, got {excerpt(host)}")
    if not isinstance(envs, list) or not all(isinstance(each, str) and "=" in each for each in envs):
        raise ValueError(f'{hostfile}: "envs" is a list of texts like "NAME=VALUE", got {excerpt(envs)}')
    return hosts


def _is_here(host: dict[str, Any]) -> bool:
    """Whether a host is this machine."""
    for address in host.get("ips", [])[:1]:
        with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as tried:
            try:
                tried.bind((address, 0))
            except (OSError, UnicodeError):
                return False
    return True


def free_ports(count: int) -> int:
    """Return the first of so many ports in a row that nobody listens at now."""
    for _ in range(100):
        with contextlib.ExitStack() as stack:
            first = stack.enter_context(socket.socket())
            first.bind(("127.0.0.1", 0))
            start: int = first.getsockname()[1]
            try:
                for port in range(start + 1, start + count):
                    stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
            except (OSError, OverflowError):
                continue
            return start
    raise OSError(f"there are no {count} free ports in a row")


def run_ranks(starts: Sequence[Start], command: Sequence[str]) -> tuple[int, str]:
    """Run a command as rank 0, and the other ranks beside it, until it ends or one of them dies.

    command: rank 0's; the others' are in `starts`. Returns the exit code, and what is to be said of a rank that died;
    rank 0 has said itself what went wrong with it.
    """
    others = [_Other(start) for start in starts[1:]]
    try:
        with _leader(starts[0], command) as leader, _passing_on(leader):
            while (code := leader.poll()) is None and not any(other.code for other in others):
                time.sleep(0.02)
            if code == 0:
                _wait_for(lambda: all(other.code is not None for other in others), _BY_THEMSELVES_S)
                return 0, ""

            # Whichever came first, others end because of it, rank 0 too: it may have said what went wrong itself. What
            # is seen first need not have been first, so an end that comes of another's waits for that one.
            def is_explained() -> bool:
                codes = [leader.poll(), *(other.code for other in others)]
                return codes[0] is not None and any(each and each not in _COME_LATER for each in codes)

            _wait_for(is_explained, _FIRST_WORD_S)
            code = leader.poll()
            if code is not None and code >= 0 and code != LOST:
                return code, ""
            return 1, _first_to_end(code, others)
    finally:
        for other in others:
            other.end()


def _first_to_end(code: int | None, others: Sequence[_Other]) -> str:
    """Say what became of the rank of whose end the others' ends are consequences. code: rank 0's."""
    ends = [(_COME_LATER.get(other.code, 0), other.last_words) for other in others if other.code]
    if code == LOST:
        ends.append((_COME_LATER[LOST] + 1, lambda: "rank 0 lost the others"))
    elif code is not None:
        ends.append((_COME_LATER.get(code, 0), lambda: f"rank 0 was ended by {_signal_name(-code)}"))
    return min(ends, key=lambda end: end[0])[1]()


class _Other:
    """The process of another rank than 0."""

    def __init__(self, start: Start) -> None:
        from mlx._distributed_utils.launch import RemoteProcess

        self.name, self._host = f"rank {start.rank} on {start.host}", start.host
        self._remote = RemoteProcess(*start)
        self._process: subprocess.Popen[bytes] = self._remote.process
        self._lines: deque[str] = deque(maxlen=20)
        streams = (self._process.stdout, True), (self._process.stderr, False)
        self._readers = [threading.Thread(target=self._read, args=each, daemon=True) for each in streams]
        for reader in self._readers:
            reader.start()

    @property
    def code(self) -> int | None:
        """Its exit code, negative for a signal; None while it runs."""
        return self._process.poll()

    def last_words(self) -> str:
        """Say in one line what became of it."""
        for reader in self._readers:
            reader.join(1)
        code = self.code
        words = [line for line in self._lines if line.strip() and not line.startswith("[ring]")]
        if code is not None and code < 0:
            hint = " (as a system does that has no memory left)" if code == -signal.SIGKILL else ""
            return f"{self.name} was ended by {_signal_name(-code)}{hint}"
        if code == _SSH_FAILED and not words and self._host != "127.0.0.1":
            return f"{self.name}: ssh can't run a command there: see what ssh -o BatchMode=yes {self._host} true says"
        said = words[-1].strip().removeprefix("mlx-paged: ") if words else f"it ended with exit code {code}"
        return f"{self.name}: {said}"

    def end(self) -> None:
        """End it, if it has not ended, and what it has left."""
        with contextlib.suppress(Exception):
            self._process.stdin.close()  # type: ignore[union-attr]  # its lifeline
            self._process.terminate()
        _wait_for(lambda: self.code is not None, _GRACE_S)
        if self.code is None:
            self._process.kill()
        with contextlib.suppress(Exception):
            self._remote.terminate()  # on the other host, too

    def _read(self, stream: Any, is_stdout: bool) -> None:
        for line in iter(stream.readline, b""):
            text = self._remote.preprocess_output(line.decode(errors="replace"), is_stdout) if is_stdout else None
            self._lines.append(line.decode(errors="replace") if text is None else text)


@contextlib.contextmanager
def _leader(start: Start, command: Sequence[str]) -> Iterator[subprocess.Popen[bytes]]:
    """Run rank 0 with this process's terminal, and end it with the block. What MLX says of lost peers is dropped."""
    alive, lifeline = os.pipe()
    stderr = os.dup(2)
    with tempfile.TemporaryDirectory() as folder:
        env = os.environ | dict(each.split("=", 1) for each in start.env)
        for name, content in start.files.items():
            (path := Path(folder) / name).write_text(content)
            env[name] = str(path)
        env |= {"MLX_RANK": "0", LIFELINE: str(alive), STDERR: str(stderr)}
        leader = subprocess.Popen(command, env=env, stderr=subprocess.PIPE, pass_fds=(alive, stderr))
        os.close(alive)
        reader = threading.Thread(target=_pass_lines, args=(leader.stderr, stderr), daemon=True)
        reader.start()
        try:
            yield leader
        finally:
            if leader.poll() is None:
                leader.terminate()
                _wait_for(lambda: leader.poll() is not None, _GRACE_S)
                leader.kill()
            leader.wait()
            reader.join(1)
            os.close(lifeline)


def _pass_lines(stream: Any, stderr: int) -> None:
    """Pass on what libraries say, but for MLX's remarks on each try to reach a rank that has gone."""
    for line in iter(stream.readline, b""):
        if not line.startswith(b"[ring]"):
            os.write(stderr, line)


@contextlib.contextmanager
def _passing_on(leader: subprocess.Popen[bytes]) -> Iterator[None]:
    """Pass signals on to rank 0, but for a terminal's Ctrl-C, which it gets as well."""

    def pass_on(number: int, _: FrameType | None) -> None:
        if not (number == signal.SIGINT and _is_in_foreground()):
            leader.send_signal(number)

    numbers = signal.SIGINT, signal.SIGTERM, signal.SIGHUP
    handlers = {number: signal.signal(number, pass_on) for number in numbers}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _is_in_foreground() -> bool:
    """Whether a terminal sends its Ctrl-C to this process and its children."""
    try:
        with open("/dev/tty") as terminal:
            return os.tcgetpgrp(terminal.fileno()) == os.getpgrp()
    except OSError:
        return False


def hold_lifeline(descriptor: int) -> None:
    """End this process as soon as the one that started it has ended, however that came."""

    def wait() -> None:
        while os.read(descriptor, 1024):
            pass
        os._exit(LOST)

    threading.Thread(target=wait, daemon=True).start()


def _wait_for(condition: Any, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
