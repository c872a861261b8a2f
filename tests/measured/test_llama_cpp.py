"""llama.cpp beside this engine: it is given the same weights, and what its server streams is counted."""

from __future__ import annotations

import json
import stat
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from comparison import gguf_file
from comparison.gguf_file import write_gguf
from comparison.llama_cpp import LlamaCppSystem
from comparison.workloads import LlamaCpp, MlxLm, Task, paged, uniform
from helpers.run_benchmark import ROOT
from helpers.tiny_models import COMMON, make_model
from mlx.utils import tree_flatten
from mlx_lm.gguf import permute_weights, translate_weight_names

DEMO = ROOT / "models" / "demo"
SERVER = """
import argparse, http.server, json

parser = argparse.ArgumentParser()
for name in ("--port", "--log-file", "--parallel", "--ctx-size"):
    parser.add_argument(name)
options, _ = parser.parse_known_args()
with open(options.log_file, "w") as log:
    log.write("llama_kv_cache: CPU KV buffer size =    2.50 MiB\\nllama_kv_cache: CPU KV buffer size =     1.00 MiB\\n")
    log.write(f"sched_reserve: CPU compute buffer size = {int(options.ctx_size) * int(options.parallel)}.00 MiB\\n")

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert body["ignore_eos"] and body["stream"]
        self.do_GET()
        for i in range(0, body["n_predict"], 2):  # two tokens make a letter
            self.wfile.write(f'data: {{"content": "x", "stop": false}}\\n\\n'.encode())
        last = {"stop": True, "tokens_predicted": body["n_predict"] - (body["prompt"] == [13])}
        self.wfile.write(f"data: {json.dumps(last)}\\n\\n".encode())

http.server.ThreadingHTTPServer(("127.0.0.1", int(options.port)), Handler).serve_forever()
"""


def write_model(folder: Path, family: str, **changes: Any) -> dict[str, mx.array]:
    """A tiny random model as a folder, with the demo's tokenizer. Returns its weights."""
    model = make_model(family, vocab_size=1600, **changes)
    weights = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    config = COMMON | {"model_type": family, "vocab_size": 1600, "bos_token_id": 4, "eos_token_id": 4} | changes
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text((DEMO / "tokenizer.json").read_text())
    return weights


def test_llamas_weights_have_the_names_and_the_order_that_mlx_lm_gives_them(tmp_path: Path) -> None:
    weights = write_model(tmp_path, "llama", rope_theta=1e4)
    write_gguf(tmp_path, tmp_path / "model.gguf")
    written, metadata = mx.load(str(tmp_path / "model.gguf"), return_metadata=True)  # type: ignore[misc]
    heads, kv_heads = COMMON["num_attention_heads"], COMMON["num_key_value_heads"]
    expected = {}
    for name, array in weights.items():
        if "q_proj" in name or "k_proj" in name:
            array = permute_weights(array, heads, heads if "q_proj" in name else kv_heads)
        expected[translate_weight_names(name)] = array
    assert written.keys() == expected.keys()
    assert all(mx.array_equal(written[name], expected[name]) for name in expected)
    assert metadata["llama.attention.head_count_kv"].item() == kv_heads
    assert len(metadata["tokenizer.ggml.tokens"]) == 1600


def test_gemmas_norms_are_those_that_are_multiplied_with(tmp_path: Path) -> None:
    weights = write_model(tmp_path, "gemma3_text", rope_theta=1e6, sliding_window=8, sliding_window_pattern=6)
    write_gguf(tmp_path, tmp_path / "model.gguf")
    written, metadata = mx.load(str(tmp_path / "model.gguf"), return_metadata=True)  # type: ignore[misc]
    assert len(written) == len(weights)
    norm = "model.layers.1.self_attn.q_norm.weight"
    assert mx.array_equal(written["blk.1.attn_q_norm.weight"], weights[norm] + 1)
    assert mx.array_equal(written["blk.1.attn_q.weight"], weights["model.layers.1.self_attn.q_proj.weight"])
    assert metadata["gemma3.attention.sliding_window"].item() == 8


@pytest.fixture
def executable(tmp_path: Path) -> str:
    """A server that answers as llama.cpp's does."""
    file = tmp_path / "llama-server"
    file.write_text(f"#!{sys.executable}\n{SERVER}")
    file.chmod(file.stat().st_mode | stat.S_IEXEC)
    return str(file)


def test_what_its_server_streams_is_counted_by_what_it_says_at_the_end(executable: str, tmp_path: Path) -> None:
    tasks = [Task([1, 2, 3], 4), Task([5], 7, num_samples=2)]
    system = LlamaCppSystem(executable, tmp_path / "no.gguf", LlamaCpp(concurrency=2), tasks)
    memory = system.size_pool(tasks)
    assert (memory.peak_bytes, memory.waste) == (3.5 * 2**20, None)
    run = system.run(tasks)
    assert run.num_tokens == 4 + 2 * 7 and len(run.times) == 3
    assert run.peak_bytes == 3.5 * 2**20 + 2 * 2 * 9 * 2**20  # two slots for the longest, and a token more
    assert all(times.time_to_first_token > 0 and times.time_per_token > 0 for times in run.times)
    with pytest.raises(RuntimeError, match=r"llama\.cpp gave 2 tokens of 3"):
        system.run([Task([13], 3)])


def test_a_server_that_ends_is_told(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"llama\.cpp's server ended with exit code 1"):
        LlamaCppSystem("false", tmp_path / "no.gguf", LlamaCpp(), [Task([1], 1)])


def test_it_stands_beside_mlx_lm_with_as_many_at_once() -> None:
    (case,) = uniform(1)
    assert case.beside_llama_cpp().systems == [MlxLm(), paged(), LlamaCpp()]
    assert case._replace(systems=[paged()]).beside_llama_cpp().systems == [paged()]


def test_a_server_that_is_no_program_is_told_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf_file, "write_gguf", lambda *_: None)
    with pytest.raises(SystemExit, match=r"server\.py: --llama-server \./nope is no program: docs/benchmarks\.md has"):
        gguf_file.gguf_in(str(tmp_path), tmp_path, "server.py", "./nope")
