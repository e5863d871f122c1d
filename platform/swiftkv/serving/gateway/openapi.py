"""The gateway's OpenAPI document: bodies as vLLM's request classes describe them, less what nobody may set.

Requests are not checked against it: parsing.py validates them with the same classes.
Called by: gateway/routes.py.
"""

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from swiftkv.serving.gateway.parsing import ENGINE_FIELDS, Kind

_REFERENCE = "#/components/schemas/{model}"

ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"description": "The request cannot be answered as it is.", "content": {"application/json": {}}},
    "5XX": {"description": "The model could not answer.", "content": {"application/json": {}}},
}


def describe_body(*kinds: Kind) -> dict[str, Any]:
    """What FastAPI adds to a route whose body is one of these."""
    schemas = [_build_schema(kind)[0] for kind in kinds]
    schema = schemas[0] if len(schemas) == 1 else {"anyOf": schemas}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def install_document(app: FastAPI, *kinds: Kind) -> None:
    """Lets the app's document hold the schemas that the bodies refer to."""

    def build() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = get_openapi(title=app.title, version=app.version, routes=app.routes)
            schemas = document.setdefault("components", {}).setdefault("schemas", {})
            for kind in kinds:
                schemas.update(_build_schema(kind)[1])
            app.openapi_schema = document
        return app.openapi_schema

    app.openapi = build  # type: ignore[method-assign]


def _build_schema(kind: Kind) -> tuple[dict[str, Any], dict[str, Any]]:
    """A body's own schema, and those that it refers to."""
    schema = kind.request.json_schema(ref_template=_REFERENCE)
    definitions = schema.pop("$defs", {})
    schema["properties"] = {k: v for k, v in schema["properties"].items() if k not in ENGINE_FIELDS}
    return schema, definitions
