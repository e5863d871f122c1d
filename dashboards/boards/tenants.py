"""What each tenant uses, costs and gets."""

from panels import Board, Panel, Query

from boards.common import BY_TENANT, quantiles

TENANTS = Board(
    "swiftkv-tenants",
    "SwiftKV: tenants",
    ("tenant", "model"),
    {
        "Use": (
            Panel(
                "Tokens in the chosen time",
                "tokens",
                "A tenant far above what it was sold: see its quota.",
                (
                    Query(
                        f"sum by (tenant, kind) (increase(ray_swiftkv_gateway_tokens_total{BY_TENANT}[$__range]))",
                        "{{tenant}} {{kind}}",
                    ),
                ),
                "number",
                12,
            ),
            Panel(
                "Requests/s",
                "requests/s",
                "One tenant's line steep and others' TTFT up: its weight is too large.",
                (Query(f"sum by (tenant) (rate(ray_swiftkv_gateway_requests_total{BY_TENANT}[1m]))", "{{tenant}}"),),
                width=12,
            ),
        ),
        "Cost": (
            Panel(
                "Replicas in use, by tenant and phase",
                "replicas",
                "transfer large: replicas wait for KV; a tenant's decode far above its prefill: long answers.",
                (
                    Query(
                        'sum by (tenant, phase) (rate(ray_swiftkv_replica_seconds_total{tenant=~"$tenant"}[5m]))',
                        "{{tenant}} {{phase}}",
                    ),
                ),
                width=12,
            ),
            Panel(
                "Replicas that the unmodified model would take, by tenant",
                "replicas",
                "Near those in use: prompts are short against the answers, so that there is little to skip.",
                (
                    Query(
                        'sum by (tenant) (rate(ray_swiftkv_unmodified_replica_seconds_total{tenant=~"$tenant"}[5m]))',
                        "{{tenant}} (estimated by FLOPs)",
                    ),
                ),
                width=12,
            ),
            Panel(
                "Idle replicas",
                "replicas",
                "Near all replicas for long: the pools are larger than what is asked of them.",
                (
                    Query(
                        "sum by (application, pool) (rate("
                        'ray_swiftkv_replica_seconds_total{phase="idle"}[5m]) * on (WorkerId) '
                        "group_left (application, pool) swiftkv:replica:info)",
                        "{{application}} {{pool}}",
                    ),
                ),
                width=12,
            ),
            Panel(
                "Charged per hour, by tenant",
                "currency/h",
                "Less than what the tenant's replica-hours, beside it, cost: the prices are too low for its requests.",
                (
                    Query(
                        f"sum by (tenant, currency) (increase(ray_swiftkv_gateway_charges_total{BY_TENANT}[1h]))",
                        "{{tenant}} {{currency}}",
                    ),
                ),
                width=12,
            ),
            Panel(
                "Replica-hours per hour, by tenant",
                "replica-hours/h",
                "A tenant's part above its part of the charges: others pay for it. The tenant - is what nobody used.",
                (
                    Query(
                        'sum by (tenant) (increase(ray_swiftkv_replica_seconds_total{tenant=~"$tenant"}[1h])) / 3600',
                        "{{tenant}}",
                    ),
                ),
                width=12,
            ),
            Panel(
                "Usage that is in no record",
                "tokens",
                "lost rises: gateways died before they wrote it; waiting rises on and on: the store does not answer.",
                (
                    Query("sum(ray_swiftkv_usage_unwritten_tokens)", "waiting"),
                    Query("sum(ray_swiftkv_usage_lost_tokens_total) or vector(0)", "lost"),
                ),
                width=12,
            ),
        ),
        "Service": (
            Panel(
                "TTFT, p95",
                "seconds",
                "One tenant's above the others': it sends more than its share, or longer prompts.",
                quantiles("ttft_seconds", "tenant", 0.95),
            ),
            Panel(
                "Seconds in the gateway's queue, p95",
                "seconds",
                "Above zero for a tenant below its share: the gateway's capacity is set too low.",
                quantiles("queue_seconds", "tenant", 0.95),
            ),
            Panel(
                "Refused, by reason",
                "requests/s",
                "queue_full and too_slow: for want of capacity; the others are the tenant's own.",
                (
                    Query(
                        f"sum by (tenant, reason) (rate(ray_swiftkv_gateway_refusals_total{BY_TENANT}[5m]))",
                        "{{tenant}} {{reason}}",
                    ),
                ),
            ),
        ),
    },
)
