"""What is noted of states that go to the block store and come back, and what is given up."""

from __future__ import annotations

import pytest
from helpers.stub_states import StoredKeys, StubStates

from mlx_paged.blocks.cache_groups import CacheGroups
from mlx_paged.blocks.checkpoints import Checkpoints
from mlx_paged.blocks.prefix_tree import PrefixNode
from mlx_paged.blocks.stored_states import StoredStates
from mlx_paged.blocks.transfers import BlockSave, StateLoad, StateSave, Transfer

SIZE = 4


@pytest.fixture
def keys() -> StoredKeys:
    return StoredKeys()


@pytest.fixture
def transfers() -> list[Transfer]:
    return []


@pytest.fixture
def stored(keys: StoredKeys, transfers: list[Transfer]) -> StoredStates:
    return StoredStates(keys, transfers)


def run(transfers: list[Transfer], keys: StoredKeys) -> None:
    """Carry out what is noted."""
    keys |= {each.key for each in transfers if isinstance(each, StateSave)}
    transfers.clear()


def test_a_prefix_s_state_is_saved_unless_it_is_there(
    stored: StoredStates, transfers: list[Transfer], keys: StoredKeys
) -> None:
    node = PrefixNode(None, (), b"\x01")
    stored.save(node, "state")
    assert transfers == [StateSave("state-01", "state")] and node.digest not in stored
    run(transfers, keys)
    stored.save(node, "state")
    assert transfers == [] and node.digest in stored
    stored.load(node.digest, node)
    assert transfers == [StateLoad("state-01", node)]


def test_nothing_is_saved_where_what_leaves_the_device_is_not_kept(
    stored: StoredStates, transfers: list[Transfer], keys: StoredKeys
) -> None:
    keys.swaps = False
    stored.save(PrefixNode(None, (), b"\x01"), "state")
    stored.park(7, 30, "state", [])
    assert transfers == [] and stored.parked_position(7) == 0


def test_a_sequence_is_parked_until_it_has_its_state_again(
    stored: StoredStates, transfers: list[Transfer], keys: StoredKeys
) -> None:
    stored.park(7, 30, "state", [(0, 3)])
    assert transfers == [StateSave("sequence-7", "state", [(0, 3)])]
    assert stored.parked_position(7) == 30, "its load would come after its save"
    run(transfers, keys)
    for _ in range(2):
        assert stored.parked_position(7) == 30
        stored.unpark(7, [(0, 5)])
        assert transfers == [StateLoad("sequence-7", 7, [(0, 5)])]
        stored.forget(7)  # as when it starts: it has to be loaded yet
        assert keys == {"sequence-7"}
        stored.put_back(7)  # as when it found no room after all
        assert transfers == [] and stored.parked_position(7) == 30
    stored.unpark(7, [])
    run(transfers, keys)
    stored.loaded(7)
    assert keys == set() and stored.parked_position(7) == 0


@pytest.mark.parametrize("is_saved", [False, True])
def test_what_was_parked_is_given_up_with_its_sequence(
    is_saved: bool, stored: StoredStates, transfers: list[Transfer], keys: StoredKeys
) -> None:
    for seq_id in (1, 2, 3):
        stored.park(seq_id, 30, "state", [])
    if is_saved:
        run(transfers, keys)
    stored.forget(1)
    assert [stored.parked_position(seq_id) for seq_id in (1, 2, 3)] == [0, 30, 30]
    stored.unpark(2, [])
    stored.clear()
    assert transfers == [] and keys == set()
    assert [stored.parked_position(seq_id) for seq_id in (1, 2, 3)] == [0, 0, 0]


def test_a_sequence_whose_state_the_store_had_no_room_for_is_not_parked(
    stored: StoredStates, transfers: list[Transfer]
) -> None:
    stored.park(1, 30, "state", [])
    transfers.clear()
    assert stored.parked_position(1) == 0


# -- with checkpoints ---------------------------------------------------------------------------------------------


def tokens(first: int, count: int) -> list[int]:
    return list(range(first, first + count))


def with_store(num_blocks: int, capacity: int, keys: StoredKeys) -> tuple[CacheGroups, Checkpoints]:
    groups = CacheGroups.make(
        [num_blocks], [None], SIZE, stored_keys=keys, states=StubStates(), num_checkpoints=capacity
    )
    assert groups.checkpoints is not None
    return groups, groups.checkpoints


def run_transfers(groups: CacheGroups, keys: StoredKeys) -> list[Transfer]:
    """Carry out what is noted. Returns it."""
    noted = [*groups.transfers]
    keys |= {each.key for each in noted if isinstance(each, BlockSave | StateSave)}
    groups.transfers.clear()
    groups.transfers_done()
    return noted


def compute(groups: CacheGroups, seq_id: str, prompt: list[int]) -> int:
    """Have a sequence compute its prompt in one step. Returns how many of its tokens were cached."""
    assert groups.checkpoints is not None
    start = groups.attach(seq_id, prompt, len(prompt), limit=len(prompt) - 1)
    groups.publish(seq_id, len(prompt))
    [*groups.checkpoints.cut(seq_id, start, len(prompt))]
    groups.checkpoints.step_built()
    groups.mark_computed(seq_id, len(prompt))
    return start


def test_a_checkpoint_that_is_worth_it_goes_to_the_store_and_is_loaded_from_there() -> None:
    keys = StoredKeys()
    groups, checkpoints = with_store(16, 1, keys)
    assert [compute(groups, seq_id, tokens(0, 6)) for seq_id in ("a", "b")] == [0, 4]
    for first, num_saved in ((50, 1), (90, 0)):  # of what was never hit nothing is saved
        compute(groups, f"from {first}", tokens(first, 6))
        assert len([each for each in run_transfers(groups, keys) if isinstance(each, StateSave)]) == num_saved
    assert compute(groups, "c", tokens(0, 6)) == 4
    (load,) = run_transfers(groups, keys)
    assert isinstance(load, StateLoad) and load.key in keys and load.owner in checkpoints._last_used
    groups.load_done(load, is_whole=False)  # it could not be read
    assert len(checkpoints) == 0


def test_a_block_that_goes_to_the_store_takes_its_checkpoint_along() -> None:
    keys = StoredKeys()
    groups, _ = with_store(3, 8, keys)
    compute(groups, "a", tokens(0, 6))
    groups.free("a", will_return=True)
    compute(groups, "b", tokens(50, 12))
    kinds = sorted(
        each.key.split("-")[0] for each in run_transfers(groups, keys) if isinstance(each, BlockSave | StateSave)
    )
    assert kinds == ["0", "state"]
    groups.free("b")
    assert groups.num_cached_tokens(tokens(0, 6)) == 4
    keys -= {key for key in keys if key.startswith("state")}
    assert groups.num_cached_tokens(tokens(0, 6)) == 0


def test_where_the_step_uses_all_checkpoints_a_state_is_loaded_for_one_sequence_only() -> None:
    keys = StoredKeys()
    groups, checkpoints = with_store(16, 1, keys)
    for seq_id in ("a", "b"):
        compute(groups, seq_id, tokens(0, 6))
    compute(groups, "c", tokens(50, 6))
    run_transfers(groups, keys)
    assert groups.attach("d", tokens(50, 6), 6, limit=5) == 4
    assert groups.attach("e", tokens(0, 6), 6, limit=5) == 4
    (load,) = groups.transfers
    assert isinstance(load, StateLoad) and load.owner == "e"
    assert [start is None for _, start, _ in checkpoints.cut("e", 4, 6)] == [True]
    groups.free("e")
    assert groups.transfers == [], "nobody waits for it"


def test_a_preempted_sequence_goes_on_after_its_last_token_with_the_block_that_was_not_full() -> None:
    keys = StoredKeys()
    groups, checkpoints = with_store(4, 8, keys)
    prompt = tokens(0, 7)
    compute(groups, "a", prompt)
    (block_id,) = groups.managers[0].block_table("a", 1)
    prompt.append(7)  # which is not computed
    groups.free("a", will_return=True, parks=True)
    assert groups.transfers == [StateSave("sequence-a", "state", [(0, block_id)])]
    run_transfers(groups, keys)
    compute(groups, "b", tokens(50, 16))
    run_transfers(groups, keys)
    groups.free("b")
    assert groups.attach("a", prompt, 8) == 7
    _, state = groups.transfers
    assert isinstance(state, StateLoad) and state.tails == [(0, groups.managers[0].block_table("a", 1)[0])]
    assert groups.managers[0].num_computed("a") == 7
    assert [start is None for _, start, _ in checkpoints.cut("a", 7, 8)] == [True]
    run_transfers(groups, keys)
    groups.load_done(state, is_whole=True)
    assert "sequence-a" not in keys


def test_a_preempted_sequence_whose_blocks_are_gone_starts_from_a_checkpoint() -> None:
    keys = StoredKeys()
    groups, _ = with_store(4, 8, keys)
    prompt = tokens(0, 11)
    compute(groups, "a", prompt)
    prompt.append(11)
    groups.free("a", will_return=True, parks=True)
    run_transfers(groups, keys)
    compute(groups, "b", tokens(50, 16))
    groups.free("b")
    noted = run_transfers(groups, keys)
    second = max(each.key for each in noted if isinstance(each, BlockSave) and each.block_id == 1)
    keys.discard(second)
    assert groups.attach("a", prompt, 12) == 0  # the one at the end of its second block can't be hit any more
    assert "sequence-a" not in keys


def test_a_checkpoint_that_goes_while_blocks_are_taken_to_start_from_it_is_missed() -> None:
    """Its block is in the store, the next one in the pool: where that has to go, nothing holds the prefix any more."""
    keys = StoredKeys()
    groups, checkpoints = with_store(4, 8, keys)
    (manager,), common = groups.managers, tokens(0, 8)
    for seq_id in ("a", "b"):
        groups.attach(seq_id, common, 8)
    manager.mark_computed("a", 4)
    manager.mark_computed("b", 8)  # whose first block is not the one that is found
    digest = manager.cached_prefixes("a")[0][1]
    checkpoints._add(manager.parts[0]["a"].last_node)
    for seq_id in ("a", "b"):
        groups.free(seq_id)
    groups.attach("x", tokens(50, 12), 12)
    groups.free("x")
    keys.add(f"0-{digest.hex()}")
    prompt = tokens(0, 4) + tokens(90, 12)
    assert groups.num_cached_tokens(prompt) == 4
    assert groups.attach("c", prompt, 16) == 0
    assert [start is None for _, start, _ in checkpoints.cut("c", 0, 16)] == [True]
