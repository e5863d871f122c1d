"""Quotas, queues and leases together, for two gateways; and what a gateway does while the shared admission is away."""

import asyncio
from types import SimpleNamespace

import pytest

from swiftkv.serving.gateway import admission_server
from swiftkv.serving.gateway.admission import LOST, Admission
from swiftkv.serving.gateway.admission_client import AdmissionClient
from swiftkv.serving.gateway.admission_server import AdmissionServer
from swiftkv.serving.gateway.settings import GatewaySettings
from swiftkv.serving.gateway.tickets import Decision, Finished, Held, Report


def make_settings(lease_s=5.0, num_replicas=2, **capacity):
    model = {"routes": [{"application": "x"}], "capacity": {"max_in_flight_sequences": 2} | capacity}
    return GatewaySettings.model_validate({"models": {"tiny": model}, "lease_s": lease_s, "num_replicas": num_replicas})


async def settle():
    await asyncio.sleep(0.05)


def in_flight(admission):
    return admission.describe()["tiny"]["in_flight_sequences"]


def test_refused_request_gives_its_quota_back(simulate, make_ticket):
    async def run():
        admission = Admission(make_settings(max_queued_requests=1, max_in_flight_sequences=1))
        limited = {"requests_per_minute": 10}
        await admission.acquire(make_ticket(**limited))
        waiting = asyncio.create_task(admission.acquire(make_ticket(**limited)))
        await settle()
        refused = await admission.acquire(make_ticket(**limited))
        assert (refused.status, refused.code) == (429, "queue_full")
        assert refused.headers["x-ratelimit-limit-requests"] == "10"
        waiting.cancel()
        await settle()
        other = await admission.acquire(make_ticket(sequences=0, **limited))
        assert other.headers["x-ratelimit-remaining-requests"] == "8"  # the first and this one

    simulate(run())


def test_places_of_a_gateway_that_fell_silent_go_to_others(simulate, make_ticket):
    async def run():
        admission = Admission(make_settings(lease_s=5))
        for _ in range(2):
            await admission.acquire(make_ticket(gateway="dead"))
        queued = asyncio.create_task(admission.acquire(make_ticket(gateway="dead")))
        waiting = asyncio.create_task(admission.acquire(make_ticket(gateway="alive")))
        for _ in range(7):
            await asyncio.sleep(1)
            await admission.report(Report("alive", held=()))
        assert (await waiting).is_granted
        assert (await queued).code == LOST
        assert in_flight(admission) == 1

    simulate(run())


def test_named_places_are_kept_and_forgotten_ones_lapse(simulate, make_ticket):
    async def run():
        admission = Admission(make_settings(lease_s=5))
        kept, forgotten = make_ticket(), make_ticket()
        await admission.acquire(kept)
        await admission.acquire(forgotten)
        for _ in range(20):
            await asyncio.sleep(1)
            await admission.report(Report("g", held=(Held(kept, True),)))
        assert in_flight(admission) == 1
        await admission.report(Report("g", finished=(Finished(kept.id, 10),)))
        await admission.report(Report("g", finished=(Finished(kept.id, 10),)))  # told twice, counted once
        assert in_flight(admission) == 0

    simulate(run())


def test_unwritten_usage_of_a_gateway_that_vanished_is_counted_once(simulate, monkeypatch):
    clock, lost = SimpleNamespace(now_s=0.0, monotonic=lambda: clock.now_s), []
    monkeypatch.setattr(admission_server, "time", clock)
    monkeypatch.setattr(admission_server, "count", lambda *counted: lost.append(counted))

    async def run():
        server = AdmissionServer()
        server.reconfigure(make_settings(lease_s=5).model_dump(mode="json"))
        await server.report(Report("dead", unwritten_tokens=900))
        await server.report(Report("dead", unwritten_tokens=70))
        await server.report(Report("ended in order", unwritten_tokens=0))
        for second in range(100):
            clock.now_s = second
            await server.report(Report("alive", unwritten_tokens=5))
            if second % 25 == 0:
                await server.report(Report("stopped for a while", unwritten_tokens=5))
            assert not lost or second > 30

    simulate(run())
    assert lost == [("swiftkv_usage_lost_tokens_total", 70)]


def test_restarted_admission_learns_what_is_in_flight(simulate, make_ticket):
    async def run():
        admission = Admission(make_settings())
        tickets = [make_ticket() for _ in range(2)]
        await admission.report(Report("g", held=tuple(Held(ticket, False) for ticket in tickets)))
        assert in_flight(admission) == 2
        waiting = asyncio.create_task(admission.acquire(make_ticket()))
        await settle()
        assert not waiting.done()
        await admission.report(Report("g", finished=(Finished(tickets[0].id, 5),)))
        assert (await waiting).is_granted

    simulate(run())


def test_changed_capacity_lets_waiting_requests_through(simulate, make_ticket):
    async def run():
        admission = Admission(make_settings(max_in_flight_sequences=1))
        await admission.acquire(make_ticket())
        waiting = asyncio.create_task(admission.acquire(make_ticket()))
        await settle()
        assert not waiting.done()
        admission.configure(make_settings(max_in_flight_sequences=2))
        assert (await waiting).is_granted

    simulate(run())


def test_late_first_token_is_429_with_a_time(simulate, make_ticket):
    async def run():
        admission = Admission(make_settings(prompt_tokens_per_s=10))
        await admission.acquire(make_ticket(prompt_tokens=1000))
        refused = await admission.acquire(make_ticket())
        assert (refused.status, refused.code) == (429, "overloaded")
        assert int(refused.headers["Retry-After"]) == 55
        assert "110.0 s" in refused.message

    simulate(run())


class Unreliable:
    """The shared admission behind a wire that can be cut."""

    def __init__(self, admission):
        self.admission = admission
        self.cut = None
        self.num_reports = 0

    async def acquire(self, ticket):
        await self._pass()
        return await self.admission.acquire(ticket)

    async def report(self, report):
        self.num_reports += 1
        await self._pass()
        await self.admission.report(report)

    async def _pass(self):
        if self.cut == "error":
            raise RuntimeError("actor died")
        if self.cut == "silence":
            await asyncio.Event().wait()


def make_clients(num, settings=None):
    settings = settings or make_settings()
    shared = Unreliable(Admission(settings))
    locals_ = [Admission(settings, share=1 / settings.num_replicas) for _ in range(num)]
    return shared, [AdmissionClient(f"g{n}", local, shared, settings.lease_s) for n, local in enumerate(locals_)]


def test_two_gateways_share_places_and_quotas(simulate, make_ticket):
    async def run():
        _, (one, two) = make_clients(2)
        first = make_ticket(gateway="g0", requests_per_minute=3)
        assert (await one.acquire(first)).is_granted
        assert (await two.acquire(make_ticket(gateway="g1", requests_per_minute=3))).is_granted
        waiting = asyncio.create_task(two.acquire(make_ticket(gateway="g1", requests_per_minute=3)))
        await settle()
        assert not waiting.done(), "both places are taken, one in each gateway"
        assert (await one.acquire(make_ticket(gateway="g0", requests_per_minute=3))).code == "rate_limit_exceeded"
        one.finish(first.id, 10)
        assert (await waiting).is_granted

    simulate(run())


@pytest.mark.parametrize("cut", ["error", "silence"])
def test_own_limits_hold_while_the_shared_admission_is_away(simulate, make_ticket, cut):
    async def run():
        shared, (client,) = make_clients(1)
        tickets = [make_ticket() for _ in range(3)]
        await client.acquire(tickets[0])
        shared.cut = cut
        began_s = asyncio.get_running_loop().time()
        # One of two gateways, two places in all: its own share is one, which the request before has.
        waiting = asyncio.create_task(client.acquire(tickets[1]))
        await asyncio.sleep(4)
        assert client.is_away and not waiting.done()
        client.finish(tickets[0].id, 10)
        assert (await waiting).is_granted
        assert asyncio.get_running_loop().time() - began_s < 4.1
        shared.cut = None
        await asyncio.sleep(4)
        assert not client.is_away
        assert in_flight(shared.admission) == 1, "it was told what is in flight"
        client.finish(tickets[1].id, 10)
        await settle()
        assert in_flight(shared.admission) == 0

    simulate(run())


def test_waiting_requests_are_not_stuck_when_the_shared_admission_goes(simulate, make_ticket):
    async def run():
        shared, (client,) = make_clients(1, make_settings(max_in_flight_sequences=1))
        first = make_ticket()
        await client.acquire(first)
        waiting = asyncio.create_task(client.acquire(make_ticket()))
        await asyncio.sleep(3)
        client.finish(first.id, 1)
        shared.cut = "silence"
        await asyncio.sleep(4)
        assert (await waiting).is_granted

    simulate(run())


def test_client_that_leaves_while_waiting_holds_nothing(simulate, make_ticket):
    async def run():
        shared, (client,) = make_clients(1, make_settings(max_in_flight_sequences=1))
        first = make_ticket()
        await client.acquire(first)
        waiting = asyncio.create_task(client.acquire(make_ticket()))
        await settle()
        waiting.cancel()
        await asyncio.wait([waiting])
        assert waiting.cancelled()
        client.finish(first.id, 1)
        await settle()
        assert shared.admission.describe()["tiny"]["queued_requests"] == 0
        assert in_flight(shared.admission) == 0

    simulate(run())


def test_news_are_gathered_and_heartbeats_go_on_without_news(simulate, make_ticket):
    async def run():
        settings = make_settings(max_in_flight_sequences=1000)
        shared, (client,) = make_clients(1, settings)
        tickets = [make_ticket() for _ in range(200)]
        for ticket in tickets:
            await client.acquire(ticket)
            client.start(ticket.id)
        await settle()
        assert in_flight(shared.admission) == 200
        before = shared.num_reports
        for ticket in tickets:
            client.finish(ticket.id, 1)
        await settle()
        assert in_flight(shared.admission) == 0
        assert shared.num_reports - before <= 2
        await asyncio.sleep(60)
        assert shared.num_reports - before == pytest.approx(60, abs=3)

    simulate(run())


def test_requests_without_engine_work_take_no_place(simulate, make_ticket):
    async def run():
        admission = Admission(make_settings(max_in_flight_sequences=1))
        for _ in range(5):
            assert await admission.acquire(make_ticket(sequences=0, prompt_tokens=0)) == Decision(True)
        assert in_flight(admission) == 0

    simulate(run())
