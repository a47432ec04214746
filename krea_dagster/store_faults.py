"""What an error of an object store means, told by its type, its code and its text. Pure.

The clients of the stores raise errors of their own, and translate some of them differently from one
call to the next. Their packages need not be installed, so that types are known by name.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Iterator
from typing import Any, Final


class StoreFault(enum.Enum):
    """What is wrong. The value is the sentence about it."""

    NO_BUCKET = "its bucket or container does not exist"
    REFUSED = "access is refused"
    WRONG_PLACE = "its name, its region or the way it is addressed is wrong"
    UNREACHABLE = "the endpoint cannot be reached"
    #: It answers with an error that may pass: it is busy, or has failed.
    TROUBLED = "it does not answer as it should"


#: Codes and statuses in the answers of S3, Azure and Google.
_CODES: Final = {
    **dict.fromkeys(
        ("NoSuchBucket", "ContainerNotFound", "FilesystemNotFound"), StoreFault.NO_BUCKET
    ),
    **dict.fromkeys(
        (
            *("AccessDenied", "AllAccessDisabled", "AccountProblem", "NotSignedUp"),
            *("InvalidAccessKeyId", "SignatureDoesNotMatch", "RequestTimeTooSkewed"),
            *("ExpiredToken", "InvalidToken", "TokenRefreshRequired", "InvalidSecurity"),
            *("AuthenticationFailed", "AuthorizationFailure", "AuthorizationPermissionMismatch"),
            *("InvalidAuthenticationInfo", "AccountIsDisabled", "InsufficientAccountPermissions"),
            *("NoAuthenticationInformation", "401", "403"),
        ),
        StoreFault.REFUSED,
    ),
    **dict.fromkeys(
        (
            *("PermanentRedirect", "TemporaryRedirect", "Redirect", "301", "307"),
            *("AuthorizationHeaderMalformed", "IllegalLocationConstraintException"),
            *("InvalidBucketName", "InvalidAddressingHeader"),
        ),
        StoreFault.WRONG_PLACE,
    ),
}

#: Names of error types.
_TYPES: Final = {
    **dict.fromkeys(
        (
            *("NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError"),
            *("TokenRetrievalError", "SSOTokenLoadError", "UnauthorizedSSOTokenError"),
            *("ProfileNotFound", "ClientAuthenticationError", "CredentialUnavailableError"),
            *("DefaultCredentialsError", "RefreshError", "PermissionError"),
        ),
        StoreFault.REFUSED,
    ),
    **dict.fromkeys(
        (
            *("EndpointConnectionError", "ConnectTimeoutError", "ConnectionRefusedError"),
            *("ClientConnectorError", "ClientConnectorDNSError", "ServiceRequestError"),
            *("ProxyConnectionError", "SSLError", "gaierror"),
        ),
        StoreFault.UNREACHABLE,
    ),
    **dict.fromkeys(
        ("NoRegionError", "InvalidRegionError", "ParamValidationError"), StoreFault.WRONG_PLACE
    ),
}

_NO_BUCKET: Final = re.compile(
    r"bucket (?:you tried to access )?does not exist|bucket not found|no such (?:bucket|container)"
    r"|container does not exist",
    re.IGNORECASE,
)

#: Most errors of a chain that are looked at.
_MOST: Final = 20


def fault_of(error: BaseException) -> StoreFault | None:
    """Return what an error of a store's client means; None if it is about a single file."""
    chain = list(_chain(error))
    for one in chain:
        for code in _codes(one):
            if (fault := _CODES.get(code)) is not None:
                return fault
    for one in chain:
        for kind in type(one).__mro__:
            if (fault := _TYPES.get(kind.__name__)) is not None:
                return fault
    if any(_NO_BUCKET.search(str(one)) for one in chain):
        return StoreFault.NO_BUCKET
    is_about_file = isinstance(
        error,
        (
            FileNotFoundError,
            FileExistsError,
            NotADirectoryError,
            IsADirectoryError,
            NotImplementedError,
        ),
    )
    return None if is_about_file else StoreFault.TROUBLED


def is_of_client(error: BaseException) -> bool:
    """Return whether an error, or a cause of it, comes from the client of an object store."""
    return any(
        kind.__module__.partition(".")[0] in _CLIENTS
        for one in _chain(error)
        for kind in type(one).__mro__
    )


_CLIENTS: Final = frozenset(
    {"botocore", "aiobotocore", "azure", "google", "gcsfs", "s3fs", "adlfs", "aiohttp", "fsspec"}
)


def one_line(error: BaseException) -> str:
    """Return the beginning of an error's text as one line, or its type if it has no text."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def _chain(error: BaseException) -> Iterator[BaseException]:
    found: BaseException | None = error
    for _ in range(_MOST):
        if found is None:
            return
        yield found
        found = found.__cause__ or found.__context__


def _codes(error: BaseException) -> Iterator[str]:
    response = getattr(error, "response", None)
    if isinstance(response, dict):  # botocore's
        about: Any = response.get("Error")
        yield str(about.get("Code", "")) if isinstance(about, dict) else ""
    for name in ("error_code", "code", "status_code", "status"):
        code = getattr(error, name, None)
        yield str(getattr(code, "value", code))
