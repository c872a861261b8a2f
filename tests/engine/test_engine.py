"""The engine's steps: requests join, leave, are aborted and preempted, and nobody else notices."""

from __future__ import annotations

import pytest
from helpers.engines import GREEDY, MakeEngine, complete, is_idle, run, tokens_of

from mlx_paged import SamplingParams
from mlx_paged.engine.engine import Engine
from mlx_paged.outputs import RequestOutput


def test_requests_join_and_leave_between_steps_without_touching_each_others_tokens(make_engine: MakeEngine) -> None:
    prompts = [[i + 1] * (3 * i + 1) for i in range(6)]
    params = [SamplingParams(seed=i, max_tokens=3 + 2 * i) for i in range(6)]
    alone = [tokens_of(complete(make_engine(), prompt, p)) for prompt, p in zip(prompts, params, strict=True)]
    engine = make_engine(max_num_seqs=3, max_num_batched_tokens=5)
    finished: dict[int, RequestOutput] = {}
    for prompt, p in zip(prompts, params, strict=True):
        engine.add_request(prompt, p)
        for _ in range(2):
            finished |= {output.request_id: output for output in engine.step() if output.finished}
    finished |= run(engine)
    assert [tokens_of(finished[i]) for i in range(6)] == alone
    assert is_idle(engine)


@pytest.mark.parametrize("num_steps", range(6))
@pytest.mark.parametrize("n", [1, 3])
def test_a_request_can_be_aborted_at_any_moment(make_engine: MakeEngine, num_steps: int, n: int) -> None:
    engine = make_engine(max_num_batched_tokens=5)
    other = tokens_of(complete(make_engine(), [7] * 6, GREEDY))
    doomed = engine.add_request([3] * 12, SamplingParams(seed=1, n=n, max_tokens=9))
    survivor = engine.add_request([7] * 6, GREEDY)
    finished: dict[int, RequestOutput] = {}
    for _ in range(num_steps):
        finished |= {output.request_id: output for output in engine.step()}
    aborted = engine.abort(doomed)
    assert aborted is not None and aborted.finished
    assert {output.finish_reason for output in aborted.outputs} == {"abort"}
    assert engine.abort(doomed) is None
    finished |= run(engine)
    assert tokens_of(finished[survivor]) == other
    assert doomed not in finished
    assert is_idle(engine)


def test_an_aborted_request_gives_back_what_it_has_so_far(make_engine: MakeEngine) -> None:
    engine = make_engine()
    whole = tokens_of(complete(engine, [5, 6], GREEDY))
    request_id = engine.add_request([5, 6], GREEDY)
    for _ in range(4):
        engine.step()
    aborted = engine.abort(request_id)
    assert aborted is not None
    assert tokens_of(aborted) == whole[:3]


def test_aborting_an_id_that_was_never_given_is_a_key_error_and_an_ended_one_is_none(make_engine: MakeEngine) -> None:
    engine = make_engine()
    for request_id in (0, -1, 7):
        with pytest.raises(KeyError, match=str(request_id)):
            engine.abort(request_id)
    complete(engine, [1], GREEDY)
    assert engine.abort(0) is None
    with pytest.raises(KeyError):
        engine.abort(1)


@pytest.mark.parametrize("prefix_caching", [True, False])
def test_a_pool_that_just_fits_the_longest_request_preempts_and_changes_no_token(
    make_engine: MakeEngine, prefix_caching: bool
) -> None:
    prompts = [[i + 1] * (4 + i) for i in range(5)]
    params = [SamplingParams(seed=i, max_tokens=14) for i in range(5)]
    roomy = make_engine()
    ids = [roomy.add_request(*pair) for pair in zip(prompts, params, strict=True)]
    expected = [tokens_of(output) for _, output in sorted(run(roomy).items())]
    assert roomy.stats().num_preemptions == 0
    tight = make_engine(num_kv_blocks=6, prefix_caching=prefix_caching)
    assert [tight.add_request(*pair) for pair in zip(prompts, params, strict=True)] == ids
    assert [tokens_of(output) for _, output in sorted(run(tight).items())] == expected
    assert tight.stats().num_preemptions > 0
    assert is_idle(tight)


def test_compaction_between_steps_changes_no_token(make_engine: MakeEngine) -> None:
    def serve(engine: Engine, compact: bool) -> tuple[list[list[int]], int]:
        for i in range(4):
            engine.add_request([i + 1] * (5 + i), SamplingParams(seed=i, n=2, max_tokens=4 + 3 * i))
        finished: dict[int, RequestOutput] = {}
        moved = 0
        while engine.has_unfinished():
            finished |= {output.request_id: output for output in engine.step()}
            if compact:
                moved += engine.compact()
        return [one.token_ids for _, output in sorted(finished.items()) for one in output.outputs], moved

    plain, _ = serve(make_engine(), compact=False)
    compacted, moved = serve(make_engine(), compact=True)
    assert moved > 0, "the premise: requests that end leave holes"
    assert compacted == plain
