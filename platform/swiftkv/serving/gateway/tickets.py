"""The records that gateways and admission exchange. All are small and pickle; none holds any text of a request.

Called by: gateway/admission.py, gateway/admission_client.py, gateway/routes.py.
"""

from dataclasses import dataclass, field

from swiftkv.serving.gateway.outcomes import Compared, Outcome


@dataclass(frozen=True, slots=True)
class Ticket:
    """What one request asks for, and whose it is. The tenant's limits travel along: admission reads no file."""

    id: str
    """Unique, unlike what a client sends as its request id."""
    gateway: str
    model: str
    tenant: str
    prompt_tokens: int
    """Estimated, unless token ids were given."""
    output_tokens: int
    """The most it may produce, or what it is taken for."""
    sequences: int = 1
    """0: needs no engine's time, only its tenant's quota."""
    deadline_s: float = 600.0
    """Left, in seconds: clocks of two machines differ."""
    streams: bool = True
    """Whether its gateway will say when its first token is out."""
    priority: int = 1
    """0 is served first."""
    weight: float = 1.0
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None

    @property
    def cost_tokens(self) -> int:
        """What it is charged until its real usage is known."""
        return self.prompt_tokens + self.output_tokens


@dataclass(frozen=True, slots=True)
class Decision:
    """Admission's answer to a ticket."""

    is_granted: bool
    headers: dict[str, str] = field(default_factory=dict)
    """OpenAI's rate-limit headers of the tenant, and Retry-After."""
    status: int = 200
    code: str | None = None
    message: str = ""


@dataclass(frozen=True, slots=True)
class Finished:
    """A request that holds its place no longer, with its real usage in tokens (None: unknown, the estimate stays)."""

    id: str
    used_tokens: int | None


@dataclass(frozen=True, slots=True)
class Held:
    """A request that its gateway still works on."""

    ticket: Ticket
    has_started: bool
    """Its first token is out."""
    application: str | None = None
    """The version that was asked."""


@dataclass(frozen=True, slots=True)
class Report:
    """What happened in one gateway since its last report. Also its sign of life."""

    gateway: str
    started: tuple[str, ...] = ()
    finished: tuple[Finished, ...] = ()
    outcomes: tuple[Outcome | Compared, ...] = ()
    held: tuple[Held, ...] | None = None
    """All that it works on; None between two heartbeats. What admission does not know (it was restarted) it adopts."""
    unwritten_tokens: int = 0
    """Of usage records that are not in the store yet: they would be lost with it."""
