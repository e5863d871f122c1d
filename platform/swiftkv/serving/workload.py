"""What a serving replica has in hand at any moment, for its own decisions and for the policy that sizes the pools.

Counts what passes through the replica's server: requests, tokens, chunks. Looks into no engine; is told by
serving/engine_log.py what a prefill engine does.
Called by: serving/decode.py, serving/prefill.py. Calls: serving/policy/stats.py.
"""

import time
from collections import deque
from collections.abc import Callable, Set
from dataclasses import dataclass

from swiftkv.serving.policy.stats import Doing, ReplicaLog, build_replica_stats


@dataclass(eq=False)
class Served:
    """One request of a decode replica; itself, however equal another is."""

    prompt_tokens: float
    uncached_tokens: float
    is_remote: bool
    """Prefilled in the other pool, whose work it is."""
    is_for_prefill_pool: bool | None = None
    """Whether it would be, in a pool that is large enough and well; None: as `is_remote` says."""
    request_id: str | None = None
    is_streamed: bool = True
    """Whether its tokens pass through the server one by one."""
    completion_tokens: int = 0
    has_begun: bool = False
    """Whether the engine has made a token of it."""

    def __post_init__(self) -> None:
        if self.is_for_prefill_pool is None:
            self.is_for_prefill_pool = self.is_remote

    @property
    def demanded_tokens(self) -> int:
        """Prompt tokens that are the prefill pool's to compute."""
        return round(self.uncached_tokens) if self.is_for_prefill_pool else 0


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

    def list_unseen(self) -> list[str]:
        """Ids of requests whose first token only the engine sees, and which are not known to have it."""
        return [served.request_id for served in self._waiting if served.request_id and not served.is_streamed]

    def begin(self, served: Served) -> None:
        """A request is given to the engine."""
        self._waiting.append(served)
        self._log.arrived(time.monotonic(), served.demanded_tokens, round(served.prompt_tokens))

    def note_begun(self, request_ids: Set[str]) -> None:
        """The engine has made a token of these requests, whose answers are sent whole."""
        for served in [served for served in self._waiting if served.request_id in request_ids]:
            self._start(served, time.monotonic())

    def take_chunk(self, served: Served, num_tokens: int = 1) -> None:
        """The engine gave tokens; a step is over when every running sequence that is streamed has had its own."""
        now = time.monotonic()
        if not served.has_begun:
            self._start(served, now)
        served.completion_tokens += num_tokens
        if not served.is_streamed:
            return
        self._chunks_of_step += 1
        if self._chunks_of_step >= self._count_streamed() and now > self._stepped_at:
            context = sum(running.prompt_tokens + running.completion_tokens for running in self._running)
            self._log.stepped(now, now - self._stepped_at, len(self._running), round(context))
            self._start_step(now)

    def end(self, served: Served) -> None:
        """The request is over, however."""
        (self._running if served.has_begun else self._waiting).remove(served)
        self._log.finished(time.monotonic(), served.demanded_tokens, served.completion_tokens)

    def report(self, kv_usage_frac: float | None = None) -> dict[str, float]:
        """For Serve's `record_autoscaling_stats`. `kv_usage_frac` is the engine's word; None: from the tokens seen."""
        context = sum(running.prompt_tokens + running.completion_tokens for running in self._running)
        seen_frac = min(1.0, context / self._kv_capacity_tokens)
        return build_replica_stats(
            self._log,
            time.monotonic(),
            queued_prompt_tokens=self.waiting_tokens,
            requests_running=len(self._running) + len(self._waiting),
            kv_usage_frac=seen_frac if kv_usage_frac is None else kv_usage_frac,
        )

    def _start(self, served: Served, now: float) -> None:
        served.has_begun = True
        self._waiting.remove(served)
        self._running.append(served)
        if served.is_streamed and self._count_streamed() == 1:
            self._start_step(now)

    def _count_streamed(self) -> int:
        return sum(served.is_streamed for served in self._running)

    def _start_step(self, now: float) -> None:
        self._stepped_at, self._chunks_of_step = now, 0


class PrefillWorkload:
    """Prompts of a prefill replica, and what its engine's time goes to."""

    def __init__(self, lease_s: float, wake: Callable[[], None] = lambda: None) -> None:
        """`lease_s`: seconds for which KV is kept for a decode replica that has not come yet. `wake` is called when a
        prompt comes to an engine that had none."""
        self._log = ReplicaLog(time.monotonic())
        self._lease_s = lease_s
        self._wake = wake
        self._queued: list[float] = []
        self._handed_out: deque[tuple[float, float]] = deque()

    def begin(self, tokens: float) -> None:
        """A prompt of about so many tokens is given to the engine."""
        if not self._queued:
            self._wake()
        self._queued.append(tokens)

    def end(self, tokens: float, computed_tokens: float = 0, held_tokens: float = 0) -> None:
        """The engine is done with it; computed none and holds none of it if it was cancelled or refused."""
        now = time.monotonic()
        self._queued.remove(tokens)
        self._forget(now)
        if computed_tokens:
            self._log.computed(now, 0, round(computed_tokens))
        if held_tokens:
            self._handed_out.append((now + self._lease_s, held_tokens))

    def spend(self, doing: Doing, seconds: float) -> None:
        """The engine did this for so long."""
        now = time.monotonic()
        if doing == "computing":
            self._log.computed(now, seconds, 0)
        elif doing == "waiting":
            self._log.waited_for_decode(now, seconds)
        else:
            self._log.exported(now, seconds)

    @property
    def last_lease_s(self) -> float:
        """Seconds until nothing is kept for anybody, if nobody has come by then."""
        return max(0.0, self._handed_out[-1][0] - time.monotonic()) if self._handed_out else 0.0

    def report(self, kv_usage_frac: float = 0) -> dict[str, float]:
        """For Serve's `record_autoscaling_stats`. KV counts as kept for its lease: nobody tells who fetched it."""
        now = time.monotonic()
        self._forget(now)
        return build_replica_stats(
            self._log,
            now,
            queued_prompt_tokens=sum(self._queued),
            requests_running=len(self._queued),
            kv_usage_frac=kv_usage_frac,
            pending_kv_tokens=sum(tokens for _, tokens in self._handed_out),
        )

    def _forget(self, now: float) -> None:
        while self._handed_out and self._handed_out[0][0] <= now:
            self._handed_out.popleft()
