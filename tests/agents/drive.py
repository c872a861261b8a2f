"""Serves the scripted model, runs each client against it, and tells of each in one line what became of it.

Run by run.sh, in a network namespace of its own.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from pydoc_data.topics import topics

from clients import ROOT, Client, chosen

sys.path.insert(0, str(ROOT / "tests"))
from helpers.scripted_model import make_scripted_model

MODEL = "qwen3"  # as the settings in examples/agents have it
PORTS = {"BASE_URL": 8000, "BUSY_URL": 8001}
ANSWER = "All done: the tool said so."
BLOCK = 16  # tokens: what is cached are whole ones
SECONDS = 600  # for a client: on a loaded machine the prompts of agents take minutes


@contextmanager
def serving(model: Path, log: Path, port: int, *options: str) -> Iterator[None]:
    """Serve the model on a port."""
    serve = [sys.executable, "-m", "mlx_paged", "serve", "--model", str(model), "--served-model-name", MODEL]
    with log.open("w") as output:
        arguments = [*serve, "--port", str(port), *options]
        server = subprocess.Popen(arguments, cwd=ROOT, stdout=output, stderr=output)
    try:
        while not _answers(port):
            if server.poll() is not None:
                raise SystemExit(f"the server has ended: {log.read_text()}")
            time.sleep(0.1)
        yield
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(60)


def _answers(port: int) -> bool:
    try:
        return bool(urllib.request.urlopen(f"http://127.0.0.1:{port}/health").status == 200)
    except OSError:
        return False


def metric(name: str) -> float:
    """The sum of a metric over its labels."""
    with urllib.request.urlopen(f"http://127.0.0.1:{PORTS['BASE_URL']}/metrics") as response:
        lines = response.read().decode().splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(name))


def drive(client: Client, folder: Path, home: Path) -> str:
    """Run a client. Returns what is worth telling. Raises AssertionError, or what subprocess does, if it fails."""
    work = home / "work"
    work.mkdir(parents=True)
    urls = {name: f"http://127.0.0.1:{port}" for name, port in PORTS.items()}
    path = f"{home / 'bin'}:{os.environ['PATH']}"
    kept = {"PATH": path, "HOME": str(home), "TERM": "dumb", "MODEL": MODEL, "LANG": "C.UTF-8"}
    environment = kept | urls | client.environment

    def run(command: Sequence[str]) -> tuple[str, float, float]:
        """Run a program. Returns what it says, and of how many tokens in its prompts how many were cached."""
        queries, hits = metric("vllm:prefix_cache_queries_total"), metric("vllm:prefix_cache_hits_total")
        with (home / "out").open("w") as output:
            subprocess.run(
                [str(folder / command[0]) if "/" in command[0] else command[0], *command[1:]],
                cwd=work, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
                timeout=SECONDS, check=True,
            )  # fmt: skip
        told = (home / "out").read_text()
        return told, metric("vllm:prefix_cache_queries_total") - queries, metric("vllm:prefix_cache_hits_total") - hits

    if client.driver:
        run(client.driver_command(folder))
        return ""
    if client.set_up is not None:
        client.set_up(folder, home)
    said, queries, hits = run(client.command)
    marker = work / "marker.txt"
    assert marker.exists() and marker.read_text() == "marker-7\n", "it has not run its tool: there is no marker.txt"
    if not client.has_tools:
        return f"prompt of {queries:.0f} tokens"
    assert ANSWER in said, "it has not shown the answer that comes after the tool's result"
    assert hits + 2 * BLOCK > 0.4 * queries, f"its tool's result follows no cached prompt: {hits:.0f} of {queries:.0f}"
    told = f"{hits:.0f} of {queries:.0f} prompt tokens were cached"
    if client.again:
        said, queries, hits = run(client.again)
        assert ANSWER in said, "it has not shown the answer to its second task"
        assert hits + 2 * BLOCK > 0.9 * queries, (
            f"its second task follows no cached prompt: {hits:.0f} of {queries:.0f}"
        )
        told += f", then {hits:.0f} of {queries:.0f}"
    return told


def main() -> int:
    """Drive the clients that are asked for. Returns 1 if one fails."""
    installed, names = Path(sys.argv[1]), sys.argv[2:]
    clients = chosen(names)
    failed = False
    with tempfile.TemporaryDirectory() as temporary:
        scratch = Path(temporary)
        model = make_scripted_model(scratch / "model", texts=list(topics.values()), vocab_size=16_000,
                                    pipe=" | tee marker.txt")  # fmt: skip
        options = ("--num-kv-blocks", "6000")
        busy = ("--num-kv-blocks", "200", "--max-num-seqs", "1", "--max-waiting", "0")
        with (
            serving(model, scratch / "serve.log", PORTS["BASE_URL"], *options),
            serving(model, scratch / "busy.log", PORTS["BUSY_URL"], *busy),
        ):
            for name, client in clients.items():
                folder, home = installed / name, scratch / name
                try:
                    version = client.version(folder)
                    told = drive(client, folder, home)
                    print(f"{name} {version} ok {told}".rstrip(), flush=True)
                except (AssertionError, OSError, subprocess.SubprocessError) as error:
                    failed = True
                    out = home / "out"
                    last = out.read_text().strip()[-3000:] if out.exists() else ""
                    print(f"{name} failed: {error}", flush=True)
                    print(last, file=sys.stderr, flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
