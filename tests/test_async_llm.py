"""AsyncLLM: streams for many tasks from one engine thread, and requests that end when nobody reads them."""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
from helpers.async_llms import GREEDY, LONG, SMALL, all_free, collect, engine_threads, load, run
from helpers.async_llms import no_thread_is_left as no_thread_is_left
from helpers.tiny_models import make_model
from mlx_lm.utils import load_tokenizer

from mlx_paged import LLM, AsyncLLM, BeamSearchParams, ModelError, SamplingParams
from mlx_paged.outputs import BeamHypothesis, BeamSearchOutput, RequestOutput


def test_what_many_tasks_get_at_once_is_what_each_would_get_alone() -> None:
    prompts = [[i + 1] * (2 + 3 * (i % 4)) for i in range(12)]
    params = [SamplingParams(seed=i, temperature=i % 2, n=1 + i % 3, max_tokens=4 + i) for i in range(12)]
    alone = [[one.token_ids for one in load().generate(*pair)[0].outputs] for pair in zip(prompts, params, strict=True)]

    async def main() -> list[list[list[int]]]:
        async with AsyncLLM.from_loader(load) as llm:
            streams = [llm.generate(*pair) for pair in zip(prompts, params, strict=True)]
            together = await asyncio.gather(*map(collect, streams))
            assert all_free(await llm.stats())
            return together

    assert run(main()) == alone


def test_requests_of_several_tasks_share_their_steps() -> None:
    async def main() -> None:
        async with AsyncLLM.from_loader(lambda: load(num_kv_blocks=256)) as llm:
            first = llm.generate([1, 2, 3], LONG)
            await anext(first)
            await asyncio.gather(*[collect(llm.generate([i + 4] * 5, LONG)) for i in range(5)], collect(first))
            assert (await llm.stats()).num_steps < 2 * 150

    run(main())


def test_the_deltas_are_those_of_stream() -> None:
    params = SamplingParams(seed=3, n=2, max_tokens=9, logprobs=1)

    async def main() -> list[RequestOutput]:
        async with AsyncLLM.from_loader(load) as llm:
            return [output async for output in llm.generate([5, 9, 2], params)]

    deltas = run(main())
    expected = list(load().stream([5, 9, 2], params))
    assert [delta.finished for delta in deltas] == [delta.finished for delta in expected]
    assert [delta.outputs for delta in deltas] == [delta.outputs for delta in expected]


def test_chat_answers_through_the_models_template(demo_folder: Path) -> None:
    tokenizer = load_tokenizer(demo_folder, eos_token_ids=4)
    messages = [{"role": "user", "content": "Where is the ball?"}]

    async def main() -> str:
        async with AsyncLLM.from_loader(lambda: load(tokenizer)) as llm:
            with pytest.raises(ValueError, match="empty"):
                await anext(llm.chat([]))
            return "".join([output.outputs[0].text async for output in llm.chat(messages, GREEDY)])

    assert run(main()) == load(tokenizer).chat(messages, GREEDY).outputs[0].text != ""


def test_a_beam_search_gives_its_one_output() -> None:
    output = BeamSearchOutput(7, None, [1, 2], [BeamHypothesis([3], "", -0.5, -0.5)], True)

    def loader() -> LLM:
        llm = load()
        made: list[Any] = []
        engine: Any = llm.engine
        engine.input_processor.make_request = lambda *asked, **more: made.append(asked) or asked
        engine.submit = lambda request: 7
        engine.has_unfinished = lambda: bool(made)
        engine.step = iter([[], [output]]).__next__
        engine.abort = lambda request_id: pytest.fail("it had ended")
        asked.append(made)
        return llm

    asked: list[list[Any]] = []

    async def main() -> BeamSearchOutput:
        llm = AsyncLLM.from_loader(loader)
        try:
            return await llm.beam_search([1, 2], BeamSearchParams(beam_width=2))
        finally:
            asked[0].clear()
            await llm.aclose()

    assert run(main()) is output


def test_a_beam_search_among_generates_is_what_it_is_alone() -> None:
    params = BeamSearchParams(beam_width=3, max_tokens=6)
    (alone,) = load().beam_search([[5, 9, 2, 7]], params)

    async def main() -> BeamSearchOutput:
        async with AsyncLLM.from_loader(load) as llm:
            found, *_ = await asyncio.gather(
                llm.beam_search([5, 9, 2, 7], params), *[collect(llm.generate([i + 1] * 4, GREEDY)) for i in range(3)]
            )
            assert all_free(await llm.stats())
            return found

    found = run(main())
    assert [one.token_ids for one in found.sequences] == [one.token_ids for one in alone.sequences]


async def _cancel(stream: Any) -> None:
    begun = asyncio.Event()

    async def read() -> None:
        async for _ in stream:
            begun.set()

    task = asyncio.create_task(read())
    await begun.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def _break(stream: Any) -> None:
    async for _ in stream:
        break
    del stream
    await asyncio.sleep(0)  # the loop closes an iterator that nobody holds


async def _close(stream: Any) -> None:
    await anext(stream)
    await stream.aclose()


async def _time_out(stream: Any) -> None:
    await anext(stream)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(anext(stream), 0)


@pytest.mark.parametrize("leave", [_cancel, _break, _close, _time_out])
def test_a_client_that_leaves_in_the_middle_frees_its_blocks(leave: Callable[[Any], Coroutine[Any, Any, None]]) -> None:
    async def main() -> None:
        async with AsyncLLM.from_loader(load) as llm:
            held: list[bool] = []
            stay = llm.generate([9] * 6, LONG)
            first = (await anext(stay)).outputs[0].token_ids
            streams = [llm.generate([1] * 10, LONG)]
            held.append(all_free(await llm.stats()))
            await leave(streams.pop())
            stats = await llm.stats()
            rest = await collect(stay)
            assert stats.num_blocks - stats.num_free_blocks <= 150 // 4  # those of the one that stays
            assert held == [False] and all_free(await llm.stats())
            assert [first + rest[0]] == [one.token_ids for one in expected.outputs]

    (expected,) = load().generate([9] * 6, LONG)
    run(main())


def test_a_stream_that_is_never_begun_holds_nothing() -> None:
    async def main() -> None:
        async with AsyncLLM.from_loader(load) as llm:
            stream = llm.generate([1] * 10, GREEDY)
            stats = await llm.stats()
            assert all_free(stats) and stats.num_steps == 0
            del stream

    run(main())


def test_a_client_that_never_reads_stalls_nobody_and_misses_nothing() -> None:
    async def main() -> list[list[int]]:
        async with AsyncLLM.from_loader(load) as llm:
            idle = llm.generate([1] * 5, GREEDY)
            first = (await anext(idle)).outputs[0].token_ids
            for i in range(5):
                await collect(llm.generate([i + 2] * 5, GREEDY))
            rest = await collect(idle)  # none, if the first output came so late that it was all
            return [first + (rest[0] if rest else [])]

    (expected,) = load().generate([1] * 5, GREEDY)
    assert run(main()) == [expected.outputs[0].token_ids]


@pytest.mark.parametrize(
    "prompt, error, message",
    [([], ValueError, "empty"), ([97], ValueError, "97"), ([1] * 300, ValueError, "300"), ("text", ValueError, "token"),
     ([0.5], TypeError, "token ids")],
)  # fmt: skip
def test_a_bad_prompt_is_its_callers_error_and_nobody_elses(prompt: Any, error: type[Exception], message: str) -> None:
    async def main() -> None:
        async with AsyncLLM.from_loader(load) as llm:
            good = llm.generate([1, 2], GREEDY)
            first = (await anext(good)).outputs[0].token_ids
            with pytest.raises(error, match=message) as caught:
                await anext(llm.generate(prompt, GREEDY))
            assert not any("engine.py" in str(entry.path) for entry in caught.traceback)
            assert len(first + (await collect(good))[0]) == 8
            assert all_free(await llm.stats())

    run(main())


def test_a_model_that_cannot_be_had_is_the_callers_error_and_leaves_no_thread(capfd: pytest.CaptureFixture) -> None:
    before = engine_threads()
    with pytest.raises(ModelError, match="did you mean") as caught:
        AsyncLLM("qwen22")
    assert [entry.path.name for entry in caught.traceback][1:] == ["async_llm.py", "async_llm.py", "engine_thread.py"]
    with pytest.raises(ValueError, match="block_size"):
        AsyncLLM(block_size=0)
    with pytest.raises(TypeError, match="page_size"):
        AsyncLLM(page_size=4)
    assert engine_threads() == before
    assert capfd.readouterr() == ("", "")


def test_a_surprise_while_loading_keeps_its_traceback_as_text() -> None:
    def loader() -> LLM:
        model = make_model("llama", **SMALL)
        weakref.finalize(model, lambda: ended_in.append(threading.current_thread().name))
        raise KeyError(type(model).__name__)

    ended_in: list[str] = []
    with pytest.raises(KeyError, match="Model") as caught:
        AsyncLLM.from_loader(loader)
    assert "in loader" in caught.value.__notes__[0]
    assert ended_in == ["mlx-paged engine"]


def test_it_may_be_made_beside_a_running_loop() -> None:
    async def main() -> None:
        async with await asyncio.to_thread(AsyncLLM.from_loader, load) as llm:
            assert len(await collect(llm.generate([1, 2], GREEDY))) == 1

    run(main())
