"""`mlx-paged inspect`: its numbers, its picture, and what bad input is told."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import click.testing
import mlx.core as mx
import pytest
from helpers.hub_stub import Hub, serve
from helpers.tiny_models import make_model
from mlx.utils import tree_flatten
from mlx_lm.utils import quantize_model

from mlx_paged.cache.block_files import VERSION
from mlx_paged.cli.main import cli
from mlx_paged.runner import memory_plan as memory_plan

ROOT = Path(__file__).parents[2]
CONFIG = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 5,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "vocab_size": 97,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}
PER_TOKEN = 5 * 2 * 2 * 16 * 2  # layers x K and V x KV heads x head dimension x bytes of float16
WEIGHTS = 2 * (97 * 64 + 5 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 96 + 2 * 64) + 64)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model folder with a configuration and no weights."""
    made = tmp_path / "tiny"
    made.mkdir()
    (made / "config.json").write_text(json.dumps(CONFIG))
    return made


def run(*args: object) -> click.testing.Result:
    return click.testing.CliRunner().invoke(cli, ["inspect", *map(str, args)])


def report(*args: object) -> dict[str, Any]:
    result = run(*args, "--json")
    assert (result.exit_code, result.stdout.count("\n")) == (0, 1), result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


# -- numbers ------------------------------------------------------------------------------------------------------


def test_json_has_every_number_of_a_hand_computed_case(folder: Path) -> None:
    args = ("--lengths", "100,2000", "--context", 2048, "--memory", "1GB", "--dtype", "float16")
    room = 10**9 - WEIGHTS
    reserved, padded, blocks, needed = (PER_TOKEN * tokens for tokens in (4096, 4096, 112 + 2000, 2100))
    assert report(folder, *args) == {
        "model": str(folder),
        "family": "llama",
        "dtype": "float16",
        "kv_cache_dtype": None,
        "max_context": 2048,
        "context": 2048,
        "block_size": 16,
        "layers": [
            {
                "num_layers": 5,
                "num_kv_heads": 2,
                "key_dim": 16,
                "value_dim": 16,
                "value_in_key": False,
                "element_bytes": 2,
                "codes": None,
                "window": None,
                "chunked": False,
                "bytes_per_token": PER_TOKEN,
                "bytes_per_block": PER_TOKEN * 16,
            }
        ],
        "bytes_per_token": PER_TOKEN,
        "state_bytes": 0,
        "state_tokens": 0,
        "device": "given",
        "memory_bytes": 10**9,
        "weight_bytes": WEIGHTS,
        "weights": {"float16": WEIGHTS},
        "weights_are": "described",
        "unknown_quantization": None,
        "lengths": [100, 2000],
        "lengths_are": "given",
        "needed_bytes": needed,
        "ways": {
            "reserved": {"bytes": reserved, "waste": pytest.approx(1 - 2100 / 4096), "fit": room * 2 // reserved},
            "padded": {"bytes": padded, "waste": pytest.approx(1 - 2100 / 4096), "fit": room * 2 // padded},
            "blocks": {"bytes": blocks, "waste": pytest.approx(1 - 2100 / 2112), "fit": room * 2 // blocks},
        },
    }


def test_text_shows_the_arithmetic(folder: Path) -> None:
    result = run(folder, "--lengths", "100,2000", "--memory", "1GB", "--dtype", "float16", "--block-size", 32)
    assert result.exit_code == 0
    assert "5 layers x 2 KV heads x (16 K + 16 V) x 2 bytes = 640 bytes" in result.stdout
    assert "32 tokens x 640 bytes = 20,480 bytes" in result.stdout
    assert "given 1 GB - weights about 321 KB (float16) = 1 GB" in result.stdout
    assert "2 requests of 100 to 2,000 tokens, mean 1,050" in result.stdout
    rows = {line.split("  ")[0]: line.split()[-2:] for line in result.stdout.splitlines() if "%" in line}
    assert rows["2,048 tokens reserved"][0] == rows["mlx-lm's padded batch"][0] == "48.7%"
    blocks = (4 + 63) * 32
    assert rows["blocks of 32"] == [f"{1 - 2100 / blocks:.1%}", f"{(10**9 - WEIGHTS) * 2 // (blocks * 640):,}"]
    assert "Kwon et al. 2023" in result.stdout
    assert "\x1b" not in result.stdout


def test_window_layers_are_named_with_their_window(folder: Path) -> None:
    config = CONFIG | {
        "model_type": "gemma3_text", "num_hidden_layers": 6, "num_key_value_heads": 1, "head_dim": 16,
        "sliding_window": 64, "sliding_window_pattern": 3,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    result = run(folder, "--dtype", "float32")
    assert "2 layers x 1 KV head x (16 K + 16 V) x 4 bytes = 256 bytes" in result.stdout
    assert "4 layers with a window of 64 tokens x 1 KV head x (16 K + 16 V) x 4 bytes = 512 bytes" in result.stdout


def test_without_a_model_it_is_the_demo_model_and_16_typical_requests(demo_folder: Path) -> None:
    found = report()
    config = json.loads((demo_folder / "config.json").read_text())
    assert found["max_context"] == config["max_position_embeddings"]
    assert found["context"] == min(8192, config["max_position_embeddings"])
    assert (len(found["lengths"]), found["lengths_are"]) == (16, "typical")
    assert found["ways"]["blocks"]["waste"] < 0.04
    assert found == report()
    assert "the demo model" in run().stdout


def test_concurrency_repeats_given_lengths_and_draws_typical_ones(folder: Path) -> None:
    assert report(folder, "--lengths", "7,9", "--concurrency", 5)["lengths"] == [7, 9, 7, 9, 7]
    typical = report(folder, "--concurrency", 40, "--context", 300)["lengths"]
    assert len(typical) == 40
    assert max(typical) == 300


def test_without_memory_it_plans_for_this_machine(folder: Path) -> None:
    limit, device = memory_plan.device_limit()
    found = report(folder)
    assert (found["memory_bytes"], found["device"]) == (limit, device)
    assert report(folder, "--memory", "50%")["memory_bytes"] == limit // 2
    if mx.default_device() == mx.cpu:
        assert found["dtype"] == "float32"


def test_weights_that_do_not_fit_are_said_not_to(folder: Path) -> None:
    result = run(folder, "--memory", "1KB")
    assert result.exit_code == 0
    assert "the weights alone do not fit" in result.stdout
    assert [way["fit"] for way in report(folder, "--memory", "1KB")["ways"].values()] == [0, 0, 0]


def test_weights_that_are_in_the_folder_are_measured_in_the_types_that_they_will_have(folder: Path) -> None:
    config = CONFIG | {"tie_word_embeddings": False, "quantization": {"group_size": 32, "bits": 4}}
    model = make_model("llama", num_hidden_layers=5, dtype=mx.float16)
    model, config = quantize_model(model, config, 32, 4)
    weights = dict(tree_flatten(model.parameters()))
    (folder / "config.json").write_text(json.dumps(config))
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    packed = sum(array.nbytes for array in weights.values() if array.dtype == mx.uint32)
    others = sum(array.nbytes for array in weights.values() if array.dtype == mx.float16)
    for dtype, factor in (("float16", 1), ("float32", 2)):
        found = report(folder, "--dtype", dtype)
        assert found["weights"] == {"uint32": packed, dtype: factor * others}
        assert (found["weight_bytes"], found["weights_are"]) == (packed + factor * others, "measured")
    words = run(folder, "--dtype", "float32").stdout
    assert f"weights {(packed + 2 * others) / 1e3:.3g} KB ({packed / 1e3:.3g} KB uint32, " in words
    (folder / "model.safetensors").write_bytes(b"")
    assert "model.safetensors is not a whole safetensors file" in run(folder).stderr


def test_saved_prompts_are_listed_by_model(tmp_path: Path) -> None:
    names = ("llama-1/a", 500, 0), ("llama-1/b", 700, 86400), ("mamba-2/0-a", 800, 43200), ("mamba-2/state-a", 1000, 0)
    for path, size, used in names:
        file = tmp_path / f"{path.replace('1/', f'1{VERSION}/')}.safetensors"
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(bytes(size))
        os.utime(file, (used, used))
    result = run("--prefix-cache-dir", tmp_path)
    assert result.exit_code == 0
    first, second, total = result.stdout.splitlines()
    day = time.strftime("%Y-%m-%d %H:%M", time.localtime(86400))
    assert first == f"llama-1  2 blocks  1.2 KB  last used {day}"
    assert second.startswith("mamba-2  1 block, 1 state  1.8 KB") and second.endswith("of another version: not used")
    assert total == f"2 models, 3 KB in {tmp_path}"
    listed = json.loads(run("--prefix-cache-dir", tmp_path, "--json").stdout)
    assert [*listed[0].values()] == ["llama-1", 2, 0, 1200, 86400.0, True]
    assert run("--prefix-cache-dir", tmp_path / "mamba-2" / "0-a.safetensors").exit_code == 2
    result = run("--prefix-cache-dir", tmp_path / "nowhere")
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert "No such file or directory" in result.stderr


@pytest.mark.parametrize("args", [["llama"], ["--blocks"], ["--context", "9"], ["--lengths", "9"], ["--svg", "x.svg"]])
def test_a_list_takes_no_option_that_it_would_ignore(args: list[str], tmp_path: Path) -> None:
    result = run("--prefix-cache-dir", tmp_path, *args)
    name = args[0] if args[0].startswith("--") else "MODEL"
    assert (result.exit_code, result.stdout) == (2, "")
    assert f"--prefix-cache-dir lists what is saved there and takes no {name}" in result.stderr


def test_a_quantisation_that_is_not_counted_is_named(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps(CONFIG | {"quantization_config": {"quant_method": "awq"}}))
    assert "without their awq quantisation" in run(folder).stdout


def test_of_a_repository_only_the_configuration_is_downloaded(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    (folder / "model.safetensors").write_bytes(b"not needed")
    (folder / "tokenizer.json").write_text("{}")
    with serve(Hub({"org/tiny": folder})) as hub:
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        assert report("org/tiny", "--dtype", "float16")["bytes_per_token"] == PER_TOKEN
        fetched = [path.rsplit("/", 1)[-1] for path in hub.requests if "/resolve/" in path]
        assert set(fetched) == {"config.json"}
        # What is there now does not pass for the whole model.
        generated = click.testing.CliRunner().invoke(cli, ["generate", "--model", "org/tiny", "hello"])
    assert generated.exit_code == 1
    assert any("model.safetensors" in path for path in hub.requests)


# -- bad input ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--context", "4096"], "--context 4096 is more than the 2048 tokens"),
        (["--context", "0"], "--context must be at least 1"),
        (["--concurrency", "0"], "--concurrency must be at least 1"),
        (["--concurrency", "2000000"], "more than 1,000,000 requests"),
        (["--block-size", "-3"], "--block-size must be at least 1"),
        (["--lengths", "12,abc"], "whole numbers with commas"),
        (["--lengths", ""], "whole numbers with commas"),
        (["--lengths", "5,0"], "--lengths must be at least 1"),
        (["--lengths", "5,3000"], "3000 tokens is more than the context of 2048"),
        (["--lengths", "5,300", "--context", "299"], "300 tokens is more than the context of 299"),
        (["--memory", "lots"], "memory size 'lots'"),
        (["--dtype", "int4"], "--dtype must be one of float32"),
        (["--svg", "picture.svg"], "--svg saves what --blocks draws"),
        (["--model", "llama"], "give the model once"),
        (["--blocks"], "takes no MODEL"),
    ],
)
def test_bad_usage_is_one_line_and_exit_code_2(args: list[str], said: str, folder: Path) -> None:
    result = run(folder, *args)
    assert (result.exit_code, result.stdout) == (2, "")
    assert said in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "args", [["--json"], ["--context", "9"], ["--concurrency", "3"], ["--memory", "1GB"], ["--dtype", "float16"]]
)
def test_a_picture_takes_no_option_that_it_would_ignore(args: list[str]) -> None:
    result = run("--blocks", *args)
    assert (result.exit_code, result.stdout) == (2, "")
    assert f"takes no {args[0]}" in result.stderr


# -- the picture --------------------------------------------------------------------------------------------------


def test_blocks_draws_shared_forked_cached_and_free_blocks_the_same_each_time() -> None:
    result = run("--blocks")
    assert result.exit_code == 0
    assert result.stdout == run("--blocks").stdout
    for word in ("request 2", "request 3", "beam 1", "beam 4", "shared by", "cached", "free", "without sharing"):
        assert word in result.stdout
    assert "request 1 " not in result.stdout  # it has ended


@pytest.mark.parametrize("lengths", ["1", "1,1", "1000", "16,16,16", "5,900,33,7"])
@pytest.mark.parametrize("block_size", [1, 5, 16, 128])
def test_any_prompts_and_block_size_can_be_drawn(lengths: str, block_size: int) -> None:
    result = run("--blocks", "--lengths", lengths, "--block-size", block_size)
    assert result.exit_code == 0
    assert f"blocks of {block_size} tokens" in result.stdout
    assert f"{int(lengths.split(',')[-1]) + 24:,} tokens" in result.stdout  # each beam after 24 steps


def test_svg_saves_the_picture(tmp_path: Path) -> None:
    target = tmp_path / "pool.svg"
    assert run("--blocks", "--svg", target).exit_code == 0
    assert "beam" in target.read_text(encoding="utf-8")


def test_an_svg_that_cannot_be_written_and_too_many_tokens_are_one_line(tmp_path: Path) -> None:
    result = run("--blocks", "--svg", tmp_path / "nowhere" / "pool.svg")
    assert (result.exit_code, result.stderr.count("\n")) == (1, 1)
    result = run("--blocks", "--lengths", "999999999")
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)


def test_the_picture_needs_no_mlx_and_no_colors(monkeypatch: pytest.MonkeyPatch) -> None:
    code = (
        "import sys; sys.argv = ['mlx-paged', 'inspect', '--blocks']\n"
        "from mlx_paged.cli.main import cli\n"
        "try: cli.main()\n"
        "except SystemExit as error: sys.exit(error.code or any(name.startswith('mlx.') for name in sys.modules))\n"
    )
    monkeypatch.setenv("FORCE_COLOR", "1")
    colored = _python(code)
    assert (colored.returncode, b"\x1b[" in colored.stdout) == (0, True)
    monkeypatch.setenv("NO_COLOR", "1")
    plain = _python(code)
    assert b"38;2;" not in plain.stdout
    assert b"48;2;" not in plain.stdout


@pytest.mark.parametrize("args", [["--blocks"], ["--memory", "1GB"]])
def test_a_reader_who_has_seen_enough_is_no_failure(args: list[str]) -> None:
    command = [sys.executable, "-m", "mlx_paged", "inspect", *args]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout and process.stderr
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 0


def _python(code: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=False)
