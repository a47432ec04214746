"""Redaction of URLs, sentences and known secrets."""

from __future__ import annotations

import base64
import json
import random
import re
import urllib.parse
from typing import Final

import pytest

from krea_dagster import redact
from krea_dagster.errors import ConfigError, PromptTableError, Unauthorized

#: What is given, and what may be shown of it. In each, "s3cr" begins a secret, and "s3user" a user.
URLS: Final = [
    # no URL, or none with a secret
    ("/data/krea", "/data/krea"),
    ("/data/a@b?c#d", "/data/a@b?c#d"),
    ("data/prompts.parquet", "data/prompts.parquet"),
    ("s3://bucket/krea", "s3://bucket/krea"),
    ("s3://b/run@5/x", "s3://b/run@5/x"),
    ("https://api.evolink.ai", "https://api.evolink.ai"),
    ("http://127.0.0.1:8080/v1", "http://127.0.0.1:8080/v1"),
    ("http://[::1]:8080/run@5/x", "http://[::1]:8080/run@5/x"),
    ("sqlite:////data/a@b/journal.db", "sqlite:////data/a@b/journal.db"),
    ("memory://", "memory://"),
    # as they should be written
    ("s3://s3user:s3cr@bucket/krea", "s3://bucket/krea"),
    ("https://s3user:s3cr%2Fet%40@host/x", "https://host/x"),
    ("https://s3cret@host/p#s3cret", "https://host/p"),
    ("https://host/p.parquet?X-Amz-Signature=s3cret&a=b", "https://host/p.parquet"),
    ("https://host/p?password=s3cret", "https://host/p"),
    ("HTTPS://s3user:s3cret@HOST/x", "HTTPS://HOST/x"),
    ("https://s3user:s3cret@[2001:db8::1]:443/x?s3cret", "https://[2001:db8::1]:443/x"),
    (
        "postgresql+psycopg://s3user:s3cr%40et@h:5432/db?password=s3cret&sslpassword=s3cret",
        "postgresql+psycopg://h:5432/db",
    ),
    # as they are written
    ("s3://s3user:s3cr/et@bucket/x", "s3://bucket/x"),
    ("https://s3user:s3cr?et@host/x", "https://host/x"),
    ("https://s3user:s3cr#et@host/x", "https://host/x"),
    ("https://s3user:s3cr@et@host/x", "https://host/x"),
    ("https://s3user:s3cr:et@[::1]/x", "https://[::1]/x"),
    ("sftp://s3user:s3cr@ss:s3cret@host:22/x", "sftp://host:22/x"),
    ("postgresql+psycopg://s3user:s3cr@ss:w@h/db?password=s3cret", "postgresql+psycopg://h/db"),
    ("postgresql://s3user:s3cret?secret#@host/db", "postgresql://host/db"),
    ("https:/s3user:s3cret@host/x", "https:/host/x"),
    # where it cannot be told what is a credential
    ("https://s3user:1/s3cret@host/x", "https://***"),
    ("https://s3user:s3cr@et/s3cret@host/x", "https://***"),
    ("https://s3user:s3cret@host/run@5/x", "https://***"),
    ("https://s3user:s3cr@host/x?sig=s3cr@et", "https://***"),
    ("https://s3user:s3cret", "https://***"),
    ("postgresql://host:s3cret/db", "postgresql://***"),
    ("postgresql://s3user:s3cret@host:54x/db", "postgresql://***"),
    # behind something else
    ("jdbc:postgresql://s3user:s3cret@host/db", "jdbc:postgresql://host/db"),
    (" https://s3user:s3cret@host/db", " https://host/db"),
    # chains
    ("simplecache::s3://s3user:s3cret@bucket/p", "simplecache::s3://bucket/p"),
    (
        "zip://a.parquet::https://s3user:s3cret@host/a.zip?s3cret",
        "zip://a.parquet::https://host/a.zip",
    ),
    ("zip://a?s3cret::https://s3user:s3/cret@host/a", "zip://a::https://host/a"),
    (
        "filecache::zip://a::ftp://s3user:s3cr::et@host/a",
        "filecache::zip://a::ftp://host/a",
    ),
]


@pytest.mark.parametrize(("given", "shown"), URLS)
def test_a_location_is_shown_without_credentials(given: str, shown: str) -> None:
    assert redact.location(given) == shown
    assert redact.location(shown) == shown


@pytest.mark.parametrize(
    "sentence",
    ["{}", "{} is gone", "look at {}, please", "({})", "'{}': not found", 'url="{}".', "a {}\nb"],
)
@pytest.mark.parametrize(("given", "shown"), [one for one in URLS if "://" in one[0]])
def test_a_url_in_a_sentence_is_shown_without_credentials(
    given: str, shown: str, sentence: str
) -> None:
    said = redact.text(sentence.format(given))
    assert said == sentence.format(shown)
    assert redact.text(said) == said


def test_of_several_urls_in_a_sentence_each_is_shown_without_its_credentials() -> None:
    said = "row-1: s3://k:s3cret@bucket/a is gone, https://h/b?sig=s3cret too; ok? {0}"
    assert redact.text(said) == "row-1: s3://bucket/a is gone, https://h/b too; ok? {0}"
    assert (
        redact.text("https://u:s3cr@h/x,https://v:s3cr@i/y?s=s3cr!") == "https://h/x,https://i/y!"
    )
    assert redact.text("at https://u:s3 cret@h/x now") == "at https://h/x now"


def test_secret_settings_are_hidden_outside_of_urls() -> None:
    said = redact.text("host=h password=s3cret sslpassword='s3 cret' client_secret = \"x\" db=d")
    assert said == "host=h password=*** sslpassword=*** client_secret = *** db=d"


def test_messages_of_libraries_do_not_show_parts_of_a_url() -> None:
    place = "ftp://s3user:s3cr%2Fet@host/x?token=abc123"
    said = redact.text(f"login s3cr/et failed for s3cr%2Fet with abc123 at {place}", place)
    assert said == "login *** failed for *** with *** at ftp://host/x"


def test_no_part_of_any_password_is_shown() -> None:
    drawn = random.Random(7)
    for _ in range(3000):
        password = "".join(drawn.choices("aZ09@:/?#%&=[].-_~!$'(),;*+\\", k=drawn.randint(3, 14)))
        url = f"{drawn.choice(['s3', 'https', 'postgresql+psycopg'])}://me:{password}@h.example/db"
        shown = redact.location(url)
        assert shown.endswith(("://h.example/db", "://***")), url
        said = redact.text(f"no: {url} is gone")
        assert re.fullmatch(r"no: \S+://(h\.example/db|\*\*\*) is gone", said), url


def test_every_error_of_the_package_is_without_credentials() -> None:
    url = "https://s3user:s3cret@host/x?sig=s3cret"
    for error in (
        ConfigError(f"{url} cannot be read"),
        PromptTableError(url, []),
        Unauthorized(f"look at {url}"),
    ):
        assert "s3" not in f"{error} {error!r} {error.args}"
        assert "https://host/x" in str(error)


def test_a_cause_with_a_credential_is_dropped() -> None:
    plain, telling = OSError("the disk is full"), OSError("https://s3user:s3cret@host/x")
    outer = ValueError("outer")
    outer.__cause__ = telling
    assert redact.safe_cause(plain) is plain
    assert redact.safe_cause(telling) is None
    assert redact.safe_cause(outer) is None
    assert redact.safe_cause(OSError("no s3cret"), "ftp://me:s3cret@h") is None


# -- a secret that is known ---------------------------------------------------------------------

KEY: Final = 'sk-Ab/cd+EF"0123_4567~xyz'


@pytest.mark.parametrize(
    "form",
    [
        KEY,
        KEY.upper(),
        KEY.lower(),
        urllib.parse.quote(KEY, safe=""),
        urllib.parse.quote(urllib.parse.quote(KEY, safe=""), safe=""),
        "".join(f"%{ord(one):02x}" for one in KEY),
        json.dumps(KEY)[1:-1],
        json.dumps(json.dumps(KEY)),
        "".join(f"\\u{ord(one):04x}" for one in KEY),
        KEY.replace('"', "&quot;").replace("&quot;", "&#34;"),
        KEY.encode().hex(),
        base64.b64encode(KEY.encode()).decode(),
        base64.b64encode(f"Bearer {KEY}".encode()).decode(),
        base64.urlsafe_b64encode(f"user:{KEY}".encode()).decode(),
        base64.b64encode(f"k:{KEY}!!".encode()).decode().lower(),
    ],
)
def test_a_known_secret_is_hidden_in_every_form(form: str) -> None:
    hidden = redact.SecretFilter(KEY)
    said = hidden.hide(f"invalid_key_{form}: no")
    assert said.startswith("invalid_key_") or "***" in said
    assert said.endswith(": no")
    assert form not in said
    assert len(said) < 30
    assert hidden.is_in(form)
    assert not hidden.is_in(said)
    assert KEY not in repr(hidden)


def test_a_short_key_is_hidden_where_it_stands_alone_and_refuses_nothing() -> None:
    hidden = redact.SecretFilter("emulator")
    assert hidden.hide("the key Emulator is wrong") == "the key *** is wrong"
    assert hidden.hide("emulators") == "emulators"
    assert not hidden.is_in("https://host/emulator/files/1")


def test_a_long_text_is_searched_quickly() -> None:
    hidden = redact.SecretFilter(KEY)
    for text in ("\\" * 100_000, "A" * 100_000, "%25" * 30_000, "&#0" * 30_000):
        assert hidden.hide(text) == text
