"""Adapters that mlx-lm trained, on models with a paged cache: its tokens, and what is said of folders without one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from helpers.stub_llm import assert_one_line, invoke
from helpers.tiny_models import make_model, unpaged_greedy
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import linear_to_lora_layers, load_adapters

from mlx_paged import LLM, AsyncLLM, ModelError, SamplingParams
from mlx_paged.errors import one_line
from mlx_paged.models import loading

PROMPT = [5, 17, 60, 3, 44, 8, 31]
LORA = {"rank": 4, "scale": 2.0, "dropout": 0.5}
GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
POOL: dict[str, Any] = {"block_size": 4, "num_kv_blocks": 32, "max_num_batched_tokens": 5}


def write_adapter(folder: Path, model: nn.Module, kind: str = "lora", num_layers: int = 2, **lora: Any) -> Path:
    """Save an adapter of random weights for `model`, which is changed, as mlx-lm's training does."""
    folder.mkdir(exist_ok=True)
    config = {"fine_tune_type": kind, "num_layers": num_layers, "lora_parameters": LORA | lora}
    linear_to_lora_layers(model, num_layers, LORA | lora, use_dora=kind == "dora")
    mx.random.seed(3)
    added = {
        name: array + mx.random.normal(array.shape)
        for name, array in tree_flatten(model.parameters())
        if name.endswith((".lora_a", ".lora_b", ".m"))
    }
    mx.save_safetensors(str(folder / "adapters.safetensors"), added)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def quantised(family: str) -> nn.Module:
    model = make_model(family)
    nn.quantize(model, group_size=32, bits=4)
    return model


def tokens_of(llm: LLM) -> list[int]:
    return llm.generate([PROMPT], GREEDY)[0].outputs[0].token_ids


@pytest.fixture
def demo_adapter(tmp_path: Path) -> Path:
    return write_adapter(tmp_path / "adapter", loading.load(None, None).model)


@pytest.mark.parametrize("make", [make_model, quantised])
@pytest.mark.parametrize(
    ("family", "kind"), [("llama", "lora"), ("llama", "dora"), ("gemma3_text", "lora"), ("mixtral", "lora")]
)
def test_an_adapter_gives_the_tokens_that_it_gives_in_mlx_lm(
    make: Callable[[str], nn.Module], family: str, kind: str, tmp_path: Path
) -> None:
    folder = write_adapter(tmp_path / "adapter", make(family), kind)
    with_adapter = load_adapters(make(family), str(folder))
    with_adapter.eval()
    expected = unpaged_greedy(with_adapter, PROMPT, 8).token_ids
    assert expected != unpaged_greedy(make(family), PROMPT, 8).token_ids
    assert tokens_of(LLM.from_model(make(family), adapter_path=folder, **POOL)) == expected


def test_weights_that_were_trained_as_a_whole_take_the_place_of_the_models_own(tmp_path: Path) -> None:
    trained = make_model("llama", seed=5)
    mx.save_safetensors(str(tmp_path / "adapters.safetensors"), dict(tree_flatten(trained.parameters())))
    (tmp_path / "adapter_config.json").write_text(json.dumps({"fine_tune_type": "full", "num_layers": -1}))
    expected = unpaged_greedy(trained, PROMPT, 8).token_ids
    assert tokens_of(LLM.from_model(make_model("llama"), **POOL)) != expected
    assert tokens_of(LLM.from_model(make_model("llama"), adapter_path=tmp_path, **POOL)) == expected


def test_every_way_to_an_llm_takes_an_adapter(demo_adapter: Path) -> None:
    expected = tokens_of(LLM.from_model(load_adapters(loading.load(None, None).model.eval(), str(demo_adapter)).eval()))
    assert tokens_of(LLM(**POOL)) != expected
    assert tokens_of(LLM(adapter_path=str(demo_adapter), **POOL)) == expected
    assert tokens_of(LLM.for_requests(None, lambda _: [(PROMPT, GREEDY)], adapter_path=demo_adapter)) == expected
    serving = AsyncLLM(adapter_path=demo_adapter, **POOL)
    assert serving.memory
    serving._thread.close()


def test_the_command_line_takes_an_adapter(demo_adapter: Path) -> None:
    args = ("generate", "--raw", "-m", "8", "--ignore-eos", "-q", "Once upon a time")
    plain, adapted = invoke(*args), invoke(*args, "--adapter-path", str(demo_adapter))
    assert (plain.exit_code, adapted.exit_code) == (0, 0)
    assert plain.stdout != adapted.stdout
    assert_one_line(invoke(*args, "--adapter-path", str(demo_adapter / "none")), 2, "--adapter-path", "none")
    (demo_adapter / "adapters.safetensors").unlink()
    assert_one_line(invoke(*args, "--adapter-path", str(demo_adapter)), 1, str(demo_adapter), "adapters.safetensors")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_an_adapter_gets_the_type_that_was_asked_for(dtype: str, demo_adapter: Path) -> None:
    model = loading.load(None, dtype, demo_adapter).model
    found = {array.dtype for _, array in tree_flatten(model.parameters())}
    assert found == {getattr(mx, dtype)}


def test_saved_prompts_are_those_of_an_adapter_with_its_weights_and_its_scale(tmp_path: Path) -> None:
    def fingerprint(adapter: Path | None) -> str:
        return LLM.from_model(make_model("llama"), adapter_path=adapter, **POOL)._runner.fingerprint()

    adapter = write_adapter(tmp_path / "one", make_model("llama"))
    seen = [fingerprint(None), fingerprint(adapter)]
    assert fingerprint(adapter) == seen[1]
    seen.append(fingerprint(write_adapter(tmp_path / "rescaled", make_model("llama"), scale=2.5)))
    weights = mx.load(str(adapter / "adapters.safetensors"))
    assert isinstance(weights, dict)
    name = next(name for name in weights if name.endswith("lora_b"))
    weights[name] = weights[name] + 1
    mx.save_safetensors(str(adapter / "adapters.safetensors"), weights)
    seen.append(fingerprint(adapter))
    assert len(set(seen)) == 4


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def lose_half(folder: Path) -> None:
    weights = mx.load(str(folder / "adapters.safetensors"))
    assert isinstance(weights, dict)
    mx.save_safetensors(str(folder / "adapters.safetensors"), dict(list(weights.items())[1:]))


def write_as_peft_does(folder: Path) -> None:
    (folder / "adapters.safetensors").rename(folder / "adapter_model.safetensors")


BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no folder": (shutil.rmtree, "there is no adapter folder"),
    "no config": (lambda folder: (folder / "adapter_config.json").unlink(), "it lacks adapter_config.json"),
    "no weights": (lambda folder: (folder / "adapters.safetensors").unlink(), "it lacks adapters.safetensors"),
    "PEFT's": (write_as_peft_does, "PEFT"),
    "no JSON": (lambda folder: (folder / "adapter_config.json").write_text("{"), "can't be read as JSON"),
    "a list": (lambda folder: (folder / "adapter_config.json").write_text("[]"), "should hold a JSON object"),
    "no scale": (lambda folder: change_config(folder, lora_parameters={"rank": 4, "dropout": 0}), "numbers for scale"),
    "no parameters": (lambda folder: change_config(folder, lora_parameters=None), "numbers for rank, scale, dropout"),
    "no layers": (lambda folder: change_config(folder, num_layers="all"), "num_layers, a whole number"),
    "other layers": (lambda folder: change_config(folder, num_layers=1), "such"),
    "too few": (lose_half, "lacks 1 of"),
    "half a file": (
        lambda folder: (folder / "adapters.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{"), "can't be read",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", BROKEN)
def test_a_folder_without_a_whole_adapter_is_named_in_one_line(what: str, tmp_path: Path) -> None:
    damage, words = BROKEN[what]
    folder = write_adapter(tmp_path / "adapter", make_model("llama"))
    damage(folder)
    with pytest.raises(ModelError) as caught:
        LLM.from_model(make_model("llama"), adapter_path=folder, **POOL)
    message = str(caught.value)
    assert str(folder) in message and words in message and "\n" not in message


def test_an_adapter_of_another_model_is_refused_with_the_first_tensor_and_the_model_it_was_made_for(
    demo_adapter: Path,
) -> None:
    change_config(demo_adapter, model="org/other")
    with pytest.raises(ModelError) as caught:
        LLM.from_model(make_model("llama"), adapter_path=demo_adapter, **POOL)
    message = str(caught.value)
    assert str(demo_adapter) in message and "does not fit this model" in message and "org/other" in message
    assert "adapter shape" in message and "\n" not in message and len(one_line(caught.value)) > 100


def test_a_folder_without_an_adapter_is_refused_before_a_model_is_looked_for(tmp_path: Path) -> None:
    for path in (tmp_path, ""):
        with pytest.raises(ModelError, match="adapter"):
            LLM("org/never-asked-for", adapter_path=path)
