"""Usage records from a gateway's requests to a sum: nothing twice, nothing silently lost."""

import asyncio
import io
import json
import time
from collections import Counter
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from swiftkv.cli.main import app
from swiftkv.errors import ConfigError, RegistryError
from swiftkv.registry.storage import Storage
from swiftkv.serving.usage import writer as module
from swiftkv.serving.usage.records import SCHEMA, UsageRecord, decode, encode, name_folder
from swiftkv.serving.usage.summing import list_hours, read_usage, sum_usage
from swiftkv.serving.usage.writer import UsageWriter

NOON = datetime(2026, 11, 3, 12, tzinfo=UTC)
HOUR = timedelta(hours=1)


def build_record(number, **changes):
    values = {
        "id": f"id-{number}",
        "request_id": "given-twice",
        "ended_at": NOON + timedelta(minutes=number),
        "tenant": "ab"[number % 2],
        "model": "tiny",
        "version": "tiny@1",
        "route": "POST /v1/completions",
        "status": 200,
        "reason": None,
        "prompt_tokens": 10 + number,
        "cached_tokens": 1,
        "completion_tokens": 2,
        "queue_s": None,
        "ttft_s": 0.5,
        "tpot_s": None,
        "total_s": 1.0,
        "charge": None,
        "currency": None,
    }
    return UsageRecord(**values | changes)


@pytest.fixture
def counted(monkeypatch):
    found = Counter()

    def count(name, amount, **labels):
        found[name, *labels.values()] += amount

    def record(name, value):
        found[name] = value

    monkeypatch.setattr(module, "count", count)
    monkeypatch.setattr(module, "record", record)
    return found


def read_all(store):
    return read_usage(Storage(store), NOON - HOUR, datetime.now(UTC) + HOUR).to_pylist()


def wait_for(condition):
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.02)


def test_records_come_back_as_they_were():
    records = [
        build_record(0, charge=Decimal("0.000000000001"), currency="USD"),
        build_record(1, queue_s=0.25, reason="queue_full", status=429),
    ]
    assert [UsageRecord(**row) for row in decode(encode(records)).to_pylist()] == records


def test_records_of_before_there_were_prices_have_none():
    older = decode(encode([build_record(0), build_record(1)])).drop_columns(["charge", "currency"])
    records = decode(write_parquet(older))
    assert records.schema == SCHEMA and records["charge"].null_count == records["currency"].null_count == 2


def write_parquet(table):
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    return buffer.getvalue()


def test_a_writer_writes_what_it_was_given_and_says_so(tmp_path, counted):
    writer = UsageWriter(str(tmp_path), "g", flush_s=0.05)
    for number in range(25):
        writer.add(build_record(number))
    wait_for(lambda: counted["swiftkv_usage_records_total", "written"] == 25)
    writer.add(build_record(25))
    writer.close()
    assert {row["id"] for row in read_all(tmp_path)} == {f"id-{number}" for number in range(26)}
    assert counted["swiftkv_usage_unwritten_tokens"] == 0


def test_what_is_not_in_the_store_yet_is_told_with_every_record_and_written_at_the_end(tmp_path, counted):
    writer = UsageWriter(str(tmp_path), "g", flush_s=60)
    for number, tokens in ((0, 12), (1, 25)):
        writer.add(build_record(number))
        assert writer.unwritten_tokens == counted["swiftkv_usage_unwritten_tokens"] == tokens
    writer.close()
    assert writer.unwritten_tokens == counted["swiftkv_usage_unwritten_tokens"] == 0
    assert len(read_all(tmp_path)) == 2


def test_while_the_store_is_away_records_are_kept_and_told_and_come_later_once(tmp_path, counted, monkeypatch):
    writes, is_away = [], [True]
    real = Storage.write

    def write(self, path, content):
        writes.append(path)
        if len(writes) == 1:
            real(self, path, content)  # it came through, and nobody heard of it
        if is_away[0]:
            raise RegistryError("away")
        real(self, path, content)

    monkeypatch.setattr(Storage, "write", write)
    writer = UsageWriter(str(tmp_path), "g", flush_s=0.02)
    writer.add(build_record(0))
    wait_for(lambda: len(writes) >= 2)
    writer.add(build_record(1))
    wait_for(lambda: counted["swiftkv_usage_unwritten_tokens"] == 12 + 13)
    is_away[0] = False
    wait_for(lambda: counted["swiftkv_usage_records_total", "written"] == 2)
    writer.close()
    assert sorted(row["id"] for row in read_all(tmp_path)) == ["id-0", "id-1"]
    assert counted["swiftkv_usage_unwritten_tokens"] == 0


def test_a_store_that_stays_away_costs_the_oldest_records_and_is_counted(tmp_path, counted, monkeypatch):
    monkeypatch.setattr(module, "MAX_KEPT", 5)
    monkeypatch.setattr(module, "MAX_BATCH", 2)
    monkeypatch.setattr(Storage, "write", lambda *_: (_ for _ in ()).throw(RegistryError("away")))
    writer = UsageWriter(str(tmp_path), "g", flush_s=0.02)
    for number in range(8):
        writer.add(build_record(number))
    wait_for(lambda: counted["swiftkv_usage_records_total", "lost"])
    writer.close()
    assert counted["swiftkv_usage_records_total", "lost"] == 4
    assert counted["swiftkv_usage_unwritten_tokens"] == sum(12 + number for number in range(4, 8))


def test_sums_count_each_record_once_and_only_in_their_time(tmp_path):
    storage = Storage(tmp_path)
    first, second = [build_record(n) for n in range(4)], [build_record(n) for n in range(2, 6)]  # two of them twice
    storage.write(f"{name_folder(NOON)}/g-0.parquet", encode(first))
    storage.write(f"{name_folder(NOON)}/h-0.parquet", encode(second))
    late = replace(build_record(100), ended_at=NOON + 3 * HOUR)
    storage.write(f"{name_folder(NOON + 3 * HOUR)}/g-1.parquet", encode([late]))
    records = read_usage(storage, NOON, NOON + 2 * HOUR)
    assert sum_usage(records, ["tenant"]) == [
        {"tenant": "a", "requests": 3, "prompt_tokens": 36, "cached_tokens": 3, "completion_tokens": 6, "charges": {}},
        {"tenant": "b", "requests": 3, "prompt_tokens": 39, "cached_tokens": 3, "completion_tokens": 6, "charges": {}},
    ]
    assert [row["requests"] for row in sum_usage(records, ["day", "hour"])] == [6]
    assert [row["requests"] for row in sum_usage(records, [])] == [6]
    until = NOON + timedelta(minutes=2)  # is not in it any more
    assert [row["id"] for row in read_usage(storage, NOON, until).to_pylist()] == ["id-0", "id-1"]
    assert sum_usage(read_usage(storage, NOON - 9 * HOUR, NOON - 8 * HOUR), ["tenant"]) == []


@pytest.mark.parametrize("content", [b"something else", b"PAR1PAR1", "another table"])
def test_a_file_that_is_no_record_is_named(tmp_path, content):
    found = content if isinstance(content, bytes) else write_parquet(pa.table({"id": ["1"]}))
    Storage(tmp_path).write(f"{name_folder(NOON)}/x.parquet", found)
    with pytest.raises(RegistryError, match=r"x\.parquet holds no usage records"):
        read_usage(Storage(tmp_path), NOON, NOON + HOUR)


def test_charges_are_summed_exactly_and_by_currency(tmp_path):
    charges = [("0.1", "USD"), ("0.2", "USD"), ("7", "EUR"), (None, None), ("0.000000000003", "USD")]
    records = [
        build_record(number, tenant="a", charge=charge and Decimal(charge), currency=currency)
        for number, (charge, currency) in enumerate(charges)
    ]
    Storage(tmp_path).write(f"{name_folder(NOON)}/g-0.parquet", encode(records))
    (row,) = sum_usage(read_usage(Storage(tmp_path), NOON, NOON + HOUR), ["tenant"])
    assert (row["requests"], row["prompt_tokens"]) == (5, 60)
    assert row["charges"] == {"USD": Decimal("0.300000000003"), "EUR": Decimal(7)}
    asked = ["usage", "--store", str(tmp_path), "--from", "2026-11-03", "--to", "2026-11-04", "--by", "tenant"]
    (told,) = json.loads(CliRunner().invoke(app, [*asked, "--json"]).stdout)
    assert told["charges"] == {"USD": "0.300000000003", "EUR": "7.000000000000"}
    table = CliRunner().invoke(app, asked).stdout
    assert [word in table for word in ("USD", "EUR", "0.300000", "7.000000")] == [True] * 4


def test_folders_of_a_time_are_its_hours_and_one_after():
    assert sorted(list_hours(NOON + HOUR / 2, NOON + HOUR)) == ["2026-11-03/12", "2026-11-03/13"]
    with pytest.raises(ConfigError, match="is not before"):
        list_hours(NOON, NOON)


def test_the_command_sums_and_says_what_is_wrong(tmp_path):
    Storage(tmp_path).write(f"{name_folder(NOON)}/g-0.parquet", encode([build_record(n) for n in range(4)]))

    def run(*options):
        return CliRunner().invoke(app, ["usage", "--store", str(tmp_path), *options])

    asked = ("--from", "2026-11-03", "--to", "2026-11-04")
    rows = json.loads(run(*asked, "--by", "tenant,version", "--json").stdout)
    assert [(row["tenant"], row["version"], row["requests"]) for row in rows] == [
        ("a", "tiny@1", 2),
        ("b", "tiny@1", 2),
    ]
    table = run(*asked)
    assert table.exit_code == 0 and "completion" in table.stdout
    with pytest.raises(ConfigError, match="--by color: there is tenant"):
        raise run(*asked, "--by", "color").exception
    assert "2026-11-01" in run("--from", "yesterday").output
    assert "no record of that time" in run("--from", "2025-01-01", "--to", "2025-01-02").stdout


def test_a_gateway_s_requests_are_the_records(make_world, tmp_path):
    """The sum is what the clients were told; a request of nobody leaves none."""
    world = make_world(usage_store=str(tmp_path))
    gateway, application = world.start_gateway()

    async def ask():
        async with world.connect(None, application) as client:
            told = []
            for stream in (False, True, False):
                body = {"model": "tiny", "prompt": "a", "max_tokens": 3, "stream": stream}
                answer = await client.post("/v1/completions", json=body)
                told.append(answer.headers["x-request-id"])
            assert (await client.post("/v1/completions", json={"model": "absent"})).status_code == 404
            await client.get("/health")
            return told

    told = asyncio.run(ask())
    asyncio.run(gateway.close())
    records = read_all(tmp_path)
    assert [record["request_id"] for record in records if record["status"] == 200] == told
    assert [record["status"] for record in records] == [200, 200, 200, 404]
    assert sum(record["completion_tokens"] for record in records) == 9
    assert sum(record["prompt_tokens"] for record in records) == 21
    assert len({record["id"] for record in records}) == 4
    assert (records[1]["ttft_s"] is None, records[0]["ttft_s"] is None) == (False, True)


def test_admission_knows_what_a_gateway_has_not_written_until_it_ends_in_order(make_world, tmp_path):
    world = make_world(usage_store=str(tmp_path))
    take, told = world.admission.report, []

    async def report(given):
        told.append(given.unwritten_tokens)
        await take(given)

    async def run():
        gateway, application = world.start_gateway()
        async with world.connect(None, application) as client:
            await client.post("/v1/completions", json={"model": "tiny", "prompt": "a", "max_tokens": 3})
        await asyncio.sleep(0.1)  # less than a heartbeat
        before = list(told)
        await gateway.close()
        return before

    world.admission.report = report
    assert asyncio.run(run())[-1] == 10
    assert told[-1] == 0
    assert len(read_all(tmp_path)) == 1
