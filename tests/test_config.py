"""The engine's configuration and sizes of memory: what is read, and what is refused by name."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from mlx_paged import EngineConfig
from mlx_paged.config import ALLOCATORS, format_memory, parse_memory, parse_swap_space


@pytest.mark.parametrize(
    "size, expected",
    [
        ("4GB", 4 * 10**9),
        ("4GiB", 2**32),
        ("1.5GB", 1_500_000_000),
        ("64MB", 64 * 10**6),
        ("512MiB", 512 * 2**20),
        ("3KB", 3000),
        ("3KiB", 3072),
        ("2TB", 2 * 10**12),
        ("2TiB", 2 * 2**40),
        ("100B", 100),
        ("100", 100),
        (100, 100),
        (" 4 gb ", 4 * 10**9),
        ("4gib", 2**32),
    ],
)
def test_sizes_are_read_in_decimal_and_binary_units(size: int | str, expected: int) -> None:
    assert parse_memory(size) == expected


@pytest.mark.parametrize("size, expected", [("30%", 300), ("100%", 1000), ("0.5%", 5), (" 12.5 % ", 125)])
def test_a_share_is_of_the_total(size: str, expected: int) -> None:
    assert parse_memory(size, total=1000) == expected


@pytest.mark.parametrize(
    "size",
    [
        "",
        "lots",
        "GB",
        "4XB",
        "4 G B",
        "-1GB",
        "-5",
        -5,
        "0",
        0,
        "0GB",
        "0%",
        "1e3",
        "4GB!",
        "٤GB",
        "1,5GB",
        "nan",
        "%",
        None,
    ],
)
def test_nonsense_is_refused_with_examples_of_how_to_write_a_size(size: Any) -> None:
    with pytest.raises(ValueError) as caught:
        parse_memory(size, total=1000)
    assert repr(size) in str(caught.value)
    assert "4GB" in str(caught.value) and "30%" in str(caught.value)


def test_a_share_above_everything_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'101%'.*at most 100%"):
        parse_memory("101%", total=1000)


def test_a_share_of_an_unknown_total_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'30%'.*bytes"):
        parse_memory("30%")


@pytest.mark.parametrize(
    "num_bytes, expected",
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1 KB"),
        (1_536_000, "1.54 MB"),
        (28_672, "28.7 KB"),
        (4 * 10**9, "4 GB"),
        (150 * 10**9, "150 GB"),
        (2 * 10**12, "2 TB"),
    ],
)
def test_sizes_are_written_for_people(num_bytes: int, expected: str) -> None:
    assert format_memory(num_bytes) == expected


OUT_OF_RANGE: list[tuple[str, Any]] = [
    *(
        (name, value)
        for name in ("block_size", "max_num_seqs", "max_num_batched_tokens")
        for value in (0, -1, 1.5, None)
    ),
    *((name, value) for name in ("num_kv_blocks", "max_model_len") for value in (0, -1, "16", True)),
    ("kv_cache_memory", "lots"),
    ("kv_cache_memory", 0),
    ("kv_cache_memory", "130%"),
    ("allocator", "mru"),
    ("dtype", "int8"),
    ("dtype", "float64"),
    ("kv_cache_dtype", "int4"),
    ("kv_cache_dtype", "float16"),
    ("kv_cache_dtype", ""),
    ("seed", 1.5),
    ("seed", None),
    ("max_staging", "none"),
    ("max_staging", "30%"),
    ("max_staging", 0),
    *(("max_step_ms", value) for value in (-1, float("nan"), float("inf"), "100", True)),
]


@pytest.mark.parametrize("name, value", OUT_OF_RANGE, ids=str)
def test_a_value_out_of_range_is_refused_with_the_value_in_the_message(name: str, value: Any) -> None:
    with pytest.raises(ValueError) as caught:
        EngineConfig(**{name: value})
    message = str(caught.value)
    assert repr(value) in message and name in message
    assert "\n" not in message


def test_both_ways_to_size_the_pool_at_once_are_refused() -> None:
    with pytest.raises(ValueError, match="num_kv_blocks or kv_cache_memory, not both"):
        EngineConfig(num_kv_blocks=4, kv_cache_memory="1GB")


def test_an_unknown_option_is_refused() -> None:
    with pytest.raises(TypeError, match="blocksize"):
        EngineConfig(blocksize=4)  # type: ignore[call-arg]


def test_the_configuration_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        EngineConfig().block_size = 0  # type: ignore[misc]


@pytest.mark.parametrize("memory", ["4GB", "4GiB", "30%", 123456])
def test_the_pools_memory_may_be_a_size_or_a_share(memory: int | str) -> None:
    assert EngineConfig(kv_cache_memory=memory).kv_cache_memory == memory


@pytest.mark.parametrize("allocator", ALLOCATORS)
def test_every_named_allocator_is_taken(allocator: str) -> None:
    assert EngineConfig(allocator=allocator).allocator == allocator


def test_the_defaults_are_those_of_the_public_surface() -> None:
    config = EngineConfig()
    assert (config.block_size, config.max_num_seqs, config.max_num_batched_tokens) == (16, 64, 2048)
    assert (config.num_kv_blocks, config.kv_cache_memory, config.max_model_len, config.dtype) == (None,) * 4
    assert (config.prefix_caching, config.allocator, config.seed) == (True, "lru", 0)
    assert (config.check_invariants, config.max_staging) == (False, "64MB")


# -- swap and saved prompts --------------------------------------------------------------------------------------


def test_swap_is_a_size_or_a_folder_and_a_new_folders_name_has_a_slash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").mkdir()
    (tmp_path / "8GB").mkdir()
    read = {"8GB": 8 * 10**9, 4096: 4096, "there": Path("there"), "./new": Path("new"), "/a/b": Path("/a/b")}
    read |= {".": Path("."), "-5GB/": Path("-5GB"), Path("new"): Path("new"), "~/x": Path("~/x").expanduser()}
    read |= {"8 GB/x": Path("8 GB/x")}
    for swap_space, expected in read.items():
        assert parse_swap_space(swap_space) == expected
    for wrong in ("-5GB", "", " ", "new", "GB", -5, 0, True, "50%", "8 parsecs", "0GB"):
        with pytest.raises(ValueError, match=r"^swap_space") as caught:
            EngineConfig(swap_space=wrong)
        assert "\n" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["8GB", "there"]


def test_saved_prompts_have_a_folder_and_a_size_only_with_one() -> None:
    EngineConfig(prefix_cache_dir="saved", prefix_cache_size="20GB")
    EngineConfig(prefix_cache_dir=Path("saved"), prefix_cache_size="5%")
    for settings, message in (
        ({"prefix_cache_dir": ""}, "prefix_cache_dir is empty"),
        ({"prefix_cache_dir": "~nobody-here/x"}, "prefix_cache_dir '~nobody-here/x': there is no user of that name"),
        ({"prefix_cache_size": "20GB"}, "give prefix_cache_dir, too"),
        ({"prefix_cache_dir": "saved", "prefix_cache_size": "-20GB"}, "prefix_cache_size '-20GB'"),
        ({"prefix_cache_dir": "saved", "prefix_cache_size": "200%"}, "prefix_cache_size .* at most 100%"),
    ):
        with pytest.raises(ValueError, match=message):
            EngineConfig(**settings)
