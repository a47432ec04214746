"""Content credentials of exported images, read back and verified with the certificate's root."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import c2pa
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from PIL import Image

from krea_dagster.curation.export.content_credentials import ContentCredentials
from krea_dagster.curation.export.export import export
from krea_dagster.curation.export.file_metadata import BY_ALGORITHM, BY_MODEL
from krea_dagster.curation.export.spec import ExportSpec, Form
from krea_dagster.errors import ConfigError
from tests.curation.export.export_project import ExportProject
from tests.curation.export.test_export import FORMS, images_in, index_of


@dataclass(frozen=True)
class Files:
    """A root that the test trusts, and a certificate that was issued under it."""

    root: str
    certificate: str
    private_key: str


def issued(folder: Path, key: Any) -> Files:
    root_key = ec.generate_private_key(ec.SECP256R1())
    root = certificate_of("root", root_key, root_key, is_root=True)
    leaf = certificate_of("leaf", key, root_key, is_root=False)
    chain, private = folder / "chain.pem", folder / "key.pem"
    pem = serialization.Encoding.PEM
    chain.write_bytes(leaf.public_bytes(pem) + root.public_bytes(pem))
    plain = serialization.NoEncryption()
    private.write_bytes(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain))
    return Files(root.public_bytes(pem).decode(), str(chain), str(private))


def certificate_of(name: str, key: Any, root_key: Any, *, is_root: bool) -> x509.Certificate:
    def named(text: str) -> x509.Name:
        organization = x509.NameAttribute(NameOID.ORGANIZATION_NAME, "A test")
        return x509.Name([organization, x509.NameAttribute(NameOID.COMMON_NAME, text)])

    usages = dict.fromkeys(
        ("content_commitment", "key_encipherment", "data_encipherment", "key_agreement"), False
    ) | {"encipher_only": False, "decipher_only": False, "digital_signature": not is_root}
    usage = x509.KeyUsage(key_cert_sign=is_root, crl_sign=is_root, **usages)
    now, public = datetime.now(timezone.utc), key.public_key()
    of_root = x509.AuthorityKeyIdentifier.from_issuer_public_key(root_key.public_key())
    builder = (
        x509.CertificateBuilder()
        .subject_name(named(name))
        .issuer_name(named("root"))
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=9))
        .add_extension(x509.BasicConstraints(ca=is_root, path_length=None), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
        .add_extension(of_root, critical=False)
        .add_extension(usage, critical=True)
    )
    if not is_root:
        purpose = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.EMAIL_PROTECTION])
        builder = builder.add_extension(purpose, critical=False)
    return builder.sign(root_key, hashes.SHA256())


def read_back(data: bytes, image_format: str, root: str) -> tuple[str, dict[str, Any]]:
    """Return whether the credentials are trusted, and what they say."""
    settings = c2pa.Settings.from_dict(
        {"trust": {"trust_anchors": root}, "verify": {"verify_trust": True}}
    )
    mime = f"image/{image_format.lower()}"
    with (
        c2pa.Context(settings=settings) as context,
        c2pa.Reader(mime, io.BytesIO(data), context=context) as reader,
    ):
        told = json.loads(reader.json())
        return str(reader.get_validation_state()), told["manifests"][told["active_manifest"]]


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return issued(tmp_path, ec.generate_private_key(ec.SECP256R1()))


@pytest.mark.parametrize("form", FORMS)
def test_every_exported_file_has_credentials_that_the_root_confirms(
    tmp_path: Path, files: Files, form: Form
) -> None:
    project = ExportProject(str(tmp_path / "krea"))
    project.write_accepted(project.rows(8))
    spec = ExportSpec(
        form=form, certificate=files.certificate, private_key=files.private_key, shard_images=4
    )
    exported = export(project.storage, spec, str(tmp_path / "out"))
    stored = {row["prompt_id"]: row for row in project.rows(8)}
    for prompt_id, (data, columns) in images_in(exported).items():
        row = stored[prompt_id]
        state, told = read_back(data, row["image_format"], files.root)
        assert state == "Trusted"
        (action,) = told["assertions"][0]["data"]["actions"]
        assert action["action"] == "c2pa.created"
        assert action["digitalSourceType"] == BY_MODEL
        assert action["softwareAgent"] == {"name": "krea-2-turbo"}
        assert "thumbnail" not in told
        assert columns["image_sha256"] == row["image_sha256"]
        with Image.open(io.BytesIO(data)) as there, Image.open(row["image_path"]) as here:
            assert there.tobytes() == here.tobytes()
        changed = data[:-40] + bytes([data[-40] ^ 1]) + data[-39:]
        assert read_back(changed, row["image_format"], files.root)[0] == "Invalid"

    # Signing again would give other bytes, so unchanged shards are not signed again.
    hashes_before = {row["key"]: row["exported_sha256"] for row in index_of(exported)}
    again = export(project.storage, spec, str(tmp_path / "out"))
    assert (again.found, again.written) == (2, 0)
    project.write_accepted(project.rows(9))
    later = export(project.storage, spec, str(tmp_path / "out"))
    assert (later.linked, later.written) == (2, 1)
    after = {row["key"]: row["exported_sha256"] for row in index_of(later)}
    assert {key: after[key] for key in hashes_before} == hashes_before


@pytest.mark.parametrize(
    "make",
    [
        lambda: rsa.generate_private_key(65537, 2048),
        lambda: ec.generate_private_key(ec.SECP384R1()),
        ed25519.Ed25519PrivateKey.generate,
    ],
    ids=["RSA", "P-384", "Ed25519"],
)
@pytest.mark.parametrize("image_format", ["WEBP", "AVIF"])
def test_keys_of_other_kinds_and_images_of_other_formats(
    tmp_path: Path, make: Callable[[], Any], image_format: str
) -> None:
    files = issued(tmp_path, make())
    file = io.BytesIO()
    Image.new("RGB", (16, 16), "green").save(file, image_format)
    signed = ContentCredentials(files.certificate, files.private_key).sign(
        file.getvalue(), image_format, made_by="an emulator", source_type=BY_ALGORITHM
    )
    assert read_back(signed, image_format, files.root)[0] == "Trusted"


def test_a_key_of_another_certificate_is_an_error_before_anything_is_exported(
    tmp_path: Path, files: Files
) -> None:
    (tmp_path / "other").mkdir()
    other = issued(tmp_path / "other", ec.generate_private_key(ec.SECP256R1()))
    with pytest.raises(ConfigError, match="cannot sign content credentials") as caught:
        ContentCredentials(files.certificate, other.private_key)
    assert "PRIVATE KEY" not in str(caught.value)
    with pytest.raises(ConfigError, match="cannot be read"):
        ContentCredentials(files.certificate, "nowhere.pem")
    with pytest.raises(ConfigError, match="both a certificate and its private key"):
        ExportSpec(certificate=files.certificate)
