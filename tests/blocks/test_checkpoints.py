"""Checkpoints by themselves: where they are made, what can be hit, which ones go. The states are a stub."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import pytest
from helpers.stub_states import StubStates

from mlx_paged import BlockManager
from mlx_paged.blocks.cache_groups import CacheGroups
from mlx_paged.blocks.checkpoints import Checkpoints

SIZE = 4


class Steps:
    """The parts of an engine that move checkpoints, step by step."""

    def __init__(self, num_blocks: int = 64, capacity: int = 16, **options: Any) -> None:
        self.states = StubStates()
        self.manager = BlockManager(num_blocks, SIZE, **options)
        self.checkpoints = Checkpoints(self.states, self.manager, capacity)
        self.groups = CacheGroups([self.manager], checkpoints=self.checkpoints)
        self.published: dict[Hashable, Any] = {}
        self.chunks: list[tuple[Hashable, int, int]] = []

    def start(self, seq_id: Hashable, tokens: list[int], chunk: int | None = None, salt: str | None = None) -> int:
        """Admit a sequence with its first chunk to the step. Returns how many of its tokens are cached."""
        num_cached = self.groups.attach(seq_id, tokens, len(tokens), salt=salt, limit=len(tokens) - 1)
        self.go_on(seq_id, num_cached, min(len(tokens), num_cached + (chunk or len(tokens))))
        return num_cached

    def go_on(self, seq_id: Hashable, start: int, end: int) -> None:
        self.groups.reserve(seq_id, end)
        self.published[seq_id] = self.groups.publish(seq_id, end)
        self.chunks.append((seq_id, start, end))

    def preempt(self, seq_id: Hashable) -> None:
        self.groups.unpublish(self.published.pop(seq_id))
        self.groups.free(seq_id)
        self.chunks = [chunk for chunk in self.chunks if chunk[0] != seq_id]

    def run(self) -> dict[Hashable, list[tuple[int, bool, bool]]]:
        """Build and compute the step. Returns of each sequence where its chunk is cut, and what is loaded and made."""
        cuts = {}
        for seq_id, start, end in self.chunks:
            pieces = list(self.checkpoints.cut(seq_id, start, end))
            cuts[seq_id] = [(to, load is not None, keep is not None) for to, load, keep in pieces]
        self.checkpoints.step_built()
        for seq_id, _, end in self.chunks:
            self.groups.mark_computed(seq_id, end)
        self.chunks, self.published = [], {}
        return cuts

    def serve(self, seq_id: Hashable, tokens: list[int], salt: str | None = None) -> int:
        """Compute a prompt in one step and end its sequence. Returns how many of its tokens were cached."""
        num_cached = self.start(seq_id, tokens, salt=salt)
        self.run()
        self.groups.free(seq_id)
        return num_cached


def tokens_from(first: int, count: int) -> list[int]:
    return list(range(first, first + count))


@pytest.fixture
def steps() -> Steps:
    return Steps()


def test_a_prompt_is_cut_at_its_last_full_block_and_one_that_a_template_may_not_write_anew(steps: Steps) -> None:
    steps.start("a", tokens_from(0, 30))
    assert steps.run() == {"a": [(20, False, True), (28, False, True), (30, False, False)]}
    assert len(steps.checkpoints) == 2
    assert steps.start("b", tokens_from(0, 30)) == 28
    assert steps.run() == {"b": [(30, True, False)]}


def test_a_chunk_is_cut_where_its_own_tokens_end(steps: Steps) -> None:
    steps.start("a", tokens_from(0, 30), chunk=21)
    assert steps.run() == {"a": [(20, False, True), (21, False, False)]}
    steps.go_on("a", 21, 28)
    assert steps.run() == {"a": [(28, False, True)]}
    steps.go_on("a", 28, 30)
    assert steps.run() == {"a": [(30, False, False)]}


@pytest.mark.parametrize("chunk", [1, 2, 3])
def test_chunks_of_any_size_reach_every_checkpoint(chunk: int, steps: Steps) -> None:
    made = []
    steps.start("a", tokens_from(0, 30), chunk=chunk)
    for end in range(chunk, 30 + chunk, chunk):
        made += [to for to, _, keep in steps.run()["a"] if keep]
        if end < 30:
            steps.go_on("a", end, min(30, end + chunk))
    assert made == [20, 28]


def test_nothing_beyond_a_checkpoint_is_hit_though_its_blocks_are_there(steps: Steps) -> None:
    steps.serve("a", tokens_from(0, 31))
    other = tokens_from(0, 26) + tokens_from(900, 6)
    assert steps.manager.num_cached_tokens(other) == 24
    assert steps.groups.num_cached_tokens(other) == 20


def test_where_prompts_part_is_learnt_by_the_second_and_hit_by_the_third(steps: Steps) -> None:
    shared = tokens_from(0, 21)
    assert steps.serve("a", shared + tokens_from(100, 30)) == 0
    assert steps.start("b", shared + tokens_from(200, 30)) == 0
    assert [to for to, _, keep in steps.run()["b"] if keep] == [20, 40, 48]
    assert steps.serve("c", shared + tokens_from(300, 30)) == 20


def test_what_an_earlier_sequence_of_the_step_makes_is_hit_in_it(steps: Steps) -> None:
    assert steps.start("a", tokens_from(0, 30)) == 0
    assert steps.start("b", [*tokens_from(0, 29), 77, 78]) == 28
    assert steps.run() == {"a": [(20, False, True), (28, False, True), (30, False, False)], "b": [(31, True, False)]}


def test_what_a_preempted_sequence_would_have_made_is_hit_no_more(steps: Steps) -> None:
    steps.start("a", tokens_from(0, 30))
    steps.preempt("a")
    assert len(steps.checkpoints) == 0 and not steps.checkpoints._plans
    assert steps.start("b", tokens_from(0, 30)) == 0
    assert [to for to, _, keep in steps.run()["b"] if keep] == [20, 28]


def test_salts_share_no_checkpoint(steps: Steps) -> None:
    steps.serve("a", tokens_from(0, 30), salt="x")
    assert steps.serve("b", tokens_from(0, 30), salt="y") == 0
    assert steps.serve("c", tokens_from(0, 30), salt="x") == 28


def test_without_a_prefix_cache_none_is_made() -> None:
    steps = Steps(prefix_caching=False)
    steps.start("a", tokens_from(0, 30))
    assert steps.run() == {"a": [(30, False, False)]}


def test_the_one_used_least_recently_goes_and_the_earliest_of_a_prompt_is_used_last() -> None:
    steps = Steps(capacity=4)
    system = tokens_from(0, 13)
    steps.serve("a", system + tokens_from(100, 10))
    steps.serve("b", system + tokens_from(200, 10))  # learns 12
    assert steps.serve("c", system + tokens_from(300, 10)) == 12
    for turn in range(4, 10):
        assert steps.serve(turn, system + tokens_from(100 * turn, 10)) == 12
        assert len(steps.checkpoints) == 4
    assert steps.states.dropped


def test_none_goes_that_the_step_starts_from_or_makes_and_rather_one_is_not_made() -> None:
    steps = Steps(capacity=2)
    steps.serve("a", tokens_from(0, 30))
    assert steps.start("b", tokens_from(0, 50)) == 28
    assert len(steps.checkpoints) == 2
    assert steps.start("c", tokens_from(500, 30)) == 0
    assert steps.run() == {"b": [(48, True, True), (50, False, False)], "c": [(30, False, False)]}
    assert steps.serve("d", tokens_from(500, 30)) == 0
    assert steps.serve("e", tokens_from(500, 30)) == 28
    assert len(steps.checkpoints) == 2


def test_a_checkpoint_goes_with_the_blocks_of_its_prefix() -> None:
    steps = Steps(num_blocks=8)
    steps.serve("a", tokens_from(0, 30))
    assert len(steps.checkpoints) == 2
    steps.serve("b", tokens_from(500, 30))
    assert len(steps.checkpoints) == 2
    assert steps.groups.num_cached_tokens(tokens_from(0, 30)) == 0
    assert steps.groups.num_cached_tokens(tokens_from(500, 30)) == 28


def test_the_newest_of_an_answer_is_kept_when_its_sequence_ends(steps: Steps) -> None:
    tokens = tokens_from(0, 10)
    steps.start("a", tokens)
    steps.run()
    answer = tokens_from(600, 17)
    tokens += answer
    steps.groups.reserve("a", 27)
    steps.groups.sync("a", 26)
    steps.states.latest["a"] = 24
    steps.groups.fork("a", "b")
    assert steps.states.forks == [("a", "b")]
    steps.groups.free("a")
    assert steps.states.kept == [24] and "a" in steps.states.freed
    assert steps.start("next", [*tokens, 1, 2, 3]) == 24


def test_states_of_answers_under_way_take_half_of_the_places_at_most() -> None:
    steps = Steps(capacity=4)
    for i, name in enumerate("ab"):
        steps.serve(name, tokens_from(100 * i, 30))
    assert len(steps.checkpoints) == 4
    assert steps.checkpoints.may_keep_latest("c") and steps.checkpoints.may_keep_latest("d")
    assert len(steps.checkpoints) == 2, "a state of an answer needs a place as a checkpoint does"
    assert not steps.checkpoints.may_keep_latest("e") and steps.checkpoints.may_keep_latest("c")
    steps.start("d", tokens_from(300, 3))
    steps.run()
    steps.groups.free("d")
    assert steps.checkpoints.may_keep_latest("e") and len(steps.checkpoints) == 2


def test_an_answer_takes_no_place_from_what_the_step_that_is_built_starts_from() -> None:
    steps = Steps(capacity=2)
    steps.serve("a", tokens_from(0, 30))
    steps.start("b", tokens_from(0, 30))
    steps.checkpoints.may_keep_latest("c")
    assert steps.groups.num_cached_tokens(tokens_from(0, 30), limit=29) == 28
    assert steps.run()["b"][0][1]


def test_without_a_prefix_cache_no_state_of_an_answer_is_kept() -> None:
    assert not Steps(prefix_caching=False).checkpoints.may_keep_latest("a")


def test_one_is_made_where_conversations_part_if_that_is_known(steps: Steps) -> None:
    tokens = tokens_from(0, 30)
    steps.groups.attach("a", tokens, 30, limit=29)
    steps.checkpoints.want("a", 14, 0)
    steps.go_on("a", 0, 30)
    assert [to for to, _, keep in steps.run()["a"] if keep] == [12, 20, 28]
    assert steps.start("b", [*tokens[:14], *tokens_from(500, 16)]) == 12
    steps.checkpoints.want("b", 14, 12)
    assert [to for to, _, keep in steps.run()["b"] if keep] == [20, 28]


def test_one_of_an_answer_whose_block_is_not_published_is_not_kept(steps: Steps) -> None:
    steps.start("a", tokens_from(0, 10))
    steps.run()
    steps.states.latest["a"] = 12  # the token that ended it went one too far
    steps.groups.free("a")
    assert steps.states.kept == []


def test_all_is_forgotten_at_once(steps: Steps) -> None:
    steps.serve("a", tokens_from(0, 30))
    steps.start("b", tokens_from(0, 30))
    steps.groups.clear()
    steps.chunks = []
    assert len(steps.checkpoints) == 0 and not steps.checkpoints._plans and steps.states.num_clears == 2
    assert steps.serve("c", tokens_from(0, 30)) == 0
