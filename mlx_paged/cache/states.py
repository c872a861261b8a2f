"""States of recurrent layers: what convolutions, state spaces and linear attention keep instead of keys and values.

A state is never written in place: a step makes new arrays of the old ones. So a fork shares them until the two go on, a
step under way needs no care, and one that comes to nothing leaves nothing to mend. A pool of states that each step
gathers from and scatters to would be copied by MLX at every step.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import mlx.core as mx

Arrays = list[mx.array | None]
"""The entries of one layer's states, [num_seqs, ...] each."""


class Stretch(NamedTuple):
    """Tokens of a step that a recurrent layer computes in one call: one of each sequence, or several of one."""

    tokens: slice
    seq_ids: list[int]
    is_first: bool = False
    """Whether they are the first of their sequence, whose state starts from nothing."""
    load: Any = None
    """The checkpoint that it starts from, by its name; None: from where the sequence is."""
    keep: Any = None
    """The name of the checkpoint that it becomes, if any."""
    latest: Sequence[tuple[int, int]] = ()
    """Of decodes, the places whose state from before the step is kept as the latest one of an answer, and the tokens
    that it comes after. The state after it may be that of one token more than the answer has."""


class _Batch:
    """The states of some sequences in all layers, as a step leaves them."""

    def __init__(self, num_seqs: int, num_entries: Sequence[int], sources: list[tuple["_Batch", list[int] | None]]):
        """sources: the batches that the states come from, in order, and the places there; None: all of them."""
        self.num_seqs = num_seqs
        self.layers: list[Arrays] = [[None] * count for count in num_entries]
        self._sources = sources

    def get(self, layer: int, entry: int) -> mx.array | None:
        """What a layer has by now: what was written, or else what was there before."""
        found = self.layers[layer][entry]
        if found is not None or not self._sources:
            return found
        parts = []
        for batch, places in self._sources:
            part = batch.get(layer, entry)
            if part is None:
                return None
            parts.append(part if places is None else part[mx.array(places)])
        return parts[0] if len(parts) == 1 else mx.concatenate(parts)

    def part(self, place: int) -> "_Batch":
        """The states of one sequence apart, which do not keep the others."""
        part = _Batch(1, [len(entries) for entries in self.layers], [])
        part.layers = [
            [None if array is None else mx.contiguous(array[place : place + 1]) for array in entries]
            for entries in self.layers
        ]
        return part

    def close(self) -> list[mx.array]:
        """Take over what was not written, and let go of the sources. Returns all arrays."""
        for layer, entries in enumerate(self.layers):
            entries[:] = [self.get(layer, entry) for entry in range(len(entries))]
        self._sources = []
        return self.arrays

    @property
    def arrays(self) -> list[mx.array]:
        return [array for entries in self.layers for array in entries if array is not None]


class States:
    """The states of all sequences: each has a place in a batch that some step has left."""

    def __init__(self, num_entries: Sequence[int], shapes: Sequence[tuple[tuple[int, ...], mx.Dtype]] = ()) -> None:
        """num_entries: of the state of each recurrent layer. shapes: what that of one sequence consists of."""
        self.num_reused = self.num_gathered = 0
        """Stretches whose states were used as an earlier step had left them, or had to be put together."""
        self._num_entries = list(num_entries)
        self._shapes = list(shapes)
        self.clear()

    def clear(self) -> None:
        """Forget all."""
        self._places: dict[int, tuple[_Batch, int]] = {}
        self._latest: dict[int, tuple[int, _Batch]] = {}
        self._checkpoints: WeakKeyDictionary[Any, _Batch] = WeakKeyDictionary()
        self._made: list[_Batch] = []
        self.to_compute: list[mx.array] = []
        """What the last step makes: to be computed with it, since its logits do not need all of that."""

    def __contains__(self, seq_id: int) -> bool:
        return seq_id in self._places

    @property
    def nbytes(self) -> int:
        """Bytes of all that is held."""
        batches = {*(batch for batch, _ in self._places.values()), *(batch for _, batch in self._latest.values())}
        return sum(array.nbytes for batch in batches.union(self._checkpoints.values()) for array in batch.arrays)

    def fork(self, seq_id: int, new_seq_id: int) -> None:
        """Let a new sequence go on from where another one is."""
        if seq_id in self._places:
            self._places[new_seq_id] = self._places[seq_id]

    def free(self, seq_id: int) -> None:
        """Forget a sequence."""
        self._places.pop(seq_id, None)
        self._latest.pop(seq_id, None)

    def latest_position(self, seq_id: int) -> int:
        """After how many tokens a state of a sequence's answer was kept last; 0: none was."""
        return self._latest[seq_id][0] if seq_id in self._latest else 0

    def keep_latest(self, seq_id: int, name: Any) -> None:
        """Make a checkpoint of that state. It is forgotten with `drop`, or when nobody else refers to its name."""
        self._checkpoints[name] = self._latest[seq_id][1]

    def drop(self, name: Any) -> None:
        """Forget a checkpoint."""
        self._checkpoints.pop(name, None)

    def of_checkpoint(self, name: Any) -> _Batch | None:
        """The state of a checkpoint, for `content_of`; None: it has none yet."""
        return self._checkpoints.get(name)

    def of_sequence(self, seq_id: int) -> _Batch | None:
        """Likewise of a sequence."""
        batch, place = self._places.get(seq_id, (None, 0))
        return None if batch is None else batch.part(place)

    def restore(self, owner: Any, content: dict[str, mx.array]) -> None:
        """Let a sequence, or a checkpoint by its name, have what `content_of` returned.

        Raises ValueError if it is of another layout.
        """
        batch = _Batch(1, self._num_entries, [])
        for layer, entries in enumerate(batch.layers):
            entries[:] = [content.get(_array_name(layer, entry)) for entry in range(len(entries))]
        found = [(array.shape, array.dtype) for array in batch.arrays]
        if found != [((1, *shape), dtype) for shape, dtype in self._shapes]:
            raise ValueError("a state of another layout")
        if isinstance(owner, int):
            self._places[owner] = batch, 0
        else:
            self._checkpoints[owner] = batch

    def begin(self, stretches: Sequence[Stretch]) -> None:
        """Find where the states of a step's stretches come from."""
        self.to_compute = []
        for stretch in stretches:
            for place, num_tokens in stretch.latest:
                batch, source = self._places[stretch.seq_ids[place]]
                part = batch.part(source)
                self._latest[stretch.seq_ids[place]] = num_tokens, part
                self.to_compute += part.arrays
            if stretch.load is not None:
                self._places[stretch.seq_ids[0]] = self._checkpoints[stretch.load], 0
            sources: list[tuple[_Batch, list[int]]] = []
            for seq_id in () if stretch.is_first else stretch.seq_ids:
                batch, place = self._places[seq_id]
                if sources and sources[-1][0] is batch:
                    sources[-1][1].append(place)
                else:
                    sources.append((batch, [place]))
            whole = [(batch, None if places == list(range(batch.num_seqs)) else places) for batch, places in sources]
            is_reused = len(whole) == 1 and whole[0][1] is None
            self.num_reused += is_reused
            self.num_gathered += bool(whole) and not is_reused
            made = _Batch(len(stretch.seq_ids), self._num_entries, whole)
            self._made.append(made)
            self._places |= {seq_id: (made, place) for place, seq_id in enumerate(stretch.seq_ids)}
            if stretch.keep is not None:
                self._checkpoints[stretch.keep] = made

    def take(self, number: int, layer: int) -> Arrays:
        """What a layer is given for a stretch, by its number."""
        return [self._made[number].get(layer, entry) for entry in range(self._num_entries[layer])]

    def put(self, number: int, layer: int, given: Arrays, arrays: Sequence[mx.array | None]) -> None:
        """What a layer has made of what it was given; an entry that it did not touch may be another module's."""
        for entry, (before, after) in enumerate(zip(given, arrays, strict=True)):
            if after is not None and after is not before:
                # A view of a longer array, as convolutions leave it, would keep all of that.
                self._made[number].layers[layer][entry] = mx.contiguous(after)

    def end(self) -> None:
        """Say that the step's graph is built."""
        self.to_compute += [array for made in self._made for array in made.close()]
        self._made = []

    def shapes(self, seq_id: int) -> list[tuple[tuple[int, ...], mx.Dtype]]:
        """What the state of one sequence consists of."""
        return [(array.shape[1:], array.dtype) for array in self._places[seq_id][0].arrays]


def content_of(state: _Batch) -> dict[str, mx.array]:
    """The arrays of one sequence's state, by names."""
    return {
        _array_name(layer, entry): array
        for layer, entries in enumerate(state.layers)
        for entry, array in enumerate(entries)
        if array is not None
    }


def _array_name(layer: int, entry: int) -> str:
    return f"s{layer}.{entry}"
