"""Exit codes, and what a person is told when something is wrong; most with a stub model, the last with real ones."""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.budget import LONG
from helpers.stub_llm import Run, StubLLM, assert_one_line, invoke, start

from mlx_paged.errors import ModelError
from mlx_paged.models.hub import DEMO_FOLDER

DEMO_WEIGHTS = (DEMO_FOLDER / "model.safetensors").read_bytes()


def test_an_unknown_command_is_bad_usage_and_none_shows_the_help(run: Run) -> None:
    assert_one_line(run("generat"), 2, "generat", "--help")
    result = run()
    assert result.exit_code == 2 and "generate" in result.stderr and "chat" in result.stderr


@pytest.mark.parametrize(
    "error", [ModelError("no such model"), ImportError("install mlx-paged[cpu]"), ValueError("too small")]
)
def test_a_model_that_cannot_be_had_is_one_line(error: Exception, run: Run) -> None:
    def make(*_: object, **__: object) -> StubLLM:
        raise error

    run.make = make
    for command in (["generate", "Hi"], ["chat"]):
        assert_one_line(run(*command), 1, str(error))


def test_a_surprise_is_one_line_and_its_traceback_is_for_verbose(run: Run) -> None:
    def before_output(self: StubLLM) -> None:
        raise RuntimeError("two\nlines")

    run.stub.before_output = before_output
    assert_one_line(run("generate", "Hi"), 1, "unexpected RuntimeError: two lines", "--verbose")
    result = run("generate", "--verbose", "Hi")
    assert result.exit_code == 1 and "Traceback" in result.stderr
    assert result.stderr.splitlines()[-1] == "mlx-paged: unexpected RuntimeError: two lines"


def test_quiet_is_stronger_than_verbose_but_failures_are_told(run: Run) -> None:
    assert run("generate", "--quiet", "--verbose", "Hi").stderr == ""
    assert_one_line(run("generate", "-q", ""), 1, "the prompt is empty")


def test_ctrl_c_while_the_model_loads_exits_130(run: Run) -> None:
    def make(*_: object, **__: object) -> StubLLM:
        raise KeyboardInterrupt

    run.make = make
    result = run("generate", "Hi")
    assert result.exit_code == 130 and result.stderr.strip() == ""


def test_ctrl_c_while_the_command_line_itself_is_imported_exits_130() -> None:
    code = """
import sys
class Interrupt:
    def find_spec(self, name, *_):
        if name == "mlx_paged.cli.options":
            raise KeyboardInterrupt
sys.meta_path.insert(0, Interrupt())
from mlx_paged.__main__ import run
run()
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (130, "", "\n")


def test_a_mistyped_model_is_one_line() -> None:
    assert_one_line(invoke("generate", "--model", "qwen22", "Hi"), 1, "did you mean")


@pytest.mark.parametrize("content", [b"", b"not weights", DEMO_WEIGHTS[:-1]])
def test_broken_weights_are_one_line_that_names_the_file(content: bytes, tmp_path: Path) -> None:
    for path in DEMO_FOLDER.glob("*.json"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "model.safetensors").write_bytes(content)
    assert_one_line(invoke("generate", "--model", str(tmp_path), "Hi"), 1, "model.safetensors")


def test_an_unknown_architecture_is_one_line_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "perceptron"}')
    (tmp_path / "model.safetensors").write_bytes(DEMO_WEIGHTS)
    (tmp_path / "tokenizer.json").write_text("{}")
    assert_one_line(invoke("generate", "--model", str(tmp_path), "Hi"), 1, "perceptron")


@pytest.mark.parametrize(
    "args",
    ["--help", "--version", "generate --help", "chat --help", "beam-search --help", "generate --top-p 7 Hi",
     "beam-search --beam-width 0 Hi"],
)  # fmt: skip
def test_help_and_usage_errors_import_nothing_heavy(args: str) -> None:
    code = (
        "import sys\nfrom mlx_paged.cli.main import main\ntry: main()\nexcept SystemExit: print('LOADED', *sys.modules)"
    )
    command = [sys.executable, "-c", code, *args.split()]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    modules = {name.split(".")[0] for name in result.stdout.split("LOADED ")[1].split()}
    assert "click" in modules
    assert not modules & {"mlx", "mlx_lm", "transformers", "numpy", "huggingface_hub", "rich", "torch", "tokenizers"}


@pytest.mark.parametrize("args", ["generate --model qwen22 Hi", "chat --model qwen22", "bench --model qwen22",
                                  "serve --model qwen22", "generate --model ./nowhere Hi",
                                  "generate --draft-model qwen22 Hi", "bench --draft-model ./nowhere -p 8 -g 8",
                                  "serve --draft-model qwen22", "generate --regex [a Hi"])  # fmt: skip
def test_what_is_mistyped_is_told_before_anything_heavy_is_imported(args: str) -> None:
    code = (
        "import sys\nfrom mlx_paged.cli.main import main\ntry: main()\nexcept SystemExit: print('LOADED', *sys.modules)"
    )
    command = [sys.executable, "-c", code, *args.split()]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    modules = {name.split(".")[0] for name in result.stdout.split("LOADED ")[1].split()}
    assert result.stderr.count("\n") == 1 and not modules & {"mlx", "mlx_lm", "transformers", "torch", "tokenizers"}


@pytest.mark.parametrize("command", [["chat"], ["generate", "--system", "Be brief.", "Hi"]])
def test_a_model_without_the_chat_template_that_is_needed_is_told_before_its_weights_are_loaded(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def make_runner(*_: object) -> None:
        raise AssertionError("the weights are loaded")

    monkeypatch.setattr("mlx_paged.llm.ModelRunner", make_runner)
    shutil.copytree(DEMO_FOLDER, tmp_path / "model", ignore=shutil.ignore_patterns("*.py", "*.jinja"))
    config = json.loads((tmp_path / "model" / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (tmp_path / "model" / "tokenizer_config.json").write_text(json.dumps(config))
    assert_one_line(invoke(*command, "--model", str(tmp_path / "model")), 1, "chat template")


def test_what_makes_mlx_faster_is_told_after_a_command_that_succeeded(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlx_paged.cli.command.advice", lambda: "install OpenBLAS")
    assert run("generate", "-v", "Hi").stderr.endswith("install OpenBLAS\n")
    assert "install" not in run("generate", "-v", "-q", "Hi").stderr + run("generate", "-v", "").stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, *([signal.SIGHUP] if LONG else [])])
def test_signals_end_a_real_run_with_130_and_no_traceback_and_leave_no_files(number: int, tmp_path: Path) -> None:
    process = start("generate", "--ignore-eos", "--max-tokens", "2000", "--swap-space", str(tmp_path), "Once")
    assert process.stdout is not None
    first = process.stdout.read(10)  # it is in the middle of its answer
    assert list(tmp_path.iterdir())
    process.send_signal(number)
    _, err = process.communicate()
    assert (process.returncode, len(first), err) == (130, 10, b"")
    assert not list(tmp_path.iterdir())


def test_a_reader_that_leaves_ends_the_run_quietly() -> None:
    process = start("generate", "--ignore-eos", "--max-tokens", "300", "Once")
    assert process.stdout is not None and process.stderr is not None
    assert process.stdout.read(1)
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() == 0
