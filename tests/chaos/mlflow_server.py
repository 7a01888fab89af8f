"""A real MLflow server, and a proxy that makes it unreachable, mute, slow or faulty."""

from __future__ import annotations

import contextlib
import http.client
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Literal

from tests.chaos.runs import ScenarioError, clean_environment

Mode = Literal["pass", "refuse", "black_hole", "slow", "errors"]
SLOW_S = 5.0


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


class MlflowServer:
    """`mlflow server` on loopback, with its own database file and artifact folder."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.port = folder, free_port()
        self.database = folder / "mlflow.db"
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1",
                 "--port", str(self.port), "--workers", "1",
                 "--backend-store-uri", f"sqlite:///{self.database}",
                 "--artifacts-destination", str(self.folder / "artifacts")],
                env=clean_environment() | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
                cwd=self.folder, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        deadline_s = time.monotonic() + 180
        while time.monotonic() < deadline_s:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"{self.uri}/health", timeout=2)
                return
            if self.process.poll() is not None:
                break
            time.sleep(0.3)
        raise ScenarioError(f"MLflow did not start: {(self.folder / 'log').read_text()[-800:]}")

    def kill(self) -> None:
        """Kill the server at once, as a power loss would."""
        if self.process is not None and self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


class Proxy:
    """A proxy at the address that clients use for MLflow; `mode` sets its behaviour."""

    def __init__(self, upstream_port: int) -> None:
        self.upstream_port, self.port = upstream_port, free_port()
        self.calls: dict[str, int] = {}  # mode -> number of calls
        self._mode: Mode = "refuse"  # not listening yet
        self._server: ThreadingHTTPServer | None = None
        self._changed = threading.Condition()

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def mode(self) -> Mode:
        return self._mode

    @mode.setter
    def mode(self, mode: Mode) -> None:
        with self._changed:
            self._mode = mode
            self._changed.notify_all()
        if mode == "refuse":
            self._stop_listening()
        elif self._server is None:
            self._listen()

    def close(self) -> None:
        self.mode = "refuse"

    def _listen(self) -> None:
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_one_request(self) -> None:
                with contextlib.suppress(OSError, http.client.HTTPException):
                    super().handle_one_request()
                    return
                self.close_connection = True

            def do_GET(self) -> None:
                proxy._serve(self)

            do_POST = do_PUT = do_PATCH = do_DELETE = do_GET

            def log_message(self, *_: object) -> None:
                return

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            block_on_close = False

        self._server = Server(("127.0.0.1", self.port), Handler)
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def _stop_listening(self) -> None:
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None

    def _serve(self, request: BaseHTTPRequestHandler) -> None:
        body = request.rfile.read(int(request.headers.get("Content-Length") or 0))
        mode = self._mode
        self.calls[mode] = number = self.calls.get(mode, 0) + 1
        if mode == "black_hole":
            with self._changed:
                self._changed.wait_for(lambda: self._mode != "black_hole", timeout=600)
            request.close_connection = True
            return
        if mode == "refuse":  # a connection opened before the mode changed
            request.close_connection = True
            return
        if mode == "slow":
            time.sleep(SLOW_S)
        # Half of the calls fail. Half of these were executed, which no client can know.
        if mode == "errors" and number % 4 == 1:
            self._answer(request, 500, {}, b"{}")
            return
        try:
            status, headers, answer = self._forward(request, body)
        except OSError:
            status, headers, answer = 502, {}, b"{}"
        if mode == "errors" and number % 4 == 3:
            status, headers, answer = 503, {}, b"{}"
        self._answer(request, status, headers, answer)

    def _forward(
        self, request: BaseHTTPRequestHandler, body: bytes
    ) -> tuple[int, dict[str, str], bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.upstream_port, timeout=60)
        try:
            headers = {k: v for k, v in request.headers.items() if k.lower() != "connection"}
            headers["Host"] = f"127.0.0.1:{self.upstream_port}"
            connection.request(request.command, request.path, body, headers)
            response = connection.getresponse()
            return response.status, dict(response.getheaders()), response.read()
        except http.client.HTTPException as error:
            raise OSError(str(error)) from error
        finally:
            connection.close()

    @staticmethod
    def _answer(
        request: BaseHTTPRequestHandler, status: int, headers: dict[str, str], body: bytes
    ) -> None:
        request.send_response(status)
        skipped = ("content-length", "transfer-encoding", "connection", "date", "server")
        for name, value in headers.items():
            if name.lower() not in skipped:
                request.send_header(name, value)
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        request.wfile.write(body)
