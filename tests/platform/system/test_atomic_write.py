"""Files that are replaced completely or not at all."""

from __future__ import annotations

import errno
import json
import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from deta.platform.system import atomic_write
from deta.platform.system.atomic_write import replacing, write_atomic, write_json


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("content", ["ä line\n", b"\x00\xff", memoryview(b"abc")])
@pytest.mark.parametrize("durable", [False, True])
def test_the_file_holds_what_was_given_and_nothing_else_is_left(tmp_path, content, durable):
    path = tmp_path / "file"
    path.write_bytes(b"something longer than what replaces it")

    write_atomic(path, content, durable=durable)

    expected = content.encode() if isinstance(content, str) else bytes(content)
    assert path.read_bytes() == expected
    assert names(tmp_path) == ["file"]


def test_a_full_disk_leaves_the_old_content(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_text("old")

    def no_space(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(atomic_write.os, "fsync", no_space)
    with pytest.raises(OSError, match="No space"):
        write_atomic(path, "new", durable=True)

    assert path.read_text() == "old"
    assert names(tmp_path) == ["file"]


def test_an_error_in_the_block_leaves_the_old_content(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def write_half() -> None:
        with replacing(path) as unfinished:
            unfinished.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_half()

    assert path.read_text() == "old"
    assert names(tmp_path) == ["file"]


def test_durable_forces_the_content_before_the_name_and_then_the_name(tmp_path, monkeypatch):
    forced = []
    fsync = os.fsync

    def record(descriptor: int) -> None:
        place = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        forced.append((place.suffix if place.is_file() else place, (tmp_path / "f").exists()))
        fsync(descriptor)

    monkeypatch.setattr(atomic_write.os, "fsync", record)
    write_atomic(tmp_path / "f", "text", durable=True)
    assert forced == [(".unfinished", False), (tmp_path.resolve(), True)]

    write_atomic(tmp_path / "f", "text")
    assert len(forced) == 2


def test_the_mode_is_given_or_that_of_any_new_file(tmp_path):
    (tmp_path / "any").touch()
    write_atomic(tmp_path / "plain", "text")
    write_atomic(tmp_path / "secret", "text", mode=0o600)

    mode = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert mode["plain"] == mode["any"]
    assert mode["secret"] == 0o600


def test_readers_never_see_a_part_while_threads_write_one_file(tmp_path):
    path = tmp_path / "file.json"
    contents = [{"writer": number, "rows": [number] * 20_000} for number in range(4)]
    write_json(path, contents[0])

    def write(content: object) -> None:
        for _ in range(10):
            write_json(path, content)

    writers = [threading.Thread(target=write, args=(content,)) for content in contents]
    for writer in writers:
        writer.start()
    num_reads = 0
    while any(writer.is_alive() for writer in writers):
        assert json.loads(path.read_text()) in contents
        num_reads += 1
    assert num_reads
    assert names(tmp_path) == ["file.json"]


def test_a_killed_writer_leaves_the_old_content(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    code = (
        "import os, sys; from pathlib import Path\n"
        "from deta.platform.system.atomic_write import replacing\n"
        "with replacing(Path(sys.argv[1])) as unfinished:\n"
        "    unfinished.write_text('half')\n"
        "    os.kill(os.getpid(), 9)\n"
    )
    assert subprocess.run([sys.executable, "-c", code, str(path)]).returncode == -9
    assert path.read_text() == "old"
    assert [name.rpartition(".")[2] for name in names(tmp_path)] == ["unfinished", "file"]


def test_json_is_indented_where_people_read_it(tmp_path):
    write_json(tmp_path / "a.json", {"b": [1]})
    assert (tmp_path / "a.json").read_text() == '{"b": [1]}'
    write_json(tmp_path / "a.json", {"b": 1}, indent=2)
    assert (tmp_path / "a.json").read_text() == '{\n  "b": 1\n}'
