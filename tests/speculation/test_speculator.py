"""How many drafts a step has, and what becomes of the tokens drawn after them."""

from __future__ import annotations

import numpy as np
import pytest

from mlx_paged.config import SpeculativeConfig
from mlx_paged.outputs import RequestMetrics
from mlx_paged.request import Request, Sequence
from mlx_paged.runner.in_flight import StepInFlight
from mlx_paged.sampling_params import BeamSearchParams, SamplingParams
from mlx_paged.scheduler.running_batch import RunningBatch
from mlx_paged.scheduler.schedule import Schedule, offsets_of
from mlx_paged.speculation.ngram import NgramProposer
from mlx_paged.speculation.speculator import Speculator
from mlx_paged.speculation.step_costs import StepCosts

FLAT = {1: 1.0, 128: 1.01}
STEEP = {1: 1.0, 128: 128.0}
MANY = 1000  # free blocks


def make_batch(*token_ids: list[int], max_tokens: int = 50, **params: object) -> RunningBatch:
    """A row for each sequence, whose last token is the only one that is not computed."""
    batch = RunningBatch(len(token_ids), 1, 64, 16)
    for number, tokens in enumerate(token_ids):
        asked = SamplingParams(**params)  # type: ignore[arg-type]
        request = Request(number, None, tokens[:1], asked, 0, max_tokens, False, RequestMetrics(0.0), is_forked=True)
        sequence = Sequence(number, request, 0, tokens)
        request.sequences.append(sequence)
        batch.add(sequence, len(tokens))
        batch.num_computed[sequence.row] -= 1
    return batch


def speculator(batch: RunningBatch, costs: dict[int, float] = FLAT, most: int = 512, **config: object) -> Speculator:
    asked = SpeculativeConfig(**config)  # type: ignore[arg-type]
    proposer = NgramProposer(asked.prompt_lookup_max, asked.prompt_lookup_min)
    return Speculator(asked, proposer, batch, StepCosts(costs), most)


def learn(speculator: Speculator, batch: RunningBatch, tokens: list[int]) -> None:
    """Let each sequence have these tokens, one after another."""
    for token in tokens:
        speculator.propose(MANY)
        for sequence in filter(None, batch.sequences):
            sequence.token_ids.append(token)
            batch.recount(sequence)
            batch.num_computed[sequence.row] += 1


def num_drafts(speculator: Speculator, num_free_blocks: int = MANY) -> list[int]:
    drafts = speculator.propose(num_free_blocks)
    return [] if drafts is None else [len(drafts.tokens.get(row, [])) for row in range(len(speculator.batch.sequences))]


def test_a_sequence_that_is_foretold_has_as_many_drafts_as_pay() -> None:
    for costs, expected in ((FLAT, [4]), (STEEP, [])):
        batch = make_batch([1, 2, 3])
        proposer = speculator(batch, costs)
        learn(proposer, batch, [1, 2, 3] * 12)
        assert num_drafts(proposer) == expected


@pytest.mark.parametrize(("most", "expected"), [(3, [2]), (8, [4]), (1, [4])])
def test_blocks_are_read_once_where_several_queries_can_share_a_read(most: int, expected: list[int]) -> None:
    batch = make_batch([1, 2, 3])
    proposer = speculator(batch)
    proposer.max_decode_queries = most
    learn(proposer, batch, [1, 2, 3] * 12)
    assert num_drafts(proposer) == expected


def test_what_is_not_foretold_has_none() -> None:
    batch = make_batch([1, 2, 3])
    proposer = speculator(batch)
    learn(proposer, batch, [*range(50, 80)])
    assert num_drafts(proposer) == []


def test_among_many_sequences_one_that_is_foretold_has_none_where_others_would_be_held_up() -> None:
    batch = make_batch([1, 2, 3], *([10 + i] for i in range(7)))
    proposer = speculator(batch, {1: 1.0, 8: 1.1, 16: 8.0})
    for i in range(40):
        proposer.propose(MANY)
        for sequence in filter(None, batch.sequences):
            sequence.token_ids.append([1, 2, 3][i % 3] if sequence.seq_id == 0 else 100 * sequence.seq_id + i)
            batch.recount(sequence)
    assert num_drafts(proposer) == []


class Dear(NgramProposer):
    """Proposes what costs something: as a draft model whose steps were measured while the machine had much to do."""

    def __init__(self) -> None:
        super().__init__(5, 2)
        self.costs = StepCosts({1: 3.0})

    def seconds(self, num_sequences: int, num_drafts: int) -> float:
        return num_drafts * self.costs.of(num_sequences)

    def skip(self) -> None:
        self.costs.fade()


def test_drafts_that_were_once_too_dear_are_tried_again_where_they_would_be_right() -> None:
    for tokens, expected in (([1, 2, 3], [1]), ([5], [])):
        batch = make_batch([1, 2, 3], max_tokens=4000)
        proposer = speculator(batch)
        proposer.proposer = dear = Dear()
        learn(proposer, batch, tokens * (30 // len(tokens)) if expected else list(range(30, 60)))
        assert num_drafts(proposer) == []
        learn(proposer, batch, tokens * (1500 // len(tokens)) if expected else list(range(100, 1600)))
        assert bool(num_drafts(proposer)) == bool(expected)
        assert (dear.costs.of(1) < 1.5) == bool(expected)


def test_always_means_always() -> None:
    assert num_drafts(speculator(make_batch([1, 2, 3, 1, 2]), STEEP, adaptive=False)) == [4]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [({"max_tokens": 3 + 2}, [0, 0]), ({"max_tokens": 3 + 4}, [2, 2]), ({"most": 5}, [3, 0]), ({"most": 6}, [4, 0])],
)
def test_there_are_no_more_than_there_is_room_for(settings: dict[str, int], expected: list[int]) -> None:
    """Of tokens of the output, one beside the drafts, and of the step."""
    batch = make_batch([1, 2, 3, 1, 2], [4, 5, 4, 5, 4], max_tokens=settings.get("max_tokens", 50))
    found = num_drafts(speculator(batch, most=settings.get("most", 512), adaptive=False))
    assert (found or [0, 0]) == expected


@pytest.mark.parametrize(("num_free", "expected"), [(4, [32, 0]), (5, [40, 0]), (6, [40, 16]), (9, [40, 40])])
def test_drafts_take_no_blocks_that_sequences_need_for_their_next_tokens(num_free: int, expected: list[int]) -> None:
    batch = make_batch([1, 2, 3, 1, 2], [4, 5, 4, 5, 4], max_tokens=200)  # blocks of 16
    assert num_drafts(speculator(batch, adaptive=False, num_speculative_tokens=40), num_free) == expected


def test_a_row_whose_last_token_is_being_drawn_waits_for_it() -> None:
    batch = make_batch([1, 2, 3, 1, 2])
    batch.num_tokens[0] += 1
    drafts = speculator(batch, adaptive=False).propose(MANY)
    assert drafts is not None and not drafts.tokens and drafts.waiting.tolist() == [True]


def test_nothing_is_proposed_where_blocks_are_few_or_a_processor_looks_on() -> None:
    assert speculator(make_batch([1, 2, 3, 1, 2]), adaptive=False).propose(1) is None
    batch = make_batch([1, 2, 3, 1, 2], logits_processors=[lambda _, logits: logits])
    assert speculator(batch, adaptive=False).propose(MANY) is None
    batch = make_batch([1, 2, 3, 1, 2])
    batch.sequences[0].request.params = BeamSearchParams(beam_width=2)  # type: ignore[union-attr]
    assert speculator(batch, adaptive=False).propose(MANY) is None


def test_tokens_are_handed_on_up_to_the_first_wrong_draft() -> None:
    batch = make_batch([1], [2], [3])
    drafts = {0: [10, 11, 12], 1: [77], 2: [30]}  # a form has dropped the place after the one of row 1
    step = StepInFlight(Schedule(drafts=drafts, num_tokens=7), np.array([0] * 4 + [1] + [2] * 2), batch.version)
    step.sampled_rows, step.sampled_version = step.rows, batch.version
    drawn = np.array([10, 11, 99, 98, 20, 31, 32])
    taken: list[tuple[list[int], list[int]]] = []
    counted: list[tuple[list[int], list[int]]] = []
    batch.num_computed[[0, 2]] += [4, 2]
    batch.num_tokens += 1  # by the draw
    proposer = speculator(batch, adaptive=False)
    proposer.process(
        step,
        [drawn],
        lambda rows, _, results: taken.append((rows.tolist(), results[0].tolist())),
        lambda rows, token_ids: counted.append((rows.tolist(), token_ids.tolist())),
    )
    assert taken == [([0, 1, 2], [10, 20, 31]), ([0], [11]), ([0], [99]), ([], [])]
    assert counted == [([0], [11]), ([0], [99]), ([], [])]
    assert (proposer.num_drafts, proposer.num_draft_tokens, proposer.num_accepted_tokens) == (2, 4, 2)
    assert batch.num_computed[[0, 2]].tolist() == [3, 1], "what is after the right ones is computed again"


def test_places_of_a_row_are_counted_from_its_first_one() -> None:
    assert offsets_of(np.array([4, 4, 4, 0, 7, 7])).tolist() == [0, 1, 2, 0, 0, 1]
    assert offsets_of(np.zeros(0, np.int64)).tolist() == []
