"""What /metrics shows, in Prometheus's names and text."""

from __future__ import annotations

from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from minqwen.engine.outputs import RequestOutput
from minqwen.serve.reports import State

# Seconds: from a step on a small GPU to a long prompt on a CPU.
TO_FIRST_TOKEN = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
PER_TOKEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)


class Metrics:
    """Counters and gauges of one server, in a registry of their own.

    A request here is one prompt of a client's request.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        at: dict[str, Any] = {"registry": self.registry}
        self.requests = Counter(
            "minqwen_requests", "Prompts that have ended, by why", ["finish_reason"], **at
        )
        self.refused = Counter("minqwen_refused", "Requests refused, by status", ["status"], **at)
        self.prompt_tokens = Counter("minqwen_prompt_tokens", "Tokens of prompts", **at)
        self.tokens = Counter("minqwen_generated_tokens", "Tokens that were drawn", **at)
        self.cached = Counter(
            "minqwen_cached_prompt_tokens", "Prompt tokens that the prefix cache had", **at
        )
        self.to_first_token = Histogram(
            "minqwen_time_to_first_token_seconds", "From arrival", buckets=TO_FIRST_TOKEN, **at
        )
        self.per_token = Histogram(
            "minqwen_time_per_token_seconds", "After the first token", buckets=PER_TOKEN, **at
        )
        self.steps = Counter("minqwen_steps", "Turns of the engine's loop", **at)
        self.open = Gauge("minqwen_open", "Prompts whose clients wait or read", **at)
        at["labelnames"] = ["replica"]
        self.running = Gauge("minqwen_running", "Completions in the engine's steps", **at)
        self.waiting = Gauge("minqwen_waiting", "Completions that wait for blocks or a place", **at)
        self.blocks_used = Gauge("minqwen_blocks_used_ratio", "Share of the cache in use", **at)
        self.preemptions = Counter(
            "minqwen_preemptions", "Completions that lost their blocks and began again", **at
        )
        self._preemptions_told: dict[int, int] = {}

    def text(self) -> bytes:
        return generate_latest(self.registry)

    def after_step(self, replica: int, state: State) -> None:
        """The state of a replica's engine after a step, which all replicas make together."""
        label = str(replica)
        if replica == 0:
            self.steps.inc()
        self.running.labels(label).set(state.running)
        self.waiting.labels(label).set(state.waiting)
        self.blocks_used.labels(label).set(state.blocks_used)
        told = self._preemptions_told.get(replica, 0)
        self.preemptions.labels(label).inc(state.preemptions - told)
        self._preemptions_told[replica] = state.preemptions

    def finished(self, output: RequestOutput) -> None:
        """A prompt and all its completions are finished."""
        self.prompt_tokens.inc(len(output.prompt_token_ids))
        self.cached.inc(output.num_cached_tokens)
        self.requests.labels(output.outputs[0].finish_reason or "").inc()
        count = sum(len(one.token_ids) for one in output.outputs)
        self.tokens.inc(count)
        metrics = output.metrics
        if metrics.time_to_first_token is not None:
            self.to_first_token.observe(metrics.time_to_first_token)
        speed = metrics.tokens_per_second(len(output.outputs[0].token_ids))
        if speed and len(output.outputs) == 1:
            self.per_token.observe(1 / speed)

    def aborted(self) -> None:
        """A prompt has been dropped, because its client has gone."""
        self.requests.labels("abort").inc()

    def failed(self) -> None:
        """A prompt has ended with an error."""
        self.requests.labels("error").inc()
