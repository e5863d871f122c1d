"""Holds requests back so that a model's engines never have more than they can start soon, and lets them go fairly.

Plain asyncio: no Ray, no quota, no HTTP. All times are the event loop's.
Called by: gateway/admission.py. Calls: gateway/fair_order.py, gateway/prefill_rate.py.
"""

import asyncio
from collections import deque
from dataclasses import dataclass
from typing import Literal

from swiftkv.serving.gateway.fair_order import FairOrder
from swiftkv.serving.gateway.prefill_rate import PrefillRate
from swiftkv.serving.gateway.settings import Capacity
from swiftkv.serving.gateway.tickets import Ticket

Reason = Literal["queue_full", "too_slow", "deadline", "lost"]

CREDIT = 8
"""What a tenant below its share can save up, in times of what engines are given at once: enough for the bursts of
ordinary traffic to pass a flood, and little enough that the other waits for it a few seconds at most."""

MIN_FINISHES = 8
"""Finished requests before their rate is believed."""


class QueueRefusal(Exception):
    """A request that will not be let through. Stays within its process."""

    def __init__(self, reason: Reason, predicted_s: float = 0.0) -> None:
        super().__init__(reason)
        self.reason = reason
        self.predicted_s = predicted_s


@dataclass(eq=False)
class _Waiter:
    ticket: Ticket
    turn: asyncio.Future[None]


@dataclass(eq=False)
class _InFlight:
    ticket: Ticket
    is_prefilling: bool
    timer: asyncio.TimerHandle | None = None


class FairQueue:
    """The queue before one model."""

    def __init__(self, capacity: Capacity, ttft_target_s: float | None = None) -> None:
        self._capacity = capacity
        self._ttft_target_s = ttft_target_s
        self._order: FairOrder[_Waiter] = FairOrder(CREDIT * capacity.max_in_flight_prompt_tokens)
        self._in_flight: dict[str, _InFlight] = {}
        self._sequences = 0
        self._prefilling_tokens = 0
        self._num_streams_prefilling = 0
        self._rate = PrefillRate(capacity.prompt_tokens_per_s)
        self._finishes: deque[float] = deque(maxlen=64)

    async def acquire(self, ticket: Ticket) -> None:
        """Returns when the request may go to an engine; `release` must follow. Cancelled, it holds nothing.

        Raises: QueueRefusal if its tenant has too many waiting, if its first token would come too late, or if its
        deadline passes before its turn.
        """
        if self._order.count(ticket.tenant) >= self._capacity.max_queued_requests:
            raise QueueRefusal("queue_full", self.predict_ttft_s(ticket))
        self._check_prediction(ticket)
        loop = asyncio.get_running_loop()
        waiter = _Waiter(ticket, loop.create_future())
        self._order.add(waiter)
        self._let_through()
        if waiter.turn.done():
            return
        try:
            async with asyncio.timeout(ticket.deadline_s):
                await waiter.turn
        except BaseException as error:
            self._order.remove(ticket)
            self.release(ticket.id)  # its turn may have come in the same moment
            if isinstance(error, TimeoutError):
                raise QueueRefusal("deadline") from None
            raise

    def start(self, ticket_id: str) -> None:
        """The request's first token is out. Does nothing for one that is not in flight."""
        flight = self._in_flight.get(ticket_id)
        if flight is not None and flight.is_prefilling:
            self._end_prefill(flight)
            self._rate.add(flight.ticket.prompt_tokens)
            self._let_through()

    def release(self, ticket_id: str, used_tokens: int | None = None) -> None:
        """The request is over, having used so many tokens. Does nothing for one that is not in flight."""
        flight = self._in_flight.pop(ticket_id, None)
        if flight is None:
            return
        if flight.is_prefilling:
            self._end_prefill(flight)
        self._note_finish()
        self._sequences -= flight.ticket.sequences
        if used_tokens is not None:
            self._order.correct(flight.ticket, used_tokens)
        self._let_through()

    def adopt(self, ticket: Ticket, has_started: bool) -> None:
        """Counts a request that engines have already; limits may be passed by it."""
        self._put_in_flight(ticket, is_prefilling=not has_started)

    def drop_waiting(self, ticket_id: str) -> None:
        """Refuses a request that waits, because nobody waits for it any more."""
        for waiter in self._order:
            if waiter.ticket.id == ticket_id and not waiter.turn.done():
                waiter.turn.set_exception(QueueRefusal("lost"))

    def resize(self, capacity: Capacity, ttft_target_s: float | None) -> None:
        """Other limits from now on; what is in flight stays."""
        self._capacity = capacity
        self._ttft_target_s = ttft_target_s
        self._order.credit_tokens = CREDIT * capacity.max_in_flight_prompt_tokens
        self._rate.given_per_s = capacity.prompt_tokens_per_s
        self._let_through()

    def predict_ttft_s(self, ticket: Ticket) -> float:
        """Seconds until the request's first token if it came now; 0 while the engines' speed is unknown."""
        ahead = self._order.look_ahead(ticket)
        rate = self._rate.tokens_per_s
        tokens = self._prefilling_tokens + ahead.prompt_tokens + ticket.prompt_tokens
        by_tokens_s = tokens / rate if rate else 0.0
        return max(by_tokens_s, self._predict_place_s(ticket, ahead.requests))

    def describe(self) -> dict[str, float | None]:
        """What waits and what is in flight, for whoever sizes the pools."""
        return {
            "queued_requests": len(self._order),
            "queued_prompt_tokens": self._order.prompt_tokens,
            "in_flight_sequences": self._sequences,
            "in_flight_prompt_tokens": self._prefilling_tokens,
            "prompt_tokens_per_s": self._rate.tokens_per_s,
        }

    def _check_prediction(self, ticket: Ticket) -> None:
        predicted_s = self.predict_ttft_s(ticket)
        is_first = not self._prefilling_tokens and not len(self._order)
        target_s = self._ttft_target_s
        if predicted_s > ticket.deadline_s or (target_s is not None and predicted_s > target_s and not is_first):
            raise QueueRefusal("too_slow", predicted_s)

    def _predict_place_s(self, ticket: Ticket, requests_ahead: float) -> float:
        free = self._capacity.max_in_flight_sequences - self._sequences
        missing = requests_ahead + ticket.sequences - free
        if missing <= 0 or len(self._finishes) < MIN_FINISHES:
            return 0.0
        elapsed_s = self._finishes[-1] - self._finishes[0]
        return missing * elapsed_s / (len(self._finishes) - 1)

    def _note_finish(self) -> None:
        if self._sequences >= self._capacity.max_in_flight_sequences:
            self._finishes.append(self._now_s())
        else:
            self._finishes.clear()  # with places free, requests end as they come, not as fast as they could

    def _let_through(self) -> None:
        while (waiter := self._order.find_next()) is not None:
            if waiter.turn.done():  # cancelled or refused; its own task has yet to take it out
                self._order.remove(waiter.ticket)
            elif self._fits(waiter.ticket):
                self._order.serve(waiter.ticket)
                self._put_in_flight(waiter.ticket, is_prefilling=True)
                waiter.turn.set_result(None)
            else:
                return  # a smaller one behind it must not pass, or a large one might never fit

    def _fits(self, ticket: Ticket) -> bool:
        capacity = self._capacity
        if self._sequences and self._sequences + ticket.sequences > capacity.max_in_flight_sequences:
            return False
        tokens = self._prefilling_tokens
        return not tokens or tokens + ticket.prompt_tokens <= capacity.max_in_flight_prompt_tokens

    def _put_in_flight(self, ticket: Ticket, is_prefilling: bool) -> None:
        self._pass_time()
        flight = self._in_flight[ticket.id] = _InFlight(ticket, is_prefilling)
        self._sequences += ticket.sequences
        if not is_prefilling:
            return
        self._prefilling_tokens += ticket.prompt_tokens
        self._num_streams_prefilling += ticket.streams
        rate = self._rate.tokens_per_s
        if not ticket.streams and rate:
            # Nobody sees the first token of an answer that comes as a whole: it is taken to be out when it should be.
            prefill_s = self._prefilling_tokens / rate
            flight.timer = asyncio.get_running_loop().call_later(prefill_s, self.start, ticket.id)

    def _end_prefill(self, flight: _InFlight) -> None:
        self._pass_time()
        flight.is_prefilling = False
        self._prefilling_tokens -= flight.ticket.prompt_tokens
        self._num_streams_prefilling -= flight.ticket.streams
        if flight.timer is not None:
            flight.timer.cancel()

    def _pass_time(self) -> None:
        self._rate.pass_time(self._now_s(), is_busy=self._num_streams_prefilling > 0)

    def _now_s(self) -> float:
        return asyncio.get_running_loop().time()
