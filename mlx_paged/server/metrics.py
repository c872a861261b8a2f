"""What a monitor reads, by the names that vLLM gives it, from a snapshot of the engine after its last steps."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Iterator
from typing import Any, cast

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp

from mlx_paged.server.errors import ApiError
from mlx_paged.server.service import Service

Answer = Callable[[Service, dict[str, Any], dict[str, Any]], Coroutine[Any, Any, ASGIApp]]


class Metrics:
    """Counts what the server does, beside what its engine counts."""

    def __init__(self, service: Service) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_EngineCollector(service))
        self._refused = Counter(
            "mlx_paged:rejected", "Requests that were refused, by status.", ["status"], registry=self._registry
        )

    def counted(self, answer: Answer) -> Answer:
        """The same endpoint, whose refusals are counted."""

        async def wrapped(service: Service, body: dict[str, Any], state: dict[str, Any]) -> ASGIApp:
            try:
                return await answer(service, body, state)
            except ApiError as error:
                self._refused.labels(str(error.status)).inc()
                raise

        return wrapped

    def page(self, request: Request) -> Response:
        """Answer GET /metrics."""
        return Response(generate_latest(self._registry), media_type=CONTENT_TYPE_LATEST)


class _EngineCollector(Collector):
    """The engine's counters."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def collect(self) -> Iterator[Metric]:
        """Read the last snapshot."""
        stats, name = self._service.llm.snapshot, self._service.options.names[0]

        def metric(kind: Any, key: str, text: str, value: float) -> Metric:
            family: Any = kind(f"vllm:{key}" if ":" not in key else key, text, labels=["model_name"])
            family.add_metric([name], value)
            return cast(Metric, family)

        used = 1 - stats.num_free_blocks / stats.num_blocks
        yield metric(GaugeMetricFamily, "num_requests_running", "Requests that run.", stats.num_running)
        yield metric(GaugeMetricFamily, "num_requests_waiting", "Requests that wait.", stats.num_waiting)
        yield metric(GaugeMetricFamily, "kv_cache_usage_perc", "Share of the blocks that sequences hold.", used)
        for key, text, value in (
            ("prefix_cache_queries", "Prompt tokens looked up in the prefix cache.", stats.prefix_query_tokens),
            ("prefix_cache_hits", "Prompt tokens found there.", stats.prefix_hit_tokens),
            ("num_preemptions", "Sequences that lost their blocks to others.", stats.num_preemptions),
            ("mlx_paged:cow_copies", "Shared blocks copied before a write.", stats.num_cow_copies),
            ("mlx_paged:swapped_blocks", "Blocks that went to a store.", stats.num_swapped_blocks),
            ("mlx_paged:steps", "Steps that computed something.", stats.num_steps),
        ):
            yield metric(CounterMetricFamily, key, text, value)
