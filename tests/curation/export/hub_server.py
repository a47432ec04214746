"""A server that speaks the Hub's API as far as a push needs: repositories, LFS files, commits."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from krea_dagster.uvicorn_server import QuietServer, listen

TOKEN = "hf_a_token_of_the_tests"
#: Files that the Hub keeps outside Git.
_LARGE = (".parquet", ".tar", ".png", ".jpg", ".webp")


@dataclass
class Repository:
    visibility: str
    files: dict[str, bytes] = field(default_factory=lambda: {".gitattributes": b"*.png lfs"})
    commits: list[str] = field(default_factory=lambda: ["initial commit"])

    @property
    def head(self) -> str:
        """The hash of the last commit."""
        return hashlib.sha1("\n".join(self.commits).encode(), usedforsecurity=False).hexdigest()


@dataclass
class Hub:
    """The state of the server; ``uploads`` counts the large files that were sent to it."""

    repositories: dict[str, Repository] = field(default_factory=dict)
    large: dict[str, bytes] = field(default_factory=dict)
    uploads: int = 0
    fails: bool = False
    url: str = ""

    @contextmanager
    def served(self) -> Iterator[Hub]:
        """Serve until the end of the block."""
        socket = listen("127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{socket.getsockname()[1]}"
        ready = threading.Event()
        server = QuietServer(self._app(), ready.set)
        thread = threading.Thread(target=server.run, args=([socket],))
        thread.start()
        try:
            assert ready.wait(20)
            yield self
        finally:
            server.should_exit = True
            thread.join(20)

    def _app(self) -> Starlette:
        here = "/api/datasets/{owner}/{name}"
        routes = [
            ("POST", "/api/repos/create", self.create),
            ("POST", "/api/validate-yaml", self.validate),
            ("GET", here, self.info),
            ("GET", here + "/revision/{revision}", self.info),
            ("GET", here + "/tree/{revision}", self.tree),
            ("POST", here + "/preupload/{revision}", self.preupload),
            ("POST", here + "/commit/{revision}", self.commit),
            ("POST", "/datasets/{owner}/{name}.git/info/lfs/objects/batch", self.batch),
            ("PUT", "/large/{oid}", self.upload),
        ]
        return Starlette(routes=[Route(path, call, methods=[how]) for how, path, call in routes])

    def _allows(self, request: Request) -> bool:
        return request.headers.get("authorization") == f"Bearer {TOKEN}"

    def _of(self, request: Request) -> Repository:
        return self.repositories["{owner}/{name}".format(**request.path_params)]

    async def create(self, request: Request) -> Response:
        if not self._allows(request):
            return JSONResponse({"error": "Invalid username or password."}, 401)
        wanted = await request.json()
        name = f"{wanted['organization']}/{wanted['name']}"
        assert wanted["type"] == "dataset"
        known = name in self.repositories
        if not known:
            self.repositories[name] = Repository(wanted["visibility"])
        url = {"url": f"{self.url}/datasets/{name}"}
        return JSONResponse(url, 409 if known else 200)

    async def validate(self, request: Request) -> Response:
        assert (await request.json())["content"].startswith("---\n")
        return JSONResponse({"errors": [], "warnings": []})

    async def info(self, request: Request) -> Response:
        name = "{owner}/{name}".format(**request.path_params)
        return JSONResponse({"id": name, "sha": self._of(request).head, "siblings": []})

    async def tree(self, request: Request) -> Response:
        files = self._of(request).files
        return JSONResponse(
            [
                {"type": "file", "path": path, "size": len(data), "oid": git_hash(data)}
                for path, data in files.items()
            ]
        )

    async def preupload(self, request: Request) -> Response:
        files = self._of(request).files
        found = []
        for one in (await request.json())["files"]:
            path = one["path"]
            large = path.endswith(_LARGE)
            known = files.get(path)
            of_file = None if known is None else large_hash(known) if large else git_hash(known)
            mode = "lfs" if large else "regular"
            found.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": of_file})
        return JSONResponse({"files": found})

    async def batch(self, request: Request) -> Response:
        objects = []
        for one in (await request.json())["objects"]:
            upload = {"upload": {"href": f"{self.url}/large/{one['oid']}"}}
            objects.append(one if one["oid"] in self.large else {**one, "actions": upload})
        return JSONResponse({"transfer": "basic", "objects": objects})

    async def upload(self, request: Request) -> Response:
        data = await request.body()
        assert large_hash(data) == request.path_params["oid"]
        self.large[request.path_params["oid"]] = data
        self.uploads += 1
        return Response()

    async def commit(self, request: Request) -> Response:
        if self.fails:
            return JSONResponse({"error": f"no commit with {TOKEN}"}, 400)
        repository = self._of(request)
        lines: list[dict[str, Any]] = [
            json.loads(line) for line in (await request.body()).splitlines()
        ]
        for line in lines:
            value = line["value"]
            match line["key"]:
                case "header":
                    repository.commits.append(value["summary"])
                case "file":
                    repository.files[value["path"]] = base64.b64decode(value["content"])
                case "lfsFile":
                    repository.files[value["path"]] = self.large[value["oid"]]
                case "deletedFile":
                    del repository.files[value["path"]]
        name = "{owner}/{name}".format(**request.path_params)
        url = f"{self.url}/datasets/{name}/commit/{repository.head}"
        return JSONResponse({"commitUrl": url, "commitOid": repository.head, "success": True})


def large_hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def git_hash(data: bytes) -> str:
    head = b"blob %d\0" % len(data)
    return hashlib.sha1(head + data, usedforsecurity=False).hexdigest()
