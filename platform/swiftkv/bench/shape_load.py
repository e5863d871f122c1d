"""Sends the load shapes to stand-ins, open loop, from a process of its own; says what became of every request.

    python -m swiftkv.bench.shape_load < PLAN > OUTCOME          in a cluster's environment (`Cluster.environment`)

Requests go straight to each application's decode deployment, as the gateway's do; no HTTP is between.
Called by: bench/serve/shapes.py. Calls: capacity/load_shapes.py, Ray Serve.
"""

import asyncio
import json
import os
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any

from swiftkv.capacity.load_shapes import Arrival, Shape, build_shapes
from swiftkv.config import StrictModel

_START_AFTER_S = 1.0


class LoadPlan(StrictModel):
    """What is sent."""

    shapes: list[str]
    """Names in `build_shapes`; each has an application of its own, `name_application(name)`."""

    rate_frac: float
    """As in `build_shapes`."""

    tokens_frac: float
    """As in `build_shapes`."""

    settled_s: float
    """As in `build_shapes`."""

    until_s: float
    """Seconds of arrivals."""

    seed: int
    """Of the arrivals."""

    def build(self) -> dict[str, Shape]:
        """The shapes."""
        shapes = build_shapes(self.rate_frac, self.tokens_frac, self.settled_s)
        return {name: shapes[name] for name in self.shapes}


class RequestOutcome(StrictModel):
    """One request. Times in seconds since the load began; late: after it should have been."""

    arrived_s: float
    sent_late_s: float
    ttft_s: float | None
    """None: lost, as `error` says."""
    tpot_s: float | None
    prefill_late_s: float = 0
    step_late_s: float = 0
    error: str = ""


def name_application(shape: str) -> str:
    """The Serve application of a shape."""
    return shape.replace(",", "").replace(" ", "-")


async def run_load(plan: LoadPlan, on_begin: Callable[[float], None]) -> dict[str, list[RequestOutcome]]:
    """The outcome of every request, by shape. `on_begin` is told when it begins, by the monotonic clock."""
    from ray import serve

    handles = {name: serve.get_app_handle(name_application(name)) for name in plan.shapes}
    began_s = time.monotonic() + _START_AFTER_S
    on_begin(began_s)
    shapes = plan.build().items()
    # Every shape has a seed of its own, or they would all be unlucky at once.
    arrivals = {name: shape.draw(0, plan.until_s, plan.seed + index) for index, (name, shape) in enumerate(shapes)}
    outcomes = await asyncio.gather(*(_send_all(handles[name], arrivals[name], began_s) for name in plan.shapes))
    return dict(zip(plan.shapes, outcomes, strict=True))


async def _send_all(handle: Any, arrivals: Iterable[Arrival], began_s: float) -> list[RequestOutcome]:
    sent: list[asyncio.Task[RequestOutcome]] = []
    for arrival in arrivals:
        await asyncio.sleep(max(0.0, began_s + arrival.time_s - time.monotonic()))
        sent.append(asyncio.create_task(_send(handle, arrival, began_s)))
    return list(await asyncio.gather(*sent))


async def _send(handle: Any, arrival: Arrival, began_s: float) -> RequestOutcome:
    should_s, now_s = began_s + arrival.time_s, time.monotonic()
    try:
        answer = await handle.remote(arrival.prompt_tokens, arrival.completion_tokens)
    except Exception as error:  # whatever it is, this request is lost and the others go on
        return RequestOutcome(
            arrived_s=arrival.time_s, sent_late_s=now_s - should_s, ttft_s=None, tpot_s=None, error=repr(error)
        )
    return RequestOutcome(
        arrived_s=arrival.time_s,
        sent_late_s=now_s - should_s,
        ttft_s=answer.first_token_s - should_s,
        tpot_s=(answer.finished_s - answer.first_token_s) / max(1, arrival.completion_tokens - 1),
        prefill_late_s=answer.prefill_late_s,
        step_late_s=answer.step_late_s,
    )


def main() -> None:
    """The plan on standard input; on standard output first when it begins (monotonic clock), then the outcomes."""
    import ray

    plan = LoadPlan.model_validate_json(sys.stdin.read())
    with os.fdopen(os.dup(sys.stdout.fileno()), "w") as results:
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # Ray prints there too
        ray.init(logging_level="ERROR", log_to_driver=False)
        outcomes = asyncio.run(run_load(plan, lambda began_s: print(began_s, file=results, flush=True)))
        json.dump({name: [outcome.model_dump() for outcome in found] for name, found in outcomes.items()}, results)


if __name__ == "__main__":
    main()
