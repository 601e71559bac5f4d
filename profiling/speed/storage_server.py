"""A server of files on this machine that fails as those of a data centre do."""

import random
import threading
import time
from collections import Counter
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class Server(ThreadingHTTPServer):
    """The files of a folder over HTTP.

    Args:
        latency: seconds before each answer.
        failures: the share of requests that fail, half of them in the middle of the file.
    """

    daemon_threads = True
    request_queue_size = 128
    is_gone = False
    num_failed = 0

    def __init__(self, folder: Path, latency: float, failures: float):
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder = folder
        self.latency = latency
        self.failures = failures
        self.chance = random.Random(0)
        self.fetched: Counter[str] = Counter()  # names of files -> complete answers
        self.url = f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def do_GET(self) -> None:
        server = self.server
        time.sleep(server.latency)
        file = server.folder / self.path.lstrip("/")
        fails = server.chance.random() < server.failures
        server.num_failed += fails
        is_cut_off = fails and self.command == "GET" and server.chance.random() < 0.5
        self.close_connection = server.is_gone or is_cut_off
        if server.is_gone:
            return
        if not file.is_file() or (fails and not is_cut_off):
            self.send_error(503 if fails else 404)
            return
        content = file.read_bytes()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            # Counted first: who has read the answer may look at the number at once.
            server.fetched[file.name] += not is_cut_off
            self.wfile.write(content[: len(content) // 2] if is_cut_off else content)

    do_HEAD = do_GET

    def log_message(self, *args) -> None:
        """Print nothing about requests."""


@contextmanager
def http(folder: Path, latency: float = 0.0, failures: float = 0.0):
    with Server(folder, latency, failures) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield server
        server.shutdown()
