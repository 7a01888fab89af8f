"""Download a file: complete and with the pinned hash, or an error that names the problem.

Received bytes are kept, so an interrupted download resumes in the next attempt or the next
process. In the cache folder, each URL has a folder of its own:

    weights.pth             the file, once it is complete and has the pinned hash
    weights.pth.json        its URL, size and SHA-256
    .weights.pth.part       the bytes received so far
    .weights.pth.part.json  the version of the file that they belong to (ETag, date, size)
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
import socket
import ssl
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, NoReturn

from tqdm import tqdm

from deta.platform.system.atomic_write import force_to_disk
from deta.platform.system.safe_read import file_sha256

MAX_BYTES = 20 * 2**30  # DETA with Swin-L and its optimizer is 2.6 GB
CHUNK_BYTES = 2**20
ATTEMPTS = 4  # in a row without a byte; any progress resets the count
FIRST_WAIT_S, LONGEST_WAIT_S = 1.0, 30.0  # backoff before a retry; doubles each time
TIMEOUT_S = 30.0  # without a byte
RETRIED = (408, 425, 429, 500, 502, 503, 504)
_PIN = re.compile(r"sha256=([0-9a-fA-F]{64})")


class DownloadError(RuntimeError):
    """A download failed. The message has the URL, the reason and what to do next."""


@dataclass(frozen=True)
class _Version:
    """The version of a file at a URL that received bytes belong to."""

    etag: str
    modified: str
    total_bytes: int | None

    @property
    def validator(self) -> str:
        """Return the value for `If-Range`; a weak ETag does not identify the bytes."""
        return self.etag if self.etag and not self.etag.startswith("W/") else self.modified


class _ConnectionCut(Exception):
    """The connection ended before the file did."""


class _VersionChanged(Exception):
    """The server has another version of the file than the received bytes."""


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
    timeout_s: float = TIMEOUT_S,
) -> Path:
    """Download a URL unless it is cached; return the local file.

    Args:
        url: http or https. `#sha256=` and 64 digits at its end pin the content.
        folder: the cache, see `cache_folder`.
        echo: receives the hash of a file that is not pinned, and notes about waiting.

    Raises:
        ValueError: such a URL is not allowed.
        DownloadError: no connection, no such file, too large, or not the pinned content. Received
            bytes are never deleted.
    """
    address, pinned = _split(url)
    name = Path(urllib.parse.unquote(urllib.parse.urlsplit(address).path)).name
    name = "download" if name in ("", "..") else name
    key = hashlib.sha256(address.encode()).hexdigest()[:16]
    place = (folder or cache_folder()) / key
    place.mkdir(parents=True, exist_ok=True)
    path = place / name
    with _locked(place, address, echo):
        if not path.exists():
            job = _Download(address, path, echo, max_bytes, timeout_s)
            job.run(attempts, first_wait_s)
            _finish(job, path, pinned)
        _verify(address, path, pinned, echo)
    return path


def _split(url: str) -> tuple[str, str | None]:
    """Return the URL without its fragment, and the SHA-256 that the fragment pins."""
    parts = urllib.parse.urlsplit(url)
    shown = parts._replace(query="", fragment="").geturl()
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


def _finish(job: _Download, path: Path, pinned: str | None) -> None:
    """Rename the received file to its final name if it has the pinned hash."""
    found = file_sha256(job.part)
    if pinned is not None and found != pinned:
        kept = path.with_name(f"{path.name}.not-{pinned[:8]}")
        os.replace(job.part, kept)
        job.version_file.unlink(missing_ok=True)
        raise DownloadError(
            f"{_shown(job.url)}: its SHA-256 is {found}, pinned is {pinned}. The "
            f"received file ({kept.stat().st_size:,} bytes) is kept as {kept} and not used. It was "
            "replaced at its source or changed on the way: ask its publisher"
        )
    record = {"url": job.url, "bytes": job.part.stat().st_size, "sha256": found}
    record_path = path.with_name(f"{path.name}.json")
    record_path.write_text(json.dumps(record, indent=2), encoding="utf-8")
    force_to_disk(job.part)
    os.replace(job.part, path)
    job.version_file.unlink(missing_ok=True)


def _verify(url: str, path: Path, pinned: str | None, echo: Callable[[str], None]) -> None:
    """Compare the cached file with the pin, or print how to pin it."""
    found = file_sha256(path)
    if pinned is None:
        echo(
            f"{_shown(url)}: {path}, {path.stat().st_size:,} bytes. Its content is not pinned; to "
            f"get the same file or an error, append #sha256={found}"
        )
    elif found != pinned:
        raise DownloadError(
            f"{path}: its SHA-256 is {found}, pinned is {pinned}; the file was changed, or "
            "another version was downloaded before. Move it away to download it again"
        )


class _Download:
    """The download of one file."""

    def __init__(
        self,
        url: str,
        path: Path,
        echo: Callable[[str], None],
        max_bytes: int,
        timeout_s: float,
    ) -> None:
        self.url, self.echo, self.max_bytes, self.timeout_s = url, echo, max_bytes, timeout_s
        self.part = path.with_name(f".{path.name}.part")
        self.version_file = path.with_name(f".{path.name}.part.json")
        self.opener = urllib.request.build_opener(_WebRedirects)

    def run(self, attempts: int, first_wait_s: float) -> None:
        failures, furthest = 0, self._num_bytes()
        while True:
            wait_s = min(first_wait_s * 2**failures, LONGEST_WAIT_S)
            try:
                self._receive()
                return
            except _VersionChanged:
                self._discard_part()
                problem = "the server has another version of the file than the received bytes"
            except urllib.error.HTTPError as error:
                if error.code not in RETRIED:
                    self._refuse_answer(error)
                problem = f"the server answers {error.code} {error.reason}"
                retry_after_s = _seconds(error.headers.get("Retry-After"))
                wait_s = max(wait_s, min(retry_after_s, LONGEST_WAIT_S))
            except (_ConnectionCut, OSError, http.client.HTTPException) as error:
                problem = _reason(error)
            failures = 0 if self._num_bytes() > furthest else failures + 1
            furthest = max(furthest, self._num_bytes())
            if failures >= attempts:
                raise DownloadError(
                    f"{_shown(self.url)}: {problem}, {failures} times in a row; "
                    f"{self._num_bytes():,} bytes were received and are kept. Check the connection "
                    "and the address and try again: the download resumes there. Without a "
                    "connection, copy the file here by other means and give its path"
                )
            self.echo(f"{_shown(self.url)}: {problem}; trying again in {wait_s:.0f} s")
            time.sleep(wait_s)

    def _receive(self) -> None:
        """Request the rest of the file once and write it."""
        known, start = self._known_version(), self._num_bytes()
        request = urllib.request.Request(
            self.url, headers={"User-Agent": "deta-platform", "Accept-Encoding": "identity"}
        )
        if start and known is not None:
            request.add_header("Range", f"bytes={start}-")
            request.add_header("If-Range", known.validator)
        try:
            response = self.opener.open(request, timeout=self.timeout_s)
        except urllib.error.HTTPError as error:
            total = re.fullmatch(r"bytes \*/(\d+)", error.headers.get("Content-Range") or "")
            if error.code == 416 and start:
                if total and int(total[1]) == start and _same(known, _version(error, start)):
                    return  # it was complete already
                raise _VersionChanged from error
            raise
        with response:
            if response.status == 206:
                first, total_bytes = _range(response.headers.get("Content-Range") or "")
                version = _version(response, total_bytes)
                if first != start or not _same(known, version):
                    raise _VersionChanged
            else:  # the whole file, whatever range was requested
                start = 0
                version = _version(response, _length(response.headers.get("Content-Length")))
            self._check(response, version, start)
            self.version_file.write_text(json.dumps(asdict(version)), encoding="utf-8")
            self._copy(response, version.total_bytes, start)

    def _copy(self, response: IO[bytes], total_bytes: int | None, start: int) -> None:
        with (
            self.part.open("r+b" if start else "wb") as file,
            # disable=None: no bar unless stderr is a terminal
            tqdm(
                total=total_bytes,
                initial=start,
                unit="B",
                unit_scale=True,
                unit_divisor=1024,
                desc=self.part.name[1 : -len(".part")],
                disable=None,
            ) as bar,
        ):
            file.seek(start)
            arrived = start
            while chunk := response.read1(CHUNK_BYTES):  # type: ignore[attr-defined]
                arrived += len(chunk)
                if arrived > self.max_bytes or arrived > (total_bytes or arrived):
                    self._refuse_size(arrived)
                file.write(chunk)
                bar.update(len(chunk))
        if total_bytes is not None and arrived < total_bytes:
            raise _ConnectionCut(f"the connection ended after {arrived:,} of {total_bytes:,} bytes")

    def _check(self, response: http.client.HTTPResponse, version: _Version, start: int) -> None:
        """Refuse a wrong or oversized response before writing anything."""
        if (response.headers.get_content_type() or "") == "text/html":
            raise DownloadError(
                f"{_shown(self.url)}: returns a web page, not a file; such an address needs a "
                "log-in or a click. Download it with a browser and give the file's path"
            )
        if version.total_bytes is None:
            return
        if version.total_bytes > self.max_bytes:
            self._refuse_size(version.total_bytes)
        free = shutil.disk_usage(self.part.parent).free
        if version.total_bytes - start > free:
            raise DownloadError(
                f"{_shown(self.url)}: {version.total_bytes:,} bytes do not fit on the disk of "
                f"{self.part.parent}, which has {free:,} left; make room, or set XDG_CACHE_HOME"
            )

    def _refuse_size(self, num_bytes: int) -> NoReturn:
        raise DownloadError(
            f"{_shown(self.url)}: has {num_bytes:,} bytes or more, the limit is "
            f"{self.max_bytes:,}; if this is right, download it by other means and give its path"
        )

    def _refuse_answer(self, error: urllib.error.HTTPError) -> NoReturn:
        advice = {
            401: "it needs a log-in; download it with a browser and give the file's path",
            403: "it needs a log-in; download it with a browser and give the file's path",
            404: "there is no such file; check the address",
            410: "the file was removed; look for another address",
        }.get(error.code, "check the address")
        raise DownloadError(
            f"{_shown(self.url)}: the server answers {error.code} {error.reason}: {advice}"
        ) from error

    def _known_version(self) -> _Version | None:
        """Return the version of the received bytes if a download of it can be resumed."""
        try:
            version = _Version(**json.loads(self.version_file.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None
        return version if version.validator else None

    def _num_bytes(self) -> int:
        return self.part.stat().st_size if self.part.exists() else 0

    def _discard_part(self) -> None:
        self.part.unlink(missing_ok=True)
        self.version_file.unlink(missing_ok=True)


class _WebRedirects(urllib.request.HTTPRedirectHandler):
    """Follow redirects within a scheme and from http to https, never back."""

    def redirect_request(self, request, fp, code, message, headers, new_url):
        scheme = urllib.parse.urlsplit(new_url).scheme
        if scheme != "https" and scheme != urllib.parse.urlsplit(request.full_url).scheme:
            raise DownloadError(
                f"{_shown(request.full_url)}: the server redirects to {_shown(new_url)}, which is "
                "less safe; give that address yourself if it is right"
            )
        return super().redirect_request(request, fp, code, message, headers, new_url)


def _version(
    response: http.client.HTTPResponse | urllib.error.HTTPError, total: int | None
) -> _Version:
    headers = response.headers
    return _Version(headers.get("ETag") or "", headers.get("Last-Modified") or "", total)


def _same(known: _Version | None, answer: _Version) -> bool:
    """Return whether two versions match in every field that both of them have."""
    return known is not None and all(
        not theirs or not ours or theirs == ours
        for theirs, ours in zip(asdict(answer).values(), asdict(known).values(), strict=True)
    )


def _range(text: str) -> tuple[int | None, int | None]:
    found = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", text)
    if found is None:
        return None, None
    return int(found[1]), None if found[2] == "*" else int(found[2])


def _length(text: str | None) -> int | None:
    return int(text) if text and text.isdecimal() else None


def _seconds(text: str | None) -> float:
    return float(text) if text and text.isdecimal() else 0.0


def _reason(error: BaseException) -> str:
    cause = error.reason if isinstance(error, urllib.error.URLError) else error
    if isinstance(cause, ssl.SSLCertVerificationError):
        return f"the server's certificate is not trusted ({cause.verify_message})"
    if isinstance(cause, socket.gaierror):
        return "the server's name is not found: this machine seems to be offline"
    if isinstance(cause, TimeoutError):
        return "the server does not answer in time"
    return str(cause) or type(cause).__name__


def _shown(url: str) -> str:
    """Return a URL without its query, which may hold a key."""
    return urllib.parse.urlsplit(url)._replace(query="", fragment="").geturl()
