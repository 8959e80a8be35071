"""What a Prometheus server reads at `/metrics`. No name, prompt or key is ever a label."""

from __future__ import annotations

import time

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from cispo.server.records import Request

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Metrics:
    """One registry for each server, so that two in one process do not meet."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.http = Counter("cispo_http_requests", "HTTP requests", ["route", "status"], registry=self.registry)
        self.finished = Counter(
            "cispo_requests_finished",
            "Accepted requests by kind and outcome",
            ["kind", "status"],
            registry=self.registry,
        )
        self.request_seconds = Histogram(
            "cispo_request_seconds", "From acceptance to result", ["kind"], buckets=_SECONDS, registry=self.registry
        )
        self.commit_seconds = Histogram(
            "cispo_log_commit_seconds", "One flush of the write-ahead log", buckets=_SECONDS, registry=self.registry
        )
        self.commits = Counter("cispo_log_writes", "Writes in the log, many to a flush", registry=self.registry)
        self.cut_seconds = Histogram(
            "cispo_cut_seconds", "One cut: snapshots of all changed runs", buckets=_SECONDS, registry=self.registry
        )
        self.engine_seconds = Counter(
            "cispo_engine_seconds", "Time of the engine by kind of work", ["work"], registry=self.registry
        )
        self.compute_seconds = Counter(
            "cispo_compute_seconds",
            "Time in models and optimizers by request",
            ["kind"],
            registry=self.registry,
        )
        for kind in ("forward_backward", "optim_step", "asample"):
            self.compute_seconds.labels(kind)  # there from the start, as 0
        self.trained_tokens = Counter("cispo_trained_tokens", "Tokens through forward_backward", registry=self.registry)
        self.sampled_tokens = Counter("cispo_sampled_tokens", "Tokens sampled", registry=self.registry)
        self.adapter_loads = Counter("cispo_adapter_loads", "Adapters brought back from disk", registry=self.registry)
        self.adapter_evictions = Counter("cispo_adapter_evictions", "Adapters let go of", registry=self.registry)
        self.resident = Gauge("cispo_adapters_resident", "Adapters in memory", registry=self.registry)
        self.queued = Gauge("cispo_requests_queued", "Requests that wait or run", registry=self.registry)
        self.sessions = Gauge("cispo_sessions", "Sessions seen in the last minute", registry=self.registry)
        self.started = time.time()

    def observe(self, request: Request) -> None:
        """A request was resolved."""
        self.finished.labels(request.kind, request.status).inc()
        self.request_seconds.labels(request.kind).observe(time.time() - request.created)

    def commit(self, seconds: float, writes: int) -> None:
        self.commit_seconds.observe(seconds)
        self.commits.inc(writes)

    def page(self) -> bytes:
        return generate_latest(self.registry)
