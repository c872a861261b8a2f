"""The clients that are tried: what is installed of each, and how it is set up and run.

Libraries have a driver in clients/. Agents get the settings in examples/agents/, as they stand.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = ROOT / "examples" / "agents"
DRIVERS = Path(__file__).resolve().parent / "clients"


@dataclass(frozen=True)
class Client:
    """A client as people install it."""

    packages: tuple[str, ...]
    """What is installed; the version of the first is told."""
    set_up: Callable[[Path, Path], None] | None = None
    """Of an agent: puts its settings into a home folder, given where it is installed, and that folder."""
    command: tuple[str, ...] = ()
    """Of an agent: what runs it once, with a task, in the folder where it is to work."""
    again: tuple[str, ...] = ()
    """Of an agent that can go on with its last session: what does so, with another task."""
    has_tools: bool = True
    """Whether the agent runs tools."""
    environment: dict[str, str] = field(default_factory=dict)
    driver: str = ""
    """Of a library: the file that drives it."""

    @property
    def is_python(self) -> bool:
        """Whether it comes from PyPI."""
        return self.driver.endswith(".py") or "pip" in self.packages

    def install(self, folder: Path) -> None:
        """Install it if it is not installed. Raises CalledProcessError."""
        if (folder / "installed").exists():
            return
        folder.mkdir(parents=True, exist_ok=True)
        if self.is_python:
            subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True)
            subprocess.run([folder / "venv/bin/python", "-m", "pip", "install", "--quiet", *self.packages], check=True)
        else:
            (folder / "package.json").write_text('{"private": true, "type": "module"}')
            quiet = ("--no-audit", "--no-fund", "--loglevel=error", "--ignore-scripts")
            subprocess.run(["npm", "install", *quiet, *self.packages], cwd=folder, check=True)
        (folder / "installed").touch()

    def version(self, folder: Path) -> str:
        """The version that is installed."""
        name = _bare(self.packages[0])
        if self.is_python:
            code = f"import importlib.metadata as m; print(m.version({name!r}))"
            run = subprocess.run([folder / "venv/bin/python", "-c", code], capture_output=True, text=True, check=True)
            return run.stdout.strip()
        return str(json.loads((folder / "node_modules" / name / "package.json").read_text())["version"])

    def driver_command(self, folder: Path) -> list[str]:
        """What drives a library. A module of JavaScript finds packages from where it lies, so drivers are copied."""
        shutil.copytree(DRIVERS, folder, dirs_exist_ok=True)
        program = str(folder / "venv/bin/python") if self.is_python else "node"
        return [program, str(folder / self.driver)]


def _bare(package: str) -> str:
    """A package's name without version and extras."""
    return package[:1] + package[1:].split("@")[0].split("[")[0].split(">")[0].split("<")[0]


def _put(name: str, *path: str) -> Callable[[Path, Path], None]:
    def put(folder: Path, home: Path) -> None:
        target = home.joinpath(*path)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(SETTINGS / name, target)

    return put


TASK = "Run the command."
NEXT_TASK = "Say it again."
_EXEC_COMMAND = """
import subprocess

def exec_command(cmd: str) -> str:
    return subprocess.run(cmd, shell=True, capture_output=True, text=True).stdout
"""

CLIENTS = {
    # Of npm's libraries the newest major versions that run on Node 20.
    "openai": Client(("openai@6",), driver="openai.mjs"),
    "anthropic": Client(("@anthropic-ai/sdk",), driver="anthropic.mjs"),
    "ai": Client(("ai@6", "@ai-sdk/openai-compatible@2", "@ai-sdk/anthropic@3"), driver="ai.mjs"),
    "litellm": Client(("litellm", "tenacity"), driver="litellm_driver.py"),
    "openai-agents": Client(("openai-agents",), driver="openai_agents_driver.py"),
    "pydantic-ai": Client(("pydantic-ai-slim[openai,anthropic]",), driver="pydantic_ai_driver.py"),
    "langchain": Client(("langchain-openai", "langchain-anthropic"), driver="langchain_driver.py"),
    "instructor": Client(("instructor",), driver="instructor_driver.py"),
    "codex": Client(
        ("@openai/codex",),
        _put("codex.toml", ".codex", "config.toml"),
        ("node_modules/.bin/codex", "exec", "--skip-git-repo-check",
         "--dangerously-bypass-approvals-and-sandbox", TASK),
        ("node_modules/.bin/codex", "exec", "resume", "--last", "--skip-git-repo-check",
         "--dangerously-bypass-approvals-and-sandbox", NEXT_TASK),
        environment={"OPENAI_API_KEY": "any"},
    ),
    "claude": Client(
        ("@anthropic-ai/claude-code@latest",),  # it brings its own runtime: which Node there is does not matter
        lambda folder, home: _link("claude", folder.glob("node_modules/@anthropic-ai/claude-code-*/claude"), home),
        ("bash", str(SETTINGS / "claude-code.sh"), "--print", "--dangerously-skip-permissions", TASK),
        ("bash", str(SETTINGS / "claude-code.sh"), "--continue", "--print",
         "--dangerously-skip-permissions", NEXT_TASK),
        environment={"IS_SANDBOX": "1"},
    ),
    "pi": Client(
        ("@mariozechner/pi-coding-agent",),
        _put("pi.json", ".pi", "agent", "models.json"),
        ("node_modules/.bin/pi", "--provider", "mlx-paged", "--model", "qwen3", "--print", TASK),
        ("node_modules/.bin/pi", "--provider", "mlx-paged", "--model", "qwen3", "--continue", "--print", NEXT_TASK),
    ),
    "opencode": Client(
        ("opencode-ai",),
        _put("opencode.json", ".config", "opencode", "opencode.json"),
        ("node_modules/opencode-linux-x64/bin/opencode", "run", TASK),
        ("node_modules/opencode-linux-x64/bin/opencode", "run", "--continue", NEXT_TASK),
    ),
    "cline": Client(
        ("cline",),
        lambda folder, home: _link("cline", folder.glob("node_modules/.bin/cline"), home),
        ("bash", "-c", f"bash {SETTINGS / 'cline.sh'} && cline --json '{TASK}'"),
    ),
    "continue": Client(
        ("@continuedev/cli",),
        command=("node_modules/.bin/cn", "--print", "--auto", "--config", str(SETTINGS / "continue.yaml"), TASK),
        again=("node_modules/.bin/cn", "--print", "--auto", "--resume",
               "--config", str(SETTINGS / "continue.yaml"), NEXT_TASK),
        environment={"CONTINUE_TELEMETRY_ENABLED": "0"},
    ),
    "llm": Client(
        ("llm", "pip"),
        _put("llm.yaml", ".config", "io.datasette.llm", "extra-openai-models.yaml"),
        ("venv/bin/llm", "prompt", "--model", "qwen3", "--key", "any", "--functions", _EXEC_COMMAND, TASK),
    ),
    "aider": Client(
        ("aider-chat", "pip"),
        lambda folder, home: _set_up_aider(folder, home),
        ("venv/bin/aider", "--yes-always", "--no-git", "--edit-format", "whole", "--message", TASK, "marker.txt"),
        has_tools=False,
    ),
}  # fmt: skip


def _link(name: str, programs: Iterable[Path], home: Path) -> None:
    """Put the one program where a shell finds it."""
    (program,) = programs
    (home / "bin").mkdir(parents=True, exist_ok=True)
    (home / "bin" / name).symlink_to(program)


def _set_up_aider(folder: Path, home: Path) -> None:
    """Put its settings in place. It has no tools: its system text picks the chain that writes the file."""
    _put("aider.conf.yml", ".aider.conf.yml")(folder, home)
    model = "- name: openai/qwen3\n  system_prompt_prefix: 'SCRIPT:whole_file '\n"
    (home / ".aider.model.settings.yml").write_text(model)


def chosen(names: list[str]) -> dict[str, Client]:
    """The clients of these names; without names, all. Exits with a line if there is no such client."""
    if unknown := [name for name in names if name not in CLIENTS]:
        raise SystemExit(f"no such client: {', '.join(unknown)}; there are {', '.join(CLIENTS)}")
    return {name: CLIENTS[name] for name in names or CLIENTS}


if __name__ == "__main__":
    for name, client in chosen(sys.argv[2:]).items():
        try:
            client.install(Path(sys.argv[1]) / name)
        except subprocess.CalledProcessError as error:
            print(f"{name}: can't be installed: {error}", file=sys.stderr)
