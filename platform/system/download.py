"""Download a file: complete and with the pinned hash, or an error that names the problem.

Received bytes are kept, so an interrupted download resumes in the next attempt or the next
process. In the cache folder, each URL has a folder of its own:

    weights.pth             the file, once it is complete and has the pinned hash
    weights.pth.json        its URL, size and SHA-256
    .weights.pth.part       the bytes received so far
    .weights.pth.part.json  the version of the file that they belong to: its ETag or date
    .lock                   held by the process that downloads
"""

from __future__ import annotations

import fcntl
import hashlib
import http.client
import json
import os
import re
import shutil
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn

from deta.platform.system.atomic_write import force_to_disk, write_json
from deta.platform.system.places import bypass_proxies
from deta.platform.system.safe_read import file_sha256

MAX_BYTES = 20 * 2**30  # DETA with Swin-L and its optimizer is 2.6 GB
RESERVE_BYTES = 10**9  # left free on the disk, so that an endless answer does not fill it
CHUNK_BYTES = 2**20
ATTEMPTS = 4  # in a row without a byte; any progress resets the count
FIRST_WAIT_S, LONGEST_WAIT_S = 1.0, 30.0  # backoff before a retry; doubles each time
TIMEOUT_S = 30.0  # without a byte
RETRIED = (408, 416, 425, 429, 500, 502, 503, 504)
ADVICE = {
    404: "there is no such file; check the address",
    401: "it needs a log-in; download it with a browser and give the file's path",
    403: "it needs a log-in; download it with a browser and give the file's path",
}
_PIN = re.compile(r"sha256=([0-9a-fA-F]{64})")


class DownloadError(RuntimeError):
    """A download failed. The message has the URL, the reason and what to do next."""


def is_url(text: str) -> bool:
    return "://" in text


def fetch(text: str, folder: Path | None = None, echo: Callable[[str], None] = print) -> Path:
    """Return the local file of a path or URL; download the URL unless it is cached.

    Raises:
        ValueError: as `download`. A DownloadError becomes a ValueError: the user gave the URL.
    """
    if not is_url(text):
        return Path(text).expanduser()
    try:
        return download(text, folder, echo=echo)
    except DownloadError as error:
        raise ValueError(str(error)) from error


def cache_folder() -> Path:
    """Return the folder of downloads: in `$XDG_CACHE_HOME/deta-platform`, default ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "deta-platform" / "downloads"


def download(
    url: str,
    folder: Path | None = None,
    *,
    echo: Callable[[str], None] = print,
    max_bytes: int = MAX_BYTES,
    attempts: int = ATTEMPTS,
    first_wait_s: float = FIRST_WAIT_S,
) -> Path:
    """Download a URL unless it is cached; return the local file.

    Args:
        url: http or https. `#sha256=` and 64 digits at its end pin the content.
        folder: the cache, see `cache_folder`.
        echo: receives the hash of a file that is not pinned, and notes about waiting.

    Raises:
        ValueError: such a URL is not allowed.
        DownloadError: no connection, no such file, too large, or not the pinned content.
    """
    address, pinned = _split(url)
    bypass_proxies()
    name = urllib.parse.unquote(urllib.parse.urlsplit(address).path).rpartition("/")[2]
    name = re.sub(r"[^A-Za-z0-9._-]", "_", name)[-100:].lstrip(".") or "download"
    place = (folder or cache_folder()) / hashlib.sha256(address.encode()).hexdigest()[:16]
    place.mkdir(parents=True, exist_ok=True)
    path, part = place / name, place / f".{name}.part"
    with _locked(place, address, echo):
        if not path.exists():
            _receive_all(address, part, max_bytes, attempts, first_wait_s, echo)
            found, num_bytes = file_sha256(part), part.stat().st_size
            if pinned not in (None, found):
                kept = part.replace(path.with_name(f"{name}.not-{pinned[:8]}"))
                raise DownloadError(
                    f"{_shown(address)}: its SHA-256 is {found}, pinned is {pinned}. The received "
                    f"file ({num_bytes:,} bytes) is kept as {kept} and not used. It was replaced "
                    "at its source or changed on the way: ask its publisher"
                )
            record = {"url": address, "bytes": num_bytes, "sha256": found}
            write_json(place / f"{name}.json", record, indent=2)
            force_to_disk(part)
            part.replace(path)
        found = file_sha256(path)
    if pinned not in (None, found):
        raise DownloadError(
            f"{path}: its SHA-256 is {found}, pinned is {pinned}; the file was changed, or "
            "another version was downloaded before. Move it away to download it again"
        )
    if pinned is None:
        echo(
            f"{_shown(address)}: {path}, {path.stat().st_size:,} bytes. Its content is not pinned; "
            f"to get the same file or an error, append #sha256={found}"
        )
    return path


def _split(url: str) -> tuple[str, str | None]:
    """Return the URL without its fragment, and the SHA-256 that the fragment pins."""
    parts = urllib.parse.urlsplit(url)
    shown = _shown(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"{shown}: only http and https are downloaded; give a file's path instead")
    if parts.username or parts.password:
        raise ValueError(
            "a URL with a password in it would be written into logs and configurations; download "
            f"the file from {parts.hostname} by other means and give its path"
        )
    pinned = _PIN.fullmatch(parts.fragment)
    if parts.fragment and pinned is None:
        raise ValueError(f"{shown}: #{parts.fragment[:80]} is not #sha256= and 64 digits")
    return parts._replace(fragment="").geturl(), pinned[1].lower() if pinned else None


@contextmanager
def _locked(place: Path, url: str, echo: Callable[[str], None]) -> Iterator[None]:
    """Hold the lock of one URL; the system releases the lock of a process that dies."""
    with (place / ".lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            echo(f"{_shown(url)}: another process is downloading it, waiting …")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _receive_all(
    url: str, part: Path, max_bytes: int, attempts: int, first_wait_s: float,
    echo: Callable[[str], None],
) -> None:  # fmt: skip
    """Request the file until all of it is in `part`."""
    failures, furthest = 0, part.stat().st_size if part.exists() else 0
    while True:
        try:
            return _receive(url, part, max_bytes)
        except urllib.error.HTTPError as error:
            problem = f"the server answers {error.code} {error.reason}"
            if error.code not in RETRIED:
                advice = ADVICE.get(error.code, "check the address")
                raise DownloadError(f"{_shown(url)}: {problem}: {advice}") from error
            if error.code == 416:  # more bytes than the file has: it is another file
                part.unlink(missing_ok=True)
        except (OSError, http.client.HTTPException) as error:
            cause = error.reason if isinstance(error, urllib.error.URLError) else error
            problem = str(cause) or type(cause).__name__
        size = part.stat().st_size if part.exists() else 0
        failures = 0 if size > furthest else failures + 1
        furthest = max(furthest, size)
        if failures >= attempts:
            raise DownloadError(
                f"{_shown(url)}: {problem}, {failures} times in a row; {size:,} bytes were "
                "received and are kept. Check the connection and the address and try again: the "
                "download resumes there. Without a connection, copy the file here by other means "
                "and give its path"
            )
        wait_s = min(first_wait_s * 2**failures, LONGEST_WAIT_S)
        echo(f"{_shown(url)}: {problem}; trying again in {wait_s:.0f} s")
        time.sleep(wait_s)


def _receive(url: str, part: Path, max_bytes: int) -> None:
    """Request the rest of the file once and append it to `part`."""
    version_file = part.with_name(f"{part.name}.json")
    headers = {"User-Agent": "deta-platform", "Accept-Encoding": "identity"}
    start = part.stat().st_size if part.exists() else 0
    known = json.loads(version_file.read_text()) if start and version_file.exists() else ""
    if known:
        headers |= {"Range": f"bytes={start}-", "If-Range": known}
    request = urllib.request.Request(url, headers=headers)
    opener = urllib.request.build_opener(_SaferRedirects)
    with opener.open(request, timeout=TIMEOUT_S) as response:
        if response.headers.get_content_type() == "text/html":
            raise DownloadError(
                f"{_shown(url)}: returns a web page, not a file; such an address needs a log-in or "
                "a click. Download it with a browser and give the file's path"
            )
        etag = response.headers.get("ETag") or "W/"  # a weak one does not identify the bytes
        date = response.headers.get("Last-Modified") or ""
        if response.status == 206:
            begins = f"bytes {start}-"
            if not (response.headers.get("Content-Range") or "").startswith(begins) or (
                known not in (etag, date)
            ):
                part.unlink()
                raise ConnectionError("the server has another version than the received bytes")
        else:  # the whole file, whatever range was requested
            start = 0
            write_json(version_file, date if etag.startswith("W/") else etag)
        length = response.headers.get("Content-Length") or ""
        total = start + int(length) if length.isdecimal() else None
        room = start + shutil.disk_usage(part.parent).free - RESERVE_BYTES
        arrived = start
        with part.open("r+b" if start else "wb") as file, _progress(part.name, total) as show:
            file.seek(start)
            while True:
                if max(arrived, total or 0) > min(max_bytes, room):
                    part.unlink()
                    raise DownloadError(
                        f"{_shown(url)}: has {max(arrived, total or 0):,} bytes or more, the limit "
                        f"is {max_bytes:,}, and the disk of {part.parent} has room for {room:,}. "
                        "Make room, set XDG_CACHE_HOME, or download it by other means and give its "
                        "path"
                    )
                chunk = response.read1(CHUNK_BYTES)
                if not chunk:
                    break
                arrived += len(chunk)
                file.write(chunk)
                show(arrived)
    if total is not None and arrived < total:
        raise ConnectionError(f"the connection ended after {arrived:,} of {total:,} bytes")


@contextmanager
def _progress(name: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """Yield a function that shows the number of received bytes; nothing without a terminal."""
    columns = ("{task.description}", BarColumn(), DownloadColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task(name.removeprefix(".").removesuffix(".part"), total=total)
        yield lambda num_bytes: bar.update(task, completed=num_bytes)


class _SaferRedirects(urllib.request.HTTPRedirectHandler):
    """Follow redirects within a scheme and from http to https, never back."""

    def redirect_request(self, request, fp, code, message, headers, new_url):
        scheme = urllib.parse.urlsplit(new_url).scheme
        if scheme not in ("https", urllib.parse.urlsplit(request.full_url).scheme):
            raise DownloadError(
                f"{_shown(request.full_url)}: the server redirects to {_shown(new_url)}, which is "
                "less safe; give that address yourself if it is right"
            )
        return super().redirect_request(request, fp, code, message, headers, new_url)


def _shown(url: str) -> str:
    """Return a URL without its query, which may hold a key."""
    return urllib.parse.urlsplit(url)._replace(query="", fragment="").geturl()
