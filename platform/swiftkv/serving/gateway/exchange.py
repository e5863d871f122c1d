"""What is known of one HTTP request while it runs, and the line, the counters and the span that remain of it.

Never holds text of a prompt or an answer.
Called by: gateway/edge.py, gateway/generation.py. Calls: metrics, gateway/settings.py, serving/usage,
serving/tracing.py.
"""

import json
import logging
import math
import re
import secrets
import sys
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

from swiftkv import metrics
from swiftkv.serving.gateway.settings import Prices, Targets
from swiftkv.serving.tracing import NOTHING, Span
from swiftkv.serving.usage.records import UsageRecord

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
        """What counts against the tenant's quota."""
        return self.prompt + self.completion


@dataclass
class Exchange:
    """One request and its answer. Times are of time.monotonic()."""

    request_id: str
    """As the client is told; it may use one twice at once."""
    route: str
    id: str = field(default_factory=lambda: secrets.token_hex(12))
    """Unique."""
    began_s: float = field(default_factory=time.monotonic)
    tenant: str = NOBODY
    model: str = NOBODY
    application: str | None = None
    status: int = 500
    reason: str | None = None
    usage: Usage = field(default_factory=Usage)
    targets: Targets = field(default_factory=Targets)
    prices: Prices | None = None
    queue_s: float | None = None
    ttft_s: float | None = None
    """Of an answer that is streamed."""
    ended_s: float | None = None
    """Since the request came, when the answer was whole."""
    charge: Decimal | None = None
    """In the currency of the prices, once the request has ended. None: its model has no prices."""
    headers: dict[str, str] = field(default_factory=dict)
    """For the answer, whichever it becomes."""
    span: Span = NOTHING
    """All of it, from when it came to its last byte."""

    def elapsed_s(self) -> float:
        """Since the request came."""
        return time.monotonic() - self.began_s

    @property
    def tpot_s(self) -> float | None:
        """Of a streamed answer that is whole: seconds per completion token after the first."""
        if self.ttft_s is None or self.ended_s is None or self.usage.completion < 2:
            return None
        return (self.ended_s - self.ttft_s) / (self.usage.completion - 1)

    def list_met_targets(self) -> list[str]:
        """ttft and tpot, of an answer that is streamed; both, of one that is whole, which counts as goodput. One that
        is not streamed may take as long as one whose tokens were all just in time."""
        ttft_s, tpot_s = (math.inf if s is None else s for s in (self.targets.ttft_s, self.targets.tpot_s))
        pairs = {"ttft": (self.ttft_s, ttft_s), "tpot": (self.tpot_s, tpot_s)}
        met = [name for name, (taken_s, target_s) in pairs.items() if taken_s is not None and taken_s <= target_s]
        if self.ended_s is None or not self.usage.completion:
            return met
        if self.ttft_s is None:
            others = self.usage.completion - 1
            is_good = self.ended_s <= ttft_s + (others * tpot_s if others else 0.0)
        else:
            is_good = len(met) == sum(taken_s is not None for taken_s, _ in pairs.values())
        return [*met, "both"] if is_good else met

    def end(self) -> None:
        """Charges, writes the line, counts, and ends the span."""
        if self.prices is not None:
            self.charge = compute_charge(self.usage, self.prices)
        facts = self.list_facts()
        logger.info("%s", json.dumps(facts))
        self.span.end(facts, is_failed=self.status >= 500 or (self.status < 400 and self.reason is not None))
        named = {"tenant": self.tenant, "model": self.model}
        labels = {**named, "version": self.application or NOBODY}
        metrics.count("swiftkv_gateway_requests_total", 1, status=str(self.status), **labels)
        if self.reason is not None:
            metrics.count("swiftkv_gateway_refusals_total", 1, reason=self.reason, **named)
        for target in self.list_met_targets():
            metrics.count("swiftkv_gateway_good_requests_total", 1, target=target, **labels)
        for kind in ("prompt", "cached", "completion"):
            if tokens := getattr(self.usage, kind):
                metrics.count("swiftkv_gateway_tokens_total", tokens, kind=kind, **labels)
        if self.charge and self.prices:
            charged = float(self.charge)
            metrics.count("swiftkv_gateway_charges_total", charged, currency=self.prices.currency, **labels)
        times = {
            "swiftkv_gateway_ttft_seconds": self.ttft_s,
            "swiftkv_gateway_tpot_seconds": self.tpot_s,
            "swiftkv_gateway_request_seconds": self.ended_s,
        }
        for name, seconds in times.items():
            if seconds is not None:
                metrics.observe(name, seconds, **labels)
        if self.queue_s is not None:
            metrics.observe("swiftkv_gateway_queue_seconds", self.queue_s, **named)

    def build_usage(self) -> UsageRecord:
        """What remains for the bill."""
        return UsageRecord(
            id=self.id,
            request_id=self.request_id,
            ended_at=datetime.now(UTC),
            tenant=self.tenant,
            model=self.model,
            version=self.application or NOBODY,
            route=self.route,
            status=self.status,
            reason=self.reason,
            prompt_tokens=self.usage.prompt,
            cached_tokens=self.usage.cached,
            completion_tokens=self.usage.completion,
            queue_s=self.queue_s,
            ttft_s=self.ttft_s,
            tpot_s=self.tpot_s,
            total_s=self.elapsed_s(),
            charge=self.charge,
            currency=self.prices.currency if self.prices else None,
        )

    def list_facts(self) -> dict[str, Any]:
        """What the line and the span say."""
        return {
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
            "tpot_s": _round(self.tpot_s),
            "total_s": _round(self.elapsed_s()),
        }


def compute_charge(usage: Usage, prices: Prices) -> Decimal:
    """What the tokens cost, exactly.

    Units: the prices' currency, up to twelve decimal places: prices have six, and are for a million tokens.
    """
    cached = prices.prompt if prices.cached is None else prices.cached
    per_million = (usage.prompt - usage.cached) * prices.prompt + usage.cached * cached
    return (per_million + usage.completion * prices.completion).scaleb(-6)


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
