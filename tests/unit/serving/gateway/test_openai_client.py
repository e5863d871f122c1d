"""The official `openai` client against the gateway over a real socket, and OpenAI's own schema against its bodies."""

import threading
import time
from types import SimpleNamespace

import openai
import pytest
import uvicorn
import yaml

from swiftkv.cluster import choose_ports
from swiftkv.serving.gateway.keys import create_key

MESSAGES = [{"role": "user", "content": "hi"}]


@pytest.fixture
def serving(make_world, tmp_path):
    """A running gateway: its world, its URL and a key of tenant `acme`."""
    key, digest = create_key()
    path = tmp_path / "tenants.yaml"
    path.write_text(yaml.safe_dump({"tenants": [{"name": "acme", "key_sha256": [digest], "requests_per_minute": 50}]}))
    world = make_world(tenants_file=str(path))
    (port,) = choose_ports(1)
    config = uvicorn.Config(lambda: world.start_gateway()[1], factory=True, port=port, log_level="error")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield SimpleNamespace(world=world, url=f"http://127.0.0.1:{port}/v1", key=key)
    server.should_exit = True
    thread.join(timeout=10)


@pytest.fixture
def client(serving):
    return openai.OpenAI(base_url=serving.url, api_key=serving.key, max_retries=0)


def test_models(client):
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "swiftkv"


def test_whole_and_streamed_chat_say_the_same(client):
    whole = client.chat.completions.create(model="tiny", messages=MESSAGES)
    assert whole.usage.total_tokens == 10
    options = {"include_usage": True}
    chunks = list(client.chat.completions.create(model="tiny", messages=MESSAGES, stream=True, stream_options=options))
    assert "".join(c.choices[0].delta.content for c in chunks if c.choices) == whole.choices[0].message.content
    assert chunks[-1].usage.total_tokens == 10
    assert [chunk.usage for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)


def test_whole_and_streamed_completion_say_the_same(client):
    whole = client.completions.create(model="tiny", prompt="hi")
    chunks = list(client.completions.create(model="tiny", prompt="hi", stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text


def test_rate_limit_headers(client):
    answer = client.completions.with_raw_response.create(model="tiny", prompt="hi")
    assert answer.headers["x-ratelimit-limit-requests"] == "50"
    assert answer.headers["x-request-id"]


def test_errors_are_the_clients_own_classes(client, serving):
    with pytest.raises(openai.NotFoundError) as caught:
        client.completions.create(model="absent", prompt="x")
    assert caught.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError, match="max_tokens"):
        client.completions.create(model="tiny", prompt="x", max_tokens="many")
    stranger = openai.OpenAI(base_url=serving.url, api_key="swk_x", max_retries=0)
    with pytest.raises(openai.AuthenticationError):
        stranger.models.list()
    with pytest.raises(openai.RateLimitError):
        for _ in range(60):
            client.completions.create(model="tiny", prompt="x")


def test_stream_that_breaks_off_raises(client, serving):
    serving.world.version.fail_after = (2, RuntimeError("lost"))
    with pytest.raises(openai.APIError):
        list(client.completions.create(model="tiny", prompt="x", stream=True))


@pytest.mark.parametrize("stream", [False, True])
def test_client_that_closes_its_connection_stops_the_version(client, serving, stream):
    version = serving.world.version
    version.pause_s = 1.0
    try:
        answer = client.with_options(timeout=0.5).completions.create(model="tiny", prompt="x", stream=stream)
        for _ in answer:
            break
        answer.close()
    except openai.APITimeoutError:
        pass
    ends_s = time.monotonic() + 1
    while version.num_running and time.monotonic() < ends_s:
        time.sleep(0.01)
    assert version.num_running == 0
    assert version.num_cancelled == 1
