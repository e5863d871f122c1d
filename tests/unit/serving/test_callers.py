"""Requests of a caller that has died are cancelled, and no others. Which actors live is a stand-in here."""

import asyncio
from types import SimpleNamespace

import pytest

from swiftkv.serving import callers


@pytest.fixture
def alive(monkeypatch):
    names = {"dies", "lives"}
    monkeypatch.setattr(callers, "LOOK_EVERY_S", 0.01)
    monkeypatch.setattr(callers, "_is_alive", names.__contains__)
    return names


def test_only_requests_of_the_dead_are_cancelled(alive):
    async def hold(held, name):
        with held.hold(SimpleNamespace(headers={callers.CALLER_HEADER: name} if name else {})):
            await asyncio.sleep(0.3)

    async def run():
        held = callers.Callers()
        tasks = {name: asyncio.create_task(hold(held, name)) for name in ("dies", "lives", None)}
        await asyncio.sleep(0.1)
        assert not any(task.done() for task in tasks.values())
        alive.discard("dies")
        await asyncio.wait(tasks.values())
        assert {name: task.cancelled() for name, task in tasks.items()} == {"dies": True, "lives": False, None: False}

    asyncio.run(run())
