"""S15: hostile artifact names are refused, uploads are bounded, and some disk stays free."""

from __future__ import annotations

import errno
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from deta.platform.checkpoint import async_writer as checkpoint_writer
from deta.platform.checkpoint.async_writer import CheckpointWriter
from deta.platform.run.config import RunConfig, override
from deta.platform.system.artifact_names import artifact_fault
from deta.platform.tracking.upload_plan import UploadRecord
from deta.platform.tracking.uploader import MAX_FILES_BYTES, RunUploader

HOSTILE = [
    "../secret", "a/../../secret", "/etc/passwd", "..%2fsecret", "..%252f", "a#b", "a?b", "a;b",
    "file:///etc/passwd", "http://host/x", "..\\secret", "C:\\x", "a\0b", "a\nb", "", ".", "..",
    "a//b", "a/", "./a", "~/x", "a b", "$(id)", "x" * 129, "/".join("a" * 9), "ü.png", "a\u202eb",
]  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_name_is_no_artifact_and_no_run(name: str):
    assert artifact_fault(name)
    with pytest.raises(ValueError, match="name="):
        override(RunConfig(), {"name": name})


@pytest.mark.parametrize("name", [None, 3, ["a"], {"a": 1}])
def test_a_name_that_is_no_string_is_no_artifact(name: object):
    assert artifact_fault(name)


@pytest.mark.parametrize(
    "name", ["report.html", "pictures/validation-step-00000020.png", "x" * 128, "..a", "a..b/-c_D"]
)
def test_our_own_names_are_artifacts(name: str):
    assert artifact_fault(name) is None


class Store:
    """Records what the uploader sends in a list."""

    shown_uri = "nowhere"
    call_s = 0.0

    def __init__(self) -> None:
        self.sent: list[tuple[str, str]] = []

    def send_file(self, run_id: str, path: Path, folder: str) -> None:
        self.sent.append((path.name, folder))

    def set_tags(self, run_id: str, tags: dict[str, str]) -> None: ...


def sent(folder: Path, events: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """Return the files of a journal that reach MLflow."""
    record = UploadRecord()
    for number, event in enumerate(events):
        record.add({"time_s": 1.0, "step": 0, **event}, number + 1)
    store = Store()
    uploader = RunUploader(folder, store)  # type: ignore[arg-type]
    try:
        uploader.record = record
        list(uploader._send_files("run"))
    finally:
        uploader.close()
    return store.sent


def test_a_journal_cannot_send_files_from_or_to_other_folders(tmp_path: Path):
    folder = tmp_path / "run"
    folder.mkdir()
    (tmp_path / "secret").write_text("secret")
    (folder / "link").symlink_to(tmp_path / "secret")
    (folder / "report.html").write_text("report")
    events: list[dict[str, Any]] = [{"kind": "file", "path": name} for name in HOSTILE]
    events += [{"kind": "file", "path": "report.html", "to": name} for name in HOSTILE if name]
    events += [{"kind": "picture", "path": name} for name in (*HOSTILE, 3, None)]
    events += [{"kind": "file", "path": "link"}]

    assert sent(folder, events) == []
    assert sent(folder, [{"kind": "file", "path": "report.html", "to": "report"}]) == [
        ("report.html", "report")
    ]


def test_a_run_sends_at_most_the_limit_in_bytes(tmp_path: Path):
    for name, num_bytes in (("a", MAX_FILES_BYTES - 10), ("b", 11), ("c", 10)):
        with (tmp_path / name).open("wb") as file:
            file.truncate(num_bytes)  # sparse
    events = [{"kind": "file", "path": name} for name in "abc"]

    assert [name for name, _ in sent(tmp_path, events)] == ["a", "c"]


@pytest.mark.parametrize(
    ("total", "free", "fits"),
    [
        (10**9, 60 * 10**6, True),  # 50 MB are left, a twentieth
        (10**9, 59 * 10**6, False),
        (10**13, 1011 * 10**6, True),  # 1 GB is left
        (10**13, 1009 * 10**6, False),
    ],
)
def test_a_checkpoint_leaves_a_part_of_the_disk_free(
    total: int, free: int, fits: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    disk = SimpleNamespace(total=total, free=free)
    monkeypatch.setattr(checkpoint_writer.shutil, "disk_usage", lambda _: disk)
    writer = CheckpointWriter(tmp_path)
    snapshot: Any = SimpleNamespace(num_bytes=10**7)
    if fits:
        writer._require_room(snapshot)
    else:
        with pytest.raises(OSError, match="No space left") as caught:
            writer._require_room(snapshot)
        assert caught.value.errno == errno.ENOSPC
