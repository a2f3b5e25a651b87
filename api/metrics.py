"""What the api measures of requests for Prometheus: how they end, how long they wait, how long they are.

Each server has a registry of its own, nothing is global. The engine client tells it when a request starts and when
tokens come, the chat route how each request ends. What is only read when Prometheus asks (ring, ranks, caches) is in
`api.ring_metrics`.
"""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Histogram

from api.generation import Generation

PREFIX = "mlx_ring"

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0)
_GAP_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0, 2.5, 5.0, 10.0, 40.0)
_TOKENS = tuple(float(digit * 10**power) for power in range(6) for digit in (1, 2, 5))

CLIENT_LEFT = "abort"  # vLLM's word


class RequestMetrics:
    """The registry that /metrics exposes, and what happens to requests in it. Times are seconds of one clock."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._requests = Counter(
            f"{PREFIX}_requests",
            "Requests by how they ended: stop, length, tool_calls, abort (the client left), or their error's status.",
            ["outcome"],
            registry=self.registry,
        )
        self._queue_time = self._histogram(
            "request_queue_time_seconds", "From acceptance until the ring began with the prompt.", _SECONDS
        )
        self._time_to_first_token = self._histogram(
            "time_to_first_token_seconds", "From acceptance to the first token.", _SECONDS
        )
        self._inter_token_latency = self._histogram(
            "inter_token_latency_seconds",
            "Gap between a request's steps that gave tokens, pauses of any cause included.",
            _GAP_SECONDS,
        )
        self._latency = self._histogram(
            "e2e_request_latency_seconds", "From acceptance to the end, of requests that got their answer.", _SECONDS
        )
        self._prompt_tokens = self._histogram(
            "request_prompt_tokens", "Length of the prompts of requests that got their answer.", _TOKENS
        )
        self._generation_tokens = self._histogram(
            "request_generation_tokens", "Length of the answers of requests that got theirs.", _TOKENS
        )

    def _histogram(self, name: str, documentation: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"{PREFIX}_{name}", documentation, buckets=buckets, registry=self.registry)

    def starts(self, generation: Generation, now: float) -> None:
        """The ring begins with a request, before `generation` is told; a second ring's beginning counts no more."""
        if generation.started_at is None:
            self._queue_time.observe(now - generation.accepted_at)

    def takes_tokens(self, generation: Generation, now: float) -> None:
        """A step gave tokens, before `generation` is told. Called for every token there is, so it does little."""
        if generation.last_token_at is None:
            self._time_to_first_token.observe(now - generation.accepted_at)
        else:
            self._inter_token_latency.observe(now - generation.last_token_at)

    def answered(self, finish_reason: str, *, latency_s: float, prompt_tokens: int, generation_tokens: int) -> None:
        """A request got its answer."""
        self._requests.labels(finish_reason).inc()
        self._latency.observe(latency_s)
        self._prompt_tokens.observe(prompt_tokens)
        self._generation_tokens.observe(generation_tokens)

    def failed(self, status: int | None) -> None:
        """A request ended with the HTTP status of an error, also where a stream had begun; None: its client left."""
        self._requests.labels(CLIENT_LEFT if status is None else str(status)).inc()
