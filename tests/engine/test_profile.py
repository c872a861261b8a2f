"""Where a step's time goes: the parts add up, the trace can be opened, and nothing is kept unless it is asked for."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.tiny_models import make_model

import mlx_paged.engine.profile
from mlx_paged import LLM, BeamSearchParams, SamplingParams
from mlx_paged.engine.profile import PARTS, Profile

GREEDY = SamplingParams(temperature=0, max_tokens=7, ignore_eos=True)
PROMPTS = [list(range(1, 24)), [5] * 9, [7, 8]]


def ticking(*times: int) -> Profile:
    """A profile over a clock that shows these nanoseconds, one after another."""
    moments: Iterator[int] = iter((0, *times))
    return Profile(now=lambda: next(moments))


def trace_of(profile: Profile, folder: Path) -> list[dict[str, Any]]:
    """The events of the trace that take time, as they are in its file."""
    profile.write(folder / "trace.json")
    content = json.loads((folder / "trace.json").read_text())
    assert content["displayTimeUnit"] == "ms"
    named = {event["name"]: event["args"]["name"] for event in content["traceEvents"] if event["ph"] == "M"}
    assert named == {"process_name": "mlx-paged", "thread_name": "engine"}
    events = [event for event in content["traceEvents"] if event["ph"] != "M"]
    for event in events:
        assert set(event) == {"name", "ph", "pid", "tid", "ts", "dur", "args"}
        assert (event["ph"], event["pid"], event["tid"]) == ("X", 1, 1)
        assert event["ts"] >= 0 and event["dur"] >= 0
    return events


def own_times(events: list[dict[str, Any]]) -> list[dict[str, float]]:
    """Of each step the microseconds of its parts, without what is inside them; fails if two events half overlap."""
    steps: list[dict[str, float]] = []
    around: list[tuple[str, float]] = []  # what we are in: names and ends
    for event in events:
        while around and around[-1][1] <= event["ts"] + 1e-4:
            around.pop()
        assert (event["name"] == "step") == (not around)
        end = event["ts"] + event["dur"]
        if around:
            assert end <= around[-1][1] + 1e-4, f"{event} ends after {around[-1]}, in which it began"
            steps[-1][around[-1][0]] -= event["dur"]
        else:
            steps.append(dict.fromkeys(["step", *PARTS], 0.0))
        steps[-1][event["name"]] += event["dur"]
        around.append((event["name"], end))
    for step in steps:
        step["rest"] = step.pop("step")
    return steps


def busy(llm: LLM) -> None:
    """All that steps can have to do: prompts, streams, samples, a search, copies."""
    search = BeamSearchParams(beam_width=3, max_tokens=6)
    llm.engine.add_request(PROMPTS[0], search)
    llm.engine.add_request(PROMPTS[1], SamplingParams(n=3, max_tokens=9, seed=1, ignore_eos=True))
    llm.engine.add_request(PROMPTS[2], GREEDY, stream=True)
    while llm.engine.has_unfinished():
        llm.engine.step()


# -- the profile by itself -----------------------------------------------------------------------------------------


def test_a_parts_time_is_its_own_and_what_is_left_is_the_rest() -> None:
    profile = ticking(10, 11, 15, 20, 100, 103, 110, 150, 170, 200)
    with profile.step(), profile.part("schedule"):  # 10 to 20, 11 to 15
        pass
    with profile.step(), profile.part("tokens"), profile.part("detokenise"):  # 100 to 200, 103 to 170, 110 to 150
        pass
    nanoseconds = {"schedule": 4, "tokens": 27, "detokenise": 40, "rest": 6 + 33}
    assert profile.seconds() == pytest.approx({name: nanoseconds.get(name, 0) / 1e9 for name in PARTS})
    assert profile.num_steps == 2


def test_a_part_that_comes_back_in_a_step_counts_each_time_and_inside_itself_once() -> None:
    profile = ticking(0, 10, 20, 30, 70, 110, 130, 200)
    with profile.step():
        with profile.part("submit"):  # 10 to 20
            pass
        with profile.part("submit"), profile.part("submit"):  # 30 to 130, and in it again from 70 to 110
            pass
    assert profile.seconds()["submit"] == pytest.approx(110e-9)
    assert profile.seconds()["rest"] == pytest.approx(90e-9)


def test_the_table_has_totals_means_the_longest_and_shares() -> None:
    profile = ticking(0, 1_000_000, 4_000_000, 10_000_000, 20_000_000, 21_000_000, 22_000_000, 30_000_000)
    for _ in range(2):
        with profile.step(), profile.part("wait"):
            pass
    lines = [line.split() for line in profile.table().splitlines()]
    assert ["wait", "0.004", "2.000", "3.000", "20.0%"] in lines
    assert ["rest", "0.016", "8.000", "9.000", "80.0%"] in lines
    assert ["schedule", "0.000", "0.000", "0.000", "0.0%"] in lines
    assert lines[-1] == ["2", "steps", "0.020", "10.000", "100.0%"]
    assert [line[0] for line in lines[1:-1]] == list(PARTS)


def test_a_profile_without_steps_has_a_table_and_a_trace(tmp_path: Path) -> None:
    assert Profile().table().endswith("0.0%")
    assert trace_of(Profile(), tmp_path) == []


def test_what_happens_between_steps_is_no_part_of_one(tmp_path: Path) -> None:
    profile = ticking(5, 8)
    with profile.part("detokenise"):
        pass
    with profile.step():
        pass
    assert profile.seconds()["detokenise"] == 0
    assert [event["name"] for event in trace_of(profile, tmp_path)] == ["step"]


def test_an_exception_ends_parts_and_steps_where_it_leaves_them(tmp_path: Path) -> None:
    profile = ticking(0, 10, 30, 100, 200, 210)
    with pytest.raises(KeyboardInterrupt), profile.step(), profile.part("build"):
        raise KeyboardInterrupt
    with profile.step():
        pass
    assert profile.seconds()["build"] == pytest.approx(20e-9)
    assert [step["rest"] for step in own_times(trace_of(profile, tmp_path))] == pytest.approx([0.08, 0.01])


def test_the_trace_keeps_the_latest_events_and_the_table_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mlx_paged.engine.profile, "MAX_EVENTS", 10)
    profile = Profile()
    for _ in range(20):
        with profile.step(), profile.part("wait"):
            pass
    assert profile.num_steps == 20
    assert [event["args"]["number"] for event in trace_of(profile, tmp_path)[::2]] == [16, 17, 18, 19, 20]


def test_events_that_take_no_time_still_nest(tmp_path: Path) -> None:
    profile = Profile(now=lambda: 7)
    with profile.step(), profile.part("tokens"), profile.part("detokenise"):
        pass
    assert [event["name"] for event in trace_of(profile, tmp_path)] == ["step", "tokens", "detokenise"]


def test_without_a_profile_a_part_makes_nothing() -> None:
    off = Profile(enabled=False)
    with off.step() as step, off.part("schedule") as part:
        off.describe(num_tokens=3)
    assert step is part is None and off.num_steps == 0 and not any(off.seconds().values())


# -- an engine's ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pipelining", ["off", "build", "submit"])
def test_the_parts_of_an_engines_steps_add_up_to_them(pipelining: str, demo_folder: Path, tmp_path: Path) -> None:
    llm = LLM(demo_folder, num_kv_blocks=200, block_size=8, pipelining=pipelining, profile=True)
    busy(llm)
    assert llm.profile is not None
    events = trace_of(llm.profile, tmp_path)
    steps = own_times(events)
    assert len(steps) == llm.profile.num_steps >= llm.stats().num_steps
    whole = [event["dur"] for event in events if event["name"] == "step"]
    assert [sum(step.values()) for step in steps] == pytest.approx(whole)
    told = llm.profile.seconds()
    for name in PARTS:
        assert sum(step[name] for step in steps) / 1e6 == pytest.approx(told[name])
        assert told[name] > 0, f"no time in {name}"
    assert sum(told.values()) == pytest.approx(sum(whole) / 1e6)
    stats = llm.stats()
    assert sum(told.values()) >= stats.host_time_s + stats.model_time_s - 1e-6  # which begin later and end sooner


@pytest.mark.parametrize("kind", ["stream", "search"])
def test_making_text_is_a_part_inside_the_taking_in_of_tokens(kind: str, demo_folder: Path, tmp_path: Path) -> None:
    llm = LLM(demo_folder, num_kv_blocks=50, profile=True)
    params = BeamSearchParams(beam_width=2, max_tokens=5) if kind == "search" else GREEDY
    llm.engine.add_request(PROMPTS[0], params, stream=kind == "stream")
    while llm.engine.has_unfinished():
        llm.engine.step()
    assert llm.profile is not None
    events = trace_of(llm.profile, tmp_path)
    texts = [event for event in events if event["name"] == "detokenise"]
    around = [event for event in events if event["name"] == "tokens"]
    assert len(texts) >= {"stream": GREEDY.max_tokens or 0, "search": 2}[kind]
    for text in texts:
        assert any(one["ts"] <= text["ts"] and text["ts"] + text["dur"] <= one["ts"] + one["dur"] for one in around)


def test_a_step_says_what_it_computed(demo_folder: Path, tmp_path: Path) -> None:
    llm = LLM(demo_folder, num_kv_blocks=50, max_num_batched_tokens=16, pipelining="off", profile=True)
    llm.generate([PROMPTS[0]], SamplingParams(temperature=0, max_tokens=3, ignore_eos=True))
    assert llm.profile is not None
    steps = [event["args"] for event in trace_of(llm.profile, tmp_path) if event["name"] == "step"]
    assert steps == [
        {"number": 1, "num_tokens": 16, "num_decodes": 0, "num_chunks": 1},
        {"number": 2, "num_tokens": 7, "num_decodes": 0, "num_chunks": 1},
        {"number": 3, "num_tokens": 1, "num_decodes": 1, "num_chunks": 0},
        {"number": 4, "num_tokens": 1, "num_decodes": 1, "num_chunks": 0},
    ]


def test_results_are_the_same_with_a_profile_and_without() -> None:
    model = make_model("llama")
    llms = [LLM.from_model(model, num_kv_blocks=100, profile=on) for on in (False, True)]
    one, other = ([output.outputs[0].token_ids for output in llm.generate(PROMPTS, GREEDY)] for llm in llms)
    assert one == other
    assert llms[0].profile is None and not llms[0].engine.profile.enabled
    assert llms[1].profile is not None


def test_a_step_that_fails_is_in_the_profile_and_the_next_ones_too(tmp_path: Path) -> None:
    llm = LLM.from_model(make_model("llama"), num_kv_blocks=100, profile=True)
    run, calls = llm.engine._runner.run, iter([False, True])

    def fail_in_the_second(inputs: Any) -> Any:
        if next(calls, False):
            raise RuntimeError("no more memory")
        return run(inputs)

    llm.engine._runner.run = fail_in_the_second  # type: ignore[method-assign]
    first, *_ = llm.generate(PROMPTS, GREEDY)
    assert first.outputs[0].finish_reason == "error"
    after_the_error, *_ = llm.generate(PROMPTS, GREEDY)
    assert after_the_error.outputs[0].finish_reason == "length"
    assert llm.profile is not None
    assert len(own_times(trace_of(llm.profile, tmp_path))) == llm.profile.num_steps


def test_an_abort_between_steps_leaves_the_parts_adding_up(demo_folder: Path, tmp_path: Path) -> None:
    llm = LLM(demo_folder, num_kv_blocks=50, profile=True)
    stream = llm.stream(PROMPTS[0], SamplingParams(temperature=0, max_tokens=50, ignore_eos=True))
    for _ in range(3):
        next(stream)
    stream.close()
    assert llm.profile is not None
    assert len(own_times(trace_of(llm.profile, tmp_path))) == llm.profile.num_steps


# -- the command line ----------------------------------------------------------------------------------------------


def command(*args: object) -> Any:
    from click.testing import CliRunner

    from mlx_paged.cli.main import cli

    return CliRunner().invoke(cli, [*map(str, args)])


@pytest.mark.parametrize("name", ["generate", "beam-search"])
def test_profile_writes_a_trace_and_shows_the_table_beside_the_same_answers(name: str, tmp_path: Path) -> None:
    ask = (name, "Tell me a story.", "What is in it?", "-m", 6, "--num-kv-blocks", 64)
    plain = command(*ask)
    profiled = command(*ask, "--profile", tmp_path / "trace.json")
    assert (profiled.exit_code, profiled.stdout) == (0, plain.stdout)
    assert all(line.startswith("mlx-paged: ") and "cut" in line for line in plain.stderr.splitlines())
    lines = profiled.stderr.removeprefix(plain.stderr).splitlines()
    assert [line.split()[0] for line in lines[1:-1]] == list(PARTS)
    assert lines[0].split()[:2] == ["total,", "s"] and " steps " in lines[-1]
    assert len(own_times_of_file(tmp_path / "trace.json")) >= 6
    quiet = command(*ask, "--profile", tmp_path / "trace.json", "-q")
    assert (quiet.exit_code, quiet.stdout, quiet.stderr) == (0, plain.stdout, "")


def own_times_of_file(path: Path) -> list[dict[str, float]]:
    events = json.loads(path.read_text())["traceEvents"]
    return own_times([event for event in events if event["ph"] == "X"])


@pytest.mark.parametrize("file", ["nowhere/trace.json", "."])
def test_a_file_that_cannot_be_written_is_bad_usage_in_one_line_before_anything_is_loaded(
    file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlx_paged.cli.loading.load_model", lambda *_: pytest.fail("a model was loaded"))
    result = command("generate", "Hello", "--profile", tmp_path / file)
    assert result.exit_code == 2
    assert result.stderr.startswith("mlx-paged: --profile: ") and result.stderr.count("\n") == 1
    assert str(tmp_path / file) in result.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full here")
def test_a_disk_that_is_full_at_the_end_is_one_line_after_the_answers() -> None:
    result = command("generate", "Hello", "-m", 3, "-q", "--num-kv-blocks", 64, "--profile", "/dev/full")
    assert result.exit_code == 1
    assert result.stdout != "" and result.stderr == "mlx-paged: [Errno 28] No space left on device\n"


@pytest.mark.parametrize(("error", "exit_code"), [(KeyboardInterrupt(), 130), (RuntimeError("no more"), 1)])
def test_a_command_that_is_interrupted_or_fails_still_writes_its_profile(
    error: BaseException, exit_code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlx_paged.cli.terminal import RunSummary

    counts = iter(range(100))

    def break_off(*_: object) -> None:
        if next(counts) == 3:
            raise error

    monkeypatch.setattr(RunSummary, "count", break_off)
    result = command("generate", "Tell me a story.", "--num-kv-blocks", 64, "--profile", tmp_path / "trace.json")
    assert result.exit_code == exit_code
    assert len(own_times_of_file(tmp_path / "trace.json")) >= 3


def test_prompts_that_are_all_refused_leave_nothing_to_show(tmp_path: Path) -> None:
    result = command("generate", "", "--profile", tmp_path / "trace.json")
    assert result.exit_code == 1
    assert result.stderr == "mlx-paged: the prompt is empty\n"
