"""Both pools in virtual time: prompts queue behind one another, and sequences share a decode replica, event by event.

Not the policy's own formulas, so that it can judge them. Requests go where Ray sends them: to whichever of two random
replicas has fewer, the decode replica first, which then asks a prefill replica. Runs no engine.
Called by: capacity/sizing.py. Calls: capacity/load_shapes.py, serving/policy/costs.py.
"""

import heapq
import math
import random
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from swiftkv.capacity.load_shapes import Arrival
from swiftkv.serving.policy.costs import Costs
from swiftkv.serving.policy.settings import Pool


@dataclass
class Request:
    """An arrival and what becomes of it. Infinite: not yet."""

    arrival: Arrival
    ttft_s: float = math.inf
    started_s: float = math.inf
    finished_s: float = math.inf
    decode: "DecodeEngine | None" = None

    @property
    def tpot_s(self) -> float:
        """Seconds per output token."""
        return (self.finished_s - self.started_s) / self.arrival.completion_tokens

    @property
    def kv_tokens(self) -> int:
        """What it will have occupied at its end."""
        return self.arrival.prompt_tokens + self.arrival.completion_tokens

    @property
    def context_tokens(self) -> float:
        """The mean over its time."""
        return self.arrival.prompt_tokens + self.arrival.completion_tokens / 2


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
    def load(self) -> int:
        """Requests it has."""
        return len(self.queue) + (self.current is not None)


@dataclass
class DecodeEngine:
    """Sequences advance together; `attained` counts the tokens that one present all the time would have."""

    costs: Costs
    active: list[tuple[float, int, Request]] = field(default_factory=list)
    waiting: deque[Request] = field(default_factory=deque)
    load: int = 0
    """Requests it has, those whose prompt is being computed included."""
    attained: float = 0
    seen_s: float = 0
    context: float = 0
    kv: int = 0
    version: int = 0
    ready_s: float = 0
    is_draining: bool = False

    @property
    def step_s(self) -> float:
        """Seconds of a step of the sequences it has now."""
        mean = self.context / len(self.active) if self.active else 0
        return self.costs.decode_step_s(len(self.active), mean)

    def advance(self, now_s: float) -> None:
        """Let the time pass."""
        if self.active:
            self.attained += (now_s - self.seen_s) / self.step_s
        self.seen_s = now_s


AnyEngine = TypeVar("AnyEngine", PrefillEngine, DecodeEngine)
Control = Callable[["Fleet", float], None]


class Fleet:
    """Both pools under arrivals."""

    def __init__(self, costs: Costs, num_prefill: int, num_decode: int, from_s: float = 0, seed: int = 0) -> None:
        self.costs = costs
        self.random = random.Random(seed)
        self.prefill = [PrefillEngine() for _ in range(num_prefill)]
        self.decode = [DecodeEngine(costs, seen_s=from_s) for _ in range(num_decode)]
        self.target: dict[Pool, int] = {"prefill": num_prefill, "decode": num_decode}
        self.unserved: deque[Request] = deque()
        self.arrived: deque[Request] = deque()
        self.finished: deque[Request] = deque()
        self._events: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._count = 0

    def run(
        self, arrivals: Iterable[Arrival], until_s: float, control: Control | None = None, tick_s: float = 10
    ) -> list[Request]:
        """What became of the arrivals. `control` is called every `tick_s` with the fleet and the time."""
        requests = [Request(arrival) for arrival in arrivals]
        for request in requests:
            self._at(request.arrival.time_s, self._arrive, request)
        if control is not None:
            for tick in range(1, int(until_s / tick_s) + 1):
                self._at(tick * tick_s, lambda now_s, act: act(self, now_s), control)
        while self._events and self._events[0][0] <= until_s:
            now_s, _, act, arguments = heapq.heappop(self._events)
            act(now_s, *arguments)
        return requests

    def scale(self, now_s: float, pool: Pool, target: int, startup_s: float) -> None:
        """Start or drain replicas; as Ray does, those that do not run yet go first."""
        engines: list[Any] = self.prefill if pool == "prefill" else self.decode
        present = [engine for engine in engines if not engine.is_draining]
        for _ in range(target - len(present)):
            ready_s = now_s + startup_s
            is_prefill = pool == "prefill"
            engines.append(
                PrefillEngine(ready_s=ready_s)
                if is_prefill
                else DecodeEngine(self.costs, seen_s=now_s, ready_s=ready_s)
            )
            self._at(ready_s, self._revive)
        for engine in sorted(present, key=lambda e: (-e.ready_s, e.load))[: max(0, len(present) - target)]:
            engine.is_draining = True
        self.target[pool] = target

    def _at(self, time_s: float, act: Callable[..., None], *arguments: Any) -> None:
        self._count += 1
        heapq.heappush(self._events, (time_s, self._count, act, arguments))

    def _pick(self, engines: Sequence[AnyEngine], now_s: float) -> AnyEngine | None:
        ready = [engine for engine in engines if engine.ready_s <= now_s and not engine.is_draining]
        if not ready:
            return None
        return min(self.random.sample(ready, min(2, len(ready))), key=lambda engine: engine.load)

    def _arrive(self, now_s: float, request: Request) -> None:
        self.arrived.append(request)
        self._send(now_s, request)

    def _send(self, now_s: float, request: Request) -> None:
        decode, prefill = self._pick(self.decode, now_s), self._pick(self.prefill, now_s)
        if decode is None or prefill is None:
            self.unserved.append(request)
            return
        request.decode = decode
        decode.load += 1
        prefill.queue.append(request)
        prefill.queued_tokens += request.arrival.prompt_tokens
        self._compute_next(now_s, prefill)

    def _compute_next(self, now_s: float, engine: PrefillEngine) -> None:
        if engine.current is None and engine.queue:
            engine.current = request = engine.queue.popleft()
            tokens = request.arrival.prompt_tokens
            end_s = now_s + self.costs.prefill_s(tokens)
            engine.work.append((now_s, end_s, tokens))
            self._at(end_s, self._prefilled, engine)

    def _prefilled(self, now_s: float, engine: PrefillEngine) -> None:
        request, engine.current = engine.current, None
        assert request is not None and request.decode is not None
        engine.queued_tokens -= request.arrival.prompt_tokens
        request.decode.waiting.append(request)
        self._admit(now_s, request.decode)
        self._compute_next(now_s, engine)

    def _admit(self, now_s: float, engine: DecodeEngine) -> None:
        engine.advance(now_s)
        while engine.waiting:
            request = engine.waiting[0]
            if engine.active and engine.kv + request.kv_tokens > self.costs.kv_tokens:
                break
            engine.waiting.popleft()
            engine.kv += request.kv_tokens
            engine.context += request.context_tokens
            self._count += 1
            heapq.heappush(engine.active, (engine.attained + request.arrival.completion_tokens, self._count, request))
            request.started_s = now_s
            request.ttft_s = now_s + engine.step_s + self.costs.first_token_s - request.arrival.time_s
        engine.version += 1
        if engine.active:
            left_s = (engine.active[0][0] - engine.attained) * engine.step_s
            self._at(now_s + left_s, self._finish, engine, engine.version)

    def _finish(self, now_s: float, engine: DecodeEngine, version: int) -> None:
        if version != engine.version:
            return
        engine.advance(now_s)
        _, _, request = heapq.heappop(engine.active)
        request.finished_s = now_s
        engine.load -= 1
        engine.kv -= request.kv_tokens
        engine.context -= request.context_tokens
        self.finished.append(request)
        self._admit(now_s, engine)

    def _revive(self, now_s: float) -> None:
        waiting, self.unserved = self.unserved, deque()
        for request in waiting:
            self._send(now_s, request)
