"""Manifest, provenance and names, without a store."""

import hashlib
import json
from datetime import UTC, datetime
from pathlib import Path

import jsonschema
import pytest
from pydantic import ValidationError

import swiftkv.registry.manifest
from swiftkv.errors import IntegrityError
from swiftkv.registry.layout import natural_order
from swiftkv.registry.manifest import Base, FileEntry, Manifest, Provenance, describe_recipe, parse_manifest

FILES = (
    FileEntry(path="a.json", size_bytes=1, sha256="0" * 64, parts=("0" * 64,)),
    FileEntry(path="b/c.txt", size_bytes=12, sha256="1" * 64, parts=("3" * 64, "4" * 64)),
)


def build_manifest(files=FILES, **more):
    values = {
        "name": "tiny",
        "version": "1",
        "published_at": datetime(2026, 1, 2, tzinfo=UTC),
        "publisher": "me@here",
        "code_version": "0",
        "part_bytes": 8,
        "files": files,
        "spec": {"hidden_size": 8},
    }
    return Manifest(**values | more)


def test_manifest_comes_back_as_it_went():
    manifest = build_manifest(teacher={"name": "t"}, recipe=describe_recipe({"steps": 2}), evaluation={"kl": 0.5})
    assert parse_manifest(manifest.to_json(), "tiny", "1") == manifest


def test_figures_that_json_lacks_stay_visible():
    manifest = build_manifest(training={"loss": float("nan"), "worst": float("inf")})
    assert json.loads(manifest.to_json())["training"] == {"loss": "NaN", "worst": "Infinity"}


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b"\xff\xfe", b'{"format": "1"}'])
def test_damaged_manifest_is_an_integrity_error(content):
    with pytest.raises(IntegrityError, match=r"manifest\.json of tiny@1"):
        parse_manifest(content, "tiny", "1")


@pytest.mark.parametrize(
    "path", ["/a", "../a", "a/../b", "a//b", "a/", "", ".", ".git/x", "a\\b", "a#1", "a\nb", "C:a"]
)
def test_unsafe_file_paths_are_refused(path):
    with pytest.raises(ValidationError):
        FileEntry(path=path, size_bytes=0, sha256="0" * 64, parts=())


def test_digest_changes_with_any_file_and_with_nothing_else():
    digest = build_manifest().digest
    assert build_manifest(publisher="you@there", version="2").digest == digest
    for change in ({"path": "z.json"}, {"size_bytes": 3}, {"sha256": "2" * 64}, {"parts": ("2" * 64,)}):
        assert build_manifest(files=(FILES[0].model_copy(update=change), FILES[1])).digest != digest


def test_the_committed_schema_is_the_manifests():
    path = Path(swiftkv.registry.manifest.__file__).with_name("manifest.schema.json")
    schema = json.loads(path.read_text())
    assert schema == Manifest.model_json_schema(), f"write it again: python -m swiftkv.registry.manifest > {path.name}"
    values = json.loads(build_manifest(base=Base(name="a/b", revision="c", stored=True)).to_json())
    jsonschema.validate(values, schema)
    for wrong in ({"files": []}, {"format": 1}, {"surprise": 1}, {"spec": None}, {"part_bytes": 0}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(values | wrong, schema)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"parts": ("3" * 64,)}, "1 parts, where its size needs 2"),
        ({"base_path": "model.safetensors"}, "a file of the base, where no base is named"),
    ],
)
def test_files_that_cannot_be_put_together_are_refused(change, message):
    with pytest.raises(ValidationError, match=message):
        build_manifest(files=(FILES[0], FILES[1].model_copy(update=change)))


def test_recipe_hash_ignores_the_order_of_keys():
    recipe = describe_recipe({"b": 1, "a": {"d": 2, "c": 3}})
    assert recipe.sha256 == hashlib.sha256(b'{"a":{"c":3,"d":2},"b":1}').hexdigest()
    assert recipe.sha256 == describe_recipe({"a": {"c": 3, "d": 2}, "b": 1}).sha256


def test_provenance_refuses_keys_it_would_lose():
    with pytest.raises(ValidationError):
        Provenance(evaluations={})


def test_versions_sort_as_people_count():
    assert sorted(["v10", "2", "v2", "10", "1.10", "1.9"], key=natural_order) == ["v2", "v10", "1.9", "1.10", "2", "10"]
