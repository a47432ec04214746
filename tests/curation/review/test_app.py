"""The review's application over real HTTP: access control, rows, images and verdicts."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any
from uuid import uuid4

import anyio
import httpx
import pytest
from PIL import Image

from krea_dagster.curation.review.app import Review, ReviewSettings
from krea_dagster.curation.review.images import name_in
from krea_dagster.engine.journal.journal import Journal
from krea_dagster.engine.journal.verdict_log import Verdict
from krea_dagster.engine.storage.storage import Storage
from krea_dagster.manifest import read_manifests, write_manifest
from tests.curation.review.review_harness import TOKEN, ReviewProject, Server, make_project, sha256

ROWS = 240


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> ReviewProject:
    return make_project(tmp_path_factory.mktemp("server") / "krea", rows=ROWS, subjects=1)


@pytest.fixture(scope="module")
def server(project: ReviewProject) -> Iterator[Server]:
    running = Server(project, "--reason", "Too dark", "--reason", "Too bright")
    yield running
    assert running.stop()[0] == 0


@pytest.fixture
def page(server: Server) -> Iterator[httpx.Client]:
    """An HTTP client that sends what the page sends."""
    origin = f"http://127.0.0.1:{server.port}"
    with httpx.Client(base_url=server.url, headers={"Origin": origin}) as client:
        yield client


def given(number: int = 0, **further: Any) -> dict[str, Any]:
    """Return a verdict as the page posts it."""
    return {
        "verdict_id": uuid4().hex,
        "image_sha256": sha256(number),
        "verdict": "keep",
        "reason": None,
        "reviewer": "ada",
        "request_key": f"key-{number}",
        "prompt_id": "prompt-000000",
        "sample": 0,
        "attempt": 0,
        "partition_key": "bucket-000",
        **further,
    }


def history(project: ReviewProject) -> list[Verdict]:
    with closing(Journal(project.journal_url)) as journal:
        return journal.verdicts.history()


# -- who may speak to it ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "path", ["/", "/api/start", f"/{TOKEN[:-1]}/", f"/{TOKEN}x/api/start", f"/{TOKEN}", "//", "/ä/"]
)
def test_a_request_with_another_token_gets_404(server: Server, path: str) -> None:
    answer = httpx.get(f"http://127.0.0.1:{server.port}{path}")
    assert answer.status_code == 404
    assert "krea-dagster review" in answer.text
    assert TOKEN not in answer.text


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "127.0.0.1", ""])
def test_a_foreign_host_header_is_refused(server: Server, host: str) -> None:
    answer = httpx.get(server.url, headers={"Host": host})
    assert answer.status_code in (400, 421)


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://127.0.0.1:1"},
        {},
        {"Sec-Fetch-Site": "cross-site"},
    ],
)
def test_no_other_origin_gives_a_verdict(
    server: Server, project: ReviewProject, headers: dict[str, str]
) -> None:
    before = len(history(project))
    if "Sec-Fetch-Site" in headers:
        headers = headers | {"Origin": f"http://127.0.0.1:{server.port}"}
    answer = httpx.post(f"{server.url}api/verdicts", json={"verdicts": [given()]}, headers=headers)
    assert answer.status_code == 403
    assert len(history(project)) == before


@pytest.mark.parametrize("path", ["api/start", f"small/{'0' * 64}", "page/main.js"])
def test_a_page_of_another_site_cannot_read_anything(server: Server, path: str) -> None:
    answer = httpx.get(server.url + path, headers={"Sec-Fetch-Site": "cross-site"})
    assert answer.status_code == 403
    opened = httpx.get(server.url, headers={"Sec-Fetch-Site": "cross-site"})
    assert opened.status_code == 200, "the link itself may be opened from anywhere"


def test_every_answer_has_the_strict_policy_and_no_cookie(page: httpx.Client) -> None:
    for path in ("", "page/review.css", "api/start", "no/such/page"):
        answer = page.get(path)
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'; script-src 'self';" in policy
        assert "unsafe" not in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "no-referrer"
        assert answer.headers["cross-origin-resource-policy"] == "same-origin"
        assert "cache-control" in answer.headers
        assert "set-cookie" not in answer.headers
        assert "access-control-allow-origin" not in answer.headers


def test_the_page_loads_only_its_own_files(page: httpx.Client) -> None:
    text = page.get("").text
    assert not re.search(r"https?://", text)
    assert not re.search(r"\son\w+=|style=|<style|<script(?! type=\"module\" src=)", text)
    for name in re.findall(r'(?:src|href)="([^"]+)"', text):
        assert page.get(name).status_code == 200, name
        body = page.get(name).text.replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"https?://", body), name
        assert "innerHTML" not in body
    for wrong in ("page/../app.py", "page/%2e%2e%2fapp.py", "page/app.py", "app.py"):
        assert page.get(wrong).status_code == 404


# -- verdicts ---------------------------------------------------------------------------------


def test_a_verdict_is_in_the_journal_when_the_answer_comes(
    page: httpx.Client, project: ReviewProject
) -> None:
    number = page.get("api/start").json()["number"]
    entry = given(5, verdict="reject", reason="Too dark")
    answer = page.post("api/verdicts", json={"verdicts": [entry, given(6)]})
    assert answer.status_code == 200
    first, second = history(project)[-2:]
    assert (first.verdict_id, first.reason, first.reviewer) == (
        entry["verdict_id"], "Too dark", "ada",
    )  # fmt: skip
    assert [one["number"] for one in answer.json()["verdicts"]] == [first.number, second.number]
    again = page.post("api/verdicts", json={"verdicts": [entry]})
    assert again.json()["verdicts"][0]["number"] == first.number
    assert len([one for one in history(project) if one.verdict_id == entry["verdict_id"]]) == 1
    said = page.get("api/since", params={"number": number}).json()
    assert [one["verdict"] for one in said["verdicts"]] == ["reject", "keep"]
    assert said["number"] == second.number


def test_an_invalid_verdict_is_named_and_does_not_block_the_others(
    page: httpx.Client, project: ReviewProject
) -> None:
    wrong = [
        given(verdict="maybe"),
        given(image_sha256="../../etc/passwd"),
        given(sample="0"),
        given(attempt=True),
        given(reviewer=" "),
        given(reason=["x"]),
        given(note=7),
        given(tag="not a list"),
        given(tag=["a,b"]),
        given(verdict=None, tag=[f"tag {at}" for at in range(51)]),
        {"verdict_id": "nothing else"},
    ]
    good = given(7)
    answer = page.post("api/verdicts", json={"verdicts": [*wrong, good]}).json()
    assert [one["verdict_id"] for one in answer["verdicts"]] == [good["verdict_id"]]
    assert [one["verdict_id"] for one in answer["refused"]] == [one["verdict_id"] for one in wrong]
    assert all(one["why"] for one in answer["refused"])
    assert history(project)[-1].verdict_id == good["verdict_id"]


def test_a_page_of_another_journal_s_review_is_refused_and_keeps_its_verdicts(
    page: httpx.Client, project: ReviewProject
) -> None:
    """As after a start for another root with the same port and token."""
    own, before = page.get("api/start").json()["journal"], len(history(project))
    entry = given(9)
    for journal, status in (("another", 409), (own, 200)):
        answer = page.post("api/verdicts", json={"journal": journal, "verdicts": [entry]})
        heard = page.get("api/since", params={"number": 0, "journal": journal})
        assert (answer.status_code, heard.status_code) == (status, status)
    assert len(history(project)) == before + 1


def test_a_file_that_was_replaced_is_not_shown_under_the_old_hash(tmp_path: Path) -> None:
    project = make_project(tmp_path / "krea", rows=16, subjects=1, measured=False)
    server = Server(project)
    for path in (project.folder / "images").rglob("*.png"):
        path.write_bytes(path.read_bytes() + b"more")
    for kind in ("small", "full"):
        answer = httpx.get(f"{server.url}{kind}/{sha256(0)}")
        assert (answer.status_code, answer.json()["error"]) == (
            415, "the file has changed since it was verified",
        )  # fmt: skip
    server.stop()


@pytest.mark.parametrize(
    ("content", "kind", "status"),
    [
        (b"{", "application/json", 400),
        (b"[1]", "application/json", 400),
        (b'{"verdicts": 7}', "application/json", 400),
        (b"[" * 100_000, "application/json", 400),
        (b" " * 2_000_000, "application/json", 413),
        (b"verdicts=1", "application/x-www-form-urlencoded", 415),
        (b'{"verdicts": []}', "text/plain", 415),
    ],
)
def test_an_invalid_post_is_refused(
    page: httpx.Client, content: bytes, kind: str, status: int
) -> None:
    answer = page.post("api/verdicts", content=content, headers={"Content-Type": kind})
    assert answer.status_code == status


# -- tags and notes ---------------------------------------------------------------------------


def names_of(page: httpx.Client, **selection: Any) -> dict[str, Any]:
    """Open a list, and return its name with its length as ``count``."""
    text = json.dumps(selection)
    answer = page.get("api/view", params={"selection": text})
    assert answer.status_code == 200, answer.text
    view: dict[str, Any] = answer.json()
    return {"selection": text, **view}


def test_a_tag_is_no_verdict_and_leaves_the_verdict_to_its_reviewer(
    page: httpx.Client, project: ReviewProject
) -> None:
    number = page.get("api/start").json()["number"]
    tag = given(20, verdict=None, tag=["night"], note="left hand", reviewer="grace")
    posted = [given(20, verdict="reject", reason="Too dark"), tag]
    answer = page.post("api/verdicts", json={"verdicts": posted}).json()
    said = answer["verdicts"][1]
    assert (said["verdict"], said["reviewer"], said["tags"]) == ("reject", "ada", ["night"])
    assert said["verdict_id"] == tag["verdict_id"], "the page waits for its own id"
    heard = page.get("api/since", params={"number": number}).json()["verdicts"]
    assert [one["note"] for one in heard] == [None, "left hand"]
    assert (history(project)[-1].annotates, history(project)[-1].reviewer) == (True, "grace")


def test_rows_are_filtered_and_sorted_by_tags_notes_and_reviewer(page: httpx.Client) -> None:
    posted = [
        given(24, verdict=None, tag=["dusk", "boat"], note="see the eyes"),
        given(25, verdict="keep", tag=["dusk"], reviewer="margaret"),
        given(26, verdict="reject", reason="a reason of its own"),
    ]
    page.post("api/verdicts", json={"verdicts": posted})
    for condition, count in (
        (["tags", "has", "dusk"], 2),
        (["tags", "has", "boat"], 1),
        (["tags", "has not", "dusk"], ROWS - 2),
        (["note", "contains", "EYES"], 1),
        (["reviewer", "is", "margaret"], 1),
        (["reason", "is", "a reason of its own"], 1),
    ):
        assert names_of(page, where=[condition])["count"] == count, condition
    columns = {one["name"]: one for one in page.get("api/columns").json()["columns"]}
    assert ["dusk", 2] in columns["tags"]["values"]
    by_time = names_of(page, where=[["reviewer", "is not empty"]], sort="reviewed_at", down=True)
    rows = page.get("api/rows", params={**by_time, "offset": 0, "limit": 1}).json()["rows"]
    assert rows[0]["image_sha256"] in (sha256(25), sha256(26))


def test_a_list_by_tags_does_not_move_when_a_tag_changes(page: httpx.Client) -> None:
    page.post("api/verdicts", json={"verdicts": [given(30, verdict=None, tag=["steady"])]})
    name = names_of(page, where=[["tags", "has", "steady"]])
    page.post("api/verdicts", json={"verdicts": [given(30, verdict=None, untag=["steady"])]})
    (row,) = page.get("api/rows", params={**name, "offset": 0, "limit": 9}).json()["rows"]
    assert row["image_sha256"] == sha256(30)
    assert row["verdict"]["tags"] == [], "but shows what is true now"
    assert names_of(page, where=[["tags", "has", "steady"]])["count"] == 0


# -- many images at once ----------------------------------------------------------------------


def test_many_images_are_judged_in_one_commit_and_undone_in_one(
    page: httpx.Client, project: ReviewProject
) -> None:
    name = names_of(page, where=[["status", "is", "stored"], ["campaign", "is", "campaign 6"]])
    rows = page.get("api/rows", params={**name, "offset": 0, "limit": 500}).json()["rows"]
    first = rows[0]["image_sha256"]
    before = given() | {"image_sha256": first, "verdict": "flag", "tag": ["own"]}
    page.post("api/verdicts", json={"verdicts": [before]})
    length = len(history(project))
    batch = {
        **name, "batch_id": uuid4().hex, "reviewer": "ada", "verdict": "reject", "reason": "Dull",
        "tag": ["dull"], "ranges": [[0, 2], [5, 5], [2, 3]],
    }  # fmt: skip
    for _ in range(2):  # as if the first answer was lost
        answer = page.post("api/batch", json=batch)
        assert answer.status_code == 200, answer.text
        assert answer.json()["images"] == 5
    written = history(project)[length:]
    assert {one.image_sha256 for one in written} == {
        rows[at]["image_sha256"] for at in (0, 1, 2, 3, 5)
    }
    assert {(one.verdict, one.reason, one.at) for one in written} == {
        ("reject", "Dull", written[0].at)
    }
    later = given() | {"image_sha256": rows[5]["image_sha256"], "reviewer": "grace"}
    page.post("api/verdicts", json={"verdicts": [later]})
    undo = {"batch_id": uuid4().hex, "undo": batch["batch_id"], "reviewer": "ada"}
    answer = page.post("api/batch", json=undo).json()
    assert (answer["images"], answer["since"]) == (4, 1)
    found = {
        one["image_sha256"]: one["verdict"]
        for one in page.get("api/rows", params={**name, "offset": 0, "limit": 9}).json()["rows"]
    }
    assert (found[first]["verdict"], found[first]["tags"]) == ("flag", ["own"])
    assert (found[rows[1]["image_sha256"]]["verdict"]) == "none"
    assert (found[rows[5]["image_sha256"]]["reviewer"]) == "grace", "a later verdict stays"


def test_a_batch_of_tags_leaves_the_verdicts(page: httpx.Client, project: ReviewProject) -> None:
    name = names_of(page, where=[["campaign", "is", "campaign 3"], ["status", "is", "stored"]])
    batch = {**name, "batch_id": uuid4().hex, "reviewer": "ada", "ranges": [[0, name["count"] - 1]]}
    page.post("api/batch", json={**batch, "verdict": None, "tag": ["set a"]})
    tagged = names_of(page, where=[["tags", "has", "set a"]])
    assert tagged["count"] == name["count"]
    assert all(one.annotates for one in history(project)[-name["count"] :])
    undo = {"batch_id": uuid4().hex, "undo": batch["batch_id"], "reviewer": "ada"}
    assert page.post("api/batch", json=undo).json()["images"] == name["count"]
    assert names_of(page, where=[["tags", "has", "set a"]])["count"] == 0


@pytest.mark.parametrize(
    ("wrong", "status"),
    [
        ({"generation": "another"}, 409),
        ({"journal": "another"}, 409),
        ({"batch_id": "x"}, 400),
        ({"ranges": 7}, 400),
        ({"ranges": [[0]]}, 400),
        ({"ranges": [[-1, 2]]}, 400),
        ({"number": None}, 400),
        ({"verdict": "maybe"}, 400),
        ({"reviewer": " "}, 400),
        ({"tag": ["a;b"]}, 400),
        ({"undo": "all"}, 400),
    ],
)
def test_an_invalid_batch_is_refused_as_a_whole(
    page: httpx.Client, project: ReviewProject, wrong: dict[str, Any], status: int
) -> None:
    before = len(history(project))
    name = names_of(page)
    batch = {
        **name,
        "batch_id": uuid4().hex,
        "reviewer": "ada",
        "verdict": "keep",
        "ranges": [[0, 3]],
    }
    answer = page.post("api/batch", json={**batch, **wrong})
    assert (answer.status_code, bool(answer.json()["error"])) == (status, True)
    assert len(history(project)) == before


def test_of_many_new_verdicts_a_page_is_told_to_read_its_rows_again(tmp_path: Path) -> None:
    project = make_project(tmp_path / "krea", rows=2400, subjects=1, measured=False)
    server = Server(project)
    headers = {"Origin": f"http://127.0.0.1:{server.port}"}
    with httpx.Client(base_url=server.url, headers=headers, timeout=120) as page:
        name = names_of(page)
        batch = {**name, "batch_id": uuid4().hex, "reviewer": "ada", "verdict": "keep"}
        page.post("api/batch", json={**batch, "ranges": [[0, 2399]]})
        said = page.get("api/since", params={"number": 0}).json()
        assert (said["many"], said["verdicts"]) == (True, [])
        assert said["number"] == len(history(project)) == 2400 - 2400 // 211
    server.stop()


def test_progress_counts_each_partition(page: httpx.Client) -> None:
    before = page.get("api/progress").json()["partitions"][0]["flag"]
    page.post("api/verdicts", json={"verdicts": [given(1, verdict="flag")]})
    sums = page.get("api/progress").json()["partitions"]
    assert [one["partition_key"] for one in sums] == [f"bucket-{at:03d}" for at in range(8)]
    assert sum(one["images"] for one in sums) == ROWS - 1
    assert sums[0]["flag"] == before + 1


# -- rows and images --------------------------------------------------------------------------


def test_rows_are_paged_and_a_list_keeps_its_verdicts(page: httpx.Client) -> None:
    selection = '{"verdicts": ["none"], "where": [["status", "is", "stored"]]}'
    view = page.get("api/view", params={"selection": selection}).json()
    name = {"selection": selection, "number": view["number"], "generation": view["generation"]}

    def rows() -> list[str]:
        found: list[str] = []
        for offset in range(0, view["count"], 100):
            part = {**name, "offset": offset, "limit": 100}
            answer = page.get("api/rows", params=part).json()
            found += [one["image_sha256"] for one in answer["rows"]]
        return found

    before = rows()
    assert len(before) == len(set(before)) == view["count"]
    chosen = int(page.get("api/next", params={**name, "after": -1}).json()["place"])
    assert chosen == 0
    entry = given() | {"image_sha256": before[0]}
    page.post("api/verdicts", json={"verdicts": [entry]})
    assert rows() == before, "a list does not move under the hand"
    assert page.get("api/next", params={**name, "after": -1}).json()["place"] == 1
    last = view["count"] - 1
    assert page.get("api/next", params={**name, "after": last}).json()["place"] == 1
    assert (
        page.get("api/view", params={"selection": selection}).json()["count"] == view["count"] - 1
    )
    row = page.get("api/rows", params={**name, "offset": 0, "limit": 1}).json()["rows"][0]
    assert row["verdict"]["verdict"] == "keep"
    whole = page.get("api/row", params={**name, "row": row["row"]}).json()
    assert whole["row"]["prompt"].startswith(row["prompt"])
    assert [one["verdict"] for one in whole["history"]] == ["keep"]


@pytest.mark.parametrize(
    ("path", "parameters", "status"),
    [
        ("api/view", {"selection": '{"sort": "nothing"}'}, 400),
        ("api/rows", {"generation": "another"}, 409),
        ("api/row", {"row": "99999"}, 404),
        ("api/row", {"row": "1; drop table verdicts"}, 400),
        ("api/siblings", {"row": "-1"}, 404),
    ],
)
def test_an_invalid_request_gets_the_reason(
    page: httpx.Client, path: str, parameters: dict[str, str], status: int
) -> None:
    generation = page.get("api/start").json()["generation"]
    answer = page.get(path, params={"generation": generation, **parameters})
    assert answer.status_code == status
    assert answer.json()["error"]


def test_images_are_addressed_by_hash_and_cached_forever(
    page: httpx.Client, project: ReviewProject
) -> None:
    small = page.get(f"small/{sha256(2)}")
    assert small.headers["content-type"] == "image/jpeg"
    assert "immutable" in small.headers["cache-control"]
    assert 320 <= max(Image.open(io.BytesIO(small.content)).size) <= 384
    full = page.get(f"full/{sha256(2)}")
    assert full.headers["content-type"] == "image/png"
    assert "immutable" in full.headers["cache-control"]
    assert full.content == (project.folder / "images/00/000-2.png").read_bytes()
    for wrong in (
        "0" * 64, "..%2f..%2fjournal.db", "../../journal.db", "journal.db", sha256(210),
    ):  # fmt: skip
        for kind in ("small", "full"):
            assert page.get(f"{kind}/{wrong}").status_code == 404


def test_a_file_outside_the_root_is_not_served(tmp_path: Path) -> None:
    """A manifest may have been changed."""
    storage = Storage(str(tmp_path / "krea"))
    inside = storage.locate("images/aa/b.png")
    assert name_in(storage, inside) == "images/aa/b.png"
    assert name_in(storage, "/before/it/was/moved/images/aa/b.png") == "images/aa/b.png"
    for wrong in (
        "/etc/passwd",
        storage.locate("journal.db"),
        storage.locate("images/../journal.db"),
        "/images/../../etc/passwd",
        "",
    ):
        assert name_in(storage, wrong) is None, wrong


def test_new_rows_are_seen_while_the_page_is_open(tmp_path: Path) -> None:
    project = make_project(tmp_path / "krea", rows=16, subjects=1, measured=False)
    storage = Storage(str(project.folder))
    with closing(Journal(project.journal_url)) as journal:
        review = Review(ReviewSettings(storage, journal, "ada", "krea"))
        before = review.generation
        table = read_manifests(storage, ["bucket-000"])
        (project.folder / "manifest" / "bucket-001.parquet").write_bytes(b"not whole yet")

        async def wait() -> None:
            with anyio.fail_after(60):
                async with anyio.create_task_group() as group:
                    group.start_soon(review.keep_up, 0.01)
                    await anyio.sleep(0.05)
                    assert review.generation == before, "what cannot be read changes nothing"
                    write_manifest(storage, "bucket-001", table)
                    while review.generation == before:  # noqa: ASYNC110 - as a page asks
                        await anyio.sleep(0.01)
                    group.cancel_scope.cancel()

        anyio.run(wait)
        assert len(review) == 16


def test_without_a_journal_a_verdict_is_refused_with_503(tmp_path: Path) -> None:
    project = make_project(tmp_path / "krea", rows=16, subjects=1, measured=False)
    server = Server(project)
    (project.folder / "journal.db").unlink()
    headers = {"Origin": f"http://127.0.0.1:{server.port}"}
    answer = httpx.post(f"{server.url}api/verdicts", json={"verdicts": [given()]}, headers=headers)
    assert answer.status_code == 503
    assert "The file is missing" in answer.json()["error"]
    server.stop()
