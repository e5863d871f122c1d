"""Request bodies drawn from an OpenAPI document, and anything else that is JSON.

Called by: tests/unit/serving/gateway/test_fuzz.py, tests/integration/test_pools.py.
"""

from typing import Any

from hypothesis import strategies as st

PATHS = ["/v1/chat/completions", "/v1/completions", "/v1/tokenize"]

ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
NUMBERS = st.integers() | st.sampled_from([0, 1, -1, 16, 2**31, 2**63 - 1, 2**63, -(2**63) - 1, 10**30])


def draw_bodies(document: dict[str, Any], path: str) -> st.SearchStrategy[dict[str, Any]]:
    """Bodies of a route, nearly as the document describes them, some of them bent."""
    schema = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
    bent = st.dictionaries(st.sampled_from(["n", "stream", "prompt", "stop"]), ANYTHING, max_size=1)
    bodies = draw_from(schema, document["components"]["schemas"])
    return st.tuples(bodies, bent).map(
        lambda parts: {**parts[0], **parts[1]} if isinstance(parts[0], dict) else parts[1]
    )


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
