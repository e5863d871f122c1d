"""How many decode replicas keep the TPOT target, have room for the KV, and a place for every sequence.

A step with B sequences takes τ(B) = a + b·B seconds, b being a sequence's own share with its context. Sequences share
the replica, so B is the number in a processor-sharing queue whose speed depends on B; it has a negative binomial
distribution that depends on the lengths only through their means:

    ρ = x · b,    E[B] = (1 + a/b) · ρ / (1 − ρ),    Var[B] = E[B] / (1 − ρ),    x = tokens/s of the replica

Routing evens the replicas out, so n of them fluctuate together like one that is n times as large. The sequence at the
percentile meets B = E[B] + z · √(Var[B] / n) + 1.
The KV in use is that many contexts, of which long answers hold theirs longer: mean and variance are weighted by time.

Called by: serving/policy/decision.py. Calls: costs.
Source: Cohen 1979, "The multiple phase service network with generalized processor sharing", for the distribution.
"""

import math
from dataclasses import dataclass
from statistics import NormalDist

from swiftkv.serving.policy.costs import Costs
from swiftkv.serving.policy.lengths import Lengths


@dataclass(frozen=True)
class DecodeLoad:
    """Requests that arrive at a rate, and what they hold while they are decoded."""

    requests_per_s: float
    completion_tokens: float
    """Mean per request."""
    context_tokens: float
    """Mean over time of one sequence's context."""
    context_tokens_squared: float
    """Mean over time of its square."""

    @property
    def tokens_per_s(self) -> float:
        """Completion tokens that all of them need per second."""
        return self.requests_per_s * self.completion_tokens

    def grown(self, frac: float) -> "DecodeLoad":
        """The same requests, more often."""
        return DecodeLoad(
            self.requests_per_s * (1 + frac),
            self.completion_tokens,
            self.context_tokens,
            self.context_tokens_squared,
        )


def build_decode_load(requests_per_s: float, lengths: Lengths, expected_completion_tokens: float) -> DecodeLoad:
    """The load of all requests. `expected_completion_tokens` stands in where no request has finished."""
    total = lengths.total
    if not total.requests or not requests_per_s:
        return DecodeLoad(0, 0, 0, 0)
    overall = total.completion_tokens / total.finished if total.finished else float(expected_completion_tokens)
    overall_squared = total.completion_tokens_squared / total.finished if total.finished else overall**2
    weight = completion = context = squared = 0.0
    for bucket in lengths.arrived():
        prompt = bucket.prompt_tokens / bucket.requests
        known = bucket.finished > 0
        mean = bucket.completion_tokens / bucket.finished if known else overall
        mean_squared = bucket.completion_tokens_squared / bucket.finished if known else overall_squared
        completion += bucket.requests * mean
        # A sequence is there for as long as its answer is; meanwhile its context grows from prompt to prompt + answer.
        weight += bucket.requests * mean
        context += bucket.requests * (mean * prompt + mean_squared / 2)
        squared += bucket.requests * (mean * prompt**2 + mean_squared * prompt + mean_squared * mean / 3)
    weight = max(weight, 1e-9)
    return DecodeLoad(requests_per_s, completion / total.requests, context / weight, squared / weight)


@dataclass(frozen=True)
class Batch:
    """What one decode replica carries. Infinite where it could not keep up."""

    mean: float
    high: float
    """At the percentile."""
    high_kv_tokens: float
    """KV in use at the percentile."""


def predict_batch(load: DecodeLoad, costs: Costs, replicas: int, percentile: float) -> Batch:
    """What each of so many replicas carries under this load."""
    if load.tokens_per_s <= 0:
        return Batch(0, 0, 0)
    tokens_per_s = load.tokens_per_s / replicas if replicas else math.inf
    own_s = max(costs.seconds_per_sequence(load.context_tokens), 1e-12)
    busy = tokens_per_s * own_s
    if busy >= 1:
        return Batch(math.inf, math.inf, math.inf)
    z = NormalDist().inv_cdf(percentile)
    mean = (1 + costs.step_s / own_s) * busy / (1 - busy)
    deviation = math.sqrt(mean / (1 - busy))
    kv = mean * load.context_tokens + z * math.sqrt(mean * load.context_tokens_squared)
    return Batch(mean, mean + z * deviation / math.sqrt(replicas) + 1, kv)


def predict_tpot_s(load: DecodeLoad, costs: Costs, replicas: int, percentile: float) -> float:
    """The TPOT that this fraction of requests keeps. Infinite if the replicas could not keep up."""
    batch = predict_batch(load, costs, replicas, percentile)
    if math.isinf(batch.high):
        return math.inf
    return costs.decode_step_s(max(batch.high, 1), load.context_tokens)


def size_decode(load: DecodeLoad, costs: Costs, target_s: float, percentile: float, highest_load_frac: float) -> int:
    """The fewest replicas that keep the target, use at most `highest_load_frac` of their KV, and have a place for all.

    The target must be one that a sequence alone keeps.
    """
    if load.tokens_per_s <= 0:
        return 0

    def suffices(replicas: int) -> bool:
        batch = predict_batch(load, costs, replicas, percentile)
        return (
            costs.decode_step_s(max(batch.high, 1), load.context_tokens) <= target_s
            and batch.high_kv_tokens <= highest_load_frac * costs.kv_tokens
            and batch.high <= costs.max_num_seqs
        )

    low, high = 0, 1
    while not suffices(high) and high < 1_000_000:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if suffices(middle) else (middle, high)
    return high
