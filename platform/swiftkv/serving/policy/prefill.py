"""How many prefill replicas keep the TTFT target for the prompts that arrive.

Prompts are served one after another, so the pool is a queue with c servers: M/G/c, or G/G/c with bursty arrivals. A
prompt is late if its wait and its own time exceed the target; that is summed over the histogram of lengths, so a few
long prompts cost what they cost, and not what the mean would.

    P(W > t) = C(c, a) · exp(−t / w),    w = E[S] · (Ca² + Cs²) / 2 / (c · (1 − ρ))
    P(late)  = Σ over buckets b: share(b) · P(W > target − own(b)),    own(b) = compute + transfer + first step

Called by: serving/policy/decision.py. Calls: costs.
Source: Allen–Cunneen's approximation of the mean wait (Allen 1990, section 5.3) with Erlang C's C(c, a), a = λE[S], and
an exponential wait of those that wait (exact in M/M/c; Kimura 1994 for G/G/c).
"""

import math
from dataclasses import dataclass

from swiftkv.serving.policy.costs import Costs
from swiftkv.serving.policy.lengths import Lengths


@dataclass(frozen=True)
class PrefillLoad:
    """Prompts of several lengths that arrive at a rate."""

    requests_per_s: float
    shares: tuple[float, ...]
    """Of all prompts, per length."""
    service_s: tuple[float, ...]
    """How long one keeps a replica busy, per length, ascending."""
    alone_s: tuple[float, ...]
    """Its TTFT if nothing waits, per length."""
    variability: float = 1
    """Squared coefficient of variation of the times between arrivals."""

    @property
    def mean_service_s(self) -> float:
        """Seconds of a replica per prompt."""
        return sum(share * service for share, service in zip(self.shares, self.service_s, strict=True))

    @property
    def busy(self) -> float:
        """Replicas that would always be busy (Erlangs)."""
        return self.requests_per_s * self.mean_service_s

    @property
    def service_variability(self) -> float:
        """Squared coefficient of variation of the service times."""
        mean = self.mean_service_s
        if mean <= 0:
            return 0.0
        second = sum(share * service**2 for share, service in zip(self.shares, self.service_s, strict=True))
        return max(0.0, second / mean**2 - 1)

    def grown(self, frac: float) -> "PrefillLoad":
        """The same prompts, more often."""
        return PrefillLoad(
            self.requests_per_s * (1 + frac), self.shares, self.service_s, self.alone_s, self.variability
        )

    def alone_quantile_s(self, percentile: float) -> float:
        """The TTFT that so many prompts keep if nothing ever waits: no number of replicas gives a shorter one."""
        reached = 0.0
        for share, alone in zip(self.shares, self.alone_s, strict=True):
            reached += share
            if reached >= percentile - 1e-9:
                return alone
        return self.alone_s[-1] if self.alone_s else 0.0


def build_prefill_load(
    requests_per_s: float, lengths: Lengths, costs: Costs, first_step_s: float, variability: float
) -> PrefillLoad:
    """The load of the requests that have something to prefill. `first_step_s`: until the first token, once the KV is in
    the decode replica."""
    total = lengths.total.requests
    buckets = [bucket for bucket in lengths.arrived() if bucket.uncached_tokens > 0]
    prompts = sum(bucket.requests for bucket in buckets)
    if not prompts or not requests_per_s:
        return PrefillLoad(0, (), (), (), variability)
    means = [bucket.uncached_tokens / bucket.requests for bucket in buckets]
    service = tuple(costs.prefill_s(mean) for mean in means)
    extra = [costs.transfer_s_per_token * mean + costs.first_token_s + first_step_s for mean in means]
    return PrefillLoad(
        requests_per_s * prompts / total,
        tuple(bucket.requests / prompts for bucket in buckets),
        service,
        tuple(own + more for own, more in zip(service, extra, strict=True)),
        variability,
    )


def compute_late_frac(load: PrefillLoad, replicas: int, target_s: float) -> float:
    """Fraction of prompts whose TTFT is above the target with so many replicas; 1 if the queue would grow for ever."""
    if load.busy <= 0:
        return 0.0
    if replicas <= load.busy:
        return 1.0
    waits = compute_erlang_c(replicas, load.busy)
    spread = (load.variability + load.service_variability) / 2
    mean_wait_s = load.mean_service_s * spread / (replicas - load.busy)  # of those that wait
    late = 0.0
    for share, alone_s in zip(load.shares, load.alone_s, strict=True):
        room_s = target_s - alone_s
        late += share * (1.0 if room_s < 0 else waits * (math.exp(-room_s / mean_wait_s) if mean_wait_s > 0 else 0.0))
    return late


def predict_ttft_s(load: PrefillLoad, replicas: int, percentile: float) -> float:
    """The TTFT that this fraction of prompts keeps. Infinite if the queue would grow for ever."""
    if load.busy <= 0:
        return 0.0
    if replicas <= load.busy:
        return math.inf
    low, high = 0.0, max(load.alone_s)
    while compute_late_frac(load, replicas, high) > 1 - percentile:
        high *= 2
    for _ in range(20):
        middle = (low + high) / 2
        if compute_late_frac(load, replicas, middle) > 1 - percentile:
            low = middle
        else:
            high = middle
    return high


def size_prefill(load: PrefillLoad, target_s: float, percentile: float, highest_load_frac: float) -> int:
    """The fewest replicas that keep the target, each busy for at most `highest_load_frac` of the time.

    The target must be one that a prompt alone keeps (`PrefillLoad.alone_quantile_s`).
    """
    if load.busy <= 0:
        return 0
    low = max(1, math.ceil(load.busy / highest_load_frac))
    if compute_late_frac(load, low, target_s) <= 1 - percentile:
        return low
    high = low
    while compute_late_frac(load, high, target_s) > 1 - percentile and high < 100 * low:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        if compute_late_frac(load, middle, target_s) > 1 - percentile:
            low = middle
        else:
            high = middle
    return high


def compute_erlang_c(servers: int, offered: float) -> float:
    """Probability that an arrival waits in M/M/c with `offered` Erlangs. 1 if the servers do not suffice."""
    if offered <= 0:
        return 0.0
    if servers <= offered:
        return 1.0
    blocked = 1.0  # Erlang B by its recursion, which cannot overflow
    for count in range(1, servers + 1):
        blocked = offered * blocked / (count + offered * blocked)
    utilisation = offered / servers
    return blocked / (1 - utilisation * (1 - blocked))
