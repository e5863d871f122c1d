"""The policy in a closed loop with stand-in engines, on ten shapes of load and a simulated clock.

The stand-ins are not the policy's own formulas: prompts queue for real, behind whichever of two random replicas has
fewer tokens waiting, and sequences share a decode replica event by event. The best size is found by trying sizes.
"""

import heapq
import itertools
import math
import random
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest

from swiftkv.serving.policy.costs import Costs
from swiftkv.serving.policy.decision import Decision, decide
from swiftkv.serving.policy.lengths import Bucket, Lengths, find_bucket
from swiftkv.serving.policy.memory import Memory
from swiftkv.serving.policy.observation import Arrivals, Observation, PoolState, Replica
from swiftkv.serving.policy.settings import PolicySettings, PoolLimits, Targets

PREFILL_S_PER_TOKEN, PREFILL_S_PER_TOKEN_SQUARED = 1 / 5000, 5e-9
STEP_S, STEP_S_PER_SEQUENCE, STEP_S_PER_CONTEXT_TOKEN = 0.02, 0.001, 5e-7
KV_TOKENS = 80_000
FIRST_TOKEN_S = 0.02
TTFT_S, TPOT_S, PERCENTILE = 2.5, 0.05, 0.95
STARTUP_S = 60.0
WINDOW_S = 30.0
TICK_S = 10.0
MAX_REPLICAS = 12

COSTS = Costs(
    prefill_s_per_token=PREFILL_S_PER_TOKEN,
    prefill_s_per_token_squared=PREFILL_S_PER_TOKEN_SQUARED,
    first_token_s=FIRST_TOKEN_S,
    step_s=STEP_S,
    step_s_per_sequence=STEP_S_PER_SEQUENCE,
    step_s_per_context_token=STEP_S_PER_CONTEXT_TOKEN,
    kv_tokens=KV_TOKENS,
)
LIMITS = PoolLimits(min_replicas=1, max_replicas=MAX_REPLICAS, startup_s=STARTUP_S)
SETTINGS = PolicySettings(
    targets=Targets(ttft_s=TTFT_S, tpot_s=TPOT_S, percentile=PERCENTILE), costs=COSTS, prefill=LIMITS, decode=LIMITS
)


@dataclass
class Request:
    arrived_s: float
    prompt: int
    completion: int
    ttft_s: float = math.inf
    started_s: float = math.inf
    finished_s: float = math.inf

    @property
    def tpot_s(self) -> float:
        return (self.finished_s - self.started_s) / self.completion


@dataclass
class PrefillEngine:
    """One prompt after another."""

    queue: deque[Request] = field(default_factory=deque)
    queued_tokens: int = 0
    current: Request | None = None
    work: deque[tuple[float, float, int]] = field(default_factory=deque)
    """Start, end and tokens of what was computed."""
    ready_s: float = 0
    is_draining: bool = False

    @property
    def load(self) -> float:
        return self.queued_tokens


@dataclass
class DecodeEngine:
    """Sequences advance together; `attained` counts the tokens that one present all the time would have."""

    active: list[tuple[float, int, Request]] = field(default_factory=list)
    waiting: deque[Request] = field(default_factory=deque)
    attained: float = 0
    seen_s: float = 0
    context: float = 0
    kv: int = 0
    version: int = 0
    ready_s: float = 0
    is_draining: bool = False

    @property
    def load(self) -> float:
        return len(self.active) + len(self.waiting)

    @property
    def step_s(self) -> float:
        return STEP_S + STEP_S_PER_SEQUENCE * len(self.active) + STEP_S_PER_CONTEXT_TOKEN * self.context

    def advance(self, now_s: float) -> None:
        if self.active:
            self.attained += (now_s - self.seen_s) / self.step_s
        self.seen_s = now_s


class Fleet:
    """Both pools under a list of requests. `control` is called every TICK_S with the fleet and the time."""

    def __init__(self, requests: list[Request], num_prefill: int, num_decode: int, seed: int = 0) -> None:
        self.random = random.Random(seed)
        self.requests = requests
        self.prefill = [PrefillEngine() for _ in range(num_prefill)]
        self.decode = [DecodeEngine() for _ in range(num_decode)]
        self.target = {"prefill": num_prefill, "decode": num_decode}
        self.events: list[tuple[float, int, Callable[..., None], tuple[object, ...]]] = []
        self.count = 0
        self.unserved: deque[Request] = deque()
        self.undecoded: deque[Request] = deque()
        self.arrived: deque[Request] = deque()
        self.finished: deque[Request] = deque()

    def run(self, until_s: float, control: Callable[["Fleet", float], None] | None = None) -> None:
        for request in self.requests:
            self.at(request.arrived_s, self.arrive, request)
        ticks = int(until_s / TICK_S) if control else 0
        for tick in range(1, ticks + 1):
            self.at(tick * TICK_S, lambda now_s: control(self, now_s))  # type: ignore[misc]
        while self.events and self.events[0][0] <= until_s:
            now_s, _, act, arguments = heapq.heappop(self.events)
            act(now_s, *arguments)

    def at(self, time_s: float, act: Callable[..., None], *arguments: object) -> None:
        self.count += 1
        heapq.heappush(self.events, (time_s, self.count, act, arguments))

    def pick(self, engines: list, now_s: float):
        ready = [engine for engine in engines if engine.ready_s <= now_s and not engine.is_draining]
        if not ready:
            return None
        return min(self.random.sample(ready, min(2, len(ready))), key=lambda engine: engine.load)

    def arrive(self, now_s: float, request: Request) -> None:
        self.arrived.append(request)
        self.send_to_prefill(now_s, request)

    def send_to_prefill(self, now_s: float, request: Request) -> None:
        engine = self.pick(self.prefill, now_s)
        if engine is None:
            self.unserved.append(request)
            return
        engine.queue.append(request)
        engine.queued_tokens += request.prompt
        self.compute_next(now_s, engine)

    def compute_next(self, now_s: float, engine: PrefillEngine) -> None:
        if engine.current is None and engine.queue:
            engine.current = request = engine.queue.popleft()
            end_s = now_s + request.prompt * (PREFILL_S_PER_TOKEN + PREFILL_S_PER_TOKEN_SQUARED * request.prompt)
            engine.work.append((now_s, end_s, request.prompt))
            self.at(end_s, self.prefilled, engine)

    def prefilled(self, now_s: float, engine: PrefillEngine) -> None:
        request, engine.current = engine.current, None
        engine.queued_tokens -= request.prompt
        self.send_to_decode(now_s, request)
        self.compute_next(now_s, engine)

    def send_to_decode(self, now_s: float, request: Request) -> None:
        engine = self.pick(self.decode, now_s)
        if engine is None:
            self.undecoded.append(request)
            return
        engine.waiting.append(request)
        self.admit(now_s, engine)

    def admit(self, now_s: float, engine: DecodeEngine) -> None:
        engine.advance(now_s)
        while engine.waiting:
            request = engine.waiting[0]
            size = request.prompt + request.completion
            if engine.active and engine.kv + size > KV_TOKENS:
                break
            engine.waiting.popleft()
            engine.kv += size
            engine.context += request.prompt + request.completion / 2
            self.count += 1
            heapq.heappush(engine.active, (engine.attained + request.completion, self.count, request))
            request.started_s = now_s
            request.ttft_s = now_s + engine.step_s + FIRST_TOKEN_S - request.arrived_s
        engine.version += 1
        if engine.active:
            self.at(
                now_s + (engine.active[0][0] - engine.attained) * engine.step_s, self.finish, engine, engine.version
            )

    def finish(self, now_s: float, engine: DecodeEngine, version: int) -> None:
        if version != engine.version:
            return
        engine.advance(now_s)
        _, _, request = heapq.heappop(engine.active)
        request.finished_s = now_s
        engine.kv -= request.prompt + request.completion
        engine.context -= request.prompt + request.completion / 2
        self.finished.append(request)
        self.admit(now_s, engine)

    def scale(self, now_s: float, pool: str, target: int, startup_s: float = STARTUP_S) -> None:
        engines = self.prefill if pool == "prefill" else self.decode
        present = [engine for engine in engines if not engine.is_draining]
        for _ in range(target - len(present)):
            engines.append(
                (PrefillEngine if pool == "prefill" else DecodeEngine)(ready_s=now_s + startup_s, **_seen(pool, now_s))
            )
            self.at(now_s + startup_s, self.revive)
        for engine in sorted(present, key=lambda e: (-e.ready_s, e.load))[: max(0, len(present) - target)]:
            engine.is_draining = True
        self.target[pool] = target

    def revive(self, now_s: float) -> None:
        waiting, self.unserved = self.unserved, deque()
        for request in waiting:
            self.send_to_prefill(now_s, request)
        waiting, self.undecoded = self.undecoded, deque()
        for request in waiting:
            self.send_to_decode(now_s, request)

    def observe(self, now_s: float) -> Observation:
        while self.arrived and self.arrived[0].arrived_s < now_s - WINDOW_S:
            self.arrived.popleft()
        while self.finished and self.finished[0].finished_s < now_s - WINDOW_S:
            self.finished.popleft()
        return Observation(
            now_s=now_s,
            prefill=PoolState(
                self.target["prefill"],
                tuple(
                    _report_prefill(index, engine, now_s)
                    for index, engine in enumerate(self.prefill)
                    if _exists(engine)
                ),
                len(self.unserved),
            ),
            decode=PoolState(
                self.target["decode"],
                tuple(
                    _report_decode(index, engine, now_s) for index, engine in enumerate(self.decode) if _exists(engine)
                ),
                len(self.undecoded),
            ),
            arrivals=Arrivals(min(WINDOW_S, now_s), _count(self.arrived, self.finished)),
        )


def _seen(pool: str, now_s: float) -> dict[str, float]:
    return {"seen_s": now_s} if pool == "decode" else {}


def _exists(engine: PrefillEngine | DecodeEngine) -> bool:
    return not engine.is_draining or engine.load > 0


def _state(engine: PrefillEngine | DecodeEngine, now_s: float) -> str:
    return "draining" if engine.is_draining else "running" if engine.ready_s <= now_s else "starting"


def _report_prefill(index: int, engine: PrefillEngine, now_s: float) -> Replica:
    while engine.work and engine.work[0][1] < now_s - WINDOW_S:
        engine.work.popleft()
    computing = sum(min(end, now_s) - max(start, now_s - WINDOW_S) for start, end, _ in engine.work)
    tokens = sum(
        size * (min(end, now_s) - max(start, now_s - WINDOW_S)) / (end - start) for start, end, size in engine.work
    )
    return Replica(
        name=f"p{index}",
        state=_state(engine, now_s),
        window_s=WINDOW_S,
        queued_prompt_tokens=engine.queued_tokens,
        running_requests=len(engine.queue) + (engine.current is not None),
        computed_prompt_tokens=tokens,
        computing_s=computing,
    )


def _report_decode(index: int, engine: DecodeEngine, now_s: float) -> Replica:
    return Replica(
        name=f"d{index}",
        state=_state(engine, now_s),
        window_s=WINDOW_S,
        running_requests=engine.load,
        kv_usage_frac=engine.kv / KV_TOKENS,
    )


def _count(arrived: deque[Request], finished: deque[Request]) -> Lengths:
    sums: dict[int, list[float]] = {}
    for request in arrived:
        bucket = sums.setdefault(find_bucket(request.prompt), [0.0] * 6)
        bucket[0] += 1
        bucket[1] += request.prompt
        bucket[2] += request.prompt
    for request in finished:
        bucket = sums.setdefault(find_bucket(request.prompt), [0.0] * 6)
        bucket[3] += 1
        bucket[4] += request.completion
        bucket[5] += request.completion**2
    return Lengths({index: Bucket(*values) for index, values in sums.items()})


# Load shapes.


@dataclass(frozen=True)
class Shape:
    """Requests per second, mean prompt and mean completion over time, and the load that the final size is for."""

    rate: Callable[[float], float]
    prompt: Callable[[float], float] = lambda _: 1500
    completion: Callable[[float], float] = lambda _: 120
    length_s: float = 2400
    start: int = 2

    def requests(self, until_s: float, seed: int, from_s: float = 0) -> Iterator[Request]:
        source = random.Random(seed)
        now_s = from_s
        while True:
            rate = self.rate(now_s)
            now_s += source.expovariate(rate) if rate > 0.01 else 1.0
            if now_s >= until_s:
                return
            if rate > 0.01:
                prompt = min(8000, max(16, int(source.lognormvariate(0, 0.7) * self.prompt(now_s) / 1.28)))
                yield Request(now_s, prompt, max(2, int(source.expovariate(1 / self.completion(now_s)))))


SHAPES = {
    "constant": Shape(lambda t: 20),
    "step up": Shape(lambda t: 5 if t < 900 else 25),
    "step down": Shape(lambda t: 24 if t < 900 else 6, start=8),
    "ramp": Shape(lambda t: 3 + 19 * min(1, t / 1500)),
    "sine": Shape(lambda t: 14 + 5 * math.sin(2 * math.pi * t / 200)),
    "burst": Shape(lambda t: 24 if 600 <= t < 690 else 8),
    "longer prompts": Shape(lambda t: 12, prompt=lambda t: 800 if t < 900 else 2400),
    "longer answers": Shape(lambda t: 12, completion=lambda t: 60 if t < 900 else 220),
    "nothing, then traffic": Shape(lambda t: 0 if t < 900 else 12),
    "on and off": Shape(lambda t: 18 if t % 120 < 60 else 2),
}


def run_policy(shape: Shape, settings: PolicySettings = SETTINGS, seed: int = 1) -> tuple[Fleet, list[Decision]]:
    fleet = Fleet(list(shape.requests(shape.length_s, seed)), shape.start, shape.start)
    decisions: list[Decision] = []

    def control(fleet: Fleet, now_s: float) -> None:
        memory = decisions[-1].memory if decisions else Memory()
        decision = decide(fleet.observe(now_s), settings, memory)
        decisions.append(decision)
        for pool in ("prefill", "decode"):
            if decision.pool(pool).replicas != fleet.target[pool]:
                fleet.scale(now_s, pool, decision.pool(pool).replicas)

    fleet.run(shape.length_s, control)
    return fleet, decisions


def find_best(shape: Shape) -> tuple[int, int]:
    """The fewest replicas of each pool that keep its target over the end of the shape, the other being large."""
    from_s, until_s = shape.length_s - 400, shape.length_s + 400

    def keeps(num_prefill: int, num_decode: int, pool: str) -> bool:
        requests = list(shape.requests(until_s, 7, from_s))
        fleet = Fleet(requests, num_prefill, num_decode)
        for engine in fleet.decode:
            engine.seen_s = from_s
        fleet.run(until_s + 600)
        judged = sorted(
            (r.ttft_s if pool == "prefill" else r.tpot_s) if math.isfinite(r.finished_s) else math.inf
            for r in requests
            if r.arrived_s > from_s + 60
        )
        return judged[int(PERCENTILE * len(judged))] <= (TTFT_S if pool == "prefill" else TPOT_S)

    many = MAX_REPLICAS + 4
    sizes = range(1, many)
    return (
        sizes[bisect_left(sizes, True, key=lambda n: keeps(n, many, "prefill"))],
        sizes[bisect_left(sizes, True, key=lambda n: keeps(many, n, "decode"))],
    )


@pytest.mark.parametrize("name", SHAPES)
def test_the_final_size_is_within_one_of_the_best_and_does_not_oscillate(name: str) -> None:
    shape = SHAPES[name]
    _, decisions = run_policy(shape)
    best = find_best(shape)
    final = decisions[-1]
    assert abs(final.prefill.replicas - best[0]) <= 1, (final.prefill, best, final.inputs)
    assert abs(final.decode.replicas - best[1]) <= 1, (final.decode, best, final.inputs)
    for pool in ("prefill", "decode"):
        sizes = [decision.pool(pool).replicas for decision in decisions[-int(600 / TICK_S) :]]
        changes = [after - before for before, after in itertools.pairwise(sizes) if after != before]
        assert len(changes) <= 1 or all((a > 0) == (changes[0] > 0) for a in changes), (pool, sizes)
