"""``/metrics``: the engine's steps and the requests' times in Prometheus' text format.

Each is exported as ``mixattn:<name>``; those that vLLM has too also under vLLM's name and labels, so that its
dashboards, autoscalers and routers read this server unchanged. An alias is the same numbers under a second name, made
when asked.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.metrics_core import HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

from mixattn.engine.client import RequestRecord
from mixattn.engine.ipc import EngineInfo, StepStats
from mixattn.metrics import EngineMetrics, SchedulerStats
from mixattn.types import FinishReason

CONTENT_TYPE = CONTENT_TYPE_LATEST

# Bounds in seconds: a step of a small model on a CPU takes milliseconds, a request up to minutes.
_STEP_BOUNDS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
_TTFT_BOUNDS_S = (
    0.001,
    0.005,
    0.01,
    0.02,
    0.04,
    0.06,
    0.08,
    0.1,
    0.25,
    0.5,
    0.75,
    1.0,
    2.5,
    5.0,
    7.5,
    10.0,
    20.0,
    40.0,
)
_REQUEST_BOUNDS_S = (0.05, 0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 60.0, 120.0, 240.0)
_TOKEN_BOUNDS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)

_PREFIX = "mixattn:"
_SAME_NAMES = (
    "num_requests_running",
    "num_requests_waiting",
    "kv_cache_usage_perc",
    "cache_config_info",
    "num_preemptions",
    "prompt_tokens",
    "generation_tokens",
    "request_success",
    "admission_rejections",
    "time_to_first_token_seconds",
    "inter_token_latency_seconds",
    "request_time_per_output_token_seconds",
    "e2e_request_latency_seconds",
    "request_queue_time_seconds",
    "request_decode_time_seconds",
    "request_prompt_tokens",
    "request_generation_tokens",
    "request_params_n",
    "request_params_max_tokens",
)
_VLLM_NAMES = {name: f"vllm:{name}" for name in _SAME_NAMES} | {"step_total_tokens": "vllm:iteration_tokens_total"}
"""Ours, without prefix, to vLLM's. Those of vLLM's names that we could not fill truthfully are left out."""

_Instrument = TypeVar("_Instrument", Counter, Gauge, Histogram)


class ServerMetrics(Collector):
    """Observes steps and requests (``engine.client.Observer``) and renders what it saw.

    Args:
        model_name: the label that all metrics carry.
        has_vllm_names: export the aliases.
    """

    def __init__(self, model_name: str, has_vllm_names: bool = True) -> None:
        self._model_name = model_name
        self._has_vllm_names = has_vllm_names
        self._instruments: list[Counter | Gauge | Histogram] = []
        self._last = SchedulerStats(0, 0, 0, 0, 0, 0, 0)
        self._queue_counts = EngineMetrics().queue_s.counts
        self._queue_total_s = 0.0

        self._running = self._gauge("num_requests_running", "Requests in the running batch.")
        self._waiting = self._gauge("num_requests_waiting", "Requests in the queue.")
        self._pages_free = self._gauge("kv_pages_free", "Pages of the KV pool that nobody holds.")
        self._pages_used = self._gauge("kv_pages_used", "Pages of the KV pool that requests hold.")
        self._pages_share = self._gauge("kv_cache_usage_perc", "Used share of the KV pool, in [0, 1].")
        self._token_budget = self._gauge("token_budget", "Query rows that a step may hold.")
        self._cache_config = self._gauge("cache_config_info", "The KV pool's shape.", "block_size", "num_gpu_blocks")

        self._steps = self._histogram("step_time_seconds", "Time of a step, planning included.", _STEP_BOUNDS_S)
        self._step_tokens = self._histogram("step_tokens", "Query rows of a step by kind.", _TOKEN_BOUNDS, "kind")
        self._step_total = self._histogram("step_total_tokens", "Query rows of a step.", _TOKEN_BOUNDS)
        self._preemptions = self._counter("num_preemptions", "Requests that lost their pages to be recomputed.")
        self._recomputed = self._counter("recomputed_tokens", "Query rows that a preemption threw away.")
        self._stalls = self._counter("decode_stalls", "Times that a running decode was left out of a step.")

        self._prompt_tokens = self._counter("prompt_tokens", "Prompt tokens of requests that got their first token.")
        self._generation_tokens = self._counter("generation_tokens", "Tokens generated.")
        self._success = self._counter("request_success", "Requests that ended.", "finished_reason")
        self._rejections = self._counter("admission_rejections", "Requests that were not taken.", "reason")
        self._ttft = self._histogram("time_to_first_token_seconds", "Arrival to first token.", _TTFT_BOUNDS_S)
        self._gaps = self._histogram("inter_token_latency_seconds", "Token to next token.", _STEP_BOUNDS_S)
        self._per_token = self._histogram(
            "request_time_per_output_token_seconds", "A request's mean gap between tokens.", _STEP_BOUNDS_S
        )
        self._e2e = self._histogram("e2e_request_latency_seconds", "Arrival to the last token.", _REQUEST_BOUNDS_S)
        self._decode_time = self._histogram(
            "request_decode_time_seconds", "First token to the last.", _REQUEST_BOUNDS_S
        )
        self._request_prompt = self._histogram("request_prompt_tokens", "Tokens of a prompt.", _TOKEN_BOUNDS)
        self._request_output = self._histogram("request_generation_tokens", "Tokens of an output.", _TOKEN_BOUNDS)
        self._params_n = self._histogram("request_params_n", "Choices asked for.", (1, 2, 5, 10, 20))
        self._params_max_tokens = self._histogram("request_params_max_tokens", "max_tokens.", _TOKEN_BOUNDS)

        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)

    def render(self) -> bytes:
        """The text of ``/metrics``."""
        return generate_latest(self._registry)

    def on_ready(self, info: EngineInfo) -> None:
        """The engine's shape is known."""
        self._token_budget.set(info.max_num_batched_tokens)
        self._cache_config.labels(str(info.page_size), str(info.num_pages)).set(1)
        self._pages_free.set(info.num_pages)

    def on_request(self, num_choices: int, max_tokens: int | None) -> None:
        """A valid request has come."""
        self._params_n.observe(num_choices)
        if max_tokens is not None:
            self._params_max_tokens.observe(max_tokens)

    def on_rejection(self, reason: str) -> None:
        """A valid request was not taken."""
        self._rejections.labels(reason).inc()

    def on_step(self, stats: StepStats) -> None:
        """A step has been made, or requests ended between steps."""
        scheduler = stats.scheduler
        self._running.set(scheduler.num_running)
        self._waiting.set(scheduler.num_waiting)
        self._pages_free.set(scheduler.num_pages_free)
        self._pages_used.set(scheduler.num_pages_used)
        self._pages_share.set(scheduler.num_pages_used / (scheduler.num_pages_used + scheduler.num_pages_free))
        self._preemptions.inc(scheduler.num_preemptions - self._last.num_preemptions)
        self._recomputed.inc(scheduler.num_recomputed_tokens - self._last.num_recomputed_tokens)
        self._stalls.inc(scheduler.num_decode_stalls - self._last.num_decode_stalls)
        self._last = scheduler
        self._queue_counts, self._queue_total_s = stats.queue_counts, stats.queue_total_s
        step = stats.step
        if step is not None:
            self._steps.observe(step.step_s)
            self._step_tokens.labels("prefill").observe(step.num_prefill_tokens)
            self._step_tokens.labels("decode").observe(step.num_decode_tokens)
            self._step_total.observe(step.num_prefill_tokens + step.num_decode_tokens)

    def on_first_token(self, record: RequestRecord, now: float) -> None:
        """A request's prompt has been read."""
        self._ttft.observe(now - record.arrival_s)
        self._prompt_tokens.inc(record.num_prompt_tokens)
        self._generation_tokens.inc()

    def on_next_token(self, gap_s: float) -> None:
        """A request has a token more."""
        self._gaps.observe(gap_s)
        self._generation_tokens.inc()

    def on_finish(self, record: RequestRecord, reason: FinishReason, now: float) -> None:
        """A request has ended, whoever ended it."""
        self._success.labels(reason.value).inc()
        self._e2e.observe(now - record.arrival_s)
        self._request_prompt.observe(record.num_prompt_tokens)
        self._request_output.observe(record.num_tokens)
        if record.first_token_s is not None and record.last_token_s is not None:
            decode_s = record.last_token_s - record.first_token_s
            self._decode_time.observe(decode_s)
            if record.num_tokens > 1:
                self._per_token.observe(decode_s / (record.num_tokens - 1))

    def collect(self) -> Iterator[Metric]:
        """All metrics, then their aliases."""
        metrics = [metric for instrument in self._instruments for metric in instrument.collect()]
        metrics.append(self._queue_times())
        for metric in metrics:
            yield _relabelled(metric, metric.name, {"model_name": self._model_name})
        if self._has_vllm_names:
            labels = {"model_name": self._model_name, "engine": "0"}
            for metric in metrics:
                alias = _VLLM_NAMES.get(metric.name.removeprefix(_PREFIX))
                if alias is not None:
                    yield _relabelled(metric, alias, labels)

    def _queue_times(self) -> HistogramMetricFamily:
        """The engine's own histogram: only it sees when a request is first in a step."""
        bounds = [*map(str, EngineMetrics().queue_s.bounds), "+Inf"]
        buckets = list(zip(bounds, itertools.accumulate(self._queue_counts), strict=True))
        name = _PREFIX + "request_queue_time_seconds"
        return HistogramMetricFamily(name, "Arrival to the first step.", buckets, self._queue_total_s)

    def _counter(self, name: str, documentation: str, *labels: str) -> Counter:
        return self._kept(Counter(_PREFIX + name, documentation, labels, registry=None))

    def _gauge(self, name: str, documentation: str, *labels: str) -> Gauge:
        return self._kept(Gauge(_PREFIX + name, documentation, labels, registry=None))

    def _histogram(self, name: str, documentation: str, bounds: Sequence[float], *labels: str) -> Histogram:
        return self._kept(Histogram(_PREFIX + name, documentation, labels, registry=None, buckets=bounds))

    def _kept(self, instrument: _Instrument) -> _Instrument:
        self._instruments.append(instrument)
        return instrument


def _relabelled(metric: Metric, name: str, labels: dict[str, str]) -> Metric:
    """``metric`` under another name, with more labels, and without the times of creation."""
    result = Metric(name, metric.documentation, metric.type)
    for sample in metric.samples:
        suffix = sample.name.removeprefix(metric.name)
        if suffix != "_created":
            result.samples.append(Sample(name + suffix, {**labels, **sample.labels}, sample.value))
    return result
