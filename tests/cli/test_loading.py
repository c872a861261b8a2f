"""What a model's makers recommend for sampling, and what loading says of a model whose layers keep states."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.families import family_model
from helpers.stub_llm import Run, assert_one_line, invoke
from mlx_lm.utils import save_config, save_model

from mlx_paged.sampling_params import SamplingParams

RECOMMENDED = {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "min_p": 0.1, "repetition_penalty": 1.05}


def test_a_command_samples_as_the_model_recommends_and_greedily_where_it_does_not_say(run: Run) -> None:
    run("generate", "Hi")
    assert run.params == SamplingParams(temperature=0.0, max_tokens=256, stop=())
    run.stub.sampling_defaults = RECOMMENDED
    run("generate", "Hi")
    assert run.params == SamplingParams(**RECOMMENDED, max_tokens=256, stop=())
    run.stub.sampling_defaults = {"top_p": 0.8}
    run("generate", "Hi")
    assert (run.params.temperature, run.params.top_p) == (0.0, 0.8)


def test_what_is_given_wins_even_if_it_is_the_usual_default(run: Run) -> None:
    run.stub.sampling_defaults = RECOMMENDED
    given = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
    args = [part for name, value in given.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    run("generate", *args, "Hi")
    assert run.params == SamplingParams(**given, max_tokens=256, stop=())
    run("generate", "--temp", "0", "Hi")
    assert (run.params.temperature, run.params.top_k) == (0.0, 20)


def test_verbose_shows_what_is_the_models_and_others_are_told_nothing(run: Run) -> None:
    run.stub.sampling_defaults = RECOMMENDED
    line = "sampling as the model's generation_config.json has it: temperature 0.7, top_k 20, repetition_penalty 1.05"
    assert line in run("generate", "-v", "--top-p", "1", "--min-p", "0", "Hi").stderr.splitlines()
    assert "generation_config" not in run("generate", "Hi").stderr


def test_a_beam_search_takes_nothing_of_it(run: Run) -> None:
    run.stub.sampling_defaults = RECOMMENDED
    run.stub.output = lambda self, request, text, finished: None  # type: ignore[method-assign,assignment,return-value]
    run("beam-search", "Hi")
    assert not hasattr(run.params, "temperature")


@pytest.fixture
def hybrid_folder(request: pytest.FixtureRequest, tmp_path: Path, demo_folder: Path) -> Iterator[str]:
    """A tiny random Granite 4, or another family's model, with the demo model's tokenizer."""
    vocab_size = json.loads((demo_folder / "config.json").read_text())["vocab_size"]
    model = family_model(getattr(request, "param", "granitemoehybrid"), vocab_size=vocab_size)
    save_model(tmp_path, model)
    save_config(
        {name: value for name, value in vars(model.args).items() if value is not None}, tmp_path / "config.json"
    )
    for file in demo_folder.glob("*token*"):
        shutil.copy(file, tmp_path)
    with warnings.catch_warnings():  # which a command shows in its own way
        yield str(tmp_path)


@pytest.mark.parametrize("hybrid_folder", ["mamba", "rwkv7"], indirect=True)
def test_a_model_without_attention_takes_the_options_of_a_pool_and_is_inspected(hybrid_folder: str) -> None:
    for option, value in (("--num-kv-blocks", "4"), ("--kv-cache-memory", "2MB"), ("--max-model-len", "40")):
        command = ("generate", "--raw", "-q", "--model", hybrid_folder, option, value, "--max-num-seqs", "4")
        result = invoke(*command, "--max-tokens", "3", "Once")
        assert (result.exit_code, bool(result.stdout)) == (0, True), result.output
    result = invoke("inspect", hybrid_folder, "--lengths", "20,30", "--context", "64")
    assert result.exit_code == 0 and "no K and V" in result.output and "one state " in result.output


def test_that_fewer_sequences_run_for_want_of_memory_is_said_once_in_words_of_options(hybrid_folder: str) -> None:
    command = ("generate", "--raw", "--model", hybrid_folder, "--max-tokens", "2", "Once")
    result = invoke(*command, "--kv-cache-memory", "1MB", "--block-size", "4")
    assert result.exit_code == 0, result.output
    (line,) = [line for line in result.stderr.splitlines() if "instead of" in line]
    assert line.startswith("mlx-paged: --max-num-seqs is ") and "more with a larger --kv-cache-memory" in line
    assert " states, 2 of each sequence " in line and "max_num_seqs" not in result.stderr


def test_too_little_memory_for_the_states_of_one_sequence_is_one_line(hybrid_folder: str) -> None:
    result = invoke("generate", "--raw", "-q", "--model", hybrid_folder, "--kv-cache-memory", "20KB", "Once")
    assert_one_line(result, 1, "states of one sequence take", "give --kv-cache-memory more")
