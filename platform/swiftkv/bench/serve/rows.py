"""The rows of the serving bench and their bounds. Measures nothing.

Called by: bench/serve, cli/bench.py.
"""

from swiftkv.bench.table import Row

ROWS = (
    Row(
        "tokens-float32", "of 200 random prompts: answers of two pools that differ from one engine's, float32", 0, False
    ),
    Row(
        "tokens-bfloat16",
        "the same in bfloat16: those that differ first where the two best log probabilities are over 0.02 apart",
        0,
        False,
    ),
    Row(
        "throughput", "16 streams: tokens/s through gateway and Ray Serve over vLLM's own server's, one core each", 0.95
    ),
    Row("ttft-added", "one stream, a small model: TTFT added by gateway and Ray Serve, ms", 10, False),
    Row(
        "metering",
        "16 streams: tokens/s with all metering, usage records and a scraper, over the same platform's without",
        0.98,
    ),
    Row(
        "flood",
        "short chats in a flood of long prompts, float32: TPOT p99 of two pools over that of one engine with the best "
        "chunks that begin chats in time",
        0.5,
        False,
    ),
    Row(
        "tenants",
        "a tenant's TTFT p95 while another sends 20 times its share, over that while it keeps to it",
        1.25,
        False,
    ),
    Row("growth", "real engines, 1 to 2 decode replicas and back by the policy under load: requests lost", 0, False),
    Row(
        "shapes",
        "ten load shapes on Ray Serve's controller, stand-in engines: replicas between final and best size, the worst",
        1,
        False,
    ),
    Row("shapes-turns", "the same: times a pool turned from growing to shrinking or back in 10 minutes", 0, False),
    Row("shapes-lost", "the same: requests lost", 0, False),
    Row("policy", "the policy's decision for 1,000 replicas, ms", 10, False),
    Row("prefill-weights", "bytes of weights in a running prefill engine over those in a whole one", 0.58, False),
)
ROW_NAMES = tuple(row.name for row in ROWS)
SHAPES_ROW_NAMES = ("shapes", "shapes-turns", "shapes-lost")
"""Of one load."""
ROW_BY_NAME = {row.name: row for row in ROWS}
