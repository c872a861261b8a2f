"""What is derived from an output: times of a request, numbers of tokens."""

from mlx_paged.outputs import BeamHypothesis, BeamSearchOutput, CompletionOutput, RequestMetrics, RequestOutput


def test_times_are_seconds_between_the_moments_of_a_request() -> None:
    metrics = RequestMetrics(arrival_time=10, first_scheduled_time=11, first_token_time=13, finished_time=23)
    assert (metrics.queue_time, metrics.time_to_first_token, metrics.total_time) == (1, 3, 13)
    assert metrics.time_per_output_token(11) == 1


def test_times_are_unknown_until_both_of_their_moments_are_there() -> None:
    metrics = RequestMetrics(arrival_time=10)
    assert (metrics.queue_time, metrics.time_to_first_token, metrics.total_time) == (None, None, None)
    assert metrics.time_per_output_token(5) is None
    metrics.first_token_time = 12
    assert metrics.time_to_first_token == 2
    assert metrics.time_per_output_token(5) is None
    metrics.finished_time = 12
    assert metrics.time_per_output_token(1) is None
    assert metrics.time_per_output_token(2) == 0


def test_a_moment_at_zero_is_known() -> None:
    assert RequestMetrics(arrival_time=-1, first_scheduled_time=0).queue_time == 1


def test_tokens_are_those_of_all_samples_or_hypotheses() -> None:
    samples = [CompletionOutput(0, "", [1, 2], 0.0), CompletionOutput(1, "", [3], 0.0)]
    assert RequestOutput(0, None, [7, 8, 9], samples).num_output_tokens == 3
    hypotheses = [BeamHypothesis([1, 2], "", 0.0, 0.0), BeamHypothesis([3, 4, 5], "", 0.0, 0.0)]
    assert BeamSearchOutput(0, None, [7], hypotheses).num_output_tokens == 5
