"""Downloads from a server that cuts connections, ignores ranges, changes files and lies."""

from __future__ import annotations

import contextlib
import hashlib
import json
import multiprocessing
import re
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from deta.platform.system import download as module
from deta.platform.system.download import DownloadError, cache_folder, download, fetch

CONTENT = bytes(range(256)) * 4096  # 1 MiB
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Server:
    """A server that returns `content`, with faults that tests set."""

    def __init__(self) -> None:
        self.content, self.etag, self.modified = CONTENT, '"v1"', ""
        self.cut_after: list[int] = []  # bytes per response before the connection closes
        self.codes: list[int] = []  # responses to give first
        self.ignores_range = self.without_length = self.ignores_if_range = False
        self.content_type = "application/octet-stream"
        self.claimed_length: int | None = None
        self.on_answer = lambda: None
        self.redirect = ""
        self.requests: list[dict[str, str]] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                outer.answer(self)
                self.close_connection = True

            def log_message(self, *_: object) -> None:
                pass

        self.httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.httpd.serve_forever, args=(0.01,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self.httpd.server_port}/files/weights.pth"

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        self.requests.append(dict(handler.headers.items()))
        if self.codes:
            code = self.codes.pop(0)
            handler.send_response(code)
            if code in (302, 307):
                handler.send_header("Location", self.redirect)
            handler.send_header("Content-Length", "0")
            handler.end_headers()
            return
        start, code = 0, 200
        wanted = re.fullmatch(r"bytes=(\d+)-", handler.headers.get("Range") or "")
        same = (
            handler.headers.get("If-Range") in (self.etag, self.modified) or self.ignores_if_range
        )
        if wanted and not self.ignores_range and same:
            start, code = int(wanted[1]), 206
        if start >= len(self.content):
            handler.send_response(416)
            handler.send_header("Content-Range", f"bytes */{len(self.content)}")
            handler.end_headers()
            return
        body = self.content[start:]
        handler.send_response(code)
        handler.send_header("Content-Type", self.content_type)
        if self.etag:
            handler.send_header("ETag", self.etag)
        if self.modified:
            handler.send_header("Last-Modified", self.modified)
        if code == 206:
            last = len(self.content) - 1
            handler.send_header("Content-Range", f"bytes {start}-{last}/{len(self.content)}")
        if not self.without_length:
            handler.send_header("Content-Length", str(self.claimed_length or len(body)))
        handler.end_headers()
        if self.cut_after:
            body = body[: self.cut_after.pop(0)]
        with contextlib.suppress(OSError):  # a client may hang up early
            handler.wfile.write(body)
        self.on_answer()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    running = Server()
    yield running
    running.httpd.shutdown()
    running.httpd.server_close()


@pytest.fixture
def get(tmp_path: Path, server: Server):
    said: list[str] = []

    def get(pin: str = f"#sha256={SHA256}", **options) -> Path:
        return download(
            server.url + pin, tmp_path / "cache", echo=said.append, first_wait_s=0.01, **options
        )

    get.said = said
    return get


def parts(folder: Path) -> list[Path]:
    return list(folder.rglob("*.part"))


def test_a_pinned_file_is_downloaded_completely_and_once(get, server, tmp_path):
    path = get()
    again = get()

    assert path == again
    assert path.name == "weights.pth"
    assert path.read_bytes() == CONTENT
    assert len(server.requests) == 1
    assert get.said == []
    record = json.loads(path.with_name("weights.pth.json").read_text())
    assert record == {"url": server.url, "bytes": len(CONTENT), "sha256": SHA256}
    assert not parts(tmp_path)


def test_the_hash_of_a_file_that_is_not_pinned_is_printed(get):
    get(pin="")

    assert f"append #sha256={SHA256}" in get.said[-1]


def test_an_interrupted_download_resumes(get, server):
    server.cut_after = [300_000, 200_000]

    path = get()

    assert path.read_bytes() == CONTENT
    assert [request.get("Range") for request in server.requests] == [
        None, "bytes=300000-", "bytes=500000-",
    ]  # fmt: skip
    assert {request.get("If-Range") for request in server.requests[1:]} == {'"v1"'}
    assert "ended after 300,000 of 1,048,576 bytes; trying again" in get.said[0]


def test_another_process_resumes_with_the_received_bytes(get, server, tmp_path):
    server.cut_after = [300_000] + [0] * 10
    with pytest.raises(DownloadError, match="300,000 bytes were received and are kept"):
        get(attempts=2)
    assert [part.stat().st_size for part in parts(tmp_path)] == [300_000]
    server.cut_after = []

    assert get().read_bytes() == CONTENT
    assert server.requests[-1]["Range"] == "bytes=300000-"


def test_a_server_that_ignores_ranges_starts_again(get, server):
    server.cut_after, server.ignores_range = [300_000], True

    assert get().read_bytes() == CONTENT


@pytest.mark.parametrize("ignores_if_range", [False, True])
def test_bytes_of_two_versions_are_never_mixed(get, server, ignores_if_range):
    server.cut_after, server.ignores_if_range = [300_000], ignores_if_range

    def change() -> None:
        server.content, server.etag = CONTENT[::-1], '"v2"'

    server.on_answer = change

    assert get(pin="").read_bytes() == CONTENT[::-1]
    assert any("another version" in line for line in get.said) == ignores_if_range


@pytest.mark.parametrize(
    ("etag", "modified", "resumes"),
    [("", "", False), ('W/"weak"', "", False), ("", "Wed, 21 Dec 2022 07:28:00 GMT", True)],
)
def test_only_a_known_version_is_resumed(get, server, etag, modified, resumes):
    server.cut_after, server.etag, server.modified = [300_000], etag, modified

    assert get().read_bytes() == CONTENT
    assert server.requests[1].get("If-Range") == (modified if resumes else None)


def test_a_wrong_length_is_an_error_and_received_bytes_are_kept(get, server, tmp_path):
    server.claimed_length, server.ignores_range = len(CONTENT) + 5, True

    with pytest.raises(DownloadError, match=r"ended after 1,048,576 of 1,048,581 bytes, 2 times"):
        get(attempts=2)

    assert [part.stat().st_size for part in parts(tmp_path)] == [len(CONTENT)]


def test_another_content_than_pinned_names_both_hashes_and_deletes_nothing(get, server):
    server.content = b"x" + CONTENT[1:]
    other = hashlib.sha256(server.content).hexdigest()

    with pytest.raises(DownloadError, match=f"is {other}, pinned is {SHA256}") as caught:
        get()

    kept = Path(re.search(r"kept as (\S+)", str(caught.value))[1])
    assert kept.read_bytes() == server.content
    server.content = CONTENT
    assert get().read_bytes() == CONTENT


def test_a_file_in_the_cache_that_was_changed_is_refused(get):
    path = get()
    path.write_bytes(b"other")

    with pytest.raises(DownloadError, match=rf"{SHA256}.*Move it away"):
        get()

    assert path.read_bytes() == b"other"


@pytest.mark.parametrize(
    ("code", "says"),
    [(404, "there is no such file"), (403, "needs a log-in"), (418, "418")],
)
def test_a_permanent_error_is_not_retried(get, server, code, says):
    server.codes = [code]

    with pytest.raises(DownloadError, match=says):
        get()

    assert len(server.requests) == 1


def test_a_busy_server_is_retried(get, server):
    server.codes = [503, 429, 500]

    assert get().read_bytes() == CONTENT
    assert len(server.requests) == 4


def test_a_web_page_is_refused(get, server):
    server.content_type = "text/html; charset=utf-8"

    with pytest.raises(DownloadError, match="returns a web page"):
        get()


@pytest.mark.parametrize("without_length", [True, False])
def test_a_file_over_the_limit_is_refused(get, server, without_length, tmp_path):
    server.without_length = without_length

    with pytest.raises(DownloadError, match="the limit is 1,000"):
        get(max_bytes=1000)

    assert not parts(tmp_path)


@pytest.mark.parametrize("without_length", [True, False])
def test_a_disk_is_not_filled(get, server, without_length, monkeypatch, tmp_path):
    server.without_length = without_length
    monkeypatch.setattr(module, "RESERVE_BYTES", shutil.disk_usage(tmp_path).free)

    with pytest.raises(DownloadError, match="Make room"):
        get()

    assert not parts(tmp_path)


@pytest.mark.parametrize(
    "name", [".lock", "a%2F..%2F..%2Fetc%2Fx", "a" * 300, "a%00b", "a%0Ab", "%2e%2e", ""]
)
def test_odd_names_stay_in_the_cache(server, tmp_path, name):
    url = f"{server.url.removesuffix('weights.pth')}{name}#sha256={SHA256}"

    path = download(url, tmp_path, echo=lambda _: None)

    assert path.read_bytes() == CONTENT
    assert re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]*", path.name)
    assert path.parent.parent == tmp_path


def test_no_server_and_no_network_have_different_messages(tmp_path, server):
    server.httpd.server_close()
    options = {"first_wait_s": 0.0, "attempts": 2, "echo": lambda _: None}
    with pytest.raises(DownloadError, match="refused, 2 times in a row"):
        download(server.url, tmp_path, **options)
    with pytest.raises(DownloadError, match=r"[Nn]ame"):
        download("https://no-such-host.invalid/a.pth", tmp_path, **options)


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("file:///etc/passwd", "only http and https"),
        ("ftp://host/a.pth", "only http and https"),
        ("https:///a.pth", "only http and https"),
        ("https://me:secret@host/a.pth", "password in it"),
        ("https://host/a.pth#md5=00", "is not #sha256="),
        ("https://host/a.pth#sha256=abc", "is not #sha256="),
    ],
)
def test_addresses_that_are_not_allowed(tmp_path, url, says):
    with pytest.raises(ValueError, match=says) as caught:
        download(url, tmp_path)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("target", ["file:///etc/passwd", "ftp://127.0.0.1/a"])
def test_a_redirect_to_another_kind_of_address_is_refused(get, server, target):
    server.codes, server.redirect = [302], target

    with pytest.raises(DownloadError, match=r"less safe|302"):
        get()

    server.codes, server.redirect = [302], server.url + "?key=abc"
    assert get().read_bytes() == CONTENT


def _download(url: str, folder: str) -> None:
    download(url, Path(folder), echo=lambda _: None)


def test_two_processes_download_once(server, tmp_path):
    context = multiprocessing.get_context("spawn")
    url = f"{server.url}#sha256={SHA256}"
    processes = [context.Process(target=_download, args=(url, str(tmp_path))) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)

    assert [process.exitcode for process in processes] == [0, 0]
    assert len(server.requests) == 1


def test_a_path_is_returned_and_the_cache_follows_the_environment(monkeypatch, tmp_path):
    assert fetch("~/a.pth") == Path.home() / "a.pth"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "deta-platform" / "downloads"
    with pytest.raises(ValueError, match="only http and https"):
        fetch("s3://bucket/a.pth")
