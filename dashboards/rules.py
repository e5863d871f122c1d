"""Prometheus recording rules and alerts, with what is to be done about each alert and an example that it is tried on.

Read by: dashboards/write.py, which writes them as prometheus/*.yml and as promtool's tests.
"""

from dataclasses import dataclass, field
from typing import Literal

POOLS = {"prefill": "Prefill:.*", "decode": "Decode:.*", "single": "LLMServer:.*"}
"""Pools by the names of their deployments."""

OBJECTIVE = 0.95
"""Part of the answers that are to be within a target."""


@dataclass(frozen=True)
class Recording:
    """A query that is evaluated once for all panels."""

    name: str
    expr: str


@dataclass(frozen=True)
class Example:
    """Series as promtool writes them, and whether the alert fires at the time given."""

    series: dict[str, str]
    at: str
    fires: bool


@dataclass(frozen=True)
class Alert:
    """What someone must look at."""

    name: str
    expr: str
    lasting: str
    severity: Literal["page", "ticket"]
    summary: str
    run_book: str
    """What to do, in a line."""
    examples: tuple[Example, ...] = field(default=())


def _name_pools() -> str:
    replicas = (
        "max by (WorkerId, application, deployment, replica) "
        '(ray_serve_deployment_replica_starts_total{deployment=~".+:.+"})'
    )
    for pool, pattern in POOLS.items():
        replicas = f'label_replace({replicas}, "pool", "{pool}", "deployment", "{pattern}")'
    return replicas


def _of_replica(expr: str) -> str:
    """Series of a replica's process, with its pool."""
    return f"{expr} * on (WorkerId) group_left (application, pool, replica) swiftkv:replica:info"


def _rate_of_pool(metric: str) -> str:
    return f"sum by (application, pool, replica) ({_of_replica(f'rate({metric}[1m])')})"


def _late_frac(target: str, window: str) -> str:
    good = f'sum by (model) (rate(ray_swiftkv_gateway_good_requests_total{{target="{target}"}}[{window}]))'
    return f"1 - {good} / sum by (model) (rate(ray_swiftkv_gateway_{target}_seconds_count[{window}]))"


WINDOWS = ("5m", "30m", "1h", "6h")

RECORDINGS = (
    Recording("swiftkv:replica:info", f"clamp({_name_pools()}, 1, 1)"),
    Recording("swiftkv:pool_completion_tokens:rate1m", _rate_of_pool("ray_vllm_generation_tokens_total")),
    Recording("swiftkv:pool_prompt_tokens:rate1m", _rate_of_pool("ray_vllm_prompt_tokens_total")),
    Recording(
        "swiftkv:pool_kv_usage:frac",
        f"max by (application, pool, replica) ({_of_replica('ray_vllm_kv_cache_usage_perc')})",
    ),
    Recording(
        "swiftkv:pool_sequences:running",
        f"sum by (application, pool, replica) ({_of_replica('ray_vllm_num_requests_running')})",
    ),
    Recording(
        "swiftkv:pool_sequences:waiting",
        f"sum by (application, pool, replica) ({_of_replica('ray_vllm_num_requests_waiting')})",
    ),
    Recording(
        "swiftkv:device_flops:rate1m",
        "avg by (application, pool, work) (sum by (WorkerId, work) (rate(ray_swiftkv_device_flops_total[1m]))"
        " * on (WorkerId) group_left (application, pool) swiftkv:replica:info)",
    ),
    *(
        Recording(f"swiftkv:gateway_{target}_late:frac_{window}", _late_frac(target, window))
        for target in ("ttft", "tpot")
        for window in WINDOWS
    ),
    Recording(
        "swiftkv:gateway_tokens:rate1m",
        "sum by (tenant, model, version, kind) (rate(ray_swiftkv_gateway_tokens_total[1m]))",
    ),
)


def _burns(target: str, short: str, long: str, factor: float) -> str:
    bound = round(factor * (1 - OBJECTIVE), 4)
    return " and ".join(f"swiftkv:gateway_{target}_late:frac_{window} > {bound}" for window in (short, long))


def _burn_alerts(target: str, what: str, run_book: str) -> tuple[Alert, Alert]:
    labels = 'model="m", tenant="t", version="v"'
    answers = f"ray_swiftkv_gateway_{target}_seconds_count{{{labels}}}"
    good = f'ray_swiftkv_gateway_good_requests_total{{{labels}, target="{target}"}}'
    late, kept = {answers: "0+60x600", good: "0+20x600"}, {answers: "0+60x600", good: "0+58x600"}
    return (
        Alert(
            f"SwiftKV{target.upper()}BurnsFast",
            _burns(target, "5m", "1h", 10),
            "2m",
            "page",
            f"{{{{ $value | humanizePercentage }}}} of {{{{ $labels.model }}}}'s answers miss their {what} target.",
            run_book,
            (Example(late, "90m", True), Example(kept, "90m", False)),
        ),
        Alert(
            f"SwiftKV{target.upper()}BurnsSlowly",
            _burns(target, "30m", "6h", 3),
            "15m",
            "ticket",
            f"{{{{ $value | humanizePercentage }}}} of {{{{ $labels.model }}}}'s answers missed their {what} target "
            "for hours.",
            run_book,
            (Example(late, "7h", True), Example(kept, "7h", False)),
        ),
    )


ALERTS = (
    *_burn_alerts(
        "ttft",
        "TTFT",
        "Pools and scaling: if prefill's queue grows, raise prefill.max_replicas or the device budget; if it does not, "
        "look at KV transfer and at the gateway's queue.",
    ),
    *_burn_alerts(
        "tpot",
        "TPOT",
        "Pools and scaling: if decode's KV use or batches are high, raise decode.max_replicas; if decode replicas "
        "prefill (KV transfer: local prompts), see why the prefill pool is not asked.",
    ),
    Alert(
        "SwiftKVPrefillStarvesDecode",
        'ray_swiftkv_policy_reason{pool="prefill", reason="at_max"} == 1 and on (application) '
        'ray_swiftkv_policy_input{pool="prefill", input="queued_prompt_tokens"} > 0',
        "5m",
        "page",
        "{{ $labels.application }} needs more prefill replicas than it may have, and prompts wait.",
        "Raise prefill.max_replicas or the device budget of the application, or lower the tenants' quotas.",
        (
            Example(
                {
                    'ray_swiftkv_policy_reason{application="a", pool="prefill", reason="at_max"}': "1x20",
                    'ray_swiftkv_policy_input{application="a", pool="prefill", input="queued_prompt_tokens"}': "900x20",
                },
                "10m",
                True,
            ),
            Example(
                {
                    'ray_swiftkv_policy_reason{application="a", pool="prefill", reason="at_max"}': "1x20",
                    'ray_swiftkv_policy_input{application="a", pool="prefill", input="queued_prompt_tokens"}': "0x20",
                },
                "10m",
                False,
            ),
        ),
    ),
    Alert(
        "SwiftKVCacheNearlyFull",
        'swiftkv:pool_kv_usage:frac{pool!="prefill"} > 0.95',
        "10m",
        "ticket",
        "Replica {{ $labels.replica }} of {{ $labels.application }} has {{ $value | humanizePercentage }} of its KV "
        "blocks in use: sequences are thrown out and computed again.",
        "Raise decode.max_replicas, or kv_cache_gib (gpu_memory_utilization) of its engines, or an FP8 KV cache.",
        (
            Example(
                {
                    'ray_vllm_kv_cache_usage_perc{WorkerId="w", ReplicaId="r"}': "0.99x30",
                    "ray_serve_deployment_replica_starts_total"
                    '{WorkerId="w", application="a", deployment="Decode:m", replica="r"}': "1x30",
                },
                "20m",
                True,
            ),
            Example(
                {
                    'ray_vllm_kv_cache_usage_perc{WorkerId="w", ReplicaId="r"}': "0.99x30",
                    "ray_serve_deployment_replica_starts_total"
                    '{WorkerId="w", application="a", deployment="Prefill:m", replica="r"}': "1x30",
                },
                "20m",
                False,
            ),
        ),
    ),
    Alert(
        "SwiftKVTransferFails",
        "sum(rate(ray_swiftkv_hop_failures_total[5m])) > 0.05 * "
        'sum(rate(ray_swiftkv_hop_prompts_total{way="remote"}[5m]))',
        "5m",
        "page",
        "The prefill pool fails at more than a twentieth of the prompts; decode replicas prefill them themselves.",
        "KV transfer: failures and expired prompts tell which side; look at the prefill replicas' logs and at the "
        "network between the nodes.",
        (
            Example(
                {
                    "ray_swiftkv_hop_failures_total": "0+2x40",
                    'ray_swiftkv_hop_prompts_total{way="remote"}': "0+10x40",
                },
                "20m",
                True,
            ),
            Example(
                {
                    "ray_swiftkv_hop_failures_total": "0+0x40",
                    'ray_swiftkv_hop_prompts_total{way="remote"}': "0+10x40",
                },
                "20m",
                False,
            ),
        ),
    ),
    Alert(
        "SwiftKVVersionsDiffer",
        "count(count by (Version) (ray_node_cpu_count)) > 1",
        "10m",
        "ticket",
        "The cluster's nodes run {{ $value }} versions of Ray.",
        "Finish the upgrade, or roll it back: the table of versions says which work together.",
        (
            Example(
                {
                    'ray_node_cpu_count{Version="2.60.0", NodeAddress="a"}': "2x30",
                    'ray_node_cpu_count{Version="2.61.0", NodeAddress="b"}': "2x30",
                },
                "20m",
                True,
            ),
            Example({'ray_node_cpu_count{Version="2.60.0", NodeAddress="a"}': "2x30"}, "20m", False),
        ),
    ),
    Alert(
        "SwiftKVVersionRejected",
        # A counter that was not there before has grown too: Ray shows none before its first decision.
        'sum by (model, reason) (increase(ray_swiftkv_rollout_decisions_total{outcome="rejected"}[1h])) > 0 or '
        'sum by (model, reason) (ray_swiftkv_rollout_decisions_total{outcome="rejected"} unless '
        "ray_swiftkv_rollout_decisions_total offset 1h) > 0",
        "0m",
        "ticket",
        "A new version of {{ $labels.model }} was rejected: {{ $labels.reason }}.",
        "Pools and scaling has what it was judged by; publish a better one or move the alias back.",
        (
            Example(
                {
                    'ray_swiftkv_rollout_decisions_total{model="m", outcome="rejected", reason="ttft"}': "0 0 0 1x30",
                },
                "20m",
                True,
            ),
            Example(
                {
                    'ray_swiftkv_rollout_decisions_total{model="m", outcome="rejected", reason="ttft"}': "_x3 1x30",
                },
                "20m",
                True,
            ),
            Example(
                {
                    'ray_swiftkv_rollout_decisions_total{model="m", outcome="switched", reason="ok"}': "0 0 0 1x30",
                },
                "20m",
                False,
            ),
        ),
    ),
    Alert(
        "SwiftKVUsageLost",
        # A counter is born with its first loss, so that `increase` would not see it.
        "sum((ray_swiftkv_usage_lost_tokens_total - ray_swiftkv_usage_lost_tokens_total offset 1h) "
        "or ray_swiftkv_usage_lost_tokens_total) > 0",
        "0m",
        "ticket",
        "Usage of {{ $value }} tokens is in no record: gateways had not written it when they vanished.",
        "Fleet health tells which gateways died; their logs have a line for each request, with its tenant and tokens.",
        (
            Example({"ray_swiftkv_usage_lost_tokens_total": "_x5 120x30"}, "20m", True),
            Example({"ray_swiftkv_usage_lost_tokens_total": "120x120"}, "90m", False),
        ),
    ),
    Alert(
        "SwiftKVDistillationStalled",
        "changes(ray_swiftkv_distill_step[15m]) == 0 and ray_swiftkv_distill_remaining_seconds > 0",
        "5m",
        "page",
        "Run {{ $labels.run }} has made no step for a quarter of an hour.",
        "`swiftkv distill --follow` shows its log; a worker that hangs is replaced when its process is ended.",
        (
            Example(
                {
                    'ray_swiftkv_distill_step{run="r"}': "5x60",
                    'ray_swiftkv_distill_remaining_seconds{run="r"}': "900x60",
                },
                "40m",
                True,
            ),
            Example(
                {
                    'ray_swiftkv_distill_step{run="r"}': "0+1x60",
                    'ray_swiftkv_distill_remaining_seconds{run="r"}': "900x60",
                },
                "40m",
                False,
            ),
        ),
    ),
    Alert(
        "SwiftKVDistillationDiverges",
        'ray_swiftkv_distill_loss_nats{part="loss"} > '
        '2 * min_over_time(ray_swiftkv_distill_loss_nats{part="loss"}[1h])',
        "10m",
        "ticket",
        "The loss of run {{ $labels.run }} is more than twice its least of the last hour.",
        "Distillation: compare learning rate and gradient norm; resume from an earlier checkpoint with a lower rate.",
        (
            Example({'ray_swiftkv_distill_loss_nats{run="r", part="loss"}': "0.1x20 0.5x30"}, "40m", True),
            Example({'ray_swiftkv_distill_loss_nats{run="r", part="loss"}': "0.5x20 0.1x30"}, "40m", False),
        ),
    ),
    Alert(
        "SwiftKVDistillationRestarts",
        "max by (run) (max_over_time(ray_swiftkv_distill_restarts[1h])) - "
        "min by (run) (min_over_time(ray_swiftkv_distill_restarts[1h])) >= 2",
        "0m",
        "ticket",
        "The workers of run {{ $labels.run }} were started again {{ $value }} times within an hour.",
        "Distillation: `swiftkv distill --follow` shows what each died of; the run ends after workers.max_failures. If "
        "memory was near the device's, fewer rows_per_pass; if nodes go, a lower checkpoints.every_steps.",
        (
            Example(
                {
                    # Each worker that records is another process.
                    'ray_swiftkv_distill_restarts{run="r", WorkerId="a"}': "0x20",
                    'ray_swiftkv_distill_restarts{run="r", WorkerId="b"}': "_x24 1x5",
                    'ray_swiftkv_distill_restarts{run="r", WorkerId="c"}': "_x34 2x30",
                },
                "50m",
                True,
            ),
            Example(
                {
                    'ray_swiftkv_distill_restarts{run="r", WorkerId="a"}': "5x20",
                    'ray_swiftkv_distill_restarts{run="r", WorkerId="b"}': "_x24 6x30",
                },
                "50m",
                False,
            ),
        ),
    ),
    Alert(
        "SwiftKVVersionDamaged",
        # A counter that was not there before has grown too: Ray shows none before its first failure.
        "sum by (operation) (increase(ray_swiftkv_registry_verification_failures_total[1h])) > 0 or "
        "sum by (operation) (ray_swiftkv_registry_verification_failures_total unless "
        "ray_swiftkv_registry_verification_failures_total offset 1h) > 0",
        "0m",
        "page",
        "A version's bytes differ from its manifest ({{ $labels.operation }}): replicas that need it do not start.",
        "The registry: the log of who failed names version and file; `swiftkv models verify NAME@V` tells a damaged "
        "store from a damaged way to it. Move the alias back; publishing the folder again mends missing and cut parts.",
        (
            Example(
                {'ray_swiftkv_registry_verification_failures_total{operation="fetch", WorkerId="w"}': "_x29 1x60"},
                "40m",
                True,
            ),
            Example(
                {'ray_swiftkv_registry_verification_failures_total{operation="fetch", WorkerId="w"}': "1x300"},
                "4h",
                False,
            ),
        ),
    ),
    Alert(
        "SwiftKVGatewaySheds",
        "sum by (model) (rate(ray_swiftkv_gateway_refusals_total"
        '{reason=~"queue_full|too_slow|overloaded|unavailable"}[10m])) > 0.05 * '
        "sum by (model) (rate(ray_swiftkv_gateway_requests_total[10m]))",
        "5m",
        "page",
        "The gateway refuses more than a twentieth of the requests for {{ $labels.model }} for want of capacity.",
        "Tenants and cost: if one tenant floods, its quota is the place; if all ask for more, raise max_replicas and "
        "the gateway's capacity.",
        (
            Example(
                {
                    'ray_swiftkv_gateway_refusals_total{model="m", tenant="t", reason="queue_full"}': "0+6x60",
                    'ray_swiftkv_gateway_requests_total{model="m", tenant="t", version="v", status="200"}': "0+60x60",
                },
                "40m",
                True,
            ),
            Example(
                {
                    'ray_swiftkv_gateway_refusals_total{model="m", tenant="t", reason="invalid_api_key"}': "0+6x60",
                    'ray_swiftkv_gateway_requests_total{model="m", tenant="t", version="v", status="200"}': "0+60x60",
                },
                "40m",
                False,
            ),
        ),
    ),
)
