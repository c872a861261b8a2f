"""What a model's makers recommend for sampling, and what the command line gives instead."""

from __future__ import annotations

from helpers.stub_llm import Run

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
