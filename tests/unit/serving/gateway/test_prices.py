"""Prices from the settings to a charge: exact, once for each request, and nothing where there are none."""

import asyncio
from collections import Counter
from datetime import UTC, datetime, timedelta
from decimal import Decimal

import pytest

from swiftkv import metrics
from swiftkv.config import parse_settings
from swiftkv.errors import ConfigError
from swiftkv.registry.storage import Storage
from swiftkv.serving.gateway.app import build_overrides
from swiftkv.serving.gateway.exchange import Usage, compute_charge
from swiftkv.serving.gateway.settings import GatewaySettings, Prices
from swiftkv.serving.usage.summing import read_usage

PRICES = {"currency": "USD", "prompt": 0.15, "cached": 0.03, "completion": 0.6}
CHARGE = Decimal("0.00000261")
"""Of the stand-in's answer: 7 prompt tokens, of which 2 were cached, and 3 completion tokens."""


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"prompt": -0.1}, "prices.prompt: should be greater than or equal to 0"),
        ({"cached": float("nan")}, "prices.cached: should be a finite number"),
        ({"completion": float("inf")}, "prices.completion: should be a finite number"),
        ({"completion": 1e12}, "prices.completion: .*digits"),
        ({"prompt": 0.0000001}, "prices.prompt: .*decimal places"),
        ({"currency": "usd"}, "prices.currency"),
        ({"currency": "US dollars"}, "prices.currency"),
        ({"output": 1}, "prices.output: unknown key"),
    ],
)
def test_prices_that_cannot_be_are_refused_by_name(change, said):
    settings = {"models": {"tiny": {"prices": PRICES | change}}}
    with pytest.raises(ConfigError, match=said):
        parse_settings(settings, GatewaySettings, "test")


def test_prices_come_through_serve_s_json_as_they_were_written():
    settings = GatewaySettings.model_validate({"models": {"tiny": {"prices": PRICES}}})
    prices = settings.models["tiny"].prices
    assert (prices.prompt, prices.cached, prices.completion) == (Decimal("0.15"), Decimal("0.03"), Decimal("0.6"))
    found = [GatewaySettings.model_validate(override["user_config"]) for override in build_overrides(settings)]
    assert found == [settings, settings]


@pytest.mark.parametrize(
    ("cached", "charge"),
    [("0.03", CHARGE), (None, "0.00000285"), ("0", "0.00000255")],
    ids=["cheaper", "not said", "free"],
)
def test_a_charge_is_exact_and_cached_tokens_are_not_charged_twice(cached, charge):
    prices = Prices.model_validate(PRICES | {"cached": cached})
    assert compute_charge(Usage(prompt=7, cached=2, completion=3), prices) == Decimal(charge)


def test_a_million_of_each_is_the_price_and_nothing_is_nothing():
    prices = Prices.model_validate(PRICES)
    assert compute_charge(Usage(prompt=2_000_000, cached=1_000_000, completion=1_000_000), prices) == Decimal("0.78")
    assert compute_charge(Usage(), prices) == 0


@pytest.fixture
def charged(monkeypatch):
    """Sums of the counter of charges by its labels."""
    found = Counter()

    def count(name, amount, **labels):
        if name == "swiftkv_gateway_charges_total":
            found[tuple(sorted(labels.items()))] += amount

    monkeypatch.setattr(metrics, "count", count)
    return found


@pytest.fixture
def ask(make_world, tmp_path):
    """Charges and currencies in the records of requests to a model with these prices, which others may follow."""

    def run(prices, *bodies, then=None):
        async def send():
            gateway, application = world.start_gateway()
            async with world.connect(None, application) as client:
                for number, body in enumerate(bodies):
                    if number and then is not None:
                        gateway.configure(build_world(then).settings)
                    await client.post("/v1/completions", json={"model": "tiny", "prompt": "a", "max_tokens": 3} | body)
            await gateway.close()

        world = build_world(prices)
        asyncio.run(send())
        now = datetime.now(UTC)
        records = read_usage(Storage(tmp_path), now - timedelta(hours=1), now + timedelta(hours=1))
        return [(row["charge"], row["currency"]) for row in records.to_pylist()]

    def build_world(prices):
        models = {"tiny": {"routes": [{"application": "tiny-1"}], "prices": prices}}
        return make_world(models=models, usage_store=str(tmp_path))

    return run


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_is_charged_once_in_its_record_and_in_the_counter(ask, charged, stream):
    assert ask(PRICES, {"stream": stream}) == [(CHARGE, "USD")]
    labels = {"tenant": "anonymous", "model": "tiny", "version": "tiny-1", "currency": "USD"}
    assert charged == {tuple(sorted(labels.items())): float(CHARGE)}


def test_what_used_no_token_is_charged_nothing(ask, charged):
    assert ask(PRICES, {"temperature": "hot"}, {"model": "absent"}) == [(0, "USD"), (None, None)]
    assert charged == {}


def test_without_prices_there_is_no_charge(ask, charged):
    assert ask(None, {}) == [(None, None)]
    assert charged == {}


def test_other_prices_hold_for_the_requests_to_come(ask, charged):
    assert ask(PRICES, {}, {}, then=PRICES | {"currency": "EUR", "completion": 0}) == [
        (CHARGE, "USD"),
        (CHARGE - 3 * Decimal("0.0000006"), "EUR"),
    ]
    assert len(charged) == 2
