"""No client input gives a 5xx: bodies drawn from the gateway's own OpenAPI document, bent, and arbitrary bytes."""

import asyncio
import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

SETTINGS = settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
PATHS = ["/v1/chat/completions", "/v1/completions", "/v1/tokenize"]

ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
NUMBERS = st.integers() | st.sampled_from([0, 1, -1, 16, 2**31, 2**63 - 1, 2**63, -(2**63) - 1, 10**30])


@pytest.fixture(scope="module")
def document():
    from swiftkv.serving.gateway.parsing import CHAT, COMPLETIONS, TOKENIZE, TOKENIZE_CHAT

    kinds = {PATHS[0]: [CHAT], PATHS[1]: [COMPLETIONS], PATHS[2]: [TOKENIZE, TOKENIZE_CHAT]}
    return {path: [kind.request.json_schema() for kind in of_path] for path, of_path in kinds.items()}


def draw_from(schema: Any, definitions: dict[str, Any], depth: int = 0) -> st.SearchStrategy[Any]:
    """Values that fit a JSON schema, nearly: bounds are ignored, and anything at all comes in between."""
    if not isinstance(schema, dict) or depth > 5:
        return ANYTHING
    if "$ref" in schema:
        return draw_from(definitions[schema["$ref"].split("/")[-1]], definitions, depth + 1)
    if "enum" in schema or "const" in schema:
        return st.sampled_from(schema.get("enum") or [schema["const"]])
    for word in ("anyOf", "oneOf", "allOf"):
        if word in schema:
            return st.one_of([draw_from(option, definitions, depth + 1) for option in schema[word]])
    kind = schema.get("type")
    if kind == "object":
        return draw_object(schema, definitions, depth)
    if kind == "array":
        return st.lists(draw_from(schema.get("items"), definitions, depth + 1), max_size=3)
    simple = {"string": st.text(max_size=12), "integer": NUMBERS, "number": NUMBERS | st.floats(), "null": st.none()}
    return simple.get(kind, st.booleans() if kind == "boolean" else ANYTHING)


def draw_object(schema: dict[str, Any], definitions: dict[str, Any], depth: int = 0) -> st.SearchStrategy[Any]:
    fields = {name: draw_from(field, definitions, depth + 1) for name, field in schema.get("properties", {}).items()}
    required = set(schema.get("required", ()))
    chosen = st.sets(st.sampled_from(sorted(fields)), max_size=5) if fields else st.just(set())
    return chosen.flatmap(
        lambda names: st.fixed_dictionaries({n: fields[n] for n in (names | required) if n in fields})
    )


@pytest.mark.parametrize("path", PATHS)
def test_bodies_of_the_documents_shape(make_world, document, path):
    strategies = [draw_object(schema, schema.get("$defs", {})) for schema in document[path]]
    world = make_world()
    application = world.start_gateway()[1]
    reached = []

    @SETTINGS
    @given(
        st.one_of(strategies), st.dictionaries(st.sampled_from(["n", "stream", "prompt", "stop"]), ANYTHING, max_size=1)
    )
    def check(body, bent):
        body = {**body, "model": "tiny", **bent}
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
