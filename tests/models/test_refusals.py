"""What is said of a model that can't be paged."""

from __future__ import annotations

import mlx.core as mx
import pytest
from helpers.families import family_model

from mlx_paged import LLM, ModelError
from mlx_paged.models import registry


@pytest.mark.parametrize("family", ["bitnet", "muse_spark"])
@pytest.mark.skipif(mx.metal.is_available(), reason="runs here")
def test_a_family_whose_layers_are_metal_kernels_is_said_to_need_a_mac(family: str) -> None:
    with pytest.raises(
        ModelError, match=f"^model family '{family}' runs on Macs only: mlx-lm computes .* Metal kernels"
    ):
        LLM.from_model(family_model(family), num_kv_blocks=4)


@pytest.mark.parametrize("family", ["phi3small", "longcat_flash_ngram", "deepseek_v32"])
def test_a_listed_familys_reason_is_the_lists_wherever_it_is_found_out(family: str) -> None:
    with pytest.raises(ModelError) as caught:
        LLM.from_model(family_model(family), num_kv_blocks=4)
    assert str(caught.value) == f"model family {family!r} can't be paged: {registry.FAMILIES[family].note}"


def test_a_family_that_no_list_names_is_refused_with_what_its_code_did(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(registry.FAMILIES, "longcat_flash_ngram")
    with pytest.raises(ModelError, match=r"itself \(a state whose shape depends on the number of tokens\)"):
        LLM.from_model(family_model("longcat_flash_ngram"), num_kv_blocks=4)
