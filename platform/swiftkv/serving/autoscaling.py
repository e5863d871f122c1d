"""Ray Serve's application-level autoscaling policy: asks `policy.decision` how large both pools should be.

Builds the observation from what replicas report, and from Prometheus where there is one; keeps the memory in Ray's
policy state; writes one log line of JSON whenever sizes or reasons change, and gauges. Decides nothing itself.
Called by: Ray Serve's controller, which makes one `PoolPolicy` per application.
Calls: serving/policy, serving/pair_policy.py, metrics.

Facts of Ray Serve 2.60 that this rests on:
- The controller calls a policy ten times a second and applies each deployment's own delays and factors afterwards. A
  deployment's autoscaling_config therefore sets upscale_delay_s, downscale_delay_s and downscale_to_zero_delay_s to 0
  and leaves the factors alone; the delays are the policy's.
- With no running replica and a waiting request, the controller itself asks for one replica (of the deployment where
  the request waits) and does not look at what a policy says until it runs. So a pool starts from zero at once, but
  with one replica; the policy has its way from there.
- Nobody can tell Ray which replica to stop: it takes those that do not run yet, then those on nodes with the fewest
  replicas, then the newest (`deployment_scheduler._get_replicas_to_stop`). A replica that is stopped takes no new
  request, finishes those it has, then runs `__del__` (which may be async) within graceful_shutdown_timeout_s. So KV
  that is yet to be pulled is kept in one of two ways: `drain: any` holds a scale-down until no running replica has
  such KV, which under steady load may be never; `drain: waits` is for replicas whose `__del__` waits until their KV
  is pulled or its lease is over, with graceful_shutdown_timeout_s longer than lease and longest request. A replica
  that drains is in no context, so that the device budget does not see it; a new one stays pending until it is gone.
- Replicas report every RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S (10 s). A context's raw_metrics has only
  running replicas; what is missing counts as stale.
- A policy's error would stop the controller's round for every application, so that here an error holds all sizes.
"""

import json
import logging
import math
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from typing import Any

from ray.serve.autoscaling_policy import PrometheusQueryMixin

from swiftkv.config import parse_settings
from swiftkv.errors import CheckpointError, RegistryError
from swiftkv.metrics import record
from swiftkv.serving.config import PairSettings
from swiftkv.serving.pair_policy import build_policy_settings
from swiftkv.serving.policy.decision import Decision, decide
from swiftkv.serving.policy.lengths import EDGES, Bucket, Lengths, find_bucket
from swiftkv.serving.policy.memory import Memory
from swiftkv.serving.policy.observation import Arrivals, Observation, PoolState, Replica
from swiftkv.serving.policy.reasons import CODES
from swiftkv.serving.policy.settings import POOLS, PolicySettings, Pool
from swiftkv.serving.policy.stats import WINDOW, WINDOW_S, read_lengths, read_replica

PREFIXES: dict[Pool, str] = {"prefill": "Prefill:", "decode": "Decode:"}
"""What the names of the two deployments begin with."""

_PLACE = "autoscaling_policy.policy_kwargs.settings"

PROMETHEUS_WINDOW_S = 60.0
_RANGE = f"[{PROMETHEUS_WINDOW_S:.0f}s]"
# Ours, of when requests come: vLLM's own histogram of prompts counts them when they end.
PROMPTS_QUERY = f"sum by (le, application) (increase(ray_swiftkv_arrived_prompt_tokens_bucket{_RANGE}))"
PROMPT_TOKENS_QUERY = f"sum by (application) (increase(ray_swiftkv_arrived_prompt_tokens_sum{_RANGE}))"
FINISHED_QUERY = f"sum by (ReplicaId) (increase(ray_vllm_request_generation_tokens_count{_RANGE}))"
COMPLETION_TOKENS_QUERY = f"sum by (ReplicaId) (increase(ray_vllm_request_generation_tokens_sum{_RANGE}))"
QUERIES = [PROMPTS_QUERY, PROMPT_TOKENS_QUERY, FINISHED_QUERY, COMPLETION_TOKENS_QUERY]

logger = logging.getLogger("ray.serve")

Contexts = dict[Any, Any]
"""Ray's DeploymentID to its AutoscalingContext."""


class PoolPolicy(PrometheusQueryMixin):
    """Sizes the two pools of an application. Ray makes one from `policy_kwargs` and calls it.

    Raises: ConfigError naming the wrong setting, at deploy.
    """

    def __init__(
        self,
        settings: dict[str, Any],
        pair: dict[str, Any] | None = None,
        prometheus_url: str | None = None,
        interval_s: float = 1.0,
    ) -> None:
        """`settings` are those of `PolicySettings`. With `pair`, the same as the application's `args`, limits and costs
        come from there and only targets must be given. `prometheus_url` is $RAY_PROMETHEUS_HOST where None; a decision
        is taken every `interval_s` seconds."""
        super().__init__(prometheus_address=prometheus_url, prometheus_queries=QUERIES)
        self._interval_s = interval_s
        if pair is None:
            complete = parse_settings(settings, PolicySettings, _PLACE)
            self._build_settings: Callable[[], PolicySettings] = lambda: complete
        else:
            parsed = parse_settings(pair, PairSettings, "autoscaling_policy.policy_kwargs.pair")
            self._build_settings = cache(lambda: build_policy_settings(parsed, settings, _PLACE))
            # Again when first needed: a controller that comes back must not depend on the registry.
            with suppress(RegistryError, CheckpointError):
                self._build_settings()

    def __call__(self, contexts: Contexts) -> tuple[dict[Any, int], dict[Any, dict[str, Any]]]:
        """Replicas of each of the two deployments, and what to remember for each."""
        states = {deployment: dict(context.policy_state) for deployment, context in contexts.items()}
        pools = find_pools(contexts)
        if pools is None:
            return {}, states
        try:
            return self._decide(contexts, pools, states), states
        except Exception:
            # One application's policy must not end the controller's round for all of them; sizes stay.
            logger.exception("swiftkv: the policy failed; both pools keep their sizes")
            states[pools["decode"]]["decided_s"] = contexts[pools["decode"]].current_time
            return {}, states

    def _decide(self, contexts: Contexts, pools: dict[Pool, Any], states: dict[Any, dict[str, Any]]) -> dict[Any, int]:
        kept = states[pools["decode"]]
        now_s = contexts[pools["decode"]].current_time
        if now_s - kept.get("decided_s", -math.inf) < self._interval_s:
            return {pools[pool]: replicas for pool, replicas in kept.get("replicas", {}).items()}
        settings = self._build_settings()
        started = time.perf_counter()
        observation = build_observation(contexts, pools, self.prometheus_results, settings.staleness_s)
        decision = decide(observation, settings, Memory.model_validate(kept.get("memory") or {}))
        took_s = time.perf_counter() - started
        application = contexts[pools["decode"]].app_name or ""
        tell(application, decision, kept, took_s)
        kept |= {
            "memory": decision.memory.model_dump(mode="json"),
            "decided_s": now_s,
            "replicas": {pool: decision.pool(pool).replicas for pool in POOLS},
            "reasons": list_codes(decision),
        }
        return {pools[pool]: decision.pool(pool).replicas for pool in POOLS}


def find_pools(contexts: Contexts) -> dict[Pool, Any] | None:
    """The deployments of the two pools; None unless each is there once, as while an application is being deployed."""
    found: dict[Pool, Any] = {}
    for pool in POOLS:
        named = [deployment for deployment in contexts if deployment.name.startswith(PREFIXES[pool])]
        if len(named) != 1:
            return None
        found[pool] = named[0]
    return found


def build_observation(
    contexts: Contexts, pools: dict[Pool, Any], prometheus: dict[str, Any] | None, staleness_s: float
) -> Observation:
    """What Ray knows of both pools, as the policy wants it. Arrivals come from Prometheus where it has them."""
    decode = contexts[pools["decode"]]
    reported = _read_arrivals(decode, staleness_s)
    measured = _query_arrivals(decode, prometheus, reported) if prometheus else None
    return Observation(
        now_s=decode.current_time,
        prefill=_read_pool(contexts[pools["prefill"]]),
        decode=_read_pool(decode),
        arrivals=measured or reported,
        notes=("arrivals: " + ("prometheus" if measured else "replicas"),),
    )


def list_codes(decision: Decision) -> list[str]:
    """The decision's reasons without their figures."""
    return sorted({f"{reason.pool}:{reason.code}" for reason in decision.reasons})


def tell(application: str, decision: Decision, before: dict[str, Any], took_s: float) -> None:
    """Write the decision down: gauges always, a log line if sizes or reasons are other than before."""
    replicas = {pool: decision.pool(pool).replicas for pool in POOLS}
    codes = list_codes(decision)
    if replicas != before.get("replicas") or codes != before.get("reasons"):
        line = {"event": "swiftkv_policy", "application": application, "took_s": round(took_s, 6)}
        logger.info(json.dumps(line | decision.to_record()))
    demand = {
        "prefill": decision.inputs["uncached_prompt_tokens_per_s"],
        "decode": decision.inputs["completion_tokens_per_s"],
    }
    for pool in POOLS:
        record("swiftkv_policy_wanted_replicas", replicas[pool], application=application, pool=pool)
        record("swiftkv_policy_demand_tokens_per_second", demand[pool], application=application, pool=pool)
        for code in CODES:
            is_given = float(f"{pool}:{code}" in codes)
            record("swiftkv_policy_reason", is_given, application=application, pool=pool, reason=code)
        for name, value in decision.inputs["pools"][pool].items():
            _record_input(application, pool, name, value)
    for name, value in decision.inputs.items():
        _record_input(application, "both", name, value)
    record("swiftkv_policy_predicted_ttft_seconds", decision.predicted_ttft_s, application=application)
    record("swiftkv_policy_predicted_tpot_seconds", decision.predicted_tpot_s, application=application)
    record("swiftkv_policy_decision_seconds", took_s, application=application)


def _record_input(application: str, pool: str, name: str, value: Any) -> None:
    if isinstance(value, int | float):
        record("swiftkv_policy_input", value, application=application, pool=pool, input=name)


def _read_pool(context: Any) -> PoolState:
    stats: dict[Any, dict[str, float]] = {replica: {} for replica in context.running_replicas}
    seen: dict[Any, float] = {}
    for name, by_replica in (context.raw_metrics or {}).items():
        for replica, series in by_replica.items():
            if series and replica in stats:
                stats[replica][name] = series[-1].value
                seen[replica] = max(seen.get(replica, -math.inf), series[-1].timestamp)
    # Without our own names a report is Ray's alone, and says nothing of the engine.
    running = [
        read_replica(
            replica.unique_id,
            max(0.0, context.current_time - seen[replica]) if WINDOW in values else math.inf,
            values,
        )
        for replica, values in stats.items()
    ]
    num_starting = max(0, context.target_num_replicas - len(running))
    starting = [Replica(name=f"starting {index}", state="starting") for index in range(num_starting)]
    return PoolState(context.target_num_replicas, (*running, *starting), context.total_queued_requests or 0.0)


def _read_arrivals(decode: Any, staleness_s: float) -> Arrivals | None:
    """What all decode replicas counted lately. None if there are replicas and none reports."""
    if not decode.running_replicas:
        return Arrivals(WINDOW_S, Lengths())
    since_s = decode.current_time - staleness_s
    raw = decode.raw_metrics or {}
    latest = [
        (name, series[-1].value)
        for name, by_replica in raw.items()
        for series in by_replica.values()
        if series and series[-1].timestamp >= since_s
    ]
    windows = [value for name, value in latest if name == WINDOW]
    if not windows:
        return None
    return Arrivals(max(windows), read_lengths(latest))


def _query_arrivals(decode: Any, prometheus: dict[str, Any], reported: Arrivals | None) -> Arrivals | None:
    """What came by our histogram and ended by vLLM's. They count prompt tokens whole; which of them are cached or too
    few for the hop, only replicas know."""
    names = {replica.unique_id for replica in decode.running_replicas}

    def find(query: str) -> list[Any]:
        return [
            sample
            for sample in _find_samples(prometheus, query)
            if sample.labels.get("ReplicaId") in names or sample.labels.get("application") == decode.app_name
        ]

    prompt_tokens, finished, completion_tokens = (
        sum(sample.value for sample in find(query))
        for query in (PROMPT_TOKENS_QUERY, FINISHED_QUERY, COMPLETION_TOKENS_QUERY)
    )
    up_to = {float(sample.labels["le"].replace("+Inf", "inf")): sample.value for sample in find(PROMPTS_QUERY)}
    if not up_to:
        return None
    total = reported.lengths.total if reported else Bucket()
    uncached_frac = total.uncached_tokens / total.prompt_tokens if total.prompt_tokens else 1.0
    lengths = convert_histogram(up_to, prompt_tokens, finished, completion_tokens, uncached_frac)
    return Arrivals(PROMETHEUS_WINDOW_S, lengths)


def convert_histogram(
    up_to: dict[float, float], prompt_tokens: float, finished: float, completion_tokens: float, uncached_frac: float
) -> Lengths:
    """Our histogram of a Prometheus one: `up_to` has the number of requests up to each edge.

    A bucket's prompts are taken as its geometric middle, then all are scaled to the sum that was measured. Completion
    tokens are spread evenly, as exponentially distributed: their squares and which prompt they go with are unknown.
    """
    middles: list[tuple[float, float]] = []
    below, below_edge = 0.0, 1.0
    for edge in sorted(up_to):
        count = up_to[edge] - below
        if count > 0:
            middles.append((math.sqrt(below_edge * edge) if math.isfinite(edge) else 1.5 * below_edge, count))
        below, below_edge = max(below, up_to[edge]), edge
    guessed = sum(middle * count for middle, count in middles)
    if guessed <= 0:
        return Lengths()
    scale = prompt_tokens / guessed if prompt_tokens > 0 else 1.0
    num_requests = sum(count for _, count in middles)
    parts = []
    for middle, count in middles:
        share, tokens = count / num_requests, middle * scale * count
        ended, completion = finished * share, completion_tokens * share
        squared = 2 * completion**2 / ended if ended else 0.0
        index = min(find_bucket(uncached_frac * tokens / count), len(EDGES))
        parts.append(Lengths({index: Bucket(count, uncached_frac * tokens, tokens, ended, completion, squared)}))
    return Lengths.sum(parts)


def _find_samples(prometheus: dict[str, Any], query: str) -> tuple[Any, ...]:
    return tuple(getattr(prometheus.get(query), "samples", ()))
