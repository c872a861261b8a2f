"""What KV caches cost: against arithmetic by hand, mlx-lm's own caches and loader, and the block manager."""

import json
import struct
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from helpers.families import config_of
from helpers.tiny_models import TINY_CONFIGS, make_model
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx.utils import tree_flatten
from mlx_lm.models.cache import BatchKVCache, BatchRotatingKVCache
from mlx_lm.utils import load_model, quantize_model

from mlx_paged import ModelError
from mlx_paged.blocks.block_manager import BlockManager
from mlx_paged.cache.layer_spec import LayerSpec
from mlx_paged.tools.cache_cost import LayerGroup, compare, read_model, typical_lengths

LLAMA_8B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "vocab_size": 128256,
    "tie_word_embeddings": False,
    "max_position_embeddings": 131072,
    "torch_dtype": "bfloat16",
}


def one_layer(window: int | None = None, *, chunked: bool = False) -> LayerGroup:
    """A layer whose tokens take one byte."""
    return LayerGroup(1, LayerSpec(1, 1, 0, mx.uint8), window, chunked)


def write_config(folder: Path, config: Any) -> Path:
    (folder / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    return folder


def taken(groups: list[LayerGroup], lengths: list[int], context: int, block_size: int) -> dict[str, int]:
    return {way.name: way.taken for way in compare(groups, lengths, context, block_size)}


# -- the three ways to hold a cache -------------------------------------------------------------------------------


def test_a_hand_computed_case() -> None:
    ways = compare([one_layer()], [1, 16, 17], context=100, block_size=16)
    assert [(way.name, way.taken, way.needed) for way in ways] == [
        ("reserved", 300, 34),
        ("padded", 768, 34),
        ("blocks", 16 + 16 + 32, 34),
    ]
    assert [way.waste for way in ways] == [1 - 34 / 300, 1 - 34 / 768, 1 - 34 / 64]
    assert [way.fitting(1000) for way in ways] == [10, 3, 46]  # 1000 // 100, 1000 * 3 // 768, 1000 * 3 // 64


def test_a_window_layer_needs_its_window_and_the_blocks_that_it_touches() -> None:
    ways = compare([one_layer(), one_layer(window=24)], [40], context=1000, block_size=16)
    # A query at the end of 40 tokens sees 16..39 of the window layer: two whole blocks.
    assert [way.taken for way in ways] == [1000 + 24, 256 + 24, 48 + 32]
    assert ways[0].needed == 40 + 24
    assert taken([one_layer(window=24)], [41], 1000, 16)["blocks"] == 32  # 17..40, the third block has 40
    assert taken([one_layer(window=24)], [57], 1000, 16)["blocks"] == 32
    assert taken([one_layer(window=26)], [41], 1000, 16)["blocks"] == 48  # 15..40 touches a third


def test_a_layer_in_chunks_is_reserved_a_whole_one_however_far_the_last_is_filled() -> None:
    ways = compare([one_layer(window=24, chunked=True)], [40], context=49, block_size=16)
    # A query at the end of 40 tokens sees 24..39: its chunk begins in the middle of a block, which is held whole.
    assert [way.taken for way in ways] == [24, 24, 32]
    assert ways[0].needed == 16


def test_groups_of_layers_count_by_their_bytes() -> None:
    group = LayerGroup(3, LayerSpec(num_kv_heads=2, key_dim=192, value_dim=128, dtype=mx.float16), window=None)
    assert group.bytes_per_token == 3 * 2 * 320 * 2
    assert taken([group, one_layer()], [5], 7, 4) == {"reserved": 3841 * 7, "padded": 3841 * 256, "blocks": 3841 * 8}


@settings(max_examples=60)
@given(
    lengths=st.lists(st.integers(1, 130), min_size=1, max_size=5),
    block_size=st.integers(1, 40),
    window=st.none() | st.integers(1, 70),
)
def test_blocks_are_what_the_block_manager_holds_while_the_last_token_is_computed(
    lengths: list[int], block_size: int, window: int | None
) -> None:
    manager = BlockManager(1000, block_size, window=window, prefix_caching=False)
    for seq_id, length in enumerate(lengths):
        manager.allocate(seq_id, range(length))
        manager.mark_computed(seq_id, length - 1)
    held = (manager.num_blocks - manager.num_free_blocks) * block_size
    assert taken([one_layer(window)], lengths, 1000, block_size)["blocks"] == held


@pytest.mark.parametrize(
    ("prompts", "num_steps"), [([3, 250], 5), ([3, 250], 6), ([3, 250], 7), ([256], 0), ([511], 2)]
)
def test_padded_is_what_mlx_lm_batch_caches_allocate(prompts: list[int], num_steps: int) -> None:
    longest = max(prompts)
    cache = BatchKVCache([longest - prompt for prompt in prompts])
    for num_tokens in [longest] + [1] * num_steps:
        tokens = mx.zeros((len(prompts), 2, num_tokens, 8), mx.float16)
        cache.update_and_fetch(tokens, tokens)
    group = LayerGroup(1, LayerSpec(2, 8, 8, mx.float16), None)
    lengths = [prompt + num_steps for prompt in prompts]
    assert taken([group], lengths, 4096, 16)["padded"] == cache.nbytes


@pytest.mark.parametrize("num_steps", [1, 255, 257, 299, 300, 301, 700])
def test_padded_window_layers_are_what_mlx_lm_rotating_caches_allocate(num_steps: int) -> None:
    cache = BatchRotatingKVCache(300, [0])
    for _ in range(num_steps):
        token = mx.zeros((1, 1, 1, 4), mx.float32)
        cache.update_and_fetch(token, token)
        mx.eval(cache.keys, cache.values)
    group = LayerGroup(1, LayerSpec(1, 4, 4, mx.float32), 300)
    assert taken([group], [num_steps], 4096, 16)["padded"] == cache.nbytes


def test_nothing_fits_where_the_weights_leave_nothing() -> None:
    assert [way.fitting(-5) for way in compare([one_layer()], [9], 10, 4)] == [0, 0, 0]


# -- typical lengths ----------------------------------------------------------------------------------------------


def test_typical_lengths_have_sharegpt_means_and_never_exceed_the_context() -> None:
    lengths = typical_lengths(20_000, context=1_000_000)
    assert sum(lengths) / len(lengths) == pytest.approx(161 + 338, rel=0.03)
    assert min(lengths) >= 2
    capped = typical_lengths(500, context=300)
    assert max(capped) == 300
    assert min(typical_lengths(500, context=1)) == 1


def test_typical_lengths_are_the_same_each_time_and_fewer_are_the_first_of_more() -> None:
    assert typical_lengths(40, 8192)[:7] == typical_lengths(7, 8192)


def test_typical_requests_in_blocks_of_16_waste_less_than_4_percent() -> None:
    reserved, padded, blocks = compare([one_layer()], typical_lengths(200, 8192), 8192, 16)
    assert blocks.waste < 0.04 < padded.waste < reserved.waste


# -- a model's size from its configuration ------------------------------------------------------------------------


@pytest.mark.parametrize("family", TINY_CONFIGS)
def test_bytes_per_token_follow_from_the_configuration(family: str, tmp_path: Path) -> None:
    config = {key: value for key, value in vars(make_model(family).args).items() if value is not None}
    size = read_model(write_config(tmp_path, config), "float16")
    num_layers, window = config["num_hidden_layers"], config.get("sliding_window")
    num_full = {"gemma3_text": num_layers // 3, "gpt_oss": num_layers // 2}.get(family, num_layers)
    head_dim = config.get("head_dim") or 64 // 4
    expected = [(num_full, None), (num_layers - num_full, window)]
    assert [(group.num_layers, group.window) for group in size.groups] == [pair for pair in expected if pair[0]]
    assert sum(group.bytes_per_token for group in size.groups) == num_layers * 2 * 2 * head_dim * 2
    assert (size.family, size.dtype) == (family, "float16")


@pytest.mark.parametrize("bits", [None, 4, 8])
@pytest.mark.parametrize("family", TINY_CONFIGS)
def test_weights_are_as_many_bytes_as_mlx_lm_loads(
    family: str, bits: int | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = make_model(family, dtype=mx.bfloat16, intermediate_size=128)
    config = {key: value for key, value in vars(model.args).items() if value is not None} | {"dtype": "bfloat16"}
    if family == "gemma3_text":
        model.pop("lm_head")
        model.tie_word_embeddings = True
    if bits:
        model, config = quantize_model(model, config, 32, bits)
    described, measured = tmp_path / "described", tmp_path / "measured"
    for folder in (described, measured):
        folder.mkdir()
        write_config(folder, config)
    mx.save_safetensors(str(measured / "model.safetensors"), dict(tree_flatten(model.parameters())))
    loaded, _ = load_model(measured)
    for dtype in ("bfloat16", "float32"):
        loaded.set_dtype(getattr(mx, dtype))
        expected = sum(array.nbytes for array in dict(tree_flatten(loaded.parameters())).values())
        for folder in (described, measured):
            size = read_model(folder, dtype)
            assert (size.weight_bytes, size.is_measured) == (expected, folder is measured)
            assert size.weights.keys() == {dtype, *(["uint32"] if bits else [])}
            assert size.unknown_quantization is None


def test_weights_that_are_not_what_the_configuration_says_are_measured(tmp_path: Path) -> None:
    model = make_model("llama", dtype=mx.float32)
    config = {key: value for key, value in vars(model.args).items() if value is not None} | {"dtype": "bfloat16"}
    weights = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(str(write_config(tmp_path, config) / "model.safetensors"), weights)
    assert read_model(tmp_path, "float16").weights == {"float16": sum(array.nbytes for array in weights.values()) // 2}
    (tmp_path / "model.safetensors").write_bytes(b"half")
    with pytest.raises(ModelError, match=r"model\.safetensors is not a whole safetensors file"):
        read_model(tmp_path)


def test_layers_quantised_in_ways_of_their_own_are_counted_so(tmp_path: Path) -> None:
    model = make_model("llama", dtype=mx.bfloat16)
    config = {key: value for key, value in vars(model.args).items() if value is not None} | {"dtype": "bfloat16"}
    eight_bits = {"group_size": 32, "bits": 8}
    model, config = quantize_model(
        model, config, 64, 4, quant_predicate=lambda path, _: eight_bits if path.endswith("v_proj") else True
    )
    weights = dict(tree_flatten(model.parameters()))
    assert weights["model.layers.0.mlp.down_proj.weight"].dtype == mx.bfloat16  # 96 is no multiple of 64
    assert weights["model.layers.0.self_attn.v_proj.weight"].shape == (32, 64 * 8 // 32)
    expected = sum(array.nbytes for array in weights.values())
    assert read_model(write_config(tmp_path, config), "bfloat16").weight_bytes == expected


def test_the_configuration_decides_and_not_what_the_family_would_quantise_today(tmp_path: Path) -> None:
    multipliers = {f"{name}_multiplier": 1.0 for name in ("embedding", "attention", "residual")}
    others = {"logits_scaling": 1.0, "attention_bias": False, "mlp_bias": False, "rope_theta": 1e4}
    model = make_model("granite", dtype=mx.bfloat16, tie_word_embeddings=False, **multipliers, **others)
    assert isinstance(model.quant_predicate("lm_head", None), dict)  # 8 bits, once files are converted anew
    nn.quantize(model, 32, 4)
    config = vars(model.args) | {"dtype": "bfloat16", "quantization": {"group_size": 32, "bits": 4}}
    expected = sum(array.nbytes for array in dict(tree_flatten(model.parameters())).values())
    assert read_model(write_config(tmp_path, config), "bfloat16").weight_bytes == expected


def test_the_demo_model_is_as_large_as_its_file(demo_folder: Path, tmp_path: Path) -> None:
    content = (demo_folder / "model.safetensors").read_bytes()
    (header_bytes,) = struct.unpack("<Q", content[:8])
    config = (demo_folder / "config.json").read_text()
    for folder in (demo_folder, write_config(tmp_path, config)):
        assert read_model(folder, "float16").weight_bytes == len(content) - 8 - header_bytes
    assert read_model(demo_folder).context == json.loads(config)["max_position_embeddings"]


def test_without_a_dtype_the_size_is_that_on_this_machine(tmp_path: Path) -> None:
    size = read_model(write_config(tmp_path, LLAMA_8B | {"num_hidden_layers": 1}))
    assert size.dtype == ("float32" if mx.default_device() == mx.cpu else "bfloat16")


def test_a_large_model_is_measured_without_allocating_it(tmp_path: Path) -> None:
    write_config(tmp_path, LLAMA_8B | {"quantization": {"bits": 4, "group_size": 64}})
    mx.synchronize()
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    size = read_model(tmp_path, "bfloat16")
    assert mx.get_peak_memory() - before < 10e6
    embedding, attention, mlp = 2 * 128256 * 4096, 2 * 4096 * (4096 + 1024), 3 * 4096 * 14336
    matrices = embedding + 32 * (attention + mlp)
    assert size.weight_bytes == matrices * 9 // 16 + 65 * 4096 * 2  # 4.5 bits a weight, and the norms
    assert sum(group.bytes_per_token for group in size.groups) == 32 * 2 * 8 * 128 * 2


def test_a_quantisation_that_only_loading_would_know_is_named(tmp_path: Path) -> None:
    config = LLAMA_8B | {"num_hidden_layers": 1, "quantization_config": {"quant_method": "gptq"}}
    assert read_model(write_config(tmp_path, config)).unknown_quantization == "gptq"


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"hidden_size": 64}, "it lacks 'model_type'"),
        ({"model_type": "llama"}, "hidden_size"),
        ({"model_type": "nonesuch"}, "nonesuch not supported"),
        ("{", "Expecting"),
        ("[]", "list"),
    ],
)
def test_a_configuration_that_is_none_is_one_line_that_names_the_file(config: Any, reason: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError) as caught:
        read_model(write_config(tmp_path, config))
    message = str(caught.value)
    assert message.startswith(str(tmp_path / "config.json"))
    assert reason in message
    assert "\n" not in message


def test_a_family_that_cannot_be_paged_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="phi3small"):
        read_model(write_config(tmp_path, config_of("phi3small")))
