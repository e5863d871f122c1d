"""The gateway over ASGI before stand-in versions: each rule of a request's way, from its key to its last byte."""

import asyncio
import json
import logging
from collections import Counter

import pytest
import yaml
from ray.exceptions import RayActorError
from ray.llm._internal.serve.core.configs.openai_api_models import ErrorInfo, ErrorResponse

from swiftkv.serving.gateway import gateway as gateway_module
from swiftkv.serving.gateway.keys import create_key

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "a secret question"}]}
TEXT = {"model": "tiny", "prompt": "a secret prompt"}
ROUTES = [("/v1/chat/completions", CHAT), ("/v1/completions", TEXT)]


def run(main):
    return asyncio.run(main)


def post(world, path="/v1/completions", body=TEXT, key=None, **options):
    """One request through a gateway of its own."""

    async def send():
        async with world.connect(key) as client:
            content = body if isinstance(body, bytes) else json.dumps(body).encode()
            return await client.post(path, content=content, **options)

    return run(send())


def read_events(response):
    return [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]


def assert_error(response, status, code=None, said=""):
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert said in error["message"]
    if code:
        assert error["code"] == code
    return error


@pytest.fixture
def make_tenants(tmp_path):
    """A tenants' file; returns its path and a key of each tenant."""

    def make(**tenants):
        keys, rows = {}, []
        for name, values in tenants.items():
            keys[name], digest = create_key()
            rows.append({"name": name, "key_sha256": [digest], **values})
        path = tmp_path / "tenants.yaml"
        path.write_text(yaml.safe_dump({"tenants": rows}))
        return str(path), keys

    return make


# Answers.


@pytest.mark.parametrize(("path", "body"), ROUTES)
def test_whole_answer_passes_with_its_usage(make_world, path, body):
    world = make_world()
    response = post(world, path, body)
    assert response.status_code == 200
    assert response.json()["usage"]["completion_tokens"] == 3
    choice = response.json()["choices"][0]
    assert (choice["message"]["content"] if "chat" in path else choice["text"]) == "Hello, world"
    assert world.version.num_cancelled == world.version.num_running == 0


@pytest.mark.parametrize("wants_usage", [None, False, True])
@pytest.mark.parametrize(("path", "body"), ROUTES)
def test_stream_has_the_usage_chunk_only_where_asked_for(make_world, path, body, wants_usage):
    world = make_world()
    options = {} if wants_usage is None else {"stream_options": {"include_usage": wants_usage}}
    response = post(world, path, body | {"stream": True} | options)
    assert response.headers["content-type"].startswith("text/event-stream")
    *chunks, done = read_events(response)
    assert done == "[DONE]"
    usages = [chunk for chunk in map(json.loads, chunks) if not chunk["choices"]]
    assert len(usages) == (1 if wants_usage else 0)
    assert len(chunks) - len(usages) == 3
    assert world.version.calls[0].request.stream_options.include_usage, "the gateway counts by it"


def test_parameters_reach_the_version(make_world):
    world = make_world()
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
    schema = {"type": "json_schema", "json_schema": {"name": "s", "schema": {"type": "object"}}}
    given = {"n": 2, "stop": ["x"], "logprobs": True, "top_logprobs": 3, "seed": 5, "max_completion_tokens": 9}
    given |= {"tools": [tool], "tool_choice": "auto", "response_format": schema, "temperature": 0.5}
    assert post(world, "/v1/chat/completions", CHAT | given).status_code == 200
    request = world.version.calls[0].request
    for name in ("n", "stop", "logprobs", "top_logprobs", "seed", "max_completion_tokens", "temperature"):
        assert getattr(request, name) == given[name]
    assert request.tools[0].function.name == "f"
    assert request.response_format.json_schema.name == "s"


def test_conversation_in_parts_reaches_the_version(make_world):
    world = make_world()
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert post(world, "/v1/chat/completions", {"messages": [{"role": "user", "content": parts}]}).status_code == 200
    assert world.version.calls[0].request.messages[0]["content"] == parts


@pytest.mark.parametrize("body", [{"prompt": "abc"}, {"messages": CHAT["messages"]}])
def test_tokenize(make_world, body):
    world = make_world()
    response = post(world, "/v1/tokenize", body)
    assert response.json()["tokens"] == [1, 2, 3]
    assert type(world.version.calls[0].request).__name__ == (
        "TokenizeChatRequest" if "messages" in body else "TokenizeCompletionRequest"
    )


def test_models_health_and_readiness(make_world, monkeypatch):
    monkeypatch.setattr(gateway_module, "READY_FOR_S", 0.0)
    world = make_world()

    async def ask():
        async with world.connect() as client:
            models = (await client.get("/v1/models")).json()
            assert [model["id"] for model in models["data"]] == ["tiny"]
            assert (await client.get("/v1/models/tiny")).json()["object"] == "model"
            assert_error(await client.get("/v1/models/absent"), 404, "model_not_found")
            assert (await client.get("/health")).status_code == 200
            assert (await client.get("/ready")).status_code == 200
            world.version.is_healthy = False
            assert_error(await client.get("/ready"), 503)
            world.version.is_asleep = True  # a pool without replicas starts one for a request, not for a probe
            assert (await client.get("/ready")).status_code == 200
            assert (await client.get("/health")).status_code == 200
            assert "/v1/completions" in (await client.get("/openapi.json")).json()["paths"]

    run(ask())


# Who may.


def test_keys_models_and_their_order(make_world, make_tenants):
    path, keys = make_tenants(acme={}, globex={"models": ["other"]})
    routes = {name: {"routes": [{"application": f"{name}-1"}]} for name in ("tiny", "other")}
    world = make_world(models=routes, tenants_file=path)
    assert_error(post(world), 401, "invalid_api_key")
    assert_error(post(world, key="swk_wrong"), 401, "invalid_api_key")
    assert post(world, key="swk_wrong").headers["www-authenticate"] == "Bearer"
    assert_error(post(world, body=b"{bad"), 401)  # nothing is read for strangers
    assert_error(post(world, key=keys["globex"]), 403, "model_not_allowed", "globex")
    assert_error(post(world, body={"model": "tiny", "prompt": 5}, key=keys["globex"]), 403)
    assert_error(post(world, body={"model": "absent"}, key=keys["acme"]), 404, "model_not_found", "other")
    assert_error(post(world, body={"prompt": "a"}, key=keys["acme"]), 400, said="tiny, other")
    assert post(world, body={"prompt": "a"}, key=keys["globex"]).status_code == 200  # only one it can mean
    assert_error(post(world, body={"model": 5}, key=keys["acme"]), 400)

    async def list_models(key):
        async with world.connect(key) as client:
            return await client.get("/v1/models")

    assert [model["id"] for model in run(list_models(keys["globex"])).json()["data"]] == ["other"]
    assert_error(run(list_models(None)), 401)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"max_tokens": "many"}, "max_tokens"),
        ({"n": 1.5}, "n"),
        ({"temperature": []}, "temperature"),
        ({"logprobs": "x"}, "logprobs"),
        ({"structured_outputs": "x"}, None),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"prompt": {"a": 1}}, None),
        ({"prompt": None}, None),
        ({"stop": 5}, None),
        ({"n": 129}, "n"),
        ({"prompt": ["a"] * 129}, "n"),
        ({"max_tokens": 2**70}, None),
    ],
)
def test_wrong_field_is_400_and_named(make_world, body, param):
    error = assert_error(post(make_world(), body=TEXT | body), 400)
    assert error["type"] == "invalid_request_error"
    if param:
        assert param in (error["param"] or error["message"])


@pytest.mark.parametrize(
    "name", ["kv_transfer_params", "priority", "data_parallel_rank", "request_id", "vllm_xargs", "prompt_embeds"]
)
@pytest.mark.parametrize(("path", "body"), ROUTES)
def test_fields_that_reach_into_the_engine_are_refused_by_name(make_world, path, body, name):
    world = make_world()
    error = assert_error(post(world, path, body | {name: 1}), 400, "unsupported_parameter", name)
    assert error["param"] == name
    assert post(world, path, body | {name: None}).status_code == 200
    assert len(world.version.calls) == 1


@pytest.mark.parametrize(
    "body", [b"", b"{bad", b"[]", b"5", b"\xff", b'{"prompt": NaN}', b'{"prompt":"\\ud800"}', b"[" * 10**5]
)
def test_body_that_is_no_json_object_is_400(make_world, body):
    assert_error(post(make_world(), body=body), 400)


def test_a_body_that_does_not_come_is_not_waited_for(make_world):
    world = make_world(limits={"deadline_s": 0.3})

    async def send_slowly():
        for _ in range(100):
            yield b"x"
            await asyncio.sleep(0.1)

    async def run_slow():
        async with world.connect() as client:
            return await client.post("/v1/completions", content=send_slowly())

    assert_error(run(run_slow()), 504, "deadline")
    assert world.version.calls == []


def test_long_body_is_413_with_and_without_a_length(make_world):
    world = make_world(limits={"max_body_bytes": 100})
    assert_error(post(world, body=b"x" * 101), 413, "body_too_large")

    async def send_in_parts():
        async def parts():
            for _ in range(50):
                yield b"x" * 10

        async with world.connect() as client:
            return await client.post("/v1/completions", content=parts())

    assert_error(run(send_in_parts()), 413, "body_too_large")


def test_long_prompt_is_400_with_the_limit(make_world):
    world = make_world(limits={"max_prompt_tokens": 10})
    assert_error(post(world, body=TEXT | {"prompt": [1] * 11}), 400, "context_length_exceeded", "at most 10")
    assert_error(post(world, body=TEXT | {"prompt": "x" * 44}), 400, "context_length_exceeded")
    assert post(world, body=TEXT | {"prompt": [1] * 10}).status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nowhere", 404),
        ("POST", "/v1/models", 405),
        ("GET", "/v1/completions", 405),
        ("DELETE", "/health", 405),
    ],
)
def test_routes_that_do_not_exist(make_world, method, path, status):
    async def send():
        async with make_world().connect() as client:
            return await client.request(method, path)

    response = run(send())
    assert_error(response, status)
    if status == 405:
        assert response.headers["allow"]


# How much, and how fast.


def test_quota_is_shared_by_two_gateways_and_told_in_headers(make_world, make_tenants):
    path, keys = make_tenants(acme={"requests_per_minute": 5}, globex={})
    world = make_world(tenants_file=path, num_replicas=2)

    async def send():
        applications = [world.start_gateway()[1] for _ in range(2)]
        responses = []
        for number in range(8):
            async with world.connect(keys["acme"], applications[number % 2]) as client:
                responses.append(await client.post("/v1/completions", json=TEXT))
        async with world.connect(keys["globex"], applications[0]) as client:
            assert (await client.post("/v1/completions", json=TEXT)).status_code == 200
        return responses

    responses = run(send())
    assert [response.status_code for response in responses] == [200] * 5 + [429] * 3
    assert [r.headers["x-ratelimit-remaining-requests"] for r in responses[:6]] == ["4", "3", "2", "1", "0", "0"]
    assert_error(responses[5], 429, "rate_limit_exceeded", "acme")
    assert 1 <= int(responses[5].headers["retry-after"]) <= 120


def test_tokens_are_charged_by_usage_not_by_estimate(make_world, make_tenants):
    path, keys = make_tenants(acme={"tokens_per_minute": 1000})
    world = make_world(tenants_file=path)

    async def send():
        application = world.start_gateway()[1]
        remaining = []
        async with world.connect(keys["acme"], application) as client:
            for _ in range(5):
                response = await client.post("/v1/completions", json=TEXT | {"max_tokens": 500})
                remaining.append(int(response.headers["x-ratelimit-remaining-tokens"]))
                await asyncio.sleep(0.05)
        return remaining

    # Each is taken for 3 + 500 tokens, and uses 10.
    assert run(send()) == [497, 487, 477, 467, 457]


def test_two_gateways_together_keep_to_the_capacity(make_world):
    capacity = {"max_in_flight_sequences": 3}
    world = make_world(models={"tiny": {"routes": [{"application": "x"}], "capacity": capacity}}, num_replicas=2)
    world.version.pause_s = 0.01
    most = 0

    async def watch():
        nonlocal most
        while True:
            most = max(most, world.version.num_running)
            await asyncio.sleep(0.001)

    async def send():
        watching = asyncio.create_task(watch())
        applications = [world.start_gateway()[1] for _ in range(2)]

        async def one(number):
            async with world.connect(None, applications[number % 2]) as client:
                return (await client.post("/v1/completions", json=TEXT | {"stream": number % 3 == 0})).status_code

        statuses = await asyncio.gather(*(one(number) for number in range(40)))
        watching.cancel()
        return statuses

    assert run(send()) == [200] * 40
    assert most == 3


def test_late_first_token_is_refused_early(make_world):
    capacity = {"prompt_tokens_per_s": 1.0, "max_in_flight_sequences": 1}
    models = {"tiny": {"routes": [{"application": "x"}], "capacity": capacity}}
    world = make_world(models=models, limits={"ttft_target_s": 5})
    world.version.pause_s = 0.05

    async def send():
        application = world.start_gateway()[1]
        async with world.connect(None, application) as client:
            first = asyncio.create_task(
                client.post("/v1/completions", json=TEXT | {"prompt": [1] * 20, "stream": True})
            )
            await asyncio.sleep(0.02)
            second = await client.post("/v1/completions", json=TEXT)
            return await first, second

    first, second = run(send())
    assert first.status_code == 200, "nothing was ahead of it"
    assert_error(second, 429, "overloaded")
    assert int(second.headers["retry-after"]) >= 1


# Time.


@pytest.mark.parametrize("stream", [False, True])
def test_time_given_by_the_client_ends_with_408(make_world, stream):
    world = make_world()
    world.version.pause_s = 5
    headers = {"x-request-timeout-s": "0.05"}
    assert_error(post(world, body=TEXT | {"stream": stream}, headers=headers), 408, "deadline")
    assert world.version.num_running == 0
    assert world.version.num_cancelled == 1


def test_servers_own_time_ends_with_504_and_the_rest_is_passed_down(make_world):
    world = make_world(limits={"deadline_s": 0.05})
    world.version.pause_s = 5
    assert_error(post(world), 504, "deadline")
    assert 0.02 < float(world.version.calls[0].headers["x-request-timeout-s"]) <= 0.05


def test_time_over_in_mid_stream_is_an_error_event(make_world):
    world = make_world()
    world.version.pause_s = 0.8
    response = post(world, body=TEXT | {"stream": True}, headers={"x-request-timeout-s": "1.2"})
    assert response.status_code == 200
    *chunks, last = read_events(response)
    assert len(chunks) == 1
    assert json.loads(last)["error"]["code"] == "deadline"


@pytest.mark.parametrize("given", ["", "x", "-1", "0", "nan", "inf", "3601"])
def test_time_that_cannot_be_given_is_400(make_world, given):
    assert_error(post(make_world(), headers={"x-request-timeout-s": given}), 400, said="x-request-timeout-s")


# Versions.


def test_traffic_is_split_by_weight_and_an_id_sticks(make_world):
    routes = [
        {"application": "old", "weight": 9},
        {"application": "new", "weight": 1},
        {"application": "off", "weight": 0},
    ]
    world = make_world(models={"tiny": {"routes": routes}})

    async def send():
        async with world.connect() as client:
            for number in range(300):
                await client.post("/v1/completions", json=TEXT, headers={"x-request-id": f"r{number}"})
            for _ in range(10):
                await client.post("/v1/completions", json=TEXT, headers={"x-request-id": "same"})

    run(send())
    counts = {name: len(version.calls) for name, version in world.versions.items()}
    assert counts["off"] == 0
    assert 15 <= counts["new"] <= 50
    same = Counter(
        name
        for name, version in world.versions.items()
        for call in version.calls
        if call.request.request_id[:4] == "same"
    )
    assert list(same.values()) == [10]


def test_weights_change_without_a_new_gateway(make_world):
    world = make_world(models={"tiny": {"routes": [{"application": "old"}, {"application": "new", "weight": 0}]}})
    changed = make_world(models={"tiny": {"routes": [{"application": "new"}]}})

    async def send():
        gateway, application = world.start_gateway()
        async with world.connect(None, application) as client:
            await client.post("/v1/completions", json=TEXT)
            gateway.configure(changed.settings)
            await client.post("/v1/completions", json=TEXT)

    run(send())
    assert [len(world.versions[name].calls) for name in ("old", "new")] == [1, 1]


def test_version_lost_before_its_first_token_is_replaced_once(make_world):
    world = make_world(models={"tiny": {"routes": [{"application": "a"}, {"application": "b"}]}})
    for version in world.versions.values():
        version.fail_first = [RayActorError()]
    responses = [post(world) for _ in range(3)]
    assert_error(responses[0], 503, "unavailable")  # both were lost
    assert responses[0].headers["retry-after"] == "1"
    assert [response.status_code for response in responses[1:]] == [200, 200]
    world.versions["a"].fail_first = [RayActorError()] * 9
    assert {post(world).status_code for _ in range(8)} == {200}


def test_model_whose_application_is_gone_is_503(make_world):
    world = make_world()
    del world.versions["tiny-1"]
    assert_error(post(world), 503, "unavailable")


@pytest.mark.parametrize("stream", [False, True])
def test_engines_refusal_keeps_its_status_and_text(make_world, stream):
    world = make_world()
    message = "This model's maximum context length is 64 tokens."
    error = ErrorInfo(message=message, type="BadRequestError", param="prompt", code=400)
    world.version.fail_first = [ErrorResponse(error=error)]
    found = assert_error(post(world, body=TEXT | {"stream": stream}), 400, "context_length_exceeded", "64 tokens")
    assert found["param"] == "prompt"


def test_engines_own_failure_is_500_without_its_text(make_world):
    world = make_world()
    world.version.fail_first = [RuntimeError("a secret of the engine")]
    assert "secret" not in assert_error(post(world), 500)["message"]


@pytest.mark.parametrize("failure", [RayActorError(), RuntimeError("secret"), None])
def test_stream_that_breaks_off_ends_with_an_error_event(make_world, failure):
    world = make_world()
    if failure:
        world.version.fail_after = (2, failure)
    else:
        world.version.ends_after = 2
    response = post(world, body=TEXT | {"stream": True})
    *chunks, last = read_events(response)
    assert len(chunks) == 2
    assert set(json.loads(last)["error"]) == {"message", "type", "param", "code"}
    assert "[DONE]" not in response.text and "secret" not in response.text


# Ids, logs, salts.


def test_request_id_is_kept_if_it_can_be_and_made_otherwise(make_world):
    world = make_world()
    assert post(world, headers={"x-request-id": "mine-1"}).headers["x-request-id"] == "mine-1"
    for wrong in ("", "a b", "x" * 129, "é".encode()):
        made = post(world, headers={"x-request-id": wrong}).headers["x-request-id"]
        assert made.startswith("req-") and len(made) == 28
    assert "x-request-id" in post(world, "/nowhere").headers
    first, second = (call.request.request_id for call in [*world.version.calls[:1], *world.version.calls[:1]])
    assert first.startswith("mine-1-") and second == world.version.calls[0].headers["x-request-id"]


def test_engines_ids_differ_for_a_repeated_request_id(make_world):
    world = make_world()
    for _ in range(2):
        post(world, headers={"x-request-id": "same"})
    first, second = (call.request.request_id for call in world.version.calls)
    assert first != second


def test_one_line_per_request_without_any_text(make_world, make_tenants, caplog):
    path, keys = make_tenants(acme={})
    world = make_world(tenants_file=path)
    with caplog.at_level(logging.INFO, "swiftkv.gateway.requests"):
        post(world, body=TEXT | {"stream": True}, key=keys["acme"], headers={"x-request-id": "r1"})
        post(world, "/v1/chat/completions", CHAT, key=keys["acme"])
        post(world, body=TEXT | {"prompt": {"secret": 1}}, key=keys["acme"])
        post(world, key="swk_secret")
    lines = [json.loads(r.getMessage()) for r in caplog.records if r.name == "swiftkv.gateway.requests"]
    assert [line["status"] for line in lines] == [200, 200, 400, 401]
    first = lines[0]
    assert (first["request_id"], first["tenant"], first["model"], first["application"]) == (
        "r1",
        "acme",
        "tiny",
        "tiny-1",
    )
    assert (first["prompt_tokens"], first["cached_tokens"], first["completion_tokens"]) == (7, 2, 3)
    assert 0 < first["ttft_s"] <= first["total_s"]
    assert lines[1]["ttft_s"] is None and lines[1]["completion_tokens"] == 3
    assert (lines[3]["tenant"], lines[3]["model"], lines[3]["reason"]) == ("-", "-", "invalid_api_key")
    assert "secret" not in caplog.text and "Hello" not in caplog.text


def test_prefixes_are_salted_by_tenant_and_by_the_clients_own_salt(make_world, make_tenants):
    path, keys = make_tenants(acme={}, globex={})
    world = make_world(tenants_file=path)
    for tenant in ("acme", "globex"):
        for given in ({}, {"cache_salt": "x"}, {"cache_salt": "y"}):
            post(world, body=TEXT | given, key=keys[tenant])
    post(world, key=keys["acme"])
    salts = [call.request.cache_salt for call in world.version.calls]
    assert len(set(salts)) == 6 and salts[6] == salts[0]
    shared = make_world(tenants_file=path, shared_prefix_cache=True)
    post(shared, key=keys["acme"])
    post(shared, body=TEXT | {"cache_salt": "x"}, key=keys["acme"])
    assert [call.request.cache_salt for call in shared.version.calls] == [None, "x"]


# Clients that leave.


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("waits", ["in the queue", "for the version"])
def test_client_that_leaves_stops_the_work_and_frees_its_place(make_world, stream, waits, caplog):
    capacity = {"max_in_flight_sequences": 1}
    world = make_world(models={"tiny": {"routes": [{"application": "x"}], "capacity": capacity}})
    world.version.pause_s = 0.3

    async def leave(application):
        body = json.dumps(TEXT | {"stream": stream}).encode()
        has_left = asyncio.Event()
        messages = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive():
            if messages:
                return messages.pop()
            await has_left.wait()
            return {"type": "http.disconnect"}

        async def send(message):
            pass

        scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": [], "query_string": b""}
        request = asyncio.create_task(application({**scope, "root_path": "", "http_version": "1.1"}, receive, send))
        await asyncio.sleep(0.4)
        has_left.set()
        await asyncio.wait_for(request, 0.2)

    async def check():
        application = world.start_gateway()[1]
        async with world.connect(None, application) as client:
            others = []
            if waits == "in the queue":
                world.version.pause_s = 1
                others = [asyncio.create_task(client.post("/v1/completions", json=TEXT))]
                await asyncio.sleep(0.05)
            await leave(application)
            assert world.version.num_running == len(others)
            assert world.version.num_cancelled == (0 if others else 1)
            await asyncio.sleep(0.05)
            assert world.admission.describe()["tiny"]["queued_requests"] == 0
            assert world.admission.describe()["tiny"]["in_flight_sequences"] == len(others)
            for other in others:
                assert (await other).status_code == 200

    with caplog.at_level(logging.INFO, "swiftkv.gateway.requests"):
        run(check())
    lines = [json.loads(r.getMessage()) for r in caplog.records if r.name == "swiftkv.gateway.requests"]
    assert (lines[0]["status"], lines[0]["reason"]) == (499, "client_left")
