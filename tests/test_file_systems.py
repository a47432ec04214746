"""URLs are opened without cached listings, with options that may name variables."""

from __future__ import annotations

import uuid
from typing import Any, ClassVar

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from krea_dagster.errors import ConfigError, StorageRefused, StorageUnavailable
from krea_dagster.file_systems import (
    endpoint_of,
    error_of_client,
    kind_of,
    open_url,
    parse_options,
    resolved,
    same_kind,
    store_error,
)


class Noting(MemoryFileSystem):  # type: ignore[misc]  # fsspec has no types
    """A file system that notes how it was opened."""

    protocol = "noting"
    store: ClassVar[dict[str, Any]] = {}

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(super()._strip_protocol(path.replace("noting://", "memory://")))


@pytest.fixture(autouse=True)
def _registered() -> None:
    fsspec.register_implementation("noting", Noting, clobber=True)


def test_no_file_system_caches_listings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_SECRET", "s3cr3t")
    options = {"secret": {"env": "A_SECRET"}, "client_kwargs": {"endpoint_url": "http://here"}}
    fs, path = open_url(f"noting://{uuid.uuid4().hex}/krea", options)
    assert path.endswith("/krea")
    assert fs.storage_options == {
        "use_listings_cache": False,
        "secret": "s3cr3t",
        "client_kwargs": {"endpoint_url": "http://here"},
    }


def test_a_value_at_any_depth_may_name_a_variable() -> None:
    options = {"key": "AKIA", "client_kwargs": {"secret": {"env": "S"}, "more": [{"env": "T"}, 3]}}
    environ = {"S": "one", "T": "two"}
    assert resolved(options, environ) == {
        "key": "AKIA",
        "client_kwargs": {"secret": "one", "more": ["two", 3]},
    }


def test_one_variable_may_hold_all_options_as_json() -> None:
    environ = {"OPTIONS": '{"key": {"env": "KEY"}, "anon": false}', "KEY": "AKIA"}
    assert resolved({"env": "OPTIONS"}, environ) == {"key": "AKIA", "anon": False}


def test_a_variable_that_is_not_set_is_named() -> None:
    with pytest.raises(ConfigError, match="the variable S_KEY, which the storage options name"):
        resolved({"key": {"env": "S_KEY"}}, {})


@pytest.mark.parametrize("text", ["s3cr3t", "[1]", '"s3cr3t"', "{"])
def test_options_that_are_no_json_object_are_refused_without_showing_them(text: str) -> None:
    with pytest.raises(ConfigError, match="KREA_STORAGE_OPTIONS is not a JSON object") as refused:
        parse_options(text, "KREA_STORAGE_OPTIONS")
    assert "s3cr3t" not in str(refused.value)


def test_urls_of_one_client_are_of_one_kind() -> None:
    assert same_kind("s3://a/b", "s3a://c")
    assert same_kind("gs://a", "gcs://b")
    assert same_kind("az://a", "abfs://b")
    assert same_kind("simplecache::s3://a", "s3://b")
    assert not same_kind("s3://a", "/data/krea")
    assert kind_of("/data/krea") == "file"


def test_the_endpoint_is_that_of_the_options_or_of_the_clients_variable() -> None:
    client = {"client_kwargs": {"endpoint_url": "http://one:9000"}}
    assert endpoint_of("s3://krea", client, {"AWS_ENDPOINT_URL": "http://two"}) == "http://one:9000"
    assert endpoint_of("s3://krea", {}, {"AWS_ENDPOINT_URL": "http://two"}) == "http://two"
    assert endpoint_of("s3://krea", {}, {}) == ""
    text = "AccountName=a;AccountKey=s3cr3t;BlobEndpoint=http://127.0.0.1:10000/a;"
    assert endpoint_of("az://krea", {"connection_string": text}, {}) == "http://127.0.0.1:10000/a"


def test_a_refusal_names_the_bucket_the_endpoint_and_what_to_check() -> None:
    options = {"key": "AKIA-1234", "secret": "s3cr3t-word", "endpoint_url": "http://here:9000"}
    error = PermissionError("the secret s3cr3t-word of AKIA-1234 is wrong\nand more")
    said = store_error(error, "s3://krea/one", options, called="the storage root", doing="write")
    assert isinstance(said, StorageRefused)
    assert str(said) == (
        "the storage root s3://krea/one at http://here:9000: access is refused (tried to write): "
        "the secret *** of *** is wrong and more. Check the credentials (AWS_ACCESS_KEY_ID and "
        "AWS_SECRET_ACCESS_KEY, or KREA_STORAGE_OPTIONS): whether they are right, valid now, and "
        "permit this."
    )


def test_a_store_that_does_not_answer_may_be_tried_later() -> None:
    said = store_error(TimeoutError("60 s"), "s3://krea", {}, called="the storage root")
    assert isinstance(said, StorageUnavailable)


def test_an_error_of_this_package_is_none_of_a_store() -> None:
    assert error_of_client(ValueError("a bug")) is None
