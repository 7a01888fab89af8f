"""The files of a registered version: everything that predictions need, and no code.

    model.safetensors    the weights, byte for byte those of the checkpoint
    config.json          the whole configuration of the run
    state.json           step, metrics, classes
    classes.json         class index, id and name of each class
    preprocessing.json   what happens to an image before the model, and to its boxes after
    lineage.json         the origin of the model (lineage.py)
    figures.json         AP, size, latency, the check of the exported file
    MANIFEST.json        size and SHA-256 of each file

This is a checkpoint without the state of the optimizer, so both are opened the same way.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import shutil
import statistics
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from deta.model.batch import PIXEL_MEAN, PIXEL_STD
from deta.platform.checkpoint.format import (
    MANIFEST,
    Checkpoint,
    manifest_to_json,
    parse_manifest,
)
from deta.platform.checkpoint.host_snapshot import WrittenFile
from deta.platform.inference.export_check import OutputDifference
from deta.platform.inference.predictor import Predictor
from deta.platform.registry.lineage import Lineage
from deta.platform.registry.promotion_gate import Latency
from deta.platform.run.config import RunConfig, flatten
from deta.platform.system.safe_read import file_sha256

CARRIED_OVER = ("model.safetensors", "config.json", "state.json")
LINEAGE, FIGURES = "lineage.json", "figures.json"
EXPORT_REPORT = "model.json"  # of jobs/export.py
MEASURED_S = 2.0
IMAGE_SIZE_PX = (640, 480)  # width, height of the image with which latency is measured


@dataclass(frozen=True)
class VersionMetrics:
    """The measurements of a version, as figures.json has them."""

    ap: Mapping[str, float]  # the twelve COCO numbers of its evaluation, 0..1
    metrics: Mapping[str, float]  # when the checkpoint was saved, 0..100
    num_bytes: int  # of the file of the weights
    evaluation_sha256: str  # of evaluation.json, which has the hashes of the other files
    images_fingerprint: str
    latency: Latency | None = None
    export: Mapping[str, Any] | None = None  # see `read_export_report`


def write_version_files(
    folder: Path, checkpoint: Checkpoint, lineage: Lineage, metrics: VersionMetrics
) -> str:
    """Write the folder of a version, which must not exist yet.

    Returns:
        SHA-256 of its manifest.
    """
    folder.mkdir(parents=True)
    for name in CARRIED_OVER:
        shutil.copyfile(checkpoint.path / name, folder / name)
    classes = [{"index": i, **asdict(one)} for i, one in enumerate(checkpoint.categories)]
    documents = {
        "classes.json": classes,
        "preprocessing.json": preprocessing(checkpoint.config),
        LINEAGE: asdict(lineage),
        FIGURES: asdict(metrics),
    }
    for name, content in documents.items():
        (folder / name).write_text(json.dumps(content, indent=2), encoding="utf-8")
    files = {
        path.name: WrittenFile(path.stat().st_size, file_sha256(path)) for path in folder.iterdir()
    }
    manifest = manifest_to_json(checkpoint.state.step, files)
    (folder / MANIFEST).write_text(manifest, encoding="utf-8")
    expected = parse_manifest((checkpoint.path / MANIFEST).read_bytes(), checkpoint.path)
    for name in CARRIED_OVER:  # it may have changed while it was copied
        if files[name] != expected[name]:
            raise ValueError(f"{checkpoint.path / name}: has changed; use another checkpoint")
    return hashlib.sha256(manifest.encode()).hexdigest()


def read_documents(folder: Path) -> tuple[dict[str, Any], VersionMetrics]:
    """Read the lineage and the metrics in the folder of a version.

    Raises:
        ValueError: the folder is not that of a version.
    """
    try:
        lineage = json.loads((folder / LINEAGE).read_text(encoding="utf-8"))
        content = json.loads((folder / FIGURES).read_text(encoding="utf-8"))
        if content["latency"] is not None:
            content["latency"] = Latency(**content["latency"])
        return dict(lineage), VersionMetrics(**content)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{folder}: is not the folder of a registered version ({error}); register it again"
        ) from error


def preprocessing(config: RunConfig) -> dict[str, Any]:
    """Return what happens to an image before the model, and to its boxes after.

    It is for people and for code of others. This project uses the configuration itself.
    """
    size = config.data.evaluation_size
    return {
        "colour": "RGB, 8 bits a channel; the EXIF orientation is "
        + ("applied" if config.data.exif == "apply" else "ignored"),
        "sixteen_bit": config.data.sixteen_bit,
        "sixteen_bit_range": config.data.sixteen_bit_range,
        "resize": "bilinear, antialiased (PIL), the ratio is kept",
        "short_edge_px": size.short_edge,
        "max_long_edge_px": size.max_long_edge,
        "max_pixels": config.data.max_pixels,
        "scale": "1/255",
        "mean": PIXEL_MEAN,
        "std": PIXEL_STD,
        "boxes": "xyxy in pixels of the original image",
        "precision": config.precision,
        "postprocess": flatten(config.postprocess),
    }


def measure_latency(predictor: Predictor) -> Latency:
    """Time one image in memory through resizing, model and postprocessing.

    The image is grey, since the duration does not depend on the content.
    """
    image = Image.new("RGB", IMAGE_SIZE_PX, (127, 127, 127))
    predictor.predict([image])  # warm-up
    times_s: list[float] = []
    while len(times_s) < 3 or (sum(times_s) < MEASURED_S and len(times_s) < 50):
        began_s = time.perf_counter()
        predictor.predict([image])
        times_s.append(time.perf_counter() - began_s)
    return Latency(1000 * statistics.median(times_s), _device(predictor.device))


def read_export_report(folder: Path, weights_sha256: str) -> dict[str, Any]:
    """Read the comparison of exported files with the model that jobs/export.py wrote.

    Returns:
        Hash, size and difference of each file; `export_parity` evaluates them.

    Raises:
        ValueError: the folder is not from jobs/export.py, belongs to other weights, or its files
            are not those that were compared.
    """
    path = folder / EXPORT_REPORT
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        sha256, files = report["weights"]["sha256"], dict(report["files"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: is not what jobs/export.py writes ({error})") from error
    if sha256 != weights_sha256:
        raise ValueError(
            f"{folder}: was exported from other weights, SHA-256 {sha256[:12]}… instead of "
            f"{weights_sha256[:12]}…; export this checkpoint"
        )
    for name, about in files.items():
        if not (folder / name).is_file() or file_sha256(folder / name) != about["sha256"]:
            raise ValueError(f"{folder / name}: is not the file that was checked; export again")
    return {"weights_sha256": sha256, "files": files}


def export_parity(export: Mapping[str, Any] | None, weights_sha256: str) -> tuple[str, str]:
    """Return the result of the check of the exported files, and what is wrong; one is empty."""
    if export is None:
        return "", "no exported file was checked; jobs/register.py --export FOLDER"
    if export["weights_sha256"] != weights_sha256 or not export["files"]:
        return "", "the exported file has other weights"
    found = []
    for name, about in export["files"].items():
        if about["difference"] is None:
            return "", f"{name} was exported with --unverified"
        difference = OutputDifference(**about["difference"])
        if not difference.is_small:
            return "", f"{name}: {difference}"
        found.append(f"{name} scores {difference.scores:.0e}, boxes {difference.boxes:.0e} off")
    return ", ".join(found), ""


def _device(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = "CPU"
    with contextlib.suppress(OSError):  # not Linux
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        name = next(iter(re.findall(r"model name\s*: (.*)", text)), name).strip()
    threads = torch.get_num_threads()
    return f"{name}, {threads} thread{'s' * (threads > 1)}"
