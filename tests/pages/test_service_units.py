"""The units that start a server with launchd and with systemd: they parse, and start what they should."""

from __future__ import annotations

import plistlib
import re
import shutil
import subprocess
from configparser import ConfigParser
from pathlib import Path

import pytest

from mlx_paged.cli.main import cli

EXAMPLES = Path(__file__).parents[2] / "examples"
UNIT = EXAMPLES / "systemd" / "mlx-paged.service"
PAGE = EXAMPLES.parent / "docs" / "server.md"


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A home with a program where the units look for it, which prints how it was called."""
    program = tmp_path / "mlx-paged" / ".venv" / "bin" / "mlx-paged"
    for folder in (program.parent, tmp_path / "Library" / "Logs"):
        folder.mkdir(parents=True)
    program.write_text('#!/bin/sh\necho "$@"\n')
    program.chmod(0o755)
    return tmp_path


def of_launchd() -> dict[str, object]:
    return plistlib.loads((EXAMPLES / "launchd" / "mlx-paged.serve.plist").read_bytes())


def of_systemd() -> ConfigParser:
    parser = ConfigParser(interpolation=None)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read(UNIT)
    return parser


def test_both_start_the_server_with_a_file_of_options(home: Path) -> None:
    called = f"serve --config {home}/.config/mlx-paged/serve.toml\n"
    subprocess.run(of_launchd()["ProgramArguments"], env={"HOME": str(home)}, check=True)  # type: ignore[call-overload]
    assert (home / "Library" / "Logs" / "mlx-paged.log").read_text() == called
    command = of_systemd()["Service"]["ExecStart"].replace("%h", str(home)).split()
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == called


def test_the_file_of_options_is_one_that_serve_takes() -> None:
    context = cli.commands["serve"].make_context("serve", ["--config", str(EXAMPLES / "serve.toml")])
    assert (context.params["model"], context.params["kv_cache_memory"]) == ("qwen3", "4GB")


def test_both_wait_longer_than_running_requests_get_and_start_it_again_only_when_it_broke() -> None:
    (drain,) = (option for option in cli.commands["serve"].params if option.name == "drain_timeout")
    plist, service = of_launchd(), of_systemd()["Service"]
    assert min(plist["ExitTimeOut"], int(service["TimeoutStopSec"])) > drain.default  # type: ignore[operator,type-var]
    assert plist["KeepAlive"] == {"SuccessfulExit": False} and service["Restart"] == "on-failure"
    assert service["RestartPreventExitStatus"] == "2"


def test_systemd_finds_nothing_wrong_with_its_unit(home: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("there is no systemd-analyze here")
    unit = home / UNIT.name
    unit.write_text(UNIT.read_text().replace("%h", str(home)))
    done = subprocess.run(["systemd-analyze", "--man=no", "verify", unit], capture_output=True, text=True)
    about_it = [line for line in done.stderr.splitlines() if UNIT.stem in line]
    assert (done.returncode, about_it) == (0, []), done.stderr


def test_the_page_of_the_server_leads_to_each() -> None:
    files = [EXAMPLES / "serve.toml", *(EXAMPLES / "launchd").iterdir(), *(EXAMPLES / "systemd").iterdir()]
    linked = re.findall(r"\]\(\.\./examples/([\w./-]+)\)", PAGE.read_text())
    assert {str(file.relative_to(EXAMPLES)) for file in files} <= set(linked)
