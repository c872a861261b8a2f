"""The end of an AsyncLLM, of its engine and of its event loops leaves nobody waiting and nothing behind."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import mlx.core as mx
import pytest
from helpers.async_llms import GREEDY, LONG, all_free, collect, engine_threads, load, run
from helpers.async_llms import no_thread_is_left as no_thread_is_left
from helpers.budget import budget

from mlx_paged import LLM, AsyncLLM, SamplingParams
from mlx_paged.outputs import RequestOutput


def test_closing_ends_what_runs_with_abort_and_refuses_what_comes() -> None:
    async def main() -> None:
        llm = AsyncLLM.from_loader(load)
        streams = [llm.generate([i + 1] * 5, LONG) for i in range(3)]
        for stream in streams:
            await anext(stream)
        late = llm.generate([9], GREEDY)
        tasks = [asyncio.create_task(collect_outputs(stream)) for stream in streams]
        await llm.aclose()
        for outputs in await asyncio.gather(*tasks):
            assert outputs[-1].finished and outputs[-1].outputs[0].finish_reason == "abort"
            assert not any(output.finished for output in outputs[:-1])
        for refused in (anext(late), llm.stats(), llm.beam_search([1])):
            with pytest.raises(RuntimeError, match="this AsyncLLM is closed"):
                await refused
        await llm.aclose()
        llm.close()

    async def collect_outputs(stream: AsyncIterator[RequestOutput]) -> list[RequestOutput]:
        return [output async for output in stream]

    run(main())


@pytest.mark.parametrize("how", ["closed", "forgotten", "broken"])
def test_the_model_is_released_in_the_thread_that_ran_it(how: str) -> None:
    ended_in: list[str] = []

    def loader() -> LLM:
        llm = load()
        weakref.finalize(llm._runner, lambda: ended_in.append(threading.current_thread().name))
        if how == "broken":
            llm._runner.run = None  # type: ignore[assignment, method-assign]
            llm.engine.step = lambda: llm._runner.run(1)  # type: ignore[assignment, method-assign]
        return llm

    async def main() -> Any:
        llm = AsyncLLM.from_loader(loader)
        thread = llm._thread._thread
        caught = None
        try:
            await collect(llm.generate([1, 2], GREEDY))
        except RuntimeError as error:
            caught = error
        if how == "closed":
            llm.close()
        del llm
        gc.collect()
        await asyncio.to_thread(thread.join, 60)
        assert not thread.is_alive()
        return caught

    caught = run(main())
    assert (caught is not None) == (how == "broken")
    assert ended_in == ["mlx-paged engine"]


@pytest.mark.parametrize("error", [ValueError("odd"), SystemExit(3), KeyboardInterrupt(), MemoryError("full")])
def test_an_engine_that_breaks_tells_all_who_wait_and_all_who_come(
    error: BaseException, capfd: pytest.CaptureFixture
) -> None:
    def loader() -> LLM:
        llm = load()
        step, calls = llm.engine.step, iter(range(100))

        def breaking() -> list[RequestOutput]:
            if next(calls) == 5:
                raise error
            return step()

        llm.engine.step = breaking  # type: ignore[method-assign]
        return llm

    async def main() -> None:
        llm = AsyncLLM.from_loader(loader)
        streams = [collect(llm.generate([i + 1] * 5, LONG)) for i in range(3)]
        results = await asyncio.gather(*streams, return_exceptions=True)
        results += await asyncio.gather(llm.stats(), collect(llm.generate([1])), return_exceptions=True)
        for result in results:
            assert isinstance(result, RuntimeError)
            assert str(result) == f"the engine of this AsyncLLM broke: {type(error).__name__}: {error}"
            assert "in breaking" in result.__notes__[0]
        await llm.aclose()

    run(main())
    assert capfd.readouterr() == ("", "")


def test_even_an_exit_from_within_a_request_leaves_nobody_waiting() -> None:
    def loader() -> LLM:
        llm = load()

        def submit(*_: object) -> int:
            raise SystemExit

        llm.engine.submit = submit  # type: ignore[method-assign]
        return llm

    async def main() -> None:
        llm = AsyncLLM.from_loader(loader)
        results = await asyncio.gather(*[collect(llm.generate([1])) for _ in range(3)], return_exceptions=True)
        assert [type(result) for result in results] == [RuntimeError] * 3
        llm.close()

    run(main())


def test_what_is_asked_while_it_closes_is_answered_or_refused_but_never_left_waiting() -> None:
    async def main() -> None:
        for _ in range(10):
            llm = AsyncLLM.from_loader(load)
            tasks = []
            closing = asyncio.create_task(llm.aclose())
            while not closing.done():
                tasks.append(asyncio.create_task(collect(llm.generate([1, 2, 3], GREEDY))))
                await asyncio.sleep(0.001)
            results = await asyncio.gather(*tasks, return_exceptions=True)
            assert all(isinstance(result, list | RuntimeError) for result in results)

    run(main())


def test_several_event_loops_may_share_it() -> None:
    llm = AsyncLLM.from_loader(load)
    expected = [[one.token_ids for one in load().generate([i + 1] * 5, GREEDY)[0].outputs] for i in range(4)]
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda i: run(collect(llm.generate([i + 1] * 5, GREEDY))), range(4)))
    assert results == expected
    assert all_free(run(llm.stats()))
    llm.close()


def test_a_loop_that_is_closed_in_the_middle_takes_its_requests_with_it() -> None:
    llm = AsyncLLM.from_loader(lambda: load(num_kv_blocks=512))
    loop = asyncio.new_event_loop()
    stream = llm.generate([1] * 5, SamplingParams(temperature=0, max_tokens=1500, ignore_eos=True))
    loop.run_until_complete(anext(stream))  # type: ignore[arg-type]
    loop.close()

    async def steps_until_free() -> int:
        while not all_free(stats := await llm.stats()):
            pass
        return stats.num_steps

    assert run(steps_until_free()) < 1000
    llm.close()
    with pytest.raises(RuntimeError, match="closed"):
        run(llm.stats())


def test_an_idle_engine_sleeps() -> None:
    looks: list[str] = []

    def loader() -> LLM:
        llm = load()
        has_unfinished = llm.engine.has_unfinished
        llm.engine.has_unfinished = lambda: looks.append("") or has_unfinished()  # type: ignore[method-assign, func-returns-value]
        return llm

    async def main() -> None:
        async with AsyncLLM.from_loader(loader) as llm:
            await collect(llm.generate([1, 2], GREEDY))
            await llm.stats()
            before = len(looks)
            load()  # something that takes a while
            await llm.stats()
            assert len(looks) <= before + 2

    run(main())


@pytest.mark.slow
def test_many_lives_leave_no_thread_and_no_memory() -> None:
    """Six; with MLX_PAGED_LONG_TESTS=1 a thousand."""

    async def main() -> None:
        llm = AsyncLLM.from_loader(lambda: load(num_kv_blocks=40))
        stream = llm.generate([1, 2, 3], LONG)
        await anext(stream)
        await llm.aclose()
        assert [output.finished async for output in stream][-1]

    before = engine_threads()
    for life in range(budget(6, 1000)):
        run(main())
        assert engine_threads() == before
        if life == 2:
            gc.collect()
            used = mx.get_active_memory()
    gc.collect()
    assert mx.get_active_memory() <= used
