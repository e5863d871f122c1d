"""What is known of one HTTP request while it runs, and the line and the counters that remain of it.

Never holds text of a prompt or an answer.
Called by: gateway/edge.py, gateway/generation.py. Calls: metrics.
"""

import json
import logging
import re
import secrets
import sys
import time
from dataclasses import dataclass, field

from swiftkv import metrics

NOBODY = "-"
"""Label of requests without a known tenant or model: what a client makes up is never a label."""

CLIENT_LEFT = 499

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")

logger = logging.getLogger("swiftkv.gateway.requests")


@dataclass
class Usage:
    """Tokens of one request, as the engine counted them."""

    prompt: int = 0
    cached: int = 0
    completion: int = 0

    @property
    def total(self) -> int:
        """What the tenant is charged."""
        return self.prompt + self.completion


@dataclass
class Exchange:
    """One request and its answer. Times are of time.monotonic()."""

    request_id: str
    route: str
    began_s: float = field(default_factory=time.monotonic)
    tenant: str = NOBODY
    model: str = NOBODY
    application: str | None = None
    status: int = 500
    reason: str | None = None
    usage: Usage = field(default_factory=Usage)
    queue_s: float | None = None
    ttft_s: float | None = None
    headers: dict[str, str] = field(default_factory=dict)
    """For the answer, whichever it becomes."""

    def elapsed_s(self) -> float:
        """Since the request came."""
        return time.monotonic() - self.began_s

    def end(self) -> None:
        """Writes the line and counts."""
        logger.info("%s", self.format_line())
        metrics.count(
            "swiftkv_gateway_requests_total", 1, tenant=self.tenant, model=self.model, status=str(self.status)
        )
        for kind in ("prompt", "cached", "completion"):
            if tokens := getattr(self.usage, kind):
                labels = {"tenant": self.tenant, "model": self.model, "kind": kind}
                metrics.count("swiftkv_gateway_tokens_total", tokens, **labels)
        if self.ttft_s is not None:
            metrics.observe("swiftkv_gateway_ttft_seconds", self.ttft_s, model=self.model)
        if self.queue_s is not None:
            metrics.observe("swiftkv_gateway_queue_seconds", self.queue_s, tenant=self.tenant)

    def format_line(self) -> str:
        """The request as one line of JSON."""
        line = {
            "request_id": self.request_id,
            "route": self.route,
            "tenant": self.tenant,
            "model": self.model,
            "application": self.application,
            "status": self.status,
            "reason": self.reason,
            "prompt_tokens": self.usage.prompt,
            "cached_tokens": self.usage.cached,
            "completion_tokens": self.usage.completion,
            "queue_s": _round(self.queue_s),
            "ttft_s": _round(self.ttft_s),
            "total_s": _round(self.elapsed_s()),
        }
        return json.dumps(line)


def choose_request_id(given: str | None) -> str:
    """The client's id where it is one that can stand in a header and a log line; else a new one."""
    return given if given and _REQUEST_ID.fullmatch(given) else f"req-{secrets.token_hex(12)}"


def log_to_stderr() -> None:
    """Lets this process write its lines: bare, because each is a whole record."""
    if not logger.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(message)s"))
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        logger.propagate = False


def _round(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 4)
