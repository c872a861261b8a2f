"""AsyncLLM: streams for many tasks from one engine thread, and an end of that thread that is always clean."""

from __future__ import annotations

import asyncio
import gc
import os
import subprocess
import sys
import threading
import weakref
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from helpers.tiny_models import make_model
from mlx_lm.utils import load_tokenizer

import mlx_paged
from mlx_paged import LLM, AsyncLLM, BeamSearchParams, ModelError, SamplingParams
from mlx_paged.outputs import BeamHypothesis, BeamSearchOutput, EngineStats, RequestOutput

SMALL = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 48}
GREEDY = SamplingParams(temperature=0, max_tokens=8)
LONG = SamplingParams(temperature=0, max_tokens=150)


def load(tokenizer: Any = None, **config: Any) -> LLM:
    """A tiny random model in blocks of 4 that verifies itself after every step; always the same one."""
    model = make_model("llama", **SMALL, **({"vocab_size": len(tokenizer)} if tokenizer else {}))
    config = {"block_size": 4, "num_kv_blocks": 64, "max_num_seqs": 8, "check_invariants": True} | config
    return LLM.from_model(model, tokenizer, **config)


def run(main: Coroutine[Any, Any, Any]) -> Any:
    """asyncio.run, where a hang fails instead of lasting."""

    async def limited() -> Any:
        async with asyncio.timeout(120):
            return await main

    return asyncio.run(limited())


async def collect(stream: AsyncIterator[RequestOutput]) -> list[list[int]]:
    """The token ids of each sample of a stream, put together."""
    samples: dict[int, list[int]] = {}
    async for output in stream:
        for sample in output.outputs:
            samples.setdefault(sample.index, []).extend(sample.token_ids)
    return list(samples.values())


def all_free(stats: EngineStats) -> bool:
    return stats.num_free_blocks == stats.num_blocks


def engine_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "mlx-paged engine"]


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    for thread in engine_threads():  # one that a finalizer has just asked to end
        thread.join(timeout=60)
    assert engine_threads() == []


# -- outputs ----------------------------------------------------------------------------------------------------


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
        engine.make_request = lambda prompt, params, stream=False: made.append((prompt, params, stream)) or made[-1]
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


# -- ends of a request ------------------------------------------------------------------------------------------


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
            return [first + (await collect(idle))[0]]

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
            await anext(good)
            with pytest.raises(error, match=message) as caught:
                await anext(llm.generate(prompt, GREEDY))
            assert not any("engine.py" in str(entry.path) for entry in caught.traceback)
            assert len((await collect(good))[0]) == 7
            assert all_free(await llm.stats())

    run(main())


# -- loading ----------------------------------------------------------------------------------------------------


def test_a_model_that_cannot_be_had_is_the_callers_error_and_leaves_no_thread(capfd: pytest.CaptureFixture) -> None:
    with pytest.raises(ModelError, match="did you mean") as caught:
        AsyncLLM("qwen22")
    assert [entry.path.name for entry in caught.traceback][1:] == ["async_llm.py"] * 3
    with pytest.raises(ValueError, match="block_size"):
        AsyncLLM(block_size=0)
    with pytest.raises(TypeError, match="page_size"):
        AsyncLLM(page_size=4)
    assert engine_threads() == []
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


# -- the end ----------------------------------------------------------------------------------------------------


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

        def make_request(*_: object, **__: object) -> None:
            raise SystemExit

        llm.engine.make_request = make_request  # type: ignore[assignment, method-assign]
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


# -- threads and loops ------------------------------------------------------------------------------------------


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


def test_a_hundred_lives_leave_no_thread_and_no_memory() -> None:
    async def main() -> None:
        llm = AsyncLLM.from_loader(lambda: load(num_kv_blocks=40))
        stream = llm.generate([1, 2, 3], LONG)
        await anext(stream)
        await llm.aclose()
        assert [output.finished async for output in stream][-1]

    for life in range(100):
        run(main())
        assert engine_threads() == []
        if life == 9:
            gc.collect()
            used = mx.get_active_memory()
    gc.collect()
    assert mx.get_active_memory() <= used


# -- ends of a process ------------------------------------------------------------------------------------------

PROCESS = """
import asyncio, signal, sys, threading
from helpers.tiny_models import make_model
from mlx_paged import LLM, AsyncLLM, SamplingParams

state = sys.argv[1]
LONG = SamplingParams(temperature=0, max_tokens=150, ignore_eos=True)

def load():
    model = make_model("llama", num_hidden_layers=2, hidden_size=32, intermediate_size=48)
    return LLM.from_model(model, block_size=4, num_kv_blocks=256)

async def finished(llm):
    async for _ in llm.generate([1, 2, 3], SamplingParams(temperature=0, max_tokens=5)):
        pass

async def begun(llm):
    stream = llm.generate([4, 5, 6], LONG)
    await anext(stream)
    return stream

async def main():
    llm = AsyncLLM.from_loader(load)
    if state == "finished":
        await finished(llm)
        await llm.aclose()
    elif state == "middle":
        stream = await begun(llm)
    elif state == "not closed":
        await finished(llm)
    elif state == "closed in the middle":
        stream = await begun(llm)
        llm.close()
    elif state == "exception":
        await begun(llm)
        raise ValueError("on purpose")
    elif state == "exit":
        stream = await begun(llm)
        sys.exit(3)
    elif state == "interrupted":
        stream = await begun(llm)
        signal.raise_signal(signal.SIGINT)
        await asyncio.sleep(60)

if state == "never used":
    llm = AsyncLLM.from_loader(load)
elif state == "loop left behind":
    llm = AsyncLLM.from_loader(load)
    loop = asyncio.new_event_loop()
    stream = loop.run_until_complete(begun(llm))
elif state == "another thread's":
    thread = threading.Thread(target=lambda: asyncio.run(begun(AsyncLLM.from_loader(load))))
    thread.start()
elif state == "load error":
    try:
        AsyncLLM.from_loader(lambda: (load(), 1 / 0))
    except ZeroDivisionError:
        pass
elif state == "several":
    llms = [AsyncLLM.from_loader(load) for _ in range(3)]
    for llm in llms:
        asyncio.run(finished(llm))
    llms[0].close()
    streams = asyncio.run(begun(llms[1]))
else:
    asyncio.run(main())
"""
EXPECTED_ENDS = {
    "finished": (0, ""),
    "middle": (0, ""),
    "never used": (0, ""),
    "not closed": (0, ""),
    "closed in the middle": (0, ""),
    "exception": (1, "ValueError: on purpose"),
    "exit": (3, ""),
    "interrupted": (-2, "KeyboardInterrupt"),
    "loop left behind": (0, ""),
    "another thread's": (0, ""),
    "load error": (0, ""),
    "several": (0, ""),
}
NUM_ENDS = 100 if os.environ.get("MLX_PAGED_LONG_TESTS") == "1" else len(EXPECTED_ENDS)


def end_of_process(state: str) -> tuple[int, str]:
    """Exit code and the last line of stderr of a process that ends in a state."""
    roots = [str(Path(__file__).parent), str(Path(next(iter(mlx_paged.__path__))).parent)]
    path = os.pathsep.join(filter(None, [*roots, os.environ.get("PYTHONPATH")]))
    result = subprocess.run(
        [sys.executable, "-c", PROCESS, state], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path}
    )
    return result.returncode, "" if not result.stderr else result.stderr.splitlines()[-1]


def test_a_process_ends_cleanly_a_hundred_times() -> None:
    """Twelve times, each in another state; with MLX_PAGED_LONG_TESTS=1 the hundred."""
    states = [list(EXPECTED_ENDS)[number % len(EXPECTED_ENDS)] for number in range(NUM_ENDS)]
    with ThreadPoolExecutor(2) as pool:
        ends = list(pool.map(end_of_process, states))
    unclean = [(state, end) for state, end in zip(states, ends, strict=True) if end != EXPECTED_ENDS[state]]
    assert unclean == []
