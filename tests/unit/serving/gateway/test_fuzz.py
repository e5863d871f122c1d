"""No client input gives a 5xx: bodies drawn from the gateway's own OpenAPI document, bent, and arbitrary bytes."""

import asyncio
import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from openapi_bodies import ANYTHING, PATHS, draw_bodies

SETTINGS = settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


@pytest.mark.parametrize("path", PATHS)
def test_bodies_of_the_documents_shape(make_world, path):
    world = make_world()
    application = world.start_gateway()[1]
    reached = []

    @SETTINGS
    @given(draw_bodies(read_document(world, application), path))
    def check(body):
        body = {**body, "model": "tiny"}
        response = post(world, application, path, json.dumps(body).encode())
        assert response.status_code in (200, 400, 429), (response.status_code, response.text)
        if response.status_code == 200:
            reached.append(body)
        else:
            assert response.json()["error"]["message"]

    check()
    assert reached, "some must be valid, or nothing behind the validation is tried"


@pytest.mark.parametrize("path", PATHS)
def test_arbitrary_json_and_bytes(make_world, path):
    world = make_world()
    application = world.start_gateway()[1]

    @SETTINGS
    @given(st.binary(max_size=40) | ANYTHING.map(lambda value: json.dumps(value).encode()))
    def check(body):
        assert post(world, application, path, body).status_code == 400

    check()


def test_arbitrary_headers_and_paths(make_world):
    world = make_world()
    application = world.start_gateway()[1]
    values = st.text(st.characters(max_codepoint=255, exclude_characters="\r\n\0"), max_size=30).map(
        lambda t: t.encode("latin-1")
    )
    names = st.sampled_from(["authorization", "x-request-id", "x-request-timeout-s", "content-length", "content-type"])

    @SETTINGS
    @given(
        st.dictionaries(names, values, max_size=3),
        st.sampled_from([*PATHS, "/v1/models", "/v1/models/\xff%00/x", "/x"]),
    )
    def check(headers, path):
        async def send():
            async with world.connect(None, application) as client:
                return await client.post(path, content=b"{}", headers=list(headers.items()))

        assert asyncio.run(send()).status_code < 500

    check()


def post(world, application, path, body):
    async def send():
        async with world.connect(None, application) as client:
            return await client.post(path, content=body)

    return asyncio.run(send())


def read_document(world, application):
    async def read():
        async with world.connect(None, application) as client:
            return (await client.get("/openapi.json")).json()

    return asyncio.run(read())
