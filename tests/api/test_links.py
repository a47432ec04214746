"""Which result links may be followed, and to which addresses."""

from __future__ import annotations

import ipaddress

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from krea_dagster.api.links import (
    IPV4_KINDS,
    IPV4_WITHIN,
    IPV6_KINDS,
    LINK_MAX_CHARS,
    AddressKind,
    address_kind,
    check_addresses,
    check_link,
    check_redirect,
    is_local_name,
)
from krea_dagster.errors import LinkRefused

PUBLIC, LOCAL = AddressKind.PUBLIC, AddressKind.LOCAL
BENCHMARKING, NEVER = AddressKind.BENCHMARKING, AddressKind.NEVER


@pytest.mark.parametrize(
    ("address", "kind"),
    [
        ("8.8.8.8", PUBLIC),
        ("172.32.0.1", PUBLIC),
        ("100.128.0.1", PUBLIC),
        ("2606:4700::1111", PUBLIC),
        ("127.0.0.1", LOCAL),
        ("127.9.9.9", LOCAL),
        ("10.1.2.3", LOCAL),
        ("172.16.0.1", LOCAL),
        ("172.31.255.255", LOCAL),
        ("192.168.1.1", LOCAL),
        ("100.64.0.1", LOCAL),
        ("::1", LOCAL),
        ("fd12::1", LOCAL),
        ("198.18.0.7", BENCHMARKING),
        ("169.254.169.254", NEVER),
        ("100.100.100.200", NEVER),
        ("168.63.129.16", NEVER),
        ("fd00:ec2::254", NEVER),
        ("0.0.0.0", NEVER),  # noqa: S104 - an address to refuse, not to listen on
        ("0.1.2.3", NEVER),
        ("224.0.0.1", NEVER),
        ("255.255.255.255", NEVER),
        ("192.0.2.1", NEVER),
        ("::", NEVER),
        ("fe80::1", NEVER),
        ("fe80::1%eth0", NEVER),
        ("ff02::1", NEVER),
        ("2001:db8::1", NEVER),
        ("64:ff9b:1::1", NEVER),
        ("::7f00:1", NEVER),
        ("::ffff:8.8.8.8", PUBLIC),
        ("::ffff:127.0.0.1", LOCAL),
        ("::ffff:169.254.169.254", NEVER),
        ("64:ff9b::808:808", PUBLIC),
        ("64:ff9b::a00:1", LOCAL),
        ("64:ff9b::a9fe:a9fe", NEVER),
        ("2002:808:808::1", PUBLIC),
        ("2002:7f00:1::1", LOCAL),
        ("2002:a9fe:a9fe::", NEVER),
        ("files.evolink.ai", NEVER),
        ("", NEVER),
    ],
)
def test_each_address_has_a_kind(address: str, kind: AddressKind) -> None:
    assert address_kind(address) is kind


def test_each_documented_range_is_of_the_kind_of_its_row() -> None:
    """No row is hidden by an earlier one; the ends of a range have the same kind as its middle."""
    for kind, networks in (*IPV4_KINDS, *IPV6_KINDS):
        for network in networks:
            assert address_kind(str(network[-1])) is kind
            assert address_kind(str(network[0])) is kind


@given(st.ip_addresses())
def test_what_python_calls_private_is_never_called_public(
    address: ipaddress.IPv4Address | ipaddress.IPv6Address,
) -> None:
    carries_ipv4 = any(address in network for network, _ in IPV4_WITHIN)
    if not carries_ipv4 and address_kind(str(address)) is PUBLIC:
        assert address.is_global


@pytest.mark.parametrize(
    ("addresses", "base", "allowed"),
    [
        (["8.8.8.8"], [], True),
        (["8.8.8.8", "10.0.0.1"], [], False),
        (["8.8.8.8", "10.0.0.1"], [LOCAL], True),
        (["127.0.0.1"], [PUBLIC], False),
        (["127.0.0.1"], [LOCAL], True),
        (["169.254.169.254"], [LOCAL], False),
        (["169.254.169.254"], [NEVER], False),
        (["198.18.0.1"], [BENCHMARKING], True),
        (["198.18.0.1"], [LOCAL], False),
        (["127.0.0.1"], [BENCHMARKING], False),
    ],
)
def test_a_nonpublic_address_is_allowed_only_if_the_base_url_has_its_kind(
    addresses: list[str], base: list[AddressKind], allowed: bool
) -> None:
    if allowed:
        check_addresses("h", addresses, base)
    else:
        with pytest.raises(LinkRefused):
            check_addresses("h", addresses, base)


@pytest.mark.parametrize(
    "link",
    [
        "",
        "x",
        "/a.png",
        "file:///etc/passwd",
        "data:image/png;base64,AAAA",
        "ftp://example.com/a.png",
        "javascript:alert(1)",
        "//example.com/a.png",
        "https:///a.png",
        "https://",
        "https://user@example.com/a.png",
        "https://user:pass@example.com/a.png",
        "https://example.com:0/a.png",
        "https://example.com:99999/a.png",
        "https://[::1/a.png",
        "https://exa\x00mple.com/",
        "https://example.com/\r\nX: y",
        "https://example.com/" + "x" * LINK_MAX_CHARS,
    ],
)
def test_a_link_that_is_not_a_plain_web_link_is_refused(link: str) -> None:
    with pytest.raises(LinkRefused):
        check_link(link, http_allowed=True)


def test_a_refusal_does_not_show_a_links_signature() -> None:
    with pytest.raises(LinkRefused) as caught:
        check_link("ftp://example.com/a.png?sig=secret", http_allowed=False)
    assert "example.com/a.png" in str(caught.value)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("link", "http_allowed", "fetched"),
    [
        ("https://h.com/a.png?s=1#f", False, "https://h.com/a.png?s=1"),
        ("https://h.com:8443/a.png", False, "https://h.com:8443/a.png"),
        ("http://h.com/a.png", False, "https://h.com/a.png"),
        ("http://h.com:80/a.png", False, "https://h.com/a.png"),
        ("http://h.com:8080/a.png", False, "https://h.com:8080/a.png"),
        ("http://h.com/a.png", True, "http://h.com/a.png"),
        ("https://h.com/a%2Fb.png?x=%2B", True, "https://h.com/a%2Fb.png?x=%2B"),
    ],
)
def test_an_http_link_is_tried_as_https_unless_the_api_itself_is_http(
    link: str, http_allowed: bool, fetched: str
) -> None:
    assert str(check_link(link, http_allowed=http_allowed)) == fetched


@pytest.mark.parametrize(
    ("start", "location", "target"),
    [
        ("https://h.com/a", "/b", "https://h.com/b"),
        ("https://h.com/a", "https://i.com/b?c", "https://i.com/b?c"),
        ("https://h.com/a", "//i.com/b", "https://i.com/b"),
        ("http://h.com/a", "https://i.com/b", "https://i.com/b"),
        ("http://h.com/a", "http://i.com/b", "http://i.com/b"),
    ],
)
def test_a_redirect_follows_the_same_rules(start: str, location: str, target: str) -> None:
    assert str(check_redirect(httpx.URL(start), location, http_allowed=True)) == target


@pytest.mark.parametrize(
    "location",
    [
        "http://h.com/a",
        "file:///etc/passwd",
        "data:text/html,x",
        "https://u:p@h.com/",
        "https://[",
        "/" + "x" * LINK_MAX_CHARS,
    ],
)
def test_a_redirect_to_something_else_or_down_to_http_is_refused(location: str) -> None:
    with pytest.raises(LinkRefused):
        check_redirect(httpx.URL("https://h.com/a"), location, http_allowed=True)


@given(st.text(), st.booleans())
def test_any_text_is_a_web_url_or_refused(text: str, http_allowed: bool) -> None:
    for prefix in ("", "https://", "http://h/"):
        try:
            url = check_link(prefix + text, http_allowed=http_allowed)
        except LinkRefused as error:
            str(error).encode()
        else:
            assert url.scheme == "https" or (http_allowed and url.scheme == "http")


@pytest.mark.parametrize(
    ("host", "local"),
    [
        ("localhost", True),
        ("LOCALHOST.", True),
        ("api.localhost", True),
        ("emulator", True),
        ("host.docker.internal", True),
        ("api.evolink.ai", False),
        ("134744072", False),
        ("0x8080808", False),
        ("localhost.example.com", False),
    ],
)
def test_a_local_name_is_one_that_public_dns_does_not_resolve(host: str, local: bool) -> None:
    assert is_local_name(host) is local
