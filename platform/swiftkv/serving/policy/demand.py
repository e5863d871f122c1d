"""How much arrives now and how much will when a replica that starts now is up.

The present level comes from the longest recent stretch of time in which no split shows a change (after ADWIN, Bifet and
Gavaldà 2007, with a normal test for compound Poisson sums): steady traffic is averaged over minutes, a jump is seen in
one window. A trend counts only if it is significant, rises, and explains the past better than one jump does.
Called by: serving/policy/decision.py. Calls: lengths.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from swiftkv.serving.policy.lengths import Lengths
from swiftkv.serving.policy.memory import Window
from swiftkv.serving.policy.observation import Arrivals
from swiftkv.serving.policy.settings import PolicySettings, Pool

_MIN_TREND_WINDOWS = 5
_MIN_FINISHED = 10


@dataclass(frozen=True)
class Demand:
    """What the pools must be able to take."""

    requests_per_s: float
    uncached_tokens_per_s: float
    """Prompt tokens that prefill replicas would have to compute."""
    lengths: Lengths
    """Of the requests of the stretch that the level was taken from."""
    stretch_s: float
    """How long that stretch is."""
    growth_frac: dict[Pool, float]
    """By how much the demand on each pool will have grown when a replica that starts now is up."""
    error_frac: dict[Pool, float]
    """Standard error of the level of each pool's demand, as a fraction of it; 0 if there is none."""


def remember_arrivals(windows: Sequence[Window], arrivals: Arrivals | None, now_s: float, history: int) -> list[Window]:
    """The windows with the present one behind them, if it does not overlap the last. Old ones are forgotten."""
    if arrivals is None:
        return list(windows)
    kept = [window for window in windows if window.end_s > now_s - 1.5 * history * arrivals.window_s]
    if kept and kept[-1].end_s > now_s - arrivals.window_s:
        return kept
    new = Window(end_s=now_s, seconds=arrivals.window_s, lengths=arrivals.lengths.to_json())
    return [*kept[-(history - 1) :], new]


def estimate_demand(
    windows: Sequence[Window], arrivals: Arrivals | None, now_s: float, settings: PolicySettings
) -> Demand:
    """The present level and its growth, from past windows and the present one (None: only the past is known)."""
    sums = [_Sums.of(window.end_s, window.seconds, Lengths.from_json(window.lengths)) for window in windows]
    if arrivals is not None:
        sums = [past for past in sums if past.end_s <= now_s - arrivals.window_s]
        sums.append(_Sums.of(now_s, arrivals.window_s, arrivals.lengths))
    if not sums:
        nothing: dict[Pool, float] = {"prefill": 0, "decode": 0}
        return Demand(0, 0, Lengths(), 0, nothing, nothing)
    stretch = _find_steady_stretch(sums, settings.significance)
    seconds = sum(part.seconds for part in stretch)
    tokens, requests = sum(part.uncached for part in stretch), sum(part.requests for part in stretch)
    token_rates = [_Rate(part.middle_s, part.uncached / part.seconds, part.uncached_squared) for part in sums]
    request_rates = [_Rate(part.middle_s, part.requests / part.seconds, part.requests) for part in sums]
    return Demand(
        requests_per_s=requests / seconds,
        uncached_tokens_per_s=tokens / seconds,
        lengths=Lengths.sum(part.lengths for part in stretch),
        stretch_s=seconds,
        growth_frac={
            "prefill": _find_growth(token_rates, tokens / seconds, now_s, settings.prefill.startup_s, settings, sums),
            "decode": _find_growth(request_rates, requests / seconds, now_s, settings.decode.startup_s, settings, sums),
        },
        error_frac={
            "prefill": _divide_root(sum(part.uncached_squared for part in stretch), tokens),
            "decode": _divide_root(requests, requests),
        },
    )


@dataclass(frozen=True)
class _Sums:
    end_s: float
    seconds: float
    lengths: Lengths
    requests: float
    uncached: float
    uncached_squared: float
    finished: float
    completion: float
    completion_squared: float

    @classmethod
    def of(cls, end_s: float, seconds: float, lengths: Lengths) -> "_Sums":
        total = lengths.total
        return cls(
            end_s=end_s,
            seconds=max(seconds, 1e-3),
            lengths=lengths,
            requests=total.requests,
            uncached=total.uncached_tokens,
            uncached_squared=lengths.uncached_tokens_squared,
            finished=total.finished,
            completion=total.completion_tokens,
            completion_squared=total.completion_tokens_squared,
        )

    @property
    def middle_s(self) -> float:
        return self.end_s - self.seconds / 2

    @property
    def numbers(self) -> tuple[float, ...]:
        return (
            self.seconds,
            self.requests,
            self.uncached,
            self.uncached_squared,
            self.finished,
            self.completion,
            self.completion_squared,
        )


@dataclass(frozen=True)
class _Rate:
    middle_s: float
    per_s: float
    variance_of_sum: float


def _find_steady_stretch(sums: list[_Sums], significance: float) -> list[_Sums]:
    # Newest first; prefix[k] sums the newest k windows.
    prefix = [(0.0,) * 7, *accumulate((part.numbers for part in reversed(sums)), _add)]
    length = 1
    while length < len(sums):
        longer = prefix[length + 1]
        if any(_differ(prefix[cut], _subtract(longer, prefix[cut]), significance) for cut in range(1, length + 1)):
            break
        length += 1
    return sums[-length:]


def _differ(newer: tuple[float, ...], older: tuple[float, ...], significance: float) -> bool:
    """Whether requests/s, tokens/s or the mean of completion tokens are not the same in two stretches of time."""
    seconds, requests, tokens, tokens_squared, finished, completion, completion_squared = zip(newer, older, strict=True)
    # A Poisson sum has the variance of its sum of squares. Variances are those of both together, as if nothing had
    # changed: a stretch without its rare long prompts would seem to vary less than it does.
    if _is_far(requests, seconds, sum(requests), significance):
        return True
    if _is_far(tokens, seconds, sum(tokens_squared), significance):
        return True
    if min(finished) < _MIN_FINISHED:
        return False
    mean = sum(completion) / sum(finished)
    return _is_far(completion, finished, sum(completion_squared) - mean**2 * sum(finished), significance)


def _is_far(sums: tuple[float, ...], sizes: tuple[float, ...], squares: float, significance: float) -> bool:
    """Whether two sums over times (or counts) of these sizes have different means; `squares` is their variance."""
    difference = sums[0] / sizes[0] - sums[1] / sizes[1]
    variance = squares / sum(sizes) * (1 / sizes[0] + 1 / sizes[1])
    return difference**2 > significance**2 * max(variance, 1e-12)


def _find_growth(
    rates: list[_Rate], level: float, now_s: float, lead_s: float, settings: PolicySettings, sums: list[_Sums]
) -> float:
    """The fraction by which a straight line through the past is above `level` after `lead_s`; 0 without a clear one."""
    if len(rates) < _MIN_TREND_WINDOWS or level <= 0 or lead_s <= 0 or settings.max_growth_frac == 0:
        return 0.0
    times, values = [rate.middle_s for rate in rates], [rate.per_s for rate in rates]
    mean_time, mean_value = _mean(times), _mean(values)
    spread = sum((time - mean_time) ** 2 for time in times)
    slope = sum((t - mean_time) * (v - mean_value) for t, v in zip(times, values, strict=True)) / spread
    variance = _mean([rate.variance_of_sum / part.seconds**2 for rate, part in zip(rates, sums, strict=True)])
    if slope <= settings.significance * math.sqrt(variance / spread):
        return 0.0
    line_error = sum((v - mean_value - slope * (t - mean_time)) ** 2 for t, v in zip(times, values, strict=True))
    if _error_of_best_step(values) < line_error:
        return 0.0
    ahead = mean_value + slope * (now_s + lead_s - mean_time)
    return min(settings.max_growth_frac, max(0.0, ahead / level - 1))


def _error_of_best_step(values: list[float]) -> float:
    return min(_error(values[:cut]) + _error(values[cut:]) for cut in range(1, len(values)))


def _error(values: list[float]) -> float:
    mean = _mean(values)
    return sum((value - mean) ** 2 for value in values)


def _divide_root(sum_of_squares: float, total: float) -> float:
    # A Poisson sum has the variance of its sum of squares.
    return math.sqrt(sum_of_squares) / total if total > 0 else 0.0


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _add(left: tuple[float, ...], right: tuple[float, ...]) -> tuple[float, ...]:
    return tuple(a + b for a, b in zip(left, right, strict=True))


def _subtract(left: tuple[float, ...], right: tuple[float, ...]) -> tuple[float, ...]:
    return tuple(a - b for a, b in zip(left, right, strict=True))
