"""A run that learns."""

from panels import Board, Panel, Query

_BY_RUN = '{run=~"$run"}'

DISTILLATION = Board(
    "swiftkv-distillation",
    "SwiftKV: distillation",
    ("run",),
    {
        "Learning": (
            Panel(
                "Loss and its parts",
                "nats",
                "Rising: the learning rate is too high, or the data has changed.",
                (Query(f"ray_swiftkv_distill_loss_nats{_BY_RUN}", "{{run}} {{part}}"),),
                width=12,
            ),
            Panel(
                "Gradient norm and learning rate",
                "number",
                "A norm that jumps before the loss does: a bad batch, or too high a rate.",
                (
                    Query(f"ray_swiftkv_distill_gradient_norm{_BY_RUN}", "norm {{run}}"),
                    Query(f"ray_swiftkv_distill_learning_rate{_BY_RUN}", "rate {{run}}"),
                ),
                width=12,
            ),
        ),
        "Progress": (
            Panel(
                "Steps",
                "steps",
                "Flat: a worker hangs or is being replaced.",
                (Query(f"ray_swiftkv_distill_step{_BY_RUN}", "{{run}}"),),
                width=6,
            ),
            Panel(
                "Tokens/s",
                "tokens/s",
                "Falling at equal rows: data comes too slowly, or a device is throttled.",
                (Query(f"ray_swiftkv_distill_tokens_per_second{_BY_RUN}", "{{run}}"),),
                width=6,
            ),
            Panel(
                "Until the last step",
                "seconds",
                "Growing: the run slows down.",
                (Query(f"ray_swiftkv_distill_remaining_seconds{_BY_RUN}", "{{run}}"),),
                "number",
                6,
            ),
            Panel(
                "Memory of a worker",
                "bytes",
                "Near the device's: the next longer row ends the run.",
                (Query(f"ray_swiftkv_distill_memory_bytes{_BY_RUN}", "{{run}}"),),
                width=6,
            ),
        ),
        "Devices and faults": (
            Panel(
                "FLOP/s of all workers",
                "FLOP/s",
                "Falling with tokens/s: devices wait; without: fewer positions carry a loss.",
                (Query(f"ray_swiftkv_distill_flops_per_second{_BY_RUN}", "{{run}}"),),
                width=6,
            ),
            Panel(
                "Part of the GPUs' peak",
                "part",
                "Far below the 0.4 that --dry-run assumes: small passes, or workers wait. Empty without a known peak.",
                (Query(f"ray_swiftkv_distill_flop_utilisation_frac{_BY_RUN}", "{{run}}"),),
                width=6,
            ),
            Panel(
                "Wait for a checkpoint",
                "seconds",
                "Longer than a step: the nodes' disks are too slow for checkpoints.every_steps.",
                (
                    Query(
                        f"sum by (run) (rate(ray_swiftkv_distill_checkpoint_seconds_sum{_BY_RUN}[30m])) / "
                        f"sum by (run) (rate(ray_swiftkv_distill_checkpoint_seconds_count{_BY_RUN}[30m]))",
                        "{{run}}",
                    ),
                ),
                width=6,
            ),
            Panel(
                "Workers started again",
                "number",
                "Rising: workers die, and each time the steps since the last checkpoint are lost.",
                (Query(f"max by (run) (ray_swiftkv_distill_restarts{_BY_RUN})", "{{run}}"),),
                width=6,
            ),
        ),
    },
)
