"""How load changes over time: ten shapes of requests per second, prompt lengths and answer lengths.

Each changes for a while and is then held, so that there is a size to find. Sends nothing.
Called by: capacity/fleet.py, bench/serve/shapes.py.
"""

import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

LONGEST_PROMPT = 5.5
"""Times the mean."""
_SPREAD = 0.7
_MEAN_OF_SPREAD = math.exp(_SPREAD**2 / 2)
_IDLE_S = 1.0

Level = Callable[[float], float]
"""Of the time in seconds."""


@dataclass(frozen=True)
class Arrival:
    """One request of a load."""

    time_s: float
    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True)
class Shape:
    """Requests per second, mean prompt and mean completion over time."""

    rate: Level
    prompt: Level
    completion: Level
    settled_s: float
    """When the last change is over."""
    start: int
    """Replicas of each pool when it begins."""

    def draw(self, from_s: float, until_s: float, seed: int) -> Iterator[Arrival]:
        """Poisson arrivals with log-normal prompts and exponential answers; the same seed gives the same ones."""
        source = random.Random(seed)
        now_s = from_s
        while True:
            rate = self.rate(now_s)
            now_s += source.expovariate(rate) if rate > 0 else _IDLE_S
            if now_s >= until_s:
                return
            if rate > 0:
                length = min(LONGEST_PROMPT, source.lognormvariate(0, _SPREAD) / _MEAN_OF_SPREAD)
                prompt, completion = length * self.prompt(now_s), source.expovariate(1 / self.completion(now_s))
                yield Arrival(now_s, max(16, int(prompt)), max(2, int(completion)))


def build_shapes(rate_frac: float = 1, tokens_frac: float = 1, settled_s: float = 900) -> dict[str, Shape]:
    """The ten, with rates and lengths so many times as large. Changes are over by `settled_s`; periodic ones go on."""

    def shape(rate: Level, prompt: Level = lambda _: 1500, completion: Level = lambda _: 120, start: int = 2) -> Shape:
        return Shape(
            rate=lambda time_s: rate_frac * rate(time_s),
            prompt=lambda time_s: tokens_frac * prompt(time_s),
            completion=lambda time_s: tokens_frac * completion(time_s),
            settled_s=settled_s,
            start=start,
        )

    def switch(before: float, after: float) -> Level:
        return lambda time_s: before if time_s < settled_s else after

    return {
        "constant": shape(lambda _: 20),
        "step up": shape(switch(5, 25)),
        "step down": shape(switch(24, 6), start=8),
        "ramp": shape(lambda time_s: 3 + 19 * min(1, time_s / settled_s)),
        "sine": shape(lambda time_s: 14 + 5 * math.sin(2 * math.pi * time_s / 200)),
        "burst": shape(lambda time_s: 24 if settled_s - 90 <= time_s < settled_s else 8),
        "longer prompts": shape(lambda _: 12, prompt=switch(800, 2400)),
        "longer answers": shape(lambda _: 12, completion=switch(60, 220)),
        "nothing, then traffic": shape(switch(0, 12)),
        "on and off": shape(lambda time_s: 18 if time_s % 120 < 60 else 2),
    }
