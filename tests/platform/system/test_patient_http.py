"""Half requests end in time, and keep nobody out meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

uvicorn = pytest.importorskip("uvicorn")

from deta.platform.system.patient_http import patient_protocol  # noqa: E402

WITHIN_S = 20.0  # for an answer, on a busy machine
HALF = b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nX: "


async def answer(scope: Any, receive: Any, send: Any) -> None:
    """Answer OK after the whole body; /slow after a second."""
    while (await receive()).get("more_body"):
        pass
    if scope["path"] == "/slow":
        await asyncio.sleep(1)
    await send(
        {"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]}
    )
    await send({"type": "http.response.body", "body": b"OK"})


@contextlib.contextmanager
def serving(protocol: Any, **settings: Any) -> Iterator[int]:
    config = uvicorn.Config(
        answer, log_level="critical", lifespan="off", ws="none", http=protocol, **settings
    )
    server = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        yield listening.getsockname()[1]
        server.should_exit = server.force_exit = True
        thread.join(WITHIN_S)


def ask(port: int, path: str = "/") -> int:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=WITHIN_S)
    with contextlib.closing(connection):
        connection.request("GET", path)
        return connection.getresponse().status


def connect(port: int) -> socket.socket:
    one = socket.create_connection(("127.0.0.1", port), timeout=WITHIN_S)
    one.settimeout(WITHIN_S)
    return one


def closed_after(one: socket.socket, piece: bytes = b"", within_s: float = WITHIN_S) -> float:
    """Send a piece every 0.1 s until the server closes; return after how many seconds it did."""
    began_s = time.monotonic()
    one.settimeout(0.1)
    while time.monotonic() < began_s + within_s:
        try:
            if piece:
                one.sendall(piece)
            if not one.recv(1000):
                break
        except TimeoutError:
            continue
        except OSError:
            break
    return time.monotonic() - began_s


def test_half_requests_keep_out_nobody_who_asks():
    """The same requests answer 503 through uvicorn's own protocol."""
    for protocol, expected in (("auto", 503), (patient_protocol(max_waiting=20), 200)):
        with serving(protocol, limit_concurrency=40) as port, contextlib.ExitStack() as held:
            for _ in range(60):
                held.enter_context(connect(port)).sendall(HALF)
            assert {ask(port) for _ in range(5)} == {expected}


@pytest.mark.parametrize("piece", [b"", b"a"])
@pytest.mark.parametrize("begin", [b"", HALF])
def test_the_whole_head_has_a_deadline_however_it_trickles(begin: bytes, piece: bytes):
    with serving(patient_protocol(head_s=1.0)) as port, connect(port) as one:
        one.sendall(begin)
        assert 0.5 < closed_after(one, piece if begin else b"") < 10


def test_a_connection_is_kept_between_requests_and_then_closed():
    with serving(patient_protocol(head_s=0.5, keep_alive_s=2.0)) as port:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=WITHIN_S)
        for _ in range(2):
            connection.request("POST", "/slow", b"x" * 100_000)
            assert connection.getresponse().read() == b"OK"
            assert isinstance(connection.sock, socket.socket), "closed, and not kept"
            time.sleep(1.0)
        one = connection.sock
        one.sendall(HALF)  # the next head counts from the last response
        assert closed_after(one, b"a") < 10


def test_requests_that_are_answered_are_not_closed_by_the_waiting_of_others():
    with serving(patient_protocol(head_s=5.0, max_waiting=3)) as port:
        found: list[int] = []
        slow = [
            threading.Thread(target=lambda: found.append(ask(port, "/slow"))) for _ in range(10)
        ]
        for thread in slow:
            thread.start()
            time.sleep(0.05)
        with contextlib.ExitStack() as held:
            for _ in range(30):
                held.enter_context(connect(port))
            for thread in slow:
                thread.join(WITHIN_S)
        assert found == [200] * 10


def test_pipelined_requests_are_all_answered():
    with serving(patient_protocol(head_s=0.5, keep_alive_s=0.5)) as port, connect(port) as one:
        one.sendall(b"GET /slow HTTP/1.1\r\nHost: x\r\n\r\n" * 3)
        received = b""
        with contextlib.suppress(OSError):
            while part := one.recv(1000):
                received += part
        assert received.count(b"200 OK") == 3
