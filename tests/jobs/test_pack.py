"""`jobs/pack.py` as a person calls it: killed, continued, verified."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from deta.jobs.pack import main
from deta.platform.data.coco_dataset import CocoDataset
from deta.platform.shards.open_dataset import open_dataset

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def loose(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """60 images of about 480 kB, so that packing takes a while."""
    folder = tmp_path_factory.mktemp("loose")
    random = np.random.default_rng(0)
    images, annotations = [], []
    for index in range(60):
        pixels = random.integers(0, 256, (400, 400, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.bmp")
        images.append({"id": index, "file_name": f"{index}.bmp", "width": 400, "height": 400})
        one = {"id": index, "image_id": index, "category_id": 1, "bbox": [1, 2, 30, 40]}
        annotations.append(one)
    path = folder / "annotations.json"
    coco = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "x"}]}
    path.write_text(json.dumps(coco))
    return folder, path


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "jobs/pack.py", *map(str, arguments)]


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> int:
    """The exit code, in this process: PyTorch takes seconds to import."""
    monkeypatch.setattr(sys, "argv", ["pack.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        main()
    assert isinstance(caught.value.code, int)
    return caught.value.code


def test_a_killed_pack_goes_on_and_verifies(loose, tmp_path, monkeypatch, capsys):
    images, annotations = loose
    output = tmp_path / "shards"
    packing = command(
        "--images", images, "--annotations", annotations, "--out", output, "--shard-mb", "1"
    )
    process = subprocess.Popen(
        packing, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline_s = time.monotonic() + 240
    while len(list(output.glob("shard-*.parquet"))) < 3:  # of 30
        assert process.poll() is None
        assert time.monotonic() < deadline_s
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (output / "MANIFEST.json").exists()
    with pytest.raises(ValueError, match="is an incomplete pack"):
        open_dataset(output)
    before = {path.name: path.stat().st_mtime_ns for path in output.glob("shard-*.parquet")}

    code = run(monkeypatch, *packing[2:])

    captured = capsys.readouterr()
    assert code == 0, captured.err
    kept = [name for name, time_ns in before.items()
            if (output / name).stat().st_mtime_ns == time_ns]  # fmt: skip
    assert len(kept) >= 2  # the last one may be written but not yet recorded
    assert f"{len(kept)} existed already" in captured.out
    whole, packed = CocoDataset.open(images, annotations), open_dataset(output)
    assert packed.fingerprint == whole.fingerprint
    assert all(packed.content(i) == whole.content(i) for i in range(60))
    assert not list(output.glob(".*"))
    assert run(monkeypatch, "--verify", output) == 0
    assert "as they were packed" in capsys.readouterr().out

    shard = output / "shard-00004.parquet"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 4
    shard.write_bytes(content)
    assert run(monkeypatch, "--verify", output) == 2
    assert "shard-00004.parquet: its SHA-256" in capsys.readouterr().err


def test_what_does_not_fit_is_refused_with_code_2(loose, monkeypatch, capsys):
    images, annotations = loose
    given = ["--images", images, "--annotations", annotations]
    assert run(monkeypatch, *given) == 2
    assert "give --images, --annotations and --out" in capsys.readouterr().err
    assert run(monkeypatch, *given, "--out", "s3://name:hunter2@bucket/shards") == 2
    captured = capsys.readouterr()
    assert "contains a password" in captured.err
    assert "hunter2" not in captured.err + captured.out

    text = json.loads(Path(annotations).read_text())
    text["images"][0]["width"] += 1
    wrong = Path(annotations).with_name("wrong.json")
    wrong.write_text(json.dumps(text))
    given = ["--images", images, "--annotations", str(wrong), "--out", str(wrong.parent / "out")]
    assert run(monkeypatch, *given) == 2
    said = capsys.readouterr().err
    assert "pass --lenient to skip" in said
    assert "data.lenient" not in said
