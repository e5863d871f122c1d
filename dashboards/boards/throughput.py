"""What anyone opens first: tokens, times, goodput."""

from panels import Board, Panel, Query

from boards.common import BY_MODEL, BY_POOL, BY_TENANT, OF_APPLICATION, heat_map, quantiles

THROUGHPUT = Board(
    "swiftkv-throughput",
    "SwiftKV: throughput",
    ("model", "tenant", "application", "pool", "replica"),
    {
        "Tokens": (
            Panel(
                "Completion tokens/s by pool",
                "tokens/s",
                "Falling while requests do not: decode replicas wait for prefill, for KV space, or are gone.",
                (
                    Query(
                        "sum by (application, pool) (swiftkv:pool_completion_tokens:rate1m"
                        '{application=~"$application", pool=~"$pool", pool!="prefill", replica=~"$replica"})',
                        "{{application}} {{pool}}",
                    ),
                ),
            ),
            Panel(
                "Prompt tokens/s by pool",
                "tokens/s",
                "Decode above prefill for long: the hop does not pay, or the prefill pool fails.",
                (
                    Query(
                        f"sum by (application, pool) (swiftkv:pool_prompt_tokens:rate1m{BY_POOL})",
                        "{{application}} {{pool}}",
                    ),
                ),
            ),
            Panel(
                "Tokens/s by tenant",
                "tokens/s",
                "One tenant near the whole while others wait: its weight or quota is too large.",
                (Query(f"sum by (tenant, kind) (swiftkv:gateway_tokens:rate1m{BY_TENANT})", "{{tenant}} {{kind}}"),),
            ),
            Panel(
                "Tokens/s by model and version",
                "tokens/s",
                "A version at zero that has a share: its application is gone, or nothing reaches it.",
                (
                    Query(
                        f"sum by (model, version, kind) (swiftkv:gateway_tokens:rate1m{BY_TENANT})",
                        "{{model}} {{version}} {{kind}}",
                    ),
                ),
                width=24,
            ),
        ),
        "What SwiftKV saves": (
            Panel(
                "Normalised FLOP/s of a device",
                "FLOP/s",
                "Falling under the same load: devices wait, for each other, for memory, or for KV.",
                (
                    Query(
                        f'swiftkv:device_flops:rate1m{{{OF_APPLICATION}, pool=~"$pool", work="unmodified"}}',
                        "{{application}} {{pool}}",
                    ),
                ),
            ),
            Panel(
                "Executed FLOP/s of a device",
                "FLOP/s",
                "As high as the normalised ones in a prefill pool: skipping is off, or the model is no SwiftKV model.",
                (
                    Query(
                        f'swiftkv:device_flops:rate1m{{{OF_APPLICATION}, pool=~"$pool", work="executed"}}',
                        "{{application}} {{pool}}",
                    ),
                ),
            ),
            Panel(
                "Work that skipping saved",
                "part",
                "Falling while prompts stay as long: answers grow, whose tokens skip nothing.",
                (
                    Query(
                        "1 - sum by (application, pool) "
                        f'(swiftkv:device_flops:rate1m{{{OF_APPLICATION}, pool=~"$pool", work="executed"}}) '
                        "/ sum by (application, pool) "
                        f'(swiftkv:device_flops:rate1m{{{OF_APPLICATION}, pool=~"$pool", work="unmodified"}})',
                        "{{application}} {{pool}}",
                    ),
                ),
            ),
        ),
        "Times": (
            Panel(
                "TTFT",
                "seconds",
                "A band that climbs: prompts wait in the gateway or for prefill replicas.",
                heat_map("ttft_seconds"),
                "heat map",
            ),
            Panel(
                "TPOT",
                "seconds",
                "A band that climbs: decode batches are too large, or decode replicas prefill.",
                heat_map("tpot_seconds"),
                "heat map",
            ),
            Panel(
                "TTFT and TPOT, p95, and their targets",
                "seconds",
                "Above the model's target: see Pools and scaling for which pool lacks replicas.",
                (
                    *quantiles("ttft_seconds", "model", 0.95),
                    *quantiles("tpot_seconds", "model", 0.95),
                    Query(f"ray_swiftkv_gateway_target_seconds{BY_MODEL}", "{{target}} target {{model}}"),
                ),
            ),
        ),
        "Requests": (
            Panel(
                "Goodput and all answers",
                "requests/s",
                "Goodput below all answers: that many came outside the targets.",
                (
                    Query(
                        "sum by (model) (rate(ray_swiftkv_gateway_good_requests_total"
                        '{tenant=~"$tenant", model=~"$model", target="both"}[1m]))',
                        "good {{model}}",
                    ),
                    Query(
                        f"sum by (model) (rate(ray_swiftkv_gateway_request_seconds_count{BY_TENANT}[1m]))",
                        "all {{model}}",
                    ),
                ),
            ),
            Panel(
                "Requests/s by status",
                "requests/s",
                "429: quotas or capacity; 499: clients leave; 5xx: replicas fail.",
                (Query(f"sum by (status) (rate(ray_swiftkv_gateway_requests_total{BY_TENANT}[1m]))", "{{status}}"),),
            ),
            Panel(
                "Prompt tokens found in caches",
                "part",
                "Falling after a change of prompts or of routing: every turn of a chat is prefilled again.",
                (
                    Query(
                        "sum(rate(ray_vllm_prefix_cache_hits_total[5m])) / "
                        "sum(rate(ray_vllm_prefix_cache_queries_total[5m]))",
                        "found",
                    ),
                ),
            ),
        ),
    },
)
