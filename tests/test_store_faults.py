"""Errors of the stores' clients, as s3fs, adlfs and gcsfs raise them, and what they mean."""

from __future__ import annotations

from typing import Any

import pytest

from krea_dagster.store_faults import StoreFault, fault_of, is_of_client, one_line


def named(name: str, *bases: type[Exception], module: str = "botocore.exceptions") -> Any:
    """Make an error class as a client has it, which need not be installed."""
    return type(name, bases or (Exception,), {"__module__": module})


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


def client_error(code: str) -> Exception:
    error: Exception = named("ClientError")(f"An error occurred ({code})")
    error.response = {"Error": {"Code": code}}  # type: ignore[attr-defined]
    return error


@pytest.mark.parametrize(
    ("error", "fault"),
    [
        (
            caused(FileNotFoundError("krea/images"), client_error("NoSuchBucket")),
            StoreFault.NO_BUCKET,
        ),
        (FileNotFoundError("The specified bucket does not exist"), StoreFault.NO_BUCKET),
        (FileNotFoundError(2, "No such container", "krea"), StoreFault.NO_BUCKET),
        (caused(PermissionError("Forbidden"), client_error("403")), StoreFault.REFUSED),
        (caused(OSError("the token"), client_error("ExpiredToken")), StoreFault.REFUSED),
        (client_error("SignatureDoesNotMatch"), StoreFault.REFUSED),
        (named("NoCredentialsError")("Unable to locate credentials"), StoreFault.REFUSED),
        (named("ClientAuthenticationError", module="azure.core.exceptions")(), StoreFault.REFUSED),
        (caused(OSError("moved"), client_error("PermanentRedirect")), StoreFault.WRONG_PLACE),
        (named("EndpointConnectionError")("Could not connect"), StoreFault.UNREACHABLE),
        (named("ClientConnectorError", OSError, module="aiohttp")(), StoreFault.UNREACHABLE),
        (caused(OSError("busy"), client_error("SlowDown")), StoreFault.TROUBLED),
        (TimeoutError(), StoreFault.TROUBLED),
    ],
)
def test_each_error_of_a_store_has_a_meaning(error: Exception, fault: StoreFault) -> None:
    assert fault_of(error) is fault


@pytest.mark.parametrize(
    "error",
    [
        caused(FileNotFoundError("krea/images/00/1.png"), client_error("404")),
        caused(FileNotFoundError("krea/images/00/1.png"), client_error("NoSuchKey")),
        IsADirectoryError("krea/images"),
        NotImplementedError(),
    ],
)
def test_an_error_about_one_file_is_not_a_fault_of_the_store(error: Exception) -> None:
    assert fault_of(error) is None


def test_an_error_is_known_to_come_from_a_client_by_its_causes() -> None:
    assert is_of_client(caused(PermissionError("Forbidden"), client_error("403")))
    assert not is_of_client(PermissionError("/data/krea"))


def test_an_error_is_told_in_one_line() -> None:
    assert one_line(TimeoutError()) == "TimeoutError"
    assert one_line(ValueError("one\n  two")) == "one two"
