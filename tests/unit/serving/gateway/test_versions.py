"""What the gateway does and counts where a model has more than one version: over ASGI, before stand-in versions."""

import asyncio
import logging
import random

import pytest
from ray.llm._internal.serve.core.configs.openai_api_models import ErrorInfo, ErrorResponse

from swiftkv.serving.gateway.admission_server import AdmissionServer

TEXT = {"model": "tiny", "prompt": "a secret prompt", "max_tokens": 50, "temperature": 0.9}
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "a secret question"}], "logprobs": True}
PATHS = {"/v1/completions": TEXT, "/v1/chat/completions": CHAT}


@pytest.fixture
def world(make_world):
    """Two versions before any number of gateways, which count in one place."""
    return build_world(make_world)


def build_world(make_world, **model):
    routes = [{"application": "old", "weight": 1}, {"application": "new", "weight": 1}]
    world = make_world(models={"tiny": {"routes": routes} | model}, lease_s=0.2)
    world.admission = AdmissionServer()
    world.admission.reconfigure(world.settings.model_dump(mode="json"))
    return world


def send(world, number=20, body=TEXT, path="/v1/completions", num_gateways=1):
    """The answers, and what was counted in the end."""

    async def run():
        gateways = [world.start_gateway() for _ in range(num_gateways)]
        answers = []
        for index in range(number):
            async with world.connect(None, gateways[index % num_gateways][1]) as client:
                answers.append(await client.post(path, json=body, headers={"x-request-id": f"r{index}"}))
        await asyncio.sleep(0.1)  # reports are on their way
        report = await world.admission.describe_versions()
        for gateway, _ in gateways:
            await gateway.admission.close()
        return answers, report

    return asyncio.run(run())


@pytest.mark.parametrize("stream", [False, True])
def test_answer_names_its_version(world, stream):
    answers, _ = send(world, body=TEXT | {"stream": stream})
    asked = {
        call.request.request_id.rpartition("-")[0]: name
        for name, found in world.versions.items()
        for call in found.calls
    }
    named = {answer.headers["x-request-id"]: answer.headers["x-swiftkv-application"] for answer in answers}
    assert named == asked
    assert set(named.values()) == {"old", "new"}


@pytest.mark.parametrize(
    "failure",
    [RuntimeError("broken"), ErrorResponse(error=ErrorInfo(message="broken", type="InternalServerError", code=500))],
)
@pytest.mark.parametrize("stream", [False, True])
def test_fault_of_one_version_is_answered_by_the_other_and_counted(world, failure, stream):
    world.versions["new"].fail_first = [failure] * 99
    answers, report = send(world, body=TEXT | {"stream": stream})
    assert {(answer.status_code, answer.headers["x-swiftkv-application"]) for answer in answers} == {(200, "old")}
    new, old = report.counts["new"], report.counts["old"]
    assert new.failed == new.ended == len(world.versions["new"].calls) > 3
    assert (old.ended, old.failed) == (20, 0)


def test_fault_of_the_only_version_is_not_asked_again(make_world):
    world = make_world()
    world.version.fail_first = [RuntimeError("broken")]
    answers, _ = send_plain(world)
    assert answers.status_code == 500
    assert len(world.version.calls) == 1


def send_plain(world):
    async def run():
        async with world.connect() as client:
            return await client.post("/v1/completions", json=TEXT), None

    return asyncio.run(run())


def test_what_the_client_did_wrong_is_asked_of_one_version(world):
    error = ErrorResponse(error=ErrorInfo(message="too long", type="BadRequestError", code=400))
    for version in world.versions.values():
        version.fail_first = [error] * 99
    answers, report = send(world)
    assert {answer.status_code for answer in answers} == {400}
    assert sum(len(version.calls) for version in world.versions.values()) == 20
    assert sum(counts.failed for counts in report.counts.values()) == 20


@pytest.mark.parametrize("num_gateways", [1, 3])
def test_outcomes_of_all_gateways_are_counted_together(world, num_gateways):
    world.versions["new"].fail_after = (1, RuntimeError("cut"))
    _, report = send(world, 30, TEXT | {"stream": True}, num_gateways=num_gateways)
    new, old = report.counts["new"], report.counts["old"]
    assert new.ended + old.ended == 30
    assert new.failed == new.ended == len(world.versions["new"].calls)
    assert (old.failed, old.ttft.count, old.tpot.count) == (0, old.ended, old.ended)
    assert new.ttft.count == 0


def test_whole_answers_have_a_time_per_token_and_no_first_token(world):
    _, report = send(world)
    assert {(found.ttft.count, found.tpot.count == found.ended) for found in report.counts.values()} == {(0, True)}


def test_requests_in_flight_are_known_by_version_and_a_client_that_leaves_is_no_failure(world):
    for version in world.versions.values():
        version.pause_s = 5

    async def run():
        gateway, application = world.start_gateway()
        async with world.connect(None, application) as client:
            sending = [
                asyncio.create_task(
                    client.post("/v1/completions", json=TEXT | {"stream": True}, headers={"x-request-id": f"r{index}"})
                )
                for index in range(8)
            ]
            await asyncio.sleep(0.3)
            during = await world.admission.describe_versions()
            for task in sending:
                task.cancel()
            await asyncio.gather(*sending, return_exceptions=True)
            await asyncio.sleep(0.3)
            after = await world.admission.describe_versions()
            await gateway.admission.close()
            return during, after

    during, after = asyncio.run(run())
    assert during.in_flight == {name: len(version.calls) for name, version in world.versions.items()}
    assert sum(during.in_flight.values()) == 8
    assert (after.in_flight, after.counts) == ({}, {})


def test_model_without_a_version_yet_is_503(make_world):
    world = make_world(models={"tiny": {}, "other": {"routes": [{"application": "x"}]}})
    answer, _ = send_plain(world)
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "not_ready")


# Comparing.


@pytest.mark.parametrize(("path", "body"), PATHS.items())
@pytest.mark.parametrize(("words", "agreed"), [(("Hello", ",", " world"), 1), (("Something", " else"), 0)])
def test_both_versions_are_asked_the_beginning_greedily(make_world, path, body, words, agreed, caplog):
    caplog.set_level(logging.DEBUG)
    world = build_world(make_world, comparison={"frac": 1, "tokens": 3})
    world.versions["new"].words = words
    _, report = send(world, 1, body | {"stream": True}, path)
    compared = [
        call.request
        for version in world.versions.values()
        for call in version.calls
        if call.request.request_id.startswith("cmp-")
    ]
    assert len(compared) == 2
    assert len({request.request_id for request in compared}) == 2
    for request in compared:
        assert (request.temperature, request.max_tokens, request.n, request.stream) == (0, 3, 1, False)
        assert not request.logprobs
        assert request.cache_salt
    assert (report.counts["new"].compared, report.counts["new"].agreed) == (1, agreed)
    assert sum(counts.ended for counts in report.counts.values()) == 1, "comparisons are no requests"
    assert not any(secret in caplog.text for secret in ("secret", "Hello", "Something"))


def test_comparison_that_fails_harms_nobody(make_world):
    world = build_world(make_world, comparison={"frac": 1, "tokens": 3})
    world.versions["new"].fail_first = [RuntimeError("broken")] * 99
    answers, report = send(world, 5)
    assert {answer.status_code for answer in answers} == {200}
    assert report.counts["new"].compared == 0


def test_sample_is_about_its_part_and_leaves_out_what_has_several_answers(make_world, monkeypatch):
    monkeypatch.setattr(random, "random", random.Random(0).random)
    world = build_world(make_world, comparison={"frac": 0.25, "tokens": 3})
    _, report = send(world, 60)
    assert 8 <= report.counts["new"].compared <= 22
    world = build_world(make_world, comparison={"frac": 1, "tokens": 3})
    _, report = send(world, 5, TEXT | {"n": 2})
    assert sum(counts.compared for counts in report.counts.values()) == 0
