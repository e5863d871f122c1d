"""The fair queue in virtual time: who goes first, who waits how long, who is refused."""

import asyncio
import random
from collections import Counter

import pytest

from swiftkv.serving.gateway.fair_queue import FairQueue, QueueRefusal
from swiftkv.serving.gateway.settings import Capacity

PROMPT_TOKENS_PER_S = 1000.0


def make_queue(target_s=None, **capacity):
    defaults = {"max_in_flight_sequences": 1, "max_in_flight_prompt_tokens": 10**6}
    return FairQueue(Capacity(**defaults | capacity), target_s)


async def run_in_order(queue, tickets, service_s=1.0):
    """Ids in the order in which they are served, all having come at once."""
    served = []

    async def run(ticket):
        await queue.acquire(ticket)
        served.append(ticket)
        await asyncio.sleep(service_s)
        queue.release(ticket.id, ticket.cost_tokens)

    await asyncio.gather(*(run(ticket) for ticket in tickets))
    return served


def test_one_tenant_is_served_first_come_first_served(simulate, make_ticket):
    tickets = [make_ticket(prompt_tokens=size) for size in (500, 1, 300, 2)]
    assert simulate(run_in_order(make_queue(), tickets)) == tickets


def test_tenants_share_tokens_by_weight_whatever_the_size_of_their_requests(simulate, make_ticket):
    heavy = [make_ticket("heavy", 100, weight=3.0) for _ in range(300)]
    light = [make_ticket("light", 300, weight=1.0) for _ in range(100)]
    served = simulate(run_in_order(make_queue(max_queued_requests=1000), heavy + light))
    tokens = Counter()
    for ticket in served[:200]:
        tokens[ticket.tenant] += ticket.prompt_tokens
    assert tokens["heavy"] / tokens["light"] == pytest.approx(3.0, rel=0.05)


def test_earlier_class_never_waits_for_a_later_one(simulate, make_ticket):
    batch = [make_ticket("b", priority=2) for _ in range(5)]
    interactive = [make_ticket("i", priority=0) for _ in range(5)]
    served = simulate(run_in_order(make_queue(), batch + interactive))
    assert [ticket.tenant for ticket in served] == ["b"] + ["i"] * 5 + ["b"] * 4


def test_idle_tenant_saves_up_a_bounded_credit(simulate, make_ticket):
    async def run():
        queue = make_queue(max_in_flight_prompt_tokens=100)
        await run_in_order(queue, [make_ticket("busy") for _ in range(50)])
        return await run_in_order(queue, [make_ticket(name) for _ in range(30) for name in ("busy", "idle")])

    served = [ticket.tenant for ticket in simulate(run())]
    credit = served[1:].index("busy")  # the first was let through before the other came
    assert credit == pytest.approx(8, abs=2)
    assert served[credit : credit + 20].count("idle") == pytest.approx(10, abs=2), "then both have their share"


def test_real_usage_replaces_the_estimate(simulate, make_ticket):
    async def run():
        queue = make_queue()
        order = []

        async def request(tenant, used):
            ticket = make_ticket(tenant, 10, output_tokens=1000)
            await queue.acquire(ticket)
            order.append(tenant)
            await asyncio.sleep(1)
            queue.release(ticket.id, used)

        await asyncio.gather(*[request("short", 20) for _ in range(60)], *[request("long", 200) for _ in range(60)])
        return Counter(order[:44])

    counts = simulate(run())
    assert counts["short"] / counts["long"] == pytest.approx(10, rel=0.5)


def test_sequences_and_prompt_tokens_in_flight_are_bounded(simulate, make_ticket):
    async def run():
        queue = make_queue(max_in_flight_sequences=4, max_in_flight_prompt_tokens=1000)
        seen = []

        async def request(size, sequences):
            ticket = make_ticket(prompt_tokens=size, sequences=sequences)
            await queue.acquire(ticket)
            seen.append(queue.describe())
            await asyncio.sleep(0.1)
            queue.start(ticket.id)
            await asyncio.sleep(1)
            queue.release(ticket.id)

        draw = random.Random(0)
        await asyncio.gather(*(request(draw.randrange(1, 600), draw.choice([1, 2, 3])) for _ in range(200)))
        return queue, seen

    queue, seen = simulate(run())
    assert max(state["in_flight_sequences"] for state in seen) == 4
    assert max(state["in_flight_prompt_tokens"] for state in seen) <= 1000
    assert queue.describe()["in_flight_sequences"] == queue.describe()["in_flight_prompt_tokens"] == 0


def test_request_larger_than_the_bounds_runs_alone(simulate, make_ticket):
    async def run():
        queue = make_queue(max_in_flight_sequences=2, max_in_flight_prompt_tokens=100)
        return await run_in_order(queue, [make_ticket(prompt_tokens=5000, sequences=9), make_ticket()])

    assert len(simulate(run())) == 2


def test_deadline_ends_the_wait_and_leaves_nothing_behind(simulate, make_ticket):
    async def run():
        queue = make_queue()
        await queue.acquire(first := make_ticket())
        with pytest.raises(QueueRefusal, match="deadline"):
            await queue.acquire(make_ticket(deadline_s=2.5))
        assert asyncio.get_running_loop().time() == 2.5
        assert queue.describe()["queued_requests"] == 0
        queue.release(first.id)
        await queue.acquire(make_ticket())

    simulate(run())


@pytest.mark.parametrize("is_granted_first", [False, True])
def test_cancelled_wait_holds_nothing(simulate, make_ticket, is_granted_first):
    async def run():
        queue = make_queue()
        await queue.acquire(first := make_ticket())
        waiting = asyncio.create_task(queue.acquire(make_ticket()))
        await asyncio.sleep(1)
        if is_granted_first:
            queue.release(first.id)  # the turn and the cancellation come in the same moment
        waiting.cancel()
        await asyncio.wait([waiting])
        assert waiting.cancelled()
        assert queue.describe()["queued_requests"] == 0
        assert queue.describe()["in_flight_sequences"] == (0 if is_granted_first else 1)

    simulate(run())


def test_full_queue_refuses_its_own_tenant_only(simulate, make_ticket):
    async def run():
        queue = make_queue(max_queued_requests=3)
        await queue.acquire(make_ticket("flood"))
        waiting = [asyncio.create_task(queue.acquire(make_ticket("flood"))) for _ in range(3)]
        await asyncio.sleep(0)
        with pytest.raises(QueueRefusal, match="queue_full"):
            await queue.acquire(make_ticket("flood"))
        other = asyncio.create_task(queue.acquire(make_ticket("other")))
        await asyncio.sleep(0)
        assert not other.done()
        assert len(waiting) == 3

    simulate(run())


def test_predicted_ttft_is_what_is_ahead_in_fair_order_and_its_own(simulate, make_ticket):
    async def run():
        queue = make_queue(prompt_tokens_per_s=PROMPT_TOKENS_PER_S)
        await queue.acquire(make_ticket("flood", 1000))
        waiting = [asyncio.create_task(queue.acquire(make_ticket("flood", 1000))) for _ in range(9)]
        await asyncio.sleep(0)
        assert len(waiting) == queue.describe()["queued_requests"]
        assert queue.predict_ttft_s(make_ticket("flood", 500)) == pytest.approx(10.5)
        # The other tenant's turn comes after what runs; at most one of the flood's may still be served first.
        assert 1.5 <= queue.predict_ttft_s(make_ticket("other", 500)) <= 2.5
        assert queue.predict_ttft_s(make_ticket("first", 500, priority=0)) == pytest.approx(1.5)

    simulate(run())


def test_late_first_token_is_refused_at_once_unless_nothing_is_ahead(simulate, make_ticket):
    async def run():
        queue = make_queue(target_s=2.0, prompt_tokens_per_s=PROMPT_TOKENS_PER_S)
        await queue.acquire(first := make_ticket(prompt_tokens=5000))
        with pytest.raises(QueueRefusal, match="too_slow") as caught:
            await queue.acquire(make_ticket())
        assert caught.value.predicted_s == pytest.approx(5.1)
        queue.start(first.id)
        queue.release(first.id)
        with pytest.raises(QueueRefusal, match="too_slow"):
            await queue.acquire(make_ticket(prompt_tokens=5000, deadline_s=4.0))

    simulate(run())


def test_speed_is_measured_where_it_is_not_given(simulate, make_ticket):
    async def run():
        queue = make_queue()
        assert queue.predict_ttft_s(make_ticket()) == 0
        for _ in range(20):
            await queue.acquire(ticket := make_ticket(prompt_tokens=500))
            await asyncio.sleep(0.25)
            queue.start(ticket.id)
            await asyncio.sleep(3)
            queue.release(ticket.id)
            await asyncio.sleep(10)
        return queue.describe()["prompt_tokens_per_s"]

    assert simulate(run()) == pytest.approx(2000, rel=0.01)


def test_whole_answers_do_not_hold_prompt_tokens_while_they_decode(simulate, make_ticket):
    async def run():
        queue = make_queue(
            max_in_flight_sequences=8, max_in_flight_prompt_tokens=1000, prompt_tokens_per_s=PROMPT_TOKENS_PER_S
        )
        for _ in range(4):
            await queue.acquire(make_ticket(prompt_tokens=1000, streams=False))
        assert asyncio.get_running_loop().time() == pytest.approx(3.0)

    simulate(run())


async def _measure_ttft(make_ticket, flood_per_s, victim_per_s, seed, duration_s=300):
    """95th percentile of the victim's TTFT in s, before one engine that prefills in the order it is given."""
    # Engines are given about one prompt at once, as the settings advise.
    queue = make_queue(max_in_flight_sequences=64, max_in_flight_prompt_tokens=300, prompt_tokens_per_s=1000)
    engine = asyncio.Lock()
    loop = asyncio.get_running_loop()
    draw = random.Random(seed)
    found = []

    async def request(tenant):
        began_s = loop.time()
        ticket = make_ticket(tenant, draw.randrange(100, 300), output_tokens=20, deadline_s=60)
        try:
            await queue.acquire(ticket)
        except QueueRefusal:
            assert tenant == "flood", "the victim is never refused"
            return
        async with engine:
            await asyncio.sleep(ticket.prompt_tokens / PROMPT_TOKENS_PER_S)
        queue.start(ticket.id)
        if tenant == "victim":
            found.append(loop.time() - began_s)
        await asyncio.sleep(0.2)
        queue.release(ticket.id, ticket.cost_tokens)

    async def send(tenant, per_s):
        running = []
        while loop.time() < duration_s:
            await asyncio.sleep(draw.expovariate(per_s))
            running.append(asyncio.create_task(request(tenant)))
        await asyncio.gather(*running)

    await asyncio.gather(send("flood", flood_per_s), send("victim", victim_per_s))
    found.sort()
    return found[int(len(found) * 0.95)]


@pytest.mark.parametrize("seed", range(2))
def test_flood_of_twenty_times_the_share_raises_anothers_ttft_by_less_than_a_quarter(simulate, make_ticket, seed):
    share_per_s = 2.5  # 200 tokens each, of 1,000 tokens/s: half
    kept = simulate(_measure_ttft(make_ticket, share_per_s, share_per_s / 2, seed))
    flooded = simulate(_measure_ttft(make_ticket, 20 * share_per_s, share_per_s / 2, seed))
    print(f"victim's TTFT p95: {kept:.3f} s while the other keeps its share, {flooded:.3f} s in its flood")
    assert flooded / kept <= 1.25
