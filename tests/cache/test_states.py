"""States by themselves: where a step's come from, what is shared, copied, and let go."""

from __future__ import annotations

import mlx.core as mx
import pytest

from mlx_paged.cache.states import States, Stretch, content_of


class Node:
    """Names a checkpoint."""


def run(states: States, *stretches: Stretch) -> list[list[float]]:
    """A step of a layer that adds its number of tokens to its state. Returns what each stretch was given."""
    states.begin(stretches)
    given = []
    for number, stretch in enumerate(stretches):
        (before,) = states.take(number, 0)
        num_seqs = len(stretch.seq_ids)
        given.append([] if before is None else before[:, 0].tolist())
        after = (mx.zeros((num_seqs, 2)) if before is None else before) + (stretch.tokens.stop - stretch.tokens.start)
        states.put(number, 0, [before], [after])
    states.end()
    return given


def prompt(seq_id: int, count: int, **options: object) -> Stretch:
    return Stretch(slice(0, count), [seq_id], is_first=True, **options)  # type: ignore[arg-type]


def decode(*seq_ids: int, latest: tuple[tuple[int, int], ...] = ()) -> Stretch:
    return Stretch(slice(0, 1), list(seq_ids), latest=latest)


@pytest.fixture
def states() -> States:
    return States([1])


def test_a_batch_that_stays_is_used_as_it_is_and_one_that_changes_is_gathered(states: States) -> None:
    assert run(states, prompt(1, 10), prompt(2, 20)) == [[], []]
    assert run(states, decode(1, 2)) == [[10, 20]]
    assert (states.num_reused, states.num_gathered) == (0, 1)
    assert run(states, decode(1, 2)) == [[11, 21]]
    assert (states.num_reused, states.num_gathered) == (1, 1)
    assert run(states, decode(2)) == [[22]]
    assert run(states, decode(1, 2)) == [[12, 23]]  # of which the first one sat out
    assert (states.num_reused, states.num_gathered) == (1, 3)


def test_forks_share_a_state_until_they_go_on(states: States) -> None:
    run(states, prompt(1, 10))
    size = states.nbytes
    states.fork(1, 2)
    assert states.nbytes == size
    assert run(states, decode(1)) == [[10]]
    assert run(states, decode(2, 1)) == [[10, 11]]


def test_a_later_stretch_of_the_step_starts_from_what_an_earlier_one_makes(states: States) -> None:
    node = Node()
    first, second = prompt(1, 8, keep=node), Stretch(slice(0, 3), [1])
    assert run(states, first, second, Stretch(slice(0, 2), [2], load=node)) == [[], [8], [8]]
    assert run(states, decode(1, 2)) == [[11, 10]]


def test_a_checkpoint_stays_when_its_sequence_goes_and_goes_with_its_name(states: States) -> None:
    node = Node()
    run(states, prompt(1, 8, keep=node))
    size = states.nbytes
    states.free(1)
    assert states.nbytes == size and 1 not in states
    assert run(states, Stretch(slice(0, 1), [2], load=node)) == [[8]]
    states.free(2)
    del node
    assert states.nbytes == 0
    other = Node()
    run(states, prompt(3, 8, keep=other))
    states.free(3)
    states.drop(other)
    assert states.nbytes == 0


def test_the_latest_state_of_an_answer_is_its_row_from_before_the_step(states: States) -> None:
    run(states, prompt(1, 10), prompt(2, 20))
    run(states, decode(1, 2))
    run(states, decode(1, 2, latest=((1, 21),)))
    assert (states.latest_position(1), states.latest_position(2)) == (0, 21)
    assert len(states.to_compute) == 2, "computed with the step, since nothing else needs it"
    states.fork(2, 3)
    assert states.latest_position(3) == 0
    node = Node()
    states.keep_latest(2, node)
    for seq_id in (1, 2, 3):
        states.free(seq_id)
    assert states.nbytes == 2 * 4
    assert run(states, Stretch(slice(0, 1), [4], load=node)) == [[21]]


def test_modules_that_share_a_cache_each_keep_what_they_have_written() -> None:
    states, nodes = States([2]), [Node(), Node()]
    stretches = [prompt(1, 4, keep=nodes[0]), Stretch(slice(0, 4), [1], keep=nodes[1])]
    states.begin(stretches)
    for entry in (0, 1):  # each over all stretches before the other
        for number in range(2):
            given = states.take(number, 0)
            before = given[entry]
            made: list[mx.array | None] = list(given)
            made[entry] = mx.full((1, 1), 4.0 + entry) if before is None else before + 4
            states.put(number, 0, given, made)
    states.end()
    states.begin([Stretch(slice(0, 1), [2], load=nodes[0]), Stretch(slice(0, 1), [3], load=nodes[1])])
    found = [[array.item() for array in states.take(number, 0) if array is not None] for number in range(2)]
    assert found == [[4, 5], [8, 9]]


@pytest.mark.parametrize("kind", ["sequence", "checkpoint"])
def test_a_state_goes_on_from_what_was_kept_of_it(kind: str) -> None:
    states, node = States([1], [((2,), mx.float32)]), Node()
    run(states, prompt(1, 10), prompt(2, 20, keep=node))
    run(states, decode(1, 2))
    state = states.of_sequence(2) if kind == "sequence" else states.of_checkpoint(node)
    assert state is not None
    content = content_of(state)
    states.clear()
    assert states.of_sequence(2) is None and states.of_checkpoint(node) is None
    if kind == "sequence":
        states.restore(5, content)
        assert run(states, decode(5)) == [[21]]
    else:
        states.restore(node, content)
        assert run(states, Stretch(slice(0, 1), [5], load=node)) == [[20]]


@pytest.mark.parametrize("content", [{}, {"s0.0": mx.zeros((1, 3))}, {"s0.0": mx.zeros((1, 2), mx.float16)}])
def test_a_state_of_another_layout_is_refused(content: dict[str, mx.array]) -> None:
    states = States([1], [((2,), mx.float32)])
    with pytest.raises(ValueError, match="a state of another layout"):
        states.restore(5, content)
    assert 5 not in states


def test_all_is_forgotten_at_once(states: States) -> None:
    run(states, prompt(1, 8, keep=(node := Node())))
    states.clear()
    assert states.nbytes == 0 and 1 not in states and not states.to_compute
    assert node is not None
