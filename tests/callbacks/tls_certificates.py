"""A certificate for localhost, and its authority, which the emulator trusts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import trustme


@dataclass(frozen=True)
class TlsCertificates:
    """Files in PEM."""

    ca: Path
    cert: Path
    key: Path

    @classmethod
    def make(cls, folder: Path) -> TlsCertificates:
        """Create an authority and a certificate."""
        authority = trustme.CA()
        made = cls(*(folder / name for name in ("ca.pem", "cert.pem", "key.pem")))
        authority.cert_pem.write_to_path(made.ca)
        issued = authority.issue_cert("localhost")
        issued.cert_chain_pems[0].write_to_path(made.cert)
        issued.private_key_pem.write_to_path(made.key)
        return made

    @property
    def options(self) -> tuple[str, ...]:
        """The options of ``callbacks serve``."""
        return ("--tls-cert", str(self.cert), "--tls-key", str(self.key))
