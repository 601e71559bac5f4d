"""An export pushed to a server of this test's own, and what is refused before the export."""

import base64
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest
from huggingface_hub import constants

from ds_cmli.common.errors import UserError
from tests.export.conftest import export

NAME, TOKEN = "someone/a-model", "hf_of_this_test"


class Server(BaseHTTPRequestHandler):
    """What huggingface_hub asks for when it uploads a folder; `files` is what a push has left, by path."""

    protocol_version = "HTTP/1.1"

    def answer(self, content: dict, status: int = 200) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.answer({"error": "Invalid credentials"}, 401)
        elif path == "/api/whoami-v2":
            self.answer({"name": "someone", "orgs": []})
        elif "/tree/" in path:
            self.answer([{"type": "file", "path": file, "size": 1, "oid": "0"} for file in self.server.files])
        else:
            self.answer({"id": NAME, "sha": "0" * 40, "siblings": [{"rfilename": file} for file in self.server.files]})

    def do_POST(self) -> None:
        body, path = self.body(), self.path.partition("?")[0]
        if path == "/api/repos/create":
            self.answer({"url": f"{self.server.address}/{NAME}"})
        elif "/preupload/" in path:
            files = json.loads(body)["files"]
            self.answer({"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]})
        elif path.endswith("/commit/main") and self.server.full:
            self.answer({"error": "no space"}, 507)
        elif "/commit/" in path:
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    self.server.files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "deletedFile":
                    del self.server.files[value["path"]]
            self.answer({"success": True, "commitOid": "0" * 40, "commitUrl": f"{self.server.address}/{NAME}/commit/0"})
        else:
            self.answer({})

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    server.address = f"http://127.0.0.1:{server.server_port}"
    server.files, server.full = {"notes.md": b"mine", "text_encoder/text.onnx": b"of former weights"}, False
    Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def push(run, server, tmp_path, monkeypatch):
    """The command in this process: a function of the name, the token and the server's address."""
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no token"))

    def call(name=NAME, token=TOKEN, address=server.address):
        monkeypatch.setattr(constants, "ENDPOINT", address)
        monkeypatch.setenv("HF_TOKEN", token)
        return export(run, tmp_path / "export", "--push", name)

    return call


def test_pushed_as_it_stands_in_the_folder(push, server, capsys):
    folder = push()
    assert f"pushed to {server.address}/{NAME}" in capsys.readouterr().out
    written = {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}
    # Another's file stays, another export's does not.
    assert server.files == {**written, "notes.md": b"mine"}
    assert "model.safetensors" in written and "README.md" in written


@pytest.mark.parametrize(
    "change, line",
    [
        ({"token": ""}, f"--push is {NAME!r}: no token, run `hf auth login` or set HF_TOKEN"),
        ({"token": "hf_other"}, f"--push is {NAME!r}: Invalid user token."),
        ({"name": "a/b/c"}, "--push is 'a/b/c': Repo id must be in the form"),
        ({"address": "http://127.0.0.1:1"}, f"--push is {NAME!r}: [Errno 111] Connection refused"),
    ],
)
def test_refused_in_one_line_before_the_export(push, tmp_path, change, line):
    with pytest.raises(UserError) as error:
        push(**change)
    assert str(error.value).startswith(line) and "\n" not in str(error.value)
    assert not (tmp_path / "export").exists()


def test_a_failed_push_leaves_the_folder_and_says_how_to_push_it(push, server, tmp_path):
    server.full = True
    with pytest.raises(UserError) as error:
        push()
    assert (tmp_path / "export" / "model.safetensors").is_file()
    assert str(error.value).endswith(f"`hf upload {NAME} {tmp_path / 'export'}` pushes it")
