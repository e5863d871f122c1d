"""The tenants' file: finding a tenant by its key, reading the file again, and refusing a wrong one."""

import os

import pytest
import yaml

from swiftkv.cli.key import key as show_new_key
from swiftkv.errors import ConfigError
from swiftkv.serving.gateway import tenants as tenants_module
from swiftkv.serving.gateway.keys import create_key, hash_key
from swiftkv.serving.gateway.refusals import Refusal
from swiftkv.serving.gateway.tenants import ANONYMOUS, TenantDirectory


@pytest.fixture
def write(tmp_path):
    path = tmp_path / "tenants.yaml"

    def write(*tenants, text=None):
        path.write_text(text if text is not None else yaml.safe_dump({"tenants": list(tenants)}))
        return path

    return write


@pytest.fixture(autouse=True)
def _always_look(monkeypatch):
    monkeypatch.setattr(tenants_module, "CHECK_INTERVAL_S", 0.0)


def find(directory, key):
    return directory.find(f"Bearer {key}").name


def test_each_key_finds_its_tenant_and_no_other_does(write):
    (key_1, hash_1), (key_2, hash_2), (key_3, hash_3) = (create_key() for _ in range(3))
    directory = TenantDirectory(
        str(write({"name": "acme", "key_sha256": [hash_1, hash_2]}, {"name": "globex", "key_sha256": [hash_3]}))
    )
    assert [find(directory, key) for key in (key_1, key_2, key_3)] == ["acme", "acme", "globex"]
    for wrong in (
        None,
        "",
        "Bearer",
        "Bearer ",
        f"Basic {key_1}",
        "Bearer swk_x",
        f"Bearer {hash_1}",
        f"Bearer {key_1}x",
    ):
        with pytest.raises(Refusal) as caught:
            directory.find(wrong)
        assert caught.value.status == 401
        assert caught.value.headers == {"WWW-Authenticate": "Bearer"}


def test_key_has_256_random_bits_and_is_not_in_its_hash(capsys):
    keys = {create_key()[0] for _ in range(100)}
    assert len(keys) == 100
    assert all(key.startswith("swk_") and len(key) == 4 + 43 for key in keys)
    show_new_key()
    shown = capsys.readouterr().out
    key = next(word for word in shown.split() if word.startswith("swk_"))
    assert hash_key(key) in shown


def test_without_a_file_everyone_is_anonymous():
    assert TenantDirectory(None).find(None) is ANONYMOUS
    assert TenantDirectory(None).find("Bearer whatever") is ANONYMOUS


def test_changed_file_is_read_again_and_a_broken_one_changes_nothing(write, caplog):
    (old, old_hash), (new, new_hash) = create_key(), create_key()
    path = write({"name": "acme", "key_sha256": [old_hash]})
    directory = TenantDirectory(str(path))
    write({"name": "acme", "key_sha256": [new_hash]})
    assert find(directory, new) == "acme"
    with pytest.raises(Refusal):
        find(directory, old)
    for broken in ("tenants: [", "tenants: 5", "tenants: [{name: x, key: y}]", ""):
        write(text=broken)
        assert find(directory, new) == "acme"
    os.unlink(path)
    assert find(directory, new) == "acme"
    assert caplog.text.count("the tenants stay as they were") == 5
    write({"name": "renamed", "key_sha256": [new_hash]})
    assert find(directory, new) == "renamed"


def test_file_is_looked_at_once_a_second(write, monkeypatch):
    monkeypatch.setattr(tenants_module, "CHECK_INTERVAL_S", 3600.0)
    (old, old_hash), (_, new_hash) = create_key(), create_key()
    directory = TenantDirectory(str(write({"name": "acme", "key_sha256": [old_hash]})))
    assert find(directory, old) == "acme"
    write({"name": "acme", "key_sha256": [new_hash]})
    assert find(directory, old) == "acme"


@pytest.mark.parametrize(
    ("tenants", "said"),
    [
        ([{"name": "a", "key_sha256": ["0" * 64]}, {"name": "b", "key_sha256": ["0" * 64]}], "the same key"),
        ([{"name": "a"}, {"name": "a"}], "named twice: a"),
        ([{"name": "a b"}], "name"),
        ([{"name": "a", "weight": 0}], "weight"),
        ([{"name": "a", "priority": "high"}], "'interactive', 'standard' or 'batch'"),
        ([{"name": "a", "requests_per_minute": 0}], "requests_per_minute"),
    ],
)
def test_wrong_file_is_refused_at_the_start(write, tenants, said):
    with pytest.raises(ConfigError, match=said):
        TenantDirectory(str(write(*tenants)))


def test_missing_file_is_refused_at_the_start(tmp_path):
    with pytest.raises(ConfigError, match="no such file"):
        TenantDirectory(str(tmp_path / "absent.yaml"))
