"""Commands on several ranks: they start the others, answer as one process does, and all of them end together."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from helpers.servers import wait_for
from helpers.stub_llm import assert_one_line, invoke, start

from mlx_paged.distributed.launch import Start, plan_starts, run_ranks

STORY = ("generate", "--raw", "--ignore-eos", "--temp", "0", "Once upon a time")
ENDS_S = 10


@contextmanager
def ranks(*args: str) -> Iterator[subprocess.Popen[bytes]]:
    """A command on two ranks."""
    process = start(*args, "--tensor-parallel-size", "2", stdin=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def children(process: int) -> list[int]:
    """The processes that a process has started: rank 1 and then rank 0."""
    listed = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    pairs = (line.split() for line in listed.splitlines())
    return [int(pid) for pid, parent in pairs if int(parent) == process]


def is_there(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize(("victim", "number"), [(0, signal.SIGKILL), (-1, signal.SIGKILL), (0, signal.SIGABRT)])
@pytest.mark.slow
def test_a_rank_that_dies_in_the_middle_ends_all_with_a_line(victim: int, number: int) -> None:
    with ranks(*STORY, "-m", "1500") as process:
        assert process.stdout is not None and process.stderr is not None
        begun = process.stdout.read(20)
        assert begun == b", there was a boy na"  # what one process writes
        pids = children(process.pid)
        assert len(pids) == 2
        os.kill(pids[victim], number)
        process.wait(ENDS_S)
        wait_for(lambda: not any(map(is_there, pids)), ENDS_S)
        said = process.stderr.read().decode()
        assert process.returncode == 1
        name = "rank 1 on 127.0.0.1" if victim == 0 else "rank 0"
        assert said.startswith(f"mlx-paged: {name} was ended by {signal.Signals(number).name}")
        assert said.count("\n") == 1


@pytest.mark.slow
def test_nothing_is_left_of_a_command_that_is_killed_itself() -> None:
    with ranks(*STORY, "-m", "1500") as process:
        assert process.stdout is not None
        assert process.stdout.read(5)
        pids = children(process.pid)
        process.kill()
        wait_for(lambda: not any(map(is_there, pids)), ENDS_S)


@pytest.mark.slow
def test_what_two_ranks_write_is_what_one_process_writes_and_their_memory_is_told_by_rank() -> None:
    with ranks(*STORY, "-m", "8", "--verbose") as process:
        out, said = process.communicate(timeout=300)
    assert out.decode() == invoke(*STORY, "-m", "8").stdout
    told = [line for line in said.decode().splitlines() if line.startswith("rank ")]
    assert [line.split("; weights")[0].split(": ", 1)[1] for line in told] == [
        f"layers 3, KV heads 1; {line.split('; ')[1]}" for line in told
    ]
    assert process.returncode == 0 and len(told) == 2


def test_what_goes_wrong_in_rank_0_is_told_once() -> None:
    with ranks("generate", "--model", "/nowhere", "hi") as process:
        out, said = process.communicate(timeout=120)
    assert (process.returncode, out) == (1, b"")
    assert said.startswith(b"mlx-paged: there is no folder '/nowhere'") and said.count(b"\n") == 1


@pytest.mark.parametrize(
    ("hosts", "message"),
    [
        ("[", "hosts.json is not JSON: Expecting value"),
        ([["127.0.0.1"]], """a host is {"ssh": NAME, "ips": [ADDRESS]}, got ['127.0.0.1']"""),
        ([{"ssh": "a"}, {"ssh": 5}], """a host is {"ssh": NAME, "ips": [ADDRESS]}, got {'ssh': 5}"""),
        ([{"ssh": "a", "ips": "192.0.2.1"}], "a host is"),
        (None, "hosts.json: a list of hosts is expected"),
        ({"backend": "ring"}, "hosts.json: a list of hosts is expected"),
        ({"hosts": [{"ssh": "a"}] * 2, "envs": ["A"]}, '"envs" is a list of texts like "NAME=VALUE", got [\'A\']'),
        ([], "--tensor-parallel-size=2, and hosts.json names 0 hosts"),
        ([{"ssh": "a", "ips": ["127.0.0.1"]}], "--tensor-parallel-size=2, and hosts.json names 1 hosts"),
        ([{"ssh": "a"}, {"ssh": "b"}], "mlx.launch: The ring backend requires IPs"),
        ({"backend": "mpi", "hosts": [{"ssh": "a"}, {"ssh": "b"}]}, "its backend is not one of those"),
        (
            [{"ssh": "a", "ips": ["192.0.2.1"]}, {"ssh": "b", "ips": ["192.0.2.2"]}],
            "none of its addresses is 192.0.2.1",
        ),
    ],
)
def test_a_file_of_hosts_that_is_wrong_is_refused_in_one_line(
    hosts: Any, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("hosts.json").write_text(hosts if isinstance(hosts, str) else json.dumps(hosts))
    result = invoke("generate", "--tensor-parallel-size", "2", "--hostfile", "hosts.json", "hi")
    assert_one_line(result, 2, message)


def test_hosts_without_ranks_are_refused(tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("[]")
    result = invoke("generate", "--hostfile", str(tmp_path / "hosts"), "hi")
    assert_one_line(result, 2, "--hostfile names the hosts of ranks: give --tensor-parallel-size, too")


def test_each_rank_is_started_on_its_host_with_what_mlx_needs(tmp_path: Path) -> None:
    hosts = [{"ssh": f"mac{i}", "ips": ["127.0.0.1" if i == 0 else f"192.0.2.{i}"]} for i in range(3)]
    (file := tmp_path / "hosts.json").write_text(json.dumps({"hosts": hosts, "envs": ["A=b"]}))
    starts = plan_starts(3, "size", file, ["run", "it"])
    assert all(isinstance(each, Start) for each in starts)
    assert [(each.rank, each.host, each.command) for each in starts] == [
        (i, f"mac{i}", ["run", "it"]) for i in range(3)
    ]
    addresses = json.loads(starts[0].files["MLX_HOSTFILE"])
    assert [ip.split(":")[0] for (ip,) in addresses] == ["127.0.0.1", "192.0.2.1", "192.0.2.2"]
    assert "A=b" in starts[2].env


@pytest.mark.parametrize(
    ("leader", "others", "ended"),
    [
        ("exit 0", ["exit 0"], (0, "")),
        ("exit 3", ["sleep 60"], (3, "")),
        ("sleep 60", ["echo mlx-paged: no memory >&2; exit 1"], (1, "rank 1 on 127.0.0.1: no memory")),
        ("sleep 60", ["exit 74", "exit 7"], (1, "rank 2 on 127.0.0.1: it ended with exit code 7")),
        ("kill -9 $$", ["exit 74", "exit 74"], (1, "rank 0 was ended by SIGKILL")),
        ("kill -11 $$", ["exit 74", "sleep 0.3; kill -TERM $$"], (1, "rank 2 on 127.0.0.1 was ended by SIGTERM")),
        ("echo it is so >&2; exit 1", ["echo it is so >&2; exit 1"], (1, "")),
    ],
)
def test_the_rank_that_ended_first_is_the_one_that_is_spoken_of(
    leader: str, others: list[str], ended: tuple[int, str]
) -> None:
    rest = [Start(i, "127.0.0.1", None, None, {}, [], ["bash", "-c", each]) for i, each in enumerate(others, start=1)]
    first = Start(0, "127.0.0.1", None, None, {"HOSTS": "{}"}, ["A=b"], [])
    checks = '[ "$A$MLX_RANK" = b0 ] && [ -f "$HOSTS" ] || exit 9'
    assert run_ranks([first, *rest], ["bash", "-c", f"{checks}; {leader}"]) == ended


def test_a_host_that_ssh_cannot_reach_is_told_of_with_the_command_that_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (ssh := tmp_path / "ssh").write_text("#!/bin/bash\nexit 255\n")
    ssh.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    starts = [Start(i, host, None, None, {}, [], []) for i, host in enumerate(("127.0.0.1", "mac1"))]
    said = "rank 1 on mac1: ssh can't run a command there: see what ssh -o BatchMode=yes mac1 true says"
    assert run_ranks(starts, ["sleep", "60"]) == (1, said)


def test_a_signal_that_ends_the_command_while_it_looks_at_hosts_is_not_taken_for_a_wrong_file(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from mlx._distributed_utils import launch

    monkeypatch.setattr(launch, "main", lambda: sys.exit(130))
    with pytest.raises(SystemExit) as caught:
        plan_starts(2, "size", None, ["run", "it"])
    assert caught.value.code == 130
