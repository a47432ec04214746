"""Content credentials (C2PA): a signed statement in the image file about how it was made.

They need the extra ``c2pa``, and a certificate and key of the user. No server is asked, so a
signature has no time stamp of an authority.
"""

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from typing import Any, Final

from PIL import Image

from krea_dagster.curation.export.file_metadata import BY_ALGORITHM
from krea_dagster.errors import ConfigError

#: Tried in this order: which one fits depends on the key.
_ALGORITHMS: Final = ("es256", "ps256", "es384", "ed25519", "es512", "ps384", "ps512")
_SETTINGS: Final = {"builder": {"thumbnail": {"enabled": False}}}


class ContentCredentials:
    """Signs images. Thread-safe.

    Args:
        certificate: A PEM file of the certificate and those that it was issued under.
        private_key: A PEM file of its key, without a password.

    Raises:
        ConfigError: The library is missing, or it cannot sign with these files.
    """

    def __init__(self, certificate: str, private_key: str) -> None:
        try:
            import c2pa  # noqa: PLC0415 - an extra
        except ImportError:
            raise ConfigError(
                "content credentials need the extra c2pa: pip install 'krea-dagster[c2pa]'"
            ) from None
        self._c2pa: Any = c2pa
        self._certificate, self._key = _read(certificate), _read(private_key)
        #: The same for the same certificate.
        self.certificate_sha256: Final = hashlib.sha256(self._certificate).hexdigest()
        self._algorithm = self._fitting_algorithm(certificate)

    def sign(self, data: bytes, image_format: str, *, made_by: str, source_type: str) -> bytes:
        """Return an image file with credentials that say what made the image.

        Raises ValueError for a file that cannot be signed.
        """
        try:
            return self._signed(self._algorithm, data, image_format, made_by, source_type)
        except self._c2pa.C2paError as error:
            raise ValueError(f"no content credentials: {error}") from None

    def _fitting_algorithm(self, certificate: str) -> str:
        file = io.BytesIO()
        Image.new("RGB", (8, 8)).save(file, "PNG")
        errors = []
        for algorithm in _ALGORITHMS:
            try:
                self._signed(algorithm, file.getvalue(), "PNG", "a test", BY_ALGORITHM)
            except self._c2pa.C2paError as error:
                errors.append(f"{algorithm}: {error}")
                continue
            return algorithm
        raise ConfigError(
            f"the certificate {certificate} and its key cannot sign content credentials. The key "
            "must be that of the first certificate, and the file must have the certificates that "
            f"it was issued under ({'; '.join(errors)})"
        )

    def _signed(
        self, algorithm: str, data: bytes, image_format: str, made_by: str, source_type: str
    ) -> bytes:
        c2pa, signed = self._c2pa, io.BytesIO()
        created = {
            "action": "c2pa.created",
            "softwareAgent": {"name": made_by},
            "digitalSourceType": source_type,
        }
        claim = {
            "claim_generator_info": [{"name": "krea-dagster"}],
            "assertions": [{"label": "c2pa.actions.v2", "data": {"actions": [created]}}],
        }
        info = c2pa.C2paSignerInfo(algorithm, self._certificate, self._key, None)
        with (
            c2pa.Context(settings=c2pa.Settings.from_dict(_SETTINGS)) as context,
            c2pa.Signer.from_info(info) as signer,
            c2pa.Builder(claim, context) as builder,
        ):
            builder.sign(signer, f"image/{image_format.lower()}", io.BytesIO(data), signed)
        return signed.getvalue()


def _read(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
