"""Untrusted files are read with limits, and faults name the file."""

from __future__ import annotations

import gzip
import hashlib
import os
from pathlib import Path

import pytest

from deta.platform.system.safe_read import file_sha256, gunzip, read_bounded, read_json


def test_a_file_over_the_limit_is_refused_without_reading_it(tmp_path: Path):
    path = tmp_path / "sparse"
    with path.open("wb") as file:
        file.truncate(1 << 40)  # 1 TiB of zeros
    with pytest.raises(ValueError, match=r"sparse: has over 1,000 bytes"):
        read_bounded(path, 1000)
    path.write_bytes(bytes(1000))
    assert len(read_bounded(path, 1000)) == 1000


def test_what_is_not_a_file_is_refused(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe")  # opening it would block
    for path, kind in ((tmp_path, "folder"), (tmp_path / "pipe", "pipe"), (Path("/dev/zero"), "")):
        with pytest.raises(ValueError, match=rf"{kind}.*not a file"):
            read_bounded(path, 1000)
    with pytest.raises(FileNotFoundError):
        read_bounded(tmp_path / "absent", 1000)


@pytest.mark.parametrize("content", [b"[" * 1_000_000, b"{", b"\xff\xfe", b""])
def test_damaged_json_is_a_value_error(tmp_path: Path, content: bytes):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"."):
        read_json(path)
    path.write_bytes(b'{"a": [1]}')
    assert read_json(path) == {"a": [1]}


def test_a_gzip_bomb_stops_at_the_limit():
    bomb = gzip.compress(bytes(100_000_000))
    with pytest.raises(ValueError, match="over 1,000,000 bytes when decompressed"):
        gunzip(bomb, 1_000_000)
    with pytest.raises(ValueError, match="ends too early"):
        gunzip(gzip.compress(b"x" * 1000)[:-9], 10_000)
    assert gunzip(gzip.compress(b"x" * 1000), 1000) == b"x" * 1000


def test_the_hash_is_that_of_the_content(tmp_path: Path):
    (tmp_path / "file").write_bytes(b"abc" * 100_000)
    assert file_sha256(tmp_path / "file") == hashlib.sha256(b"abc" * 100_000).hexdigest()
