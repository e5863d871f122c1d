"""What a serving replica reports for the policy: the names, the log that counts, and the way back into records.

One flat dictionary of floats per replica, as Ray Serve's `record_autoscaling_stats` wants it:

    window_s                                                      seconds that all sums cover
    queued_prompt_tokens, requests_running, kv_usage_frac, pending_kv_tokens                      of this moment
    computed_prompt_tokens, computing_s, exporting_s, waiting_for_decode_s               sums of a prefill replica
    steps, steps_s, step_sequences, step_context_tokens                                   sums of a decode replica
    {requests | uncached_tokens | prompt_tokens | finished | completion_tokens | completion_tokens_squared}_le_{edge}
                             sums of requests, per edge of `lengths.EDGES` or inf; only those that are not 0

Sums are over a rolling window, so nobody keeps differences of counters, and a replica that ends leaves none behind.
Requests are counted once, by the replica that the gateway sent them to (the decode replica).
Called by: serving replicas, serving/autoscaling.py. Calls: lengths, observation.
"""

from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from swiftkv.serving.policy.lengths import EDGES, Bucket, Lengths, find_bucket
from swiftkv.serving.policy.observation import Replica

Doing = Literal["computing", "waiting", "exporting"]
"""What a prefill engine spends its time on. waiting: prompts have no KV blocks, as those of others are yet to be
fetched; exporting: nothing is to be computed, and KV is yet to be fetched."""

WINDOW_S = 30.0
BIN_S = 1.0

MOMENTARY = ("queued_prompt_tokens", "requests_running", "kv_usage_frac", "pending_kv_tokens")
SUMMED = (
    "computed_prompt_tokens",
    "computing_s",
    "exporting_s",
    "waiting_for_decode_s",
    "steps",
    "steps_s",
    "step_sequences",
    "step_context_tokens",
)
WINDOW = "window_s"
_SEPARATOR = "_le_"
_LABELS = (*(str(edge) for edge in EDGES), "inf")
_INDEX = {label: index for index, label in enumerate(_LABELS)}


class ReplicaLog:
    """Counts what one replica does. Bounded: as many numbers as there are names, per second of the window.

    Every method takes the time, from one clock that only goes forward. Not thread-safe.
    """

    def __init__(self, now_s: float, window_s: float = WINDOW_S) -> None:
        self._window_s = window_s
        self._started_s = now_s
        self._bins: deque[tuple[float, dict[str, float]]] = deque()

    def arrived(self, now_s: float, uncached_tokens: int, prompt_tokens: int) -> None:
        """A request came. `uncached_tokens` are those that a prefill replica should compute as far as is known: 0 if
        the prompt is too short to be worth the hop."""
        label = _LABELS[find_bucket(uncached_tokens)]
        self._add(now_s, requests=1, uncached_tokens=uncached_tokens, prompt_tokens=prompt_tokens, label=label)

    def finished(self, now_s: float, uncached_tokens: int, completion_tokens: int) -> None:
        """A request ended, however. `uncached_tokens` as when it arrived."""
        label = _LABELS[find_bucket(uncached_tokens)]
        squared = float(completion_tokens) ** 2
        self._add(
            now_s, finished=1, completion_tokens=completion_tokens, completion_tokens_squared=squared, label=label
        )

    def computed(self, now_s: float, seconds: float, prompt_tokens: int) -> None:
        """The engine computed prompts for so long."""
        self._add(now_s, computing_s=seconds, computed_prompt_tokens=prompt_tokens)

    def exported(self, now_s: float, seconds: float) -> None:
        """The engine had nothing to compute and KV that was yet to be fetched."""
        self._add(now_s, exporting_s=seconds)

    def waited_for_decode(self, now_s: float, seconds: float) -> None:
        """The engine could have computed, but its space was taken by KV that was yet to be fetched."""
        self._add(now_s, waiting_for_decode_s=seconds)

    def stepped(self, now_s: float, seconds: float, sequences: int, context_tokens: int) -> None:
        """The engine did a decode step; `context_tokens` of all its sequences together."""
        self._add(now_s, steps=1, steps_s=seconds, step_sequences=sequences, step_context_tokens=context_tokens)

    def sums(self, now_s: float) -> dict[str, float]:
        """All sums of the window, and its length; shorter than asked for while the replica is young."""
        self._forget(now_s)
        totals = {WINDOW: max(min(self._window_s, now_s - self._started_s), BIN_S)}
        for _, sums in self._bins:
            for name, value in sums.items():
                totals[name] = totals.get(name, 0.0) + value
        return totals

    def _add(self, now_s: float, label: str | None = None, **amounts: float) -> None:
        if not self._bins or now_s - self._bins[-1][0] >= BIN_S:
            self._forget(now_s)
            self._bins.append((now_s, {}))
        sums = self._bins[-1][1]
        for name, amount in amounts.items():
            key = name if label is None else f"{name}{_SEPARATOR}{label}"
            sums[key] = sums.get(key, 0.0) + amount

    def _forget(self, now_s: float) -> None:
        while self._bins and self._bins[0][0] <= now_s - self._window_s:
            self._bins.popleft()


def build_replica_stats(
    log: ReplicaLog,
    now_s: float,
    *,
    queued_prompt_tokens: float = 0,
    requests_running: float = 0,
    kv_usage_frac: float = 0,
    pending_kv_tokens: float = 0,
) -> dict[str, float]:
    """What a replica returns from `record_autoscaling_stats`.

    `queued_prompt_tokens`: uncached tokens of prompts taken and not yet computed. `pending_kv_tokens`: tokens of KV
    kept only because another replica is yet to pull them.
    """
    return {
        "queued_prompt_tokens": float(queued_prompt_tokens),
        "requests_running": float(requests_running),
        "kv_usage_frac": float(kv_usage_frac),
        "pending_kv_tokens": float(pending_kv_tokens),
        **log.sums(now_s),
    }


def read_replica(name: str, age_s: float, stats: Mapping[str, float]) -> Replica:
    """A running replica as it reported itself."""
    figures: dict[str, Any] = {key: stats.get(key, 0.0) for key in (*MOMENTARY, *SUMMED)}
    running = figures.pop("requests_running")
    return Replica(name, age_s=age_s, window_s=stats.get(WINDOW, WINDOW_S), running_requests=running, **figures)


def read_lengths(stats: Iterable[tuple[str, float]]) -> Lengths:
    """The histogram in (name, value) pairs of any number of replicas; other names are passed over."""
    sums: dict[int, dict[str, float]] = {}
    for name, value in stats:
        field, separator, label = name.partition(_SEPARATOR)
        if separator and field in Bucket._fields and label in _INDEX:
            bucket = sums.setdefault(_INDEX[label], {})
            bucket[field] = bucket.get(field, 0.0) + value
    return Lengths({index: Bucket(**fields) for index, fields in sums.items()})
