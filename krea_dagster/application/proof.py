"""The proof that journal, files, manifests and account agree."""

from __future__ import annotations

from collections.abc import Callable

from krea_dagster.application.backend import Backend
from krea_dagster.errors import ConfigError
from krea_dagster.spend.proof.findings import Proof, ProofFigures
from krea_dagster.spend.proof.verify import verify


def prove(
    backend: Backend,
    *,
    hash_bytes: int | None = None,
    on_progress: Callable[[ProofFigures], None] = lambda _: None,
) -> Proof:
    """Prove that journal, files, manifests and account agree; see ``spend.proof.verify``.

    ``hash_bytes`` bounds how many bytes of images are hashed again; None hashes all. Raises
    ConfigError if there is no journal, and JournalError if it cannot be read.
    """
    storage = backend.open_storage()
    if not backend.has_journal():
        raise ConfigError(f"{storage.shown('')} has no journal yet: there is nothing to verify")
    backend.check_root()
    with backend.open_journal() as journal:
        return verify(journal, storage, hash_bytes=hash_bytes, on_progress=on_progress)
