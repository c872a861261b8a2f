"""What a monitor reads, by the names that vLLM gives it: what requests were, and the engine after its last steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, cast

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from mlx_paged.outputs import EngineStats, RequestOutput

_SECONDS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 30, 60, 120, 300)
_SIZE_BUCKETS = 15  # of steps: up to 16,384 tokens
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)


class Metrics:
    """Counts what the server does, beside what its engine counts."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self, snapshot: Callable[[], EngineStats], model_name: str) -> None:
        """snapshot: reads the engine's counters as they were lately."""
        self._model = model_name
        self._registry = CollectorRegistry()
        self._registry.register(_EngineCollector(snapshot, model_name))
        self._prompt_tokens = self._make(Counter, "vllm:prompt_tokens", "Tokens of prompts.")
        self._output_tokens = self._make(Counter, "vllm:generation_tokens", "Tokens that were put out.")
        self._success = self._make(
            Counter, "vllm:request_success", "Samples that ended, by why.", labels=("finished_reason",)
        )
        self._first_token = self._times("time_to_first_token", "From the arrival to the first token.")
        self._per_token = self._times("time_per_output_token", "From a token to the next, as a request's mean.")
        self._total_time = self._times("e2e_request_latency", "From the arrival to the end.")
        self._queue_time = self._times("request_queue_time", "From the arrival to the first step.")
        self._prompt_lens = self._make(Histogram, "vllm:request_prompt_tokens", "Tokens of a prompt.", buckets=_TOKENS)
        self._output_lens = self._make(
            Histogram, "vllm:request_generation_tokens", "Tokens that a request put out.", buckets=_TOKENS
        )
        self._refused = self._make(Counter, "mlx_paged:rejected", "Requests refused, by status.", labels=("status",))
        self.clients = self._make(Gauge, "mlx_paged:http_clients", "Clients that are being answered.")

    def _times(self, name: str, text: str) -> Any:
        return self._make(Histogram, f"vllm:{name}_seconds", text, buckets=_SECONDS)

    def _make(self, kind: Any, name: str, text: str, *, labels: tuple[str, ...] = (), **more: Any) -> Any:
        metric = kind(name, text, ("model_name", *labels), registry=self._registry, **more)
        return metric if labels else metric.labels(self._model)

    def refused(self, status: int) -> None:
        """Count a request that was refused."""
        self._refused.labels(self._model, str(status)).inc()

    def finished(self, last: RequestOutput, num_tokens: int) -> None:
        """Count a request that has ended. num_tokens: that it has put out in all."""
        self._prompt_tokens.inc(len(last.prompt_token_ids))
        self._output_tokens.inc(num_tokens)
        self._prompt_lens.observe(len(last.prompt_token_ids))
        self._output_lens.observe(num_tokens)
        for sample in last.outputs:
            self._success.labels(self._model, str(sample.finish_reason)).inc()
        if (times := last.metrics) is not None:
            for metric, seconds in (
                (self._first_token, times.time_to_first_token),
                (self._per_token, times.time_per_output_token(num_tokens // max(1, len(last.outputs)))),
                (self._total_time, times.total_time),
                (self._queue_time, times.queue_time),
            ):
                if seconds is not None:
                    metric.observe(seconds)

    def text(self) -> bytes:
        """Write everything in Prometheus' format."""
        return generate_latest(self._registry)


class _EngineCollector(Collector):
    """The engine's counters, as its last snapshot has them."""

    def __init__(self, snapshot: Callable[[], EngineStats], model_name: str) -> None:
        self._snapshot = snapshot
        self._model = model_name

    def collect(self) -> Iterator[Metric]:
        """Read the last snapshot."""
        stats = self._snapshot()
        used = 1 - stats.num_free_blocks / stats.num_blocks
        for key, text, value in (
            ("vllm:num_requests_running", "Sequences that run.", stats.num_running),
            ("vllm:num_requests_waiting", "Sequences that wait.", stats.num_waiting),
            ("mlx_paged:max_step_seconds", "What a step may take while requests stream.", stats.max_step_ms / 1000),
            ("vllm:kv_cache_usage_perc", "Share of the blocks that sequences hold, from 0 to 1.", used),
            ("mlx_paged:state_bytes", "Bytes of the states of recurrent layers that are held.", stats.state_bytes),
            ("mlx_paged:checkpoints", "Of these states, those a prompt can go on from.", stats.num_checkpoints),
        ):
            yield self._metric(GaugeMetricFamily, key, text, value)
        for key, text, value in (
            ("vllm:prefix_cache_queries", "Prompt tokens looked up in the prefix cache.", stats.prefix_query_tokens),
            ("vllm:prefix_cache_hits", "Prompt tokens found there.", stats.prefix_hit_tokens),
            ("vllm:num_preemptions", "Sequences that lost their blocks to others.", stats.num_preemptions),
            ("vllm:spec_decode_num_drafts", "How often a sequence had guessed tokens.", stats.num_drafts),
            ("vllm:spec_decode_num_draft_tokens", "Guessed tokens that were verified.", stats.num_draft_tokens),
            ("vllm:spec_decode_num_accepted_tokens", "Those that were right.", stats.num_accepted_tokens),
            ("mlx_paged:cow_copies", "Shared blocks copied before a write.", stats.num_cow_copies),
            ("mlx_paged:swapped_blocks", "Blocks that went to a store.", stats.num_swapped_blocks),
            ("mlx_paged:swapped_states", "States that went to a store.", stats.num_swapped_states),
            ("mlx_paged:steps", "Steps that computed something.", stats.num_steps),
        ):
            yield self._metric(CounterMetricFamily, key, text, value)

        sizes, counted, buckets = stats.step_sizes, 0, []
        for i, count in enumerate(sizes.counts[:_SIZE_BUCKETS]):
            counted += count
            buckets.append((str(float(1 << i)), float(counted)))
        steps = HistogramMetricFamily("vllm:iteration_tokens_total", "Tokens of a step.", labels=["model_name"])
        steps.add_metric([self._model], [*buckets, ("+Inf", float(sum(sizes.counts)))], sizes.num_tokens)
        yield steps

    def _metric(self, kind: Any, key: str, text: str, value: float) -> Metric:
        family = kind(key, text, labels=["model_name"])
        family.add_metric([self._model], value)
        return cast(Metric, family)
