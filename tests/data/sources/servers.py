"""A hub of data sets and models on this machine, with faults."""

import hashlib
import json
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

OWNER_NAME = "red/apples"


class Server(ThreadingHTTPServer):
    """Serves the files of a data set and of models.

    Attributes:
        revisions: commit -> files of the data set red/apples; `branches`: name -> commit.
        models: OWNER/NAME -> files.
        faults: path -> what its next requests of content do instead, in order: a status, ("cut", bytes) to end the
            connection there, ("bytes", content) for other content of the same size, ("wait", seconds).
        log: (method, path, Range) of each request.
    """

    daemon_threads, block_on_close = True, False

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.revisions, self.branches, self.models = {}, {}, {}
        self.faults, self.log, self.headers = {}, [], []
        self.url = f"http://127.0.0.1:{self.server_port}"

    def commit(self, files, branch="main"):
        """A new revision of the data set; returns its commit."""
        commit = hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
        self.revisions[commit], self.branches[branch] = files, commit
        return commit

    def fetched(self):
        """The paths whose content was sent, with the first byte of each."""
        return [(path, first) for method, path, first in self.log if method == "GET"]

    def handle_error(self, request, client_address):
        pass


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = unquote(urlsplit(self.path).path)
        self.server.headers.append(dict(self.headers))
        parts = path.strip("/").split("/")
        if parts[:2] == ["api", "datasets"]:
            self.server.log.append(("API", path, 0))
            return self.api("/".join(parts[2:4]), parts[4], "/".join(parts[5:]))
        if parts[0] == "datasets" and parts[3:4] == ["resolve"]:
            files, commit = self.server.revisions.get(parts[4], {}), parts[4]
            name = "/".join(parts[5:])
            digest = hashlib.sha256(files[name]).hexdigest()
            extra = {"X-Repo-Commit": commit, "X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(len(files[name]))}
            return self.content(name, files[name], digest, extra)
        if parts[2:3] == ["resolve"] or parts[:2] == ["api", "models"]:
            return self.of_model(parts)
        self.answer(404, b"")

    def of_model(self, parts):
        """A file of a model. Of its API nothing is there, which transformers asks for optional files."""
        of_api = parts[0] == "api"
        files = self.server.models.get("/".join(parts[2:4] if of_api else parts[:2]))
        content = None if of_api else (files or {}).get("/".join(parts[4:]))
        commit = {"X-Repo-Commit": "1" * 40}
        if content is None:
            code = "RepoNotFound" if files is None else "EntryNotFound"
            return self.answer(404, b"", {**commit, "X-Error-Code": code})
        self.content("/".join(parts[4:]), content, hashlib.sha256(content).hexdigest(), commit)

    def api(self, name, part, revision):
        commit = self.server.branches.get(revision, revision)
        files = self.server.revisions.get(commit)
        fault = self.next_fault("api")
        if isinstance(fault, int):
            return self.answer(fault, b"")
        if name != OWNER_NAME or files is None:
            code = "RepoNotFound" if name != OWNER_NAME else "RevisionNotFound"
            return self.answer(404, b"{}", {"X-Error-Code": code, "X-Error-Message": "not found"})
        if part == "revision":
            answer = {"id": name, "sha": commit, "siblings": [], "tags": [], "private": False, "downloads": 0}
        else:
            answer = []
            for path, content in files.items():
                lfs = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
                answer.append({"type": "file", "path": path, "size": len(content), "oid": "0" * 40, "lfs": lfs})
        self.answer(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})

    def content(self, name, content, etag, extra):
        size, first, last, status = len(content), 0, len(content), 200
        wanted = self.headers.get("Range")
        if wanted:
            start, _, end = wanted.removeprefix("bytes=").partition("-")
            first, last, status = int(start), int(end or size - 1) + 1, 206
            extra = {**extra, "Content-Range": f"bytes {first}-{last - 1}/{size}"}
        extra = {**extra, "ETag": f'"{etag}"'}
        self.server.log.append((self.command, name, first))
        fault = None if self.command == "HEAD" else self.next_fault(name)
        if isinstance(fault, int):
            return self.answer(fault, b"")
        kind, value = fault or ("", None)
        if kind == "wait":
            time.sleep(value)
        if kind == "bytes":
            content = value
        self.answer(status, content[first:last], extra, value if kind == "cut" else None)

    def next_fault(self, name):
        faults = self.server.faults.get(name, [])
        return faults.pop(0) if faults else None

    def answer(self, status, body, headers=None, cut=None):
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), "Connection": "close", **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[:cut])
        if cut is not None:
            self.close_connection = True


@contextmanager
def serving():
    server = Server()
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
