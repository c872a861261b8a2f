"""Block stores while they write and run out of space."""

from __future__ import annotations

import os
from pathlib import Path

import mlx.core as mx
import pytest
from helpers.block_stores import content, folder_store, same_bits

from mlx_paged.cache.block_store import BlockStores, MemoryStore, checksum
from mlx_paged.cache.kv_cache import BlockContent
from mlx_paged.errors import EngineWarning


def test_a_block_that_is_put_again_counts_once(tmp_path: Path) -> None:
    folder_store(tmp_path / "one").put("1", content(1))
    size_of_file = (tmp_path / "one" / "1.safetensors").stat().st_size
    size = sum(array.nbytes for array in content(0).values())
    for store in (MemoryStore(2 * size), folder_store(tmp_path / "two", capacity=2 * size_of_file)):
        for number in (1, 2, 2, 2):
            store.put(str(number), content(number))
        assert "1" in store and same_bits(store.get("2"), content(2))


def test_the_checksum_is_of_all_arrays() -> None:
    whole = content(1)
    changed = [whole | {name: mx.array(array).at[0, 0, 0].add(1)} for name, array in whole.items()]
    assert len({checksum(one) for one in (whole, *changed)}) == 3


def test_while_a_block_is_saved_nothing_has_its_name_but_an_old_file_that_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, save, states = folder_store(tmp_path), mx.save_safetensors, []
    store.put("one", content(1))
    old = (tmp_path / "one.safetensors").read_bytes()

    def save_half_then_all(path: str, *arguments: object) -> None:
        Path(path).write_bytes(old[: len(old) // 2])
        found = {name: tmp_path / f"{name}.safetensors" for name in ("one", "two")}
        states.append({name: file.read_bytes() for name, file in found.items() if file.exists()})
        save(path, *arguments)

    monkeypatch.setattr(mx, "save_safetensors", save_half_then_all)
    store.put("two", content(2))
    store.put("one", content(3))
    two = (tmp_path / "two.safetensors").read_bytes()
    assert states == [{"one": old}, {"one": old, "two": two}]
    assert same_bits(store.get("one"), content(3))


def test_a_block_that_could_not_be_saved_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: str, *_: object) -> None:
        Path(path).write_bytes(b"half")
        raise RuntimeError("No space left on device")

    monkeypatch.setattr(mx, "save_safetensors", fail)
    store = folder_store(tmp_path)
    with pytest.raises(OSError, match=r"can't take another block: No space left"):
        store.put("one", content(1))
    assert list(tmp_path.glob("*.safetensors")) == [] and "one" not in store


class FullStore(MemoryStore):
    """A store that takes nothing, and how often it was asked to."""

    num_puts = 0

    def put(self, key: str, content: BlockContent) -> None:
        self.num_puts += 1
        raise OSError("no space")


@pytest.mark.parametrize(
    ("put", "reason"), [("put_evicted", "swap is off"), ("put_prompt", "prompts are not saved any more")]
)
def test_a_store_that_fails_is_not_asked_again_and_one_warning_says_so(put: str, reason: str) -> None:
    full = FullStore(0)
    stores = BlockStores(full, full)
    with pytest.warns(EngineWarning, match=reason) as caught:
        for key in ("one", "two"):
            getattr(stores, put)(key, content(1))
    assert (full.num_puts, len(caught), stores.num_swapped_blocks) == (1, 1, 0)


def test_a_block_that_can_not_be_used_is_forgotten_wherever_it_is(tmp_path: Path) -> None:
    stores = BlockStores(MemoryStore(10**6), folder_store(tmp_path))
    stores.put_evicted("one", content(1))
    stores.put_prompt("one", content(1))
    assert stores.num_swapped_blocks == 1
    with pytest.warns(EngineWarning, match="computed again: another layout"):
        stores.drop("one", ValueError("another layout"))
    assert "one" not in stores and stores.get("one") is None


def test_of_the_files_of_an_earlier_run_the_oldest_goes_first(tmp_path: Path) -> None:
    before = folder_store(tmp_path)
    for moment, key in enumerate(("b", "c", "a")):
        before.put(key, content(moment))
        os.utime(tmp_path / f"{key}.safetensors", (moment, moment))
    store = folder_store(tmp_path, capacity=3 * (tmp_path / "a.safetensors").stat().st_size)
    store.put("d", content(4))
    assert [key for key in "abcd" if key in store] == ["a", "c", "d"]
