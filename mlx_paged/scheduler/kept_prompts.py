"""Prompts whose blocks are kept for samples that have not started: of a request that has more than can run at once.

A kept prompt is a sequence of the block managers that no row runs. It has all tokens of the prompt but the last, which
each sample computes for itself, into blocks of its own. Knows no mlx.
"""

from mlx_paged.blocks.cache_groups import CacheGroups
from mlx_paged.request import Request, Sequence


class KeptPrompts:
    """Gives waiting sequences their first blocks, those of a kept prompt where there is one."""

    def __init__(self, groups: CacheGroups) -> None:
        self._groups = groups
        self._waiting: dict[Request, set[Sequence]] = {}  # whom each is kept for, the one kept last at the end

    def keep(self, sequence: Sequence) -> None:
        """Keep what is computed of a request's first sequence: all of its prompt but the last token."""
        request = sequence.request
        self._groups.fork(sequence.seq_id, _id(request), request.prompt_token_ids)
        self._waiting[request] = {sequence}

    def wait(self, samples: list[Sequence]) -> None:
        """Keep a request's prompt, if it is kept, for these samples, which begin to wait."""
        if samples[0].request in self._waiting:
            self._waiting[samples[0].request] = set(samples)

    def has(self, sequence: Sequence) -> bool:
        """Say whether a prompt is kept for a sequence."""
        return sequence in self._waiting.get(sequence.request, ())

    def may_return(self, sequence: Sequence, num_running: int) -> bool:
        """Say whether a sequence that has lost its blocks, or never had any, leaves one for each that runs."""
        block_size = self._groups.block_size
        num_blocks = 1 if self.has(sequence) else -(-sequence.num_target_tokens // block_size)
        num_tails = 0 if sequence.num_shared_tokens is None else len(sequence.request.sequences)
        num_tails *= 1 + -(-len(sequence.token_ids) // block_size) - num_blocks
        return num_blocks + num_tails + num_running <= self._groups.num_free_blocks

    def attach(self, sequence: Sequence) -> int:
        """Give a waiting sequence blocks for what is to be computed of it. Returns how many tokens are cached.

        Raises OutOfBlocks.
        """
        request, token_ids = sequence.request, sequence.token_ids
        if not self.has(sequence):
            salt = request.params.cache_salt
            limit = request.max_cached_tokens
            num_tokens = sequence.num_target_tokens
            start = self._groups.attach(sequence.seq_id, token_ids, num_tokens, salt=salt, limit=limit)
            if self._groups.checkpoints is not None:
                self._groups.checkpoints.want(sequence.seq_id, request.num_opening, start)
            return start
        self._groups.fork(_id(request), sequence.seq_id, token_ids)
        return len(request.prompt_token_ids) - 1

    def done(self, sequence: Sequence) -> None:
        """Note that a sequence has started, or ended without that. A prompt is freed with the last one."""
        self._groups.forget(sequence.seq_id)
        waiting = self._waiting.get(sequence.request, set())
        waiting.discard(sequence)
        if not waiting and sequence.request in self._waiting:
            self._free(sequence.request)

    def give_up_last(self) -> bool:
        """Free the prompt that was kept last: its samples compute what is not cached. Returns whether there was one."""
        if self._waiting:
            self._free(next(reversed(self._waiting)))
            return True
        return False

    def clear(self) -> None:
        """Forget all, as the groups do."""
        self._waiting.clear()

    def _free(self, request: Request) -> None:
        del self._waiting[request]
        self._groups.free(_id(request))


def _id(request: Request) -> int:
    """The id of a request's kept prompt among sequences, whose ids are not negative."""
    return -1 - request.request_id
