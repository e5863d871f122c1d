"""What goes from prefill to decode replicas, and where prompts are prefilled."""

from panels import Board, Panel, Query

TRANSFER = Board(
    "swiftkv-transfer",
    "SwiftKV: KV transfer",
    ("application",),
    {
        "Hop": (
            Panel(
                "Prompts/s by where they are prefilled",
                "prompts/s",
                "All local: the hop does not pay, or the prefill pool is not asked because it fails.",
                (Query("sum by (way) (rate(ray_swiftkv_hop_prompts_total[1m]))", "{{way}}"),),
            ),
            Panel(
                "Break-even length",
                "tokens",
                "Rising: the prefill pool has a queue, or the network is slow; 1e9: it never pays.",
                (Query("ray_swiftkv_hop_break_even_tokens", "{{WorkerId}}"),),
            ),
            Panel(
                "Failures/s",
                "prompts/s",
                "Above zero: a prefill replica died, is silent, or its KV does not come; answers are slower.",
                (
                    Query("sum(rate(ray_swiftkv_hop_failures_total[5m]))", "hops"),
                    Query("sum(rate(ray_vllm_nixl_num_failed_transfers_total[5m]))", "transfers"),
                    Query("sum(rate(ray_vllm_nixl_num_kv_expired_reqs_total[5m]))", "KV that nobody fetched"),
                ),
            ),
        ),
        "Transfers": (
            Panel(
                "Bytes/s",
                "bytes/s",
                "At the network's rate: transfers wait for each other.",
                (Query("sum(rate(ray_swiftkv_kv_transfer_bytes_total[1m]))", "KV"),),
            ),
            Panel(
                "Seconds of a transfer",
                "seconds",
                "Rising at equal sizes: the network or the sender's memory is busy.",
                tuple(
                    Query(
                        f"histogram_quantile({fraction}, sum by (le) ("
                        "rate(ray_vllm_nixl_xfer_time_seconds_bucket[5m])))",
                        f"p{100 * fraction:g}",
                    )
                    for fraction in (0.5, 0.95)
                ),
            ),
            Panel(
                "Bytes of a transfer",
                "bytes",
                "Twice the spec's bytes per token times the prompt: prompts are short against a block.",
                (
                    Query(
                        "sum(rate(ray_swiftkv_kv_transfer_bytes_total[5m])) / "
                        "sum(rate(ray_vllm_nixl_bytes_transferred_count[5m]))",
                        "mean",
                    ),
                ),
            ),
        ),
    },
)
