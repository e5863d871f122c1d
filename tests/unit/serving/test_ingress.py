"""An error becomes a status and an OpenAI body in one place."""

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from ray.llm._internal.serve.core.configs.openai_api_models import OpenAIHTTPException
from starlette.exceptions import HTTPException
from vllm.exceptions import VLLMClientError

from swiftkv.serving.ingress import add_error_answers


class Unpaid(VLLMClientError):
    """An error of vLLM's that the request caused."""


@pytest.fixture
def client():
    app = FastAPI()
    add_error_answers(app)
    errors = {
        "engine": OpenAIHTTPException(status_code=400, message="too long"),
        "routing": HTTPException(404, "no such model"),
        "client": Unpaid("bad value"),
        "bug": KeyError("secret"),
    }

    @app.post("/raise/{name}")
    def raise_error(name: str, body: dict[str, int]) -> None:
        raise errors[name]

    return TestClient(app, raise_server_exceptions=False)


@pytest.mark.parametrize(
    ("name", "status", "message", "kind"),
    [
        ("engine", 400, "too long", "invalid_request_error"),
        ("routing", 404, "no such model", "not_found_error"),
        ("client", 400, "bad value", "invalid_request_error"),
        ("bug", 500, "internal error; the server's log has the details.", "server_error"),
    ],
)
def test_error_body(client, name, status, message, kind):
    response = client.post(f"/raise/{name}", json={})
    assert response.status_code == status
    assert response.json() == {"error": {"message": message, "type": kind, "param": None, "code": str(status)}}


def test_unknown_path_has_the_same_body(client):
    response = client.get("/nowhere")
    assert response.status_code == 404
    assert response.json()["error"]["type"] == "not_found_error"


@pytest.mark.parametrize(
    ("body", "said", "param"), [("{bad", "not JSON", None), ('{"a": "x"}', "a: ", "a"), ("", "body: ", None)]
)
def test_body_that_cannot_be_read_is_400_and_says_where(client, body, said, param):
    response = client.post("/raise/bug", content=body, headers={"Content-Type": "application/json"})
    assert response.status_code == 400
    assert said in response.json()["error"]["message"]
    assert response.json()["error"]["param"] == param
