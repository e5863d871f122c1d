"""What a serving replica has in hand at any moment, for its own decisions and for the policy that sizes the pools.

Counts what passes through the replica's server: requests, tokens, chunks. Looks into no engine.
Called by: serving/decode.py, serving/prefill.py. Calls: serving/policy/stats.py.
"""

import time
from dataclasses import dataclass

from swiftkv.serving.policy.stats import ReplicaLog, build_replica_stats


@dataclass(eq=False)
class Served:
    """One request of a decode replica; itself, however equal another is."""

    prompt_tokens: float
    uncached_tokens: float
    is_remote: bool
    """Prefilled in the other pool, whose work it is."""
    completion_tokens: int = 0


class DecodeWorkload:
    """Requests of a decode replica, before and after their first token."""

    def __init__(self, kv_capacity_tokens: float) -> None:
        """`kv_capacity_tokens`: what the engine's KV cache holds."""
        self._log = ReplicaLog(time.monotonic())
        self._kv_capacity_tokens = kv_capacity_tokens
        self._waiting: list[Served] = []
        self._running: list[Served] = []
        self._stepped_at = 0.0
        self._chunks_of_step = 0

    @property
    def num_running(self) -> int:
        """Sequences that have a first token."""
        return len(self._running)

    @property
    def waiting_tokens(self) -> float:
        """Uncached prompt tokens that this engine is still to prefill."""
        return sum(served.uncached_tokens for served in self._waiting if not served.is_remote)

    def begin(self, served: Served) -> None:
        """A request is given to the engine."""
        self._waiting.append(served)
        hopped = served.uncached_tokens if served.is_remote else 0.0
        self._log.arrived(time.monotonic(), round(hopped), round(served.prompt_tokens))

    def take_chunk(self, served: Served, num_tokens: int = 1) -> None:
        """The engine gave tokens; a step is over when every running sequence has had its own."""
        now = time.monotonic()
        if not served.completion_tokens:
            self._waiting.remove(served)
            self._running.append(served)
            if len(self._running) == 1:
                self._start_step(now)
        served.completion_tokens += num_tokens
        self._chunks_of_step += 1
        if self._chunks_of_step >= len(self._running) and now > self._stepped_at:
            context = sum(running.prompt_tokens + running.completion_tokens for running in self._running)
            self._log.stepped(now, now - self._stepped_at, len(self._running), round(context))
            self._start_step(now)

    def end(self, served: Served) -> None:
        """The request is over, however."""
        (self._running if served.completion_tokens else self._waiting).remove(served)
        hopped = served.uncached_tokens if served.is_remote else 0.0
        self._log.finished(time.monotonic(), round(hopped), served.completion_tokens)

    def report(self) -> dict[str, float]:
        """For Serve's `record_autoscaling_stats`."""
        context = sum(running.prompt_tokens + running.completion_tokens for running in self._running)
        return build_replica_stats(
            self._log,
            time.monotonic(),
            queued_prompt_tokens=self.waiting_tokens,
            requests_running=len(self._running) + len(self._waiting),
            kv_usage_frac=min(1.0, context / self._kv_capacity_tokens),
        )

    def _start_step(self, now: float) -> None:
        self._stepped_at, self._chunks_of_step = now, 0


class PrefillWorkload:
    """Prompts of a prefill replica."""

    def __init__(self, lease_s: float) -> None:
        """`lease_s`: seconds for which KV is kept for a decode replica that has not come yet."""
        self._log = ReplicaLog(time.monotonic())
        self._lease_s = lease_s
        self._queued: list[float] = []
        self._computed_at = 0.0
        self._handed_out: list[tuple[float, float]] = []

    def begin(self, tokens: float) -> None:
        """A prompt is given to the engine."""
        if not self._queued:
            self._computed_at = time.monotonic()
        self._queued.append(tokens)

    def end(self, tokens: float, is_done: bool) -> None:
        """The engine is done with it, or it was cancelled or refused."""
        now = time.monotonic()
        self._queued.remove(tokens)
        self._log.computed(now, now - self._computed_at, round(tokens) if is_done else 0)
        self._computed_at = now
        if is_done:
            self._handed_out.append((now + self._lease_s, tokens))

    @property
    def last_lease_s(self) -> float:
        """Seconds until nothing is kept for anybody, if nobody has come by then."""
        return max(0.0, self._handed_out[-1][0] - time.monotonic()) if self._handed_out else 0.0

    def report(self) -> dict[str, float]:
        """For Serve's `record_autoscaling_stats`. KV counts as kept for its lease: nobody tells who fetched it."""
        now = time.monotonic()
        self._handed_out = [entry for entry in self._handed_out if entry[0] > now]
        return build_replica_stats(
            self._log,
            now,
            queued_prompt_tokens=sum(self._queued),
            requests_running=len(self._queued),
            pending_kv_tokens=sum(tokens for _, tokens in self._handed_out),
        )
