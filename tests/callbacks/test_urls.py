"""A callback address: made and read with the secret only, and public."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from krea_dagster.callbacks import CallbackUrls, url_trouble
from krea_dagster.callbacks.urls import PathReader
from krea_dagster.emulator.contract import is_public_https
from krea_dagster.errors import ConfigError

SECRET = "f3a1" * 16
OTHER = "9b07" * 16
KEY = "ab12" * 16
BASE = "https://hooks.example.com"

keys = st.from_regex(r"[A-Za-z0-9_-]{1,64}", fullmatch=True)


def path_of(url: str, base_url: str = BASE) -> str:
    return url.removeprefix(base_url)


def callback_url(base_url: str, secret: str, key: str) -> str:
    return CallbackUrls(base_url, secret).url(key)


def request_key_of(path: str, secret: str) -> str | None:
    return PathReader(secret).request_key(path)


# -- tokens -----------------------------------------------------------------------------------


@given(keys)
def test_an_address_is_read_with_its_secret_only(key: str) -> None:
    path = path_of(callback_url(BASE, SECRET, key))
    assert request_key_of(path, SECRET) == key
    assert request_key_of(path, OTHER) is None


def test_the_address_of_a_request_is_always_the_same() -> None:
    assert callback_url(BASE, SECRET, KEY) == callback_url(BASE + "/", SECRET, KEY)


def test_deployment_and_proof_have_128_bits_each_and_do_not_contain_the_secret() -> None:
    url = callback_url(BASE, SECRET, KEY)
    deployment, last = path_of(url).strip("/").split("/")
    key, proof = last.split(".")
    assert key == KEY
    assert [len(bytes.fromhex(part)) for part in (deployment, proof)] == [16, 16]
    assert deployment != proof
    assert "f3a1f3a1" not in url


def test_the_proof_of_one_request_is_not_that_of_another() -> None:
    urls = CallbackUrls(BASE, SECRET)
    mine, other = path_of(urls.url(KEY)), path_of(urls.url("other"))
    stolen = f"{mine.partition('.')[0]}.{other.partition('.')[2]}"
    assert request_key_of(stolen, SECRET) is None


@given(st.data())
def test_an_address_with_a_changed_character_is_not_accepted(data: st.DataObject) -> None:
    path = path_of(callback_url(BASE, SECRET, KEY))
    at = data.draw(st.integers(1, len(path) - 1))
    character = data.draw(st.sampled_from("0123456789abcdefXYZ/.-_%\x00é"))
    changed = f"{path[:at]}{character}{path[at + 1 :]}"
    if changed != path:
        assert request_key_of(changed, SECRET) is None


@given(st.text())
def test_any_other_text_is_not_an_address(text: str) -> None:
    assert request_key_of(text, SECRET) is None
    assert request_key_of(path_of(callback_url(BASE, SECRET, KEY)) + text, SECRET) in (None, KEY)


def test_a_proxy_may_keep_a_prefix_or_remove_it() -> None:
    base = "https://example.com/krea/hooks"
    path = callback_url(base, SECRET, KEY).removeprefix("https://example.com")
    assert path.startswith("/krea/hooks/")
    for seen in (path, path.removeprefix("/krea"), path.removeprefix("/krea/hooks")):
        assert request_key_of(seen, SECRET) == KEY


@pytest.mark.parametrize("key", ["", "a/b", "a.b", "ä", "a" * 65, "a\n"])
def test_an_impossible_request_key_has_no_address(key: str) -> None:
    with pytest.raises(ValueError, match="request key"):
        callback_url(BASE, SECRET, key)


# -- wrong settings ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("base_url", "why"),
    [
        ("", "not an https:// URL"),
        ("hooks.example.com", "not an https:// URL"),
        ("http://hooks.example.com", "not an https:// URL"),
        ("https://", "not an https:// URL"),
        ("https://example.com:port", "not an https:// URL"),
        ("https://example.com:99999", "not an https:// URL"),
        ("https://[::1", "not an https:// URL"),
        ("https://example.com:0", "port 0"),
        ("https://me:word@example.com", "user name or a password"),
        ("https://example.com/?a=1", "query or a fragment"),
        ("https://example.com/#a", "query or a fragment"),
        ("https://exämple.com", "xn--"),
        ("https://example.com/a b", "characters"),
        ("https://example.com/\n", "characters"),
        ("https://localhost", "private address"),
        ("https://localhost:8443", "private address"),
        ("https://receiver", "private address"),
        ("https://receiver.internal", "private address"),
        ("https://printer.local.", "private address"),
        ("https://127.0.0.1", "private address"),
        ("https://10.1.2.3", "private address"),
        ("https://192.168.1.1", "private address"),
        ("https://169.254.169.254", "private address"),
        ("https://100.64.0.1", "private address"),
        ("https://224.0.0.1", "private address"),
        ("https://[::1]", "private address"),
        ("https://[fd00::1]", "private address"),
        ("https://[::ffff:10.0.0.1]", "private address"),
        ("https://2130706433", "private address"),
        ("https://0x7f.1", "private address"),
        ("https://127.1", "private address"),
    ],
)
def test_a_base_url_that_evolink_would_refuse_or_not_reach_is_refused(
    base_url: str, why: str
) -> None:
    with pytest.raises(ConfigError, match=why) as said:
        CallbackUrls(base_url, SECRET)
    assert "callback_base_url" in str(said.value)
    assert "Nothing was bought" in str(said.value)
    assert "word" not in str(said.value).replace("password", "")


@pytest.mark.parametrize(
    "base_url",
    [
        "https://hooks.example.com",
        "https://example.com:8443/krea/",
        "HTTPS://Example.COM",
        "https://xn--exmple-cua.com",
        "https://8.8.8.8",
        "https://[2606:4700::1111]:8443",
    ],
)
def test_a_public_base_url_and_its_addresses_are_accepted(base_url: str) -> None:
    assert is_public_https(callback_url(base_url, SECRET, KEY))


def test_the_address_of_a_custom_receiver_may_have_a_query() -> None:
    assert url_trouble("https://example.com/hook?token=1#part") is None
    assert url_trouble("https://example.com/" + "a" * 2029) == (
        "has 2049 characters; EvoLink accepts 2048"
    )
    assert url_trouble("https://localhost/hook", private_allowed=True) is None
    assert "private address" in str(url_trouble("https://localhost/hook"))


def test_a_private_host_is_accepted_if_the_api_is_an_emulator_on_this_machine() -> None:
    urls = CallbackUrls("https://localhost:8443", SECRET, private_allowed=True)
    assert urls.url(KEY).startswith("https://localhost:8443/")
    with pytest.raises(ConfigError):
        CallbackUrls("http://localhost:8443", SECRET, private_allowed=True)


def test_an_address_has_at_most_2048_characters_for_any_request() -> None:
    longest = BASE + "/" + "a" * (2048 - len(BASE) - 1 - 1 - 32 - 1 - 64 - 1 - 32)
    assert len(callback_url(longest, SECRET, "k" * 64)) == 2048
    with pytest.raises(ConfigError, match="2048"):
        callback_url(longest + "a", SECRET, "k")


@pytest.mark.parametrize("secret", ["", "short", "a" * 31, " " * 40, "a" * 40 + "\n", "a\x00" * 20])
def test_a_weak_secret_is_refused_and_not_shown(secret: str) -> None:
    for use in (lambda: CallbackUrls(BASE, secret), lambda: request_key_of("/", secret)):
        with pytest.raises(ConfigError, match="KREA_CALLBACK_SECRET") as said:
            use()
        assert len(secret) < 5 or secret not in str(said.value)


def test_neither_secret_nor_address_is_in_a_repr() -> None:
    urls = CallbackUrls(BASE, SECRET)
    assert repr(urls) == "CallbackUrls(***)"
