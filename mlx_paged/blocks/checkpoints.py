"""Which prefixes have a checkpoint of the recurrent layers' states, and where the next ones are made. Knows no mlx.

A state is that after exactly so many tokens, so a prefix is hit no further than to a checkpoint, which lies at the end
of a full block. A prompt gets one at its last full block; one a little before its end, since a template may write that
anew with the next turn; one after tools and system message, with which other conversations may begin; and one where it
parts from a prompt whose blocks it shares further than any checkpoint. An answer gets one every so many tokens, of
which the newest is kept, so that the next turn finds the answer too. With a block store a checkpoint goes there when
it, or its block, has to go and is worth it, and is found there.
"""

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol
from weakref import WeakKeyDictionary

from mlx_paged.blocks.block_manager import BlockManager
from mlx_paged.blocks.prefix_tree import PrefixNode
from mlx_paged.blocks.stored_states import StoredStates
from mlx_paged.blocks.transfers import GroupStoreIndex, StateSave

_TEMPLATE_END = 8  # tokens of a prompt that the next turn may have in another form


class StateStore(Protocol):
    """What holds the states; `mlx_paged.cache.states.States` says what each method means."""

    def fork(self, seq_id: Any, new_seq_id: Any) -> None: ...
    def free(self, seq_id: Any) -> None: ...
    def clear(self) -> None: ...
    def latest_position(self, seq_id: Any) -> int: ...
    def keep_latest(self, seq_id: Any, name: Any) -> None: ...
    def of_checkpoint(self, name: Any) -> Any: ...
    def of_sequence(self, seq_id: Any) -> Any: ...
    def drop(self, name: Any) -> None: ...


class CheckpointLost(Exception):
    """A checkpoint has gone with a block that was taken for the sequence that was to start from it."""


@dataclass(eq=False)
class _Plan:
    """What becomes of a sequence's states while its prompt is computed."""

    start: PrefixNode | None
    """The checkpoint that it starts from, until it has."""
    positions: set[int]
    """After so many tokens one is wanted."""
    promised: dict[int, PrefixNode] = field(default_factory=dict)
    """Of these, those that the steps which are scheduled make."""


class Checkpoints:
    """The states of sequences and prefixes, with the methods of a `BlockManager` by which those are shared."""

    window = None

    def __init__(self, states: StateStore, manager: BlockManager, capacity: int) -> None:
        """manager: that of the layers that keep the whole context. capacity: the most checkpoints on the device."""
        self._states = states
        self._manager = manager
        self._capacity = capacity
        self.stored: StoredStates | None = None
        """Those in the block store, if there is one."""
        self.clear()

    def keep_in(self, stored: StoredStates, blocks: GroupStoreIndex) -> None:
        """Keep states in a block store, too. blocks: what is there of the manager's."""
        self.stored, blocks.on_save = stored, self.block_saved

    def __len__(self) -> int:
        """How many checkpoints there are."""
        return len(self._last_used)

    def clear(self) -> None:
        """Forget all."""
        self._last_used: WeakKeyDictionary[PrefixNode, int] = WeakKeyDictionary()
        self._clock = 0
        self._plans: dict[Hashable, _Plan] = {}
        self._in_use: set[PrefixNode] = set()  # by the step that is being scheduled
        self._with_latest: set[Hashable] = set()  # sequences of whose answer a state is kept
        self._states.clear()
        if self.stored is not None:
            self.stored.clear()

    def num_cached_tokens(self, token_ids: Sequence[int], *, salt: Hashable = None, limit: int) -> int:
        """Count the leading tokens, at most `limit`, that a new sequence can go on from."""
        return max(self._path(token_ids, salt, limit), default=0)

    def attach(
        self, seq_id: Hashable, token_ids: Sequence[int], num_tokens: int, *, salt: Hashable, max_cached: int
    ) -> None:
        """Let a new sequence, which has blocks for `num_tokens`, start after `max_cached` of them, a checkpoint.

        One that is parked goes on where it was instead. Raises CheckpointLost.
        """
        size, plan = self._manager.block_size, _Plan(None, set())
        parked = self.parked_position(seq_id)
        if self._manager.prefix_caching:
            num_shared = self._manager.num_cached_tokens(token_ids[:num_tokens], salt=salt)
            ends = {num_shared, *((num_tokens - end) // size * size for end in (1, _TEMPLATE_END))}
            plan.positions = {position for position in ends if position > (parked or max_cached)}
        if max_cached and not parked:
            path = self._path(token_ids, salt, max_cached)
            if max_cached not in path:
                raise CheckpointLost
            plan.start = path[max_cached]
            for node in reversed(path.values()):  # the first ones last: what many conversations begin with survives
                if node in self._last_used:
                    self._touch(node)
            if plan.start not in self._last_used and self.stored is not None:
                has_place = self._add(plan.start)
                self.stored.load(plan.start.digest, plan.start if has_place else seq_id)
                plan.start = plan.start if has_place else None
            if plan.start is not None:
                self._in_use.add(plan.start)
        self._plans[seq_id] = plan

    def want(self, seq_id: Hashable, num_tokens: int, start: int) -> None:
        """Have one made of the first `num_tokens` tokens, in whole blocks, of a sequence that starts after `start`."""
        position = num_tokens // self._manager.block_size * self._manager.block_size
        if position > start and self._manager.prefix_caching:
            self._plans[seq_id].positions.add(position)

    def may_keep_latest(self, seq_id: Hashable) -> bool:
        """Say whether a state of a sequence's answer may be kept while it runs: half of all may be such states."""
        if seq_id in self._with_latest:
            return True
        if not self._manager.prefix_caching or 2 * len(self._with_latest) >= self._capacity:
            return False
        if not self._make_room():
            return False
        self._with_latest.add(seq_id)
        return True

    def publish(self, seq_id: Hashable, num_tokens: int) -> list[PrefixNode]:
        """Let prefixes of a sequence's first `num_tokens` tokens be hit whose states the next step makes.

        Returns them, for `unpublish` if it does not.
        """
        plan, promised = self._plans.get(seq_id) or _Plan(None, set()), []
        for position in sorted(plan.positions, reverse=True):
            if position <= num_tokens:
                plan.positions.remove(position)
                node = self._node(seq_id, position)
                if node is not None and self._add(node):
                    plan.promised[position] = node
                    promised.append(node)
                    self._in_use.add(node)
        return promised

    def unpublish(self, nodes: Sequence[PrefixNode]) -> None:
        """Let prefixes whose states are not made be hit no more."""
        for node in nodes:
            self._last_used.pop(node, None)
            self._in_use.discard(node)

    def cut(self, seq_id: Hashable, start: int, end: int) -> Iterator[tuple[int, PrefixNode | None, PrefixNode | None]]:
        """Cut a chunk of a prompt at its checkpoints.

        Yields the end of each piece, the checkpoint that it starts from, and the one that it makes, if any.
        """
        plan = self._plans.get(seq_id) or _Plan(None, set())
        cuts = [(position, node) for position, node in sorted(plan.promised.items()) if start < position <= end]
        for position, node in cuts:
            del plan.promised[position]
            yield position, self._take_start(plan), node
        if not cuts or cuts[-1][0] < end:
            yield end, self._take_start(plan), None

    def park(self, seq_id: Hashable, tails: Sequence[tuple[int, int]]) -> None:
        """Keep the state of a sequence, which is to be freed, in the block store until it returns.

        tails: its blocks that are not full, group and block id.
        """
        sequence = self._manager.parts[0][seq_id]
        if self.stored is None or sequence.num_computed == len(sequence.token_ids):  # the next token is not known
            return
        state = self._states.of_sequence(seq_id)
        if state is not None:
            self.stored.park(seq_id, sequence.num_computed, state, tails)

    def parked_position(self, seq_id: Hashable) -> int:
        """After how many tokens `park` has kept the state of a sequence; 0: it has not, or it is gone."""
        return 0 if self.stored is None else self.stored.parked_position(seq_id)

    def saves_of(self, seq_id: Hashable) -> list[StateSave]:
        """Return the checkpoints of a sequence's prefixes, for another run. Those that are there for it are in use."""
        if self.stored is None:
            return []
        node: PrefixNode | None = self._manager.parts[0][seq_id].last_node
        found = []
        while node is not None:
            if (state := self._state_of(node)) is not None:
                found.append(self.stored.save_of(node, state))
            else:
                self.stored.touch(node)
            node = node.parent
        return found

    def block_saved(self, node: PrefixNode) -> None:
        """Have a prefix's checkpoint, if it has one, kept with its block."""
        if self.stored is not None and (state := self._state_of(node)) is not None:
            self.stored.save(node, state)

    def load_done(self, owner: Any, *, is_whole: bool) -> None:
        """Note that a state that was in the block store is that of a prefix or a sequence now, or can't be had."""
        if isinstance(owner, PrefixNode):
            self.unpublish([] if is_whole else [owner])
        elif self.stored is not None:
            self.stored.loaded(owner)

    def step_built(self) -> None:
        """Say that the step is built that was scheduled: all that it starts from is taken."""
        self._in_use.clear()

    def fork(self, seq_id: Hashable, new_seq_id: Hashable, token_ids: Sequence[int] | None = None) -> None:
        """Let a new sequence go on from where another one is."""
        self._states.fork(seq_id, new_seq_id)

    def free(self, seq_id: Hashable, *, will_return: bool = False) -> None:
        """Forget a sequence that still has its blocks. The newest checkpoint of its answer is kept."""
        self._plans.pop(seq_id, None)
        self._with_latest.discard(seq_id)
        position = self._states.latest_position(seq_id)
        node = self._node(seq_id, position) if position else None
        if node is not None and self._add(node):
            self._states.keep_latest(seq_id, node)
        self._states.free(seq_id)
        if self.stored is not None:
            self.stored.put_back(seq_id)

    def _path(self, token_ids: Sequence[int], salt: Hashable, limit: int) -> dict[int, PrefixNode]:
        """The checkpoints of the prefixes of at most `limit` tokens, by their length, the shortest first.

        One that is in the block store only may have a node that is not in the tree.
        """
        size, tree = self._manager.block_size, self._manager.parts[2]
        node, found = tree.root(salt), {}
        for end in range(size, limit + 1, size):
            tokens = tuple(token_ids[end - size : end])
            child = tree.find(node, tokens)
            if child is None and self.stored is None:
                break
            node = child or PrefixNode(node, tokens)
            if node in self._last_used or (self.stored is not None and node.digest in self.stored):
                found[end] = node
        return found

    def _node(self, seq_id: Hashable, position: int) -> PrefixNode | None:
        """The prefix of a sequence's first `position` tokens, whole blocks, if it is published."""
        sequence = self._manager.parts[0][seq_id]
        node: PrefixNode | None = sequence.last_node
        num_above = sequence.num_published - position // self._manager.block_size
        if num_above < 0:
            return None
        for _ in range(num_above):
            node = node.parent if node is not None else None
        return node

    def _state_of(self, node: PrefixNode) -> Any:
        """The state of a prefix; None if it is no checkpoint, or its state is still to be loaded."""
        return self._states.of_checkpoint(node) if node in self._last_used else None

    def _take_start(self, plan: _Plan) -> PrefixNode | None:
        start, plan.start = plan.start, None
        return start

    def _touch(self, node: PrefixNode) -> None:
        self._clock += 1
        self._last_used[node] = self._clock

    def _add(self, node: PrefixNode) -> bool:
        """Add a checkpoint, if need be in the place of the one used least recently. Returns whether there is one more.

        There is not if it is there, or if the step that is being scheduled uses all others.
        """
        if node in self._last_used or not self._make_room():
            return False
        self._touch(node)
        return True

    def _make_room(self) -> bool:
        """Have a place for one more, if need be that of the one used least recently. Returns whether there is one."""
        if len(self._last_used) + len(self._with_latest) < self._capacity:
            return True
        others = [each for each in self._last_used if each not in self._in_use]
        if not others:
            return False
        oldest = min(others, key=self._last_used.__getitem__)
        if oldest.worth_storing:
            self.block_saved(oldest)
        del self._last_used[oldest]
        self._states.drop(oldest)
        return True
