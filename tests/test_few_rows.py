"""Few rows are multiplied with weights in pieces where that is faster, by the paged engine and by nobody else."""

import threading

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from conftest import unpaged_greedy

from mlx_paged import LLM, SamplingParams
from mlx_paged.models import few_rows
from mlx_paged.random_models import make_random_model


@pytest.fixture
def products(monkeypatch):
    """MLX's linear layers patched, with the shapes of what they multiplied in pieces."""
    found = []
    original = few_rows.product

    def product(x, weight, size):
        found.append((x.shape, weight.shape, size))
        return original(x, weight, size)

    monkeypatch.setattr(nn.Linear, "__call__", nn.Linear.__call__)
    monkeypatch.setattr(nn.Embedding, "as_linear", nn.Embedding.as_linear)
    monkeypatch.setattr(few_rows, "product", product)
    few_rows.patch_linear()
    return found


def random(*shape):
    return mx.array(np.random.default_rng(sum(shape)).normal(size=shape), mx.float32)


@pytest.mark.parametrize("rows", [(1,), (3, 1), (16, 1), (2, 5)])
@pytest.mark.parametrize(("num_outputs", "dim", "size"), [(512, 128, 32), (1408, 512, 32), (1040, 100, 16)])
def test_a_product_in_pieces_is_the_product(rows, num_outputs, dim, size):
    x, weight = random(*rows, dim), random(num_outputs, dim)
    expected = np.array(x, np.float64) @ np.array(weight, np.float64).T
    np.testing.assert_allclose(few_rows.product(x, weight, size), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("bias", [False, True])
def test_a_linear_layer_multiplies_few_rows_in_pieces_and_adds_its_bias(products, bias):
    layer, x = nn.Linear(256, 512, bias=bias), random(3, 1, 256)
    expected = layer(x)
    assert products == []
    with few_rows.in_pieces():
        found = layer(x)
    assert products == [((3, 1, 256), (512, 256), 32)]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_the_output_head_of_tied_embeddings_does_so_too(products):
    embedding, x = nn.Embedding(1040, 256), random(2, 1, 256)
    expected = embedding.as_linear(x)
    with few_rows.in_pieces():
        found = embedding.as_linear(x)
    assert products == [((2, 1, 256), (1040, 256), 16)], "1,040 are 65 pieces of 16"
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("why", "rows", "num_outputs", "dim", "dtype"),
    [
        ("too many rows", 17, 512, 256, mx.float32),
        ("no row", 0, 512, 256, mx.float32),
        ("a small matrix", 3, 128, 256, mx.float32),
        ("outputs that can't be divided", 3, 520, 256, mx.float32),
        ("half precision", 3, 512, 256, mx.float16),
        ("pieces too large for the kernels of small products", 16, 64, 4096, mx.float32),
    ],
)
def test_other_products_stay_whole(products, why, rows, num_outputs, dim, dtype):
    layer = nn.Linear(dim, num_outputs)
    layer.set_dtype(dtype)
    x = random(rows, 1, dim).astype(dtype)
    with few_rows.in_pieces():
        found = layer(x)
    assert (found.shape, found.dtype, products) == ((rows, 1, num_outputs), dtype, []), why


def test_a_longer_row_makes_smaller_pieces(products):
    layer = nn.Linear(4096, 64)
    with few_rows.in_pieces():
        layer(random(7, 1, 4096))
        layer(random(8, 1, 4096))
        layer(random(15, 1, 4096))
    assert [size for _, _, size in products] == [32, 16, 16]


def test_other_threads_are_left_alone(products):
    layer, x = nn.Linear(256, 512), random(3, 1, 256)
    with few_rows.in_pieces():
        other = threading.Thread(target=layer, args=(x,))
        other.start()
        other.join()
    layer(x)
    assert products == []


def test_the_engine_multiplies_in_pieces_and_generates_what_mlx_lm_does_which_does_not(products):
    model = make_random_model("qwen2-20m", "float32").model
    prompt = [5, 17, 900, 33, 8000]
    tokens = (
        LLM.from_model(model, num_kv_blocks=8)
        .generate([prompt], SamplingParams(max_tokens=6, temperature=0, ignore_eos=True))[0]
        .outputs[0]
        .token_ids
    )
    layers = 6
    assert len(products) >= 6 * (7 * layers + 1), "six steps of seven products a layer and the head"
    products.clear()
    assert (list(tokens), products) == (unpaged_greedy(model, prompt, 6).token_ids, [])


@pytest.mark.parametrize("faster", [False, True])
def test_a_loaded_model_multiplies_in_pieces_only_where_that_is_faster(monkeypatch, tiny_model, faster):
    for cls, name in ((nn.Linear, "__call__"), (nn.Embedding, "as_linear")):
        patched = getattr(cls, name)
        monkeypatch.setattr(cls, name, getattr(patched, "__wrapped__", patched))
    monkeypatch.setattr(few_rows, "pieces_are_faster", lambda: faster)
    LLM.from_model(tiny_model("qwen2"), num_kv_blocks=4)
    assert [
        few_rows._dispatch in getattr(method, "made_by", ()) for method in (nn.Linear.__call__, nn.Embedding.as_linear)
    ] == [faster] * 2


@pytest.mark.parametrize(
    ("core", "num_threads", "expected"),
    [(b"SkylakeX", 1, True), (b"SapphireRapids", 1, True), (b"SkylakeX", 2, False), (b"Haswell", 1, False)],
)
def test_pieces_are_for_a_blas_with_kernels_for_small_products_and_one_thread(core, num_threads, expected):
    class OpenBLAS:
        @staticmethod
        def openblas_get_num_threads():
            return num_threads

        @staticmethod
        def openblas_get_corename():
            return core

    assert few_rows._has_small_kernels(OpenBLAS()) is expected


def test_another_blas_has_no_such_kernels():
    assert few_rows._has_small_kernels(object()) is False
