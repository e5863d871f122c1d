"""A gateway's side of admission: asks the shared one, falls back to its own while that is away, and reports.

Decides nothing itself. While the shared admission is away each gateway allows its part of every limit (1 / number of
gateways), so that the limits hold together as long as the load is spread evenly.
Called by: gateway/routes.py. Calls: gateway/admission.py.
"""

import asyncio
import logging
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Protocol

from swiftkv.serving.gateway.admission import LOST, Admission
from swiftkv.serving.gateway.outcomes import Compared, Outcome
from swiftkv.serving.gateway.tickets import Decision, Finished, Held, Report, Ticket

REPORT_TIMEOUT_S = 2.0
HEARTBEATS_PER_LEASE = 5

GATHER_S = 0.002
"""What happens within this time is told in one report, as is what happens while the last one is on its way. Longer,
and engines would idle between a prompt's first token and the next prompt."""

logger = logging.getLogger(__name__)


class SharedAdmission(Protocol):
    """The admission of all gateways, here or elsewhere."""

    async def acquire(self, ticket: Ticket) -> Decision: ...

    async def report(self, report: Report) -> None: ...


class AdmissionClient:
    """Asks for places and says what became of them."""

    def __init__(
        self,
        gateway: str,
        local: Admission,
        shared: SharedAdmission,
        lease_s: float,
        count_unwritten_tokens: Callable[[], int] = lambda: 0,
    ) -> None:
        """`count_unwritten_tokens`: of usage records, for each report."""
        self._gateway = gateway
        self._local = local
        self._shared = shared
        self._heartbeat_s = lease_s / HEARTBEATS_PER_LEASE
        self._count_unwritten_tokens = count_unwritten_tokens
        self._is_away = False
        self._asking: set[asyncio.Task[Decision]] = set()
        self._held: dict[str, Held] = {}
        self._started: list[str] = []
        self._finished: list[Finished] = []
        self._outcomes: list[Outcome | Compared] = []
        self._news = asyncio.Event()
        self._reporter: asyncio.Task[None] | None = None

    @property
    def is_away(self) -> bool:
        """Whether the shared admission is not answering."""
        return self._is_away

    async def acquire(self, ticket: Ticket) -> Decision:
        """The decision about a request, from the shared admission if it answers. `finish` must follow a grant."""
        if self._reporter is None or self._reporter.done():
            self._reporter = asyncio.create_task(self._report_for_ever(), name="admission reports")
        decision = None if self._is_away else await self._ask_shared(ticket)
        if decision is None or decision.code == LOST:
            decision = await self._local.acquire(ticket)
        if decision.is_granted and ticket.sequences:
            self._held[ticket.id] = Held(ticket, has_started=False)
        return decision

    def start(self, ticket_id: str) -> None:
        """The request's first token is out."""
        held = self._held.get(ticket_id)
        if held is not None:
            self._held[ticket_id] = replace(held, has_started=True)
            self._started.append(ticket_id)
            self._news.set()

    def assign(self, ticket_id: str, application: str) -> None:
        """The request is sent to a version. Told with the next heartbeat."""
        held = self._held.get(ticket_id)
        if held is not None:
            self._held[ticket_id] = replace(held, application=application)

    def note(self, outcome: Outcome | Compared) -> None:
        """What became of a request at a version. Told with the next report."""
        self._outcomes.append(outcome)

    def finish(self, ticket_id: str, used_tokens: int | None) -> None:
        """The request is over; `used_tokens` None: as estimated. Returns at once, the report follows."""
        if self._held.pop(ticket_id, None) is None:
            return
        self._finished.append(Finished(ticket_id, used_tokens))
        self._news.set()

    async def close(self) -> None:
        """Ends the reports with a last one; what is still held runs out with its lease."""
        if self._reporter is not None:
            self._reporter.cancel()
            with suppress(asyncio.CancelledError):
                await self._reporter
            await self._send(self._take_news(with_held=False))

    async def _ask_shared(self, ticket: Ticket) -> Decision | None:
        """None if the shared admission went away."""
        asking = asyncio.ensure_future(self._shared.acquire(ticket))
        self._asking.add(asking)
        try:
            return await asking
        except asyncio.CancelledError:
            if _is_being_cancelled():
                asking.cancel()
                self._finished.append(Finished(ticket.id, used_tokens=0))  # a grant may have been on its way
                self._news.set()
                raise
            return None  # `_note_away` did it
        except Exception as error:  # whatever Ray says of a replica that is gone
            self._note_away(error)
            return None
        finally:
            self._asking.discard(asking)

    async def _report_for_ever(self) -> None:
        loop = asyncio.get_running_loop()
        heartbeat_at_s = 0.0
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(max(0.0, heartbeat_at_s - loop.time())):
                    await self._news.wait()
                    await asyncio.sleep(GATHER_S)
            is_due = loop.time() >= heartbeat_at_s
            if is_due:
                heartbeat_at_s = loop.time() + self._heartbeat_s
            report = self._take_news(with_held=is_due)
            await self._local.report(report)
            if is_due or not self._is_away:
                await self._send(report)

    def _take_news(self, with_held: bool) -> Report:
        self._news.clear()
        held = tuple(self._held.values()) if with_held else None
        report = Report(
            self._gateway,
            tuple(self._started),
            tuple(self._finished),
            tuple(self._outcomes),
            held,
            self._count_unwritten_tokens(),
        )
        self._started.clear()
        self._finished.clear()
        self._outcomes.clear()
        return report

    async def _send(self, report: Report) -> None:
        try:
            async with asyncio.timeout(REPORT_TIMEOUT_S):
                await self._shared.report(report)
        except Exception as error:  # what it said is lost: those places run out with their leases
            self._note_away(error)
            return
        if self._is_away:
            logger.warning("the shared admission answers again")
            self._is_away = False

    def _note_away(self, error: Exception) -> None:
        if not self._is_away:
            logger.warning("the shared admission is away, own limits hold: %s", type(error).__name__)
            self._is_away = True
        for asking in self._asking:
            asking.cancel()


def _is_being_cancelled() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
