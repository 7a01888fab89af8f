#!/usr/bin/env python
"""Export a trained model to files that need none of this package, and check them.

  python jobs/export.py ~/deta-runs/deta-r50-12ep --check-images val2017 --out exported

WEIGHTS is as for jobs/evaluate.py: a run, a checkpoint or a file of published weights. The files in
--out are

  model.pt2   a torch.export program; needs torch alone
  model.onnx  operator set 18, standard operators only; needs any ONNX runtime
  model.json  classes, preprocessing, configuration, SHA-256 of the weights and of the
              files, versions, and the result of the check

Both take `images` (B 3 H W, uint8 RGB), `sizes_px` (B 2) and `original_sizes_px` (B 2, int64,
height before width) and give `scores` (B N), `labels` (B N, class index) and `boxes_px` (B N 4,
xyxy in pixels of the original image); unused slots have the label -1. Batch and size are free.
Normalisation and suppression are part of the model. Only the resizing is not:

  import json, numpy as np, onnxruntime
  from PIL import Image
  about = json.load(open("exported/model.json"))
  short, long = about["input"]["short_edge"], about["input"]["max_long_edge"]
  image = Image.open("photo.jpg").convert("RGB")
  scale = min(short / min(image.size), long / max(image.size))
  size = [round(edge * scale) for edge in image.size]
  pixels = np.asarray(image.resize(size, Image.BILINEAR))
  inputs = {"images": pixels.transpose(2, 0, 1)[None], "sizes_px": np.array([pixels.shape[:2]]),
            "original_sizes_px": np.array([image.size[::-1]])}
  scores, labels, boxes_px = onnxruntime.InferenceSession("exported/model.onnx").run(None, inputs)

The same arrays, as torch tensors, go into torch.export.load("exported/model.pt2").module().

The images of --check-images go through the model and through each file, one by one and in
batches of different sizes. A file whose detections differ by more than 0.001 in a score or 0.001 of
the longer side in a box is deleted, and the exit code is 1.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

from deta.jobs.command_line import OUTPUT, echo, run_tool
from deta.jobs.model_options import (
    PREDICTION_KEYS,
    ModelOptions,
    open_predictor,
    read_model_options,
    require_weights,
)
from deta.platform.system.atomic_write import write_json

if TYPE_CHECKING:
    from PIL import Image

    from deta.platform.inference.export_check import OutputDifference, RuntimeSpeed
    from deta.platform.inference.exported_model import PackedImages
    from deta.platform.inference.predictor import Predictor

FILE_NAMES = {"pt2": "model.pt2", "onnx": "model.onnx"}
PACKAGES = ("deta-platform", "torch", "torchvision", "timm", "onnx", "onnxruntime")


@dataclass(frozen=True, kw_only=True)
class ExportOptions(ModelOptions):
    out: Annotated[Path, OUTPUT]  # a folder
    format: Literal["pt2", "onnx"] | None = None  # write only this file
    check_images: tuple[str, ...] = ()  # real images: files, folders or quoted patterns
    check_first: int = 20  # images to check
    check_batch: int = 4  # images per batch
    unverified: bool = False  # write the files without checking them


def main() -> NoReturn:
    options, changes = read_model_options(ExportOptions, __doc__, PREDICTION_KEYS)
    run_tool(lambda: _prepare(options, changes), lambda opened: _export(*opened, options))


def _prepare(options: ExportOptions, changes: dict[str, str]) -> tuple[Predictor, list[Path]]:
    require_weights(options.weights)
    from deta.platform.inference.image_paths import find_images

    if bool(options.check_images) == options.unverified:
        raise ValueError(
            "give images to check the files with: --check-images IMAGE …; or add --unverified"
        )
    if options.check_first < 1 or options.check_batch < 1:
        raise ValueError("--check-first and --check-batch must be at least 1")
    if options.out.is_file():
        raise ValueError(f"{options.out}: is a file; name a folder")
    if changes.setdefault("precision", "fp32") != "fp32":
        raise ValueError("precision: files are exported in fp32; leave this key out")
    if options.format != "pt2":
        _require_onnx()
    paths = [file.path for file in find_images(options.check_images, echo)]
    number = min(options.check_first, len(paths))
    paths = [paths[i * len(paths) // number] for i in range(number)]  # evenly spread
    predictor = open_predictor(options, changes)
    from deta.platform.inference.batching import check_headers

    check_headers(paths, predictor.config.data.max_pixels)
    return predictor, paths


def _export(predictor: Predictor, paths: list[Path], options: ExportOptions) -> int:
    import torch

    from deta.platform.data.image_decoding import decode
    from deta.platform.inference.export import least_side_px, trace_detector, write_onnx
    from deta.platform.inference.export_check import measure_runtime_speed, run_eagerly
    from deta.platform.inference.exported_model import pack_images
    from deta.platform.pages.number_format import duration
    from deta.platform.system.safe_read import file_sha256

    data, device = predictor.config.data, predictor.device.type
    echo(f"model: {predictor.description}")
    echo("tracing; a model of the published size takes minutes …")
    began_s = time.perf_counter()
    program = trace_detector(predictor.model, predictor.config.postprocess, predictor.device)
    echo(f"traced in {duration(time.perf_counter() - began_s)}")
    images = [decode(path, data.max_pixels, data.pixel_rules) for path in paths]
    least = least_side_px(predictor.model.config)
    pack = partial(pack_images, size=data.evaluation_size, least_side_px=least)
    eager_speed = None
    if images:
        eager_speed = measure_runtime_speed(partial(run_eagerly, predictor), pack(images[:1]))
        echo(f"the model itself, on {device}: {eager_speed}")

    options.out.mkdir(parents=True, exist_ok=True)
    files: dict[str, dict[str, Any]] = {}
    formats = [options.format] if options.format else list(FILE_NAMES)
    with tempfile.TemporaryDirectory(prefix=".unfinished-", dir=options.out) as folder:
        for format_ in formats:
            path = Path(folder) / FILE_NAMES[format_]
            began_s = time.perf_counter()
            if format_ == "pt2":
                torch.export.save(program, path)
            else:
                write_onnx(program, path)
            num_bytes = path.stat().st_size
            took = duration(time.perf_counter() - began_s)
            echo(f"{path.name}: {num_bytes / 1e6:.1f} MB in {took}")
            about = {
                "sha256": file_sha256(path),
                "bytes": num_bytes,
                "device": "any" if format_ == "onnx" else device,
                "difference": None,
                "speed": None,
            }
            if images:
                difference, speed = _check(path, predictor, pack, images, options.check_batch)
                if not difference.is_small:
                    echo(f"{path.name}: DELETED, its detections differ from the model's")
                    continue
                about |= {"difference": asdict(difference), "speed": asdict(speed)}
            files[path.name] = about
        for name in files:
            shutil.move(Path(folder) / name, options.out / name)
    if files:
        measured = {
            "verified": bool(images),
            "files": files,
            "eager_speed": None if eager_speed is None else asdict(eager_speed),
        }
        write_json(options.out / "model.json", measured | _about(predictor, least))
    if not images:
        echo("NOT VERIFIED: no image was checked")
    echo(f"{', '.join(files) or 'nothing'}: {options.out}")
    return 0 if len(files) == len(formats) else 1


def _check(
    path: Path,
    predictor: Predictor,
    pack: Callable[[Sequence[Image.Image]], PackedImages],
    images: Sequence[Image.Image],
    batch_size: int,
) -> tuple[OutputDifference, RuntimeSpeed]:
    """Compare an exported file with the model, alone and in batches, and time it."""
    from deta.platform.inference.export_check import (
        OutputDifference,
        compare_detections,
        measure_runtime_speed,
        run_eagerly,
    )
    from deta.platform.inference.exported_model import open_onnx, open_program, unpack_detections

    run = open_onnx(path) if path.suffix == ".onnx" else open_program(path, predictor.device)
    limit = predictor.config.postprocess.max_detections
    difference = OutputDifference()
    for batch in (images[i : i + n] for n in (1, batch_size) for i in range(0, len(images), n)):
        packed = pack(batch)
        pairs = zip(run_eagerly(predictor, packed), unpack_detections(*run(packed)), strict=True)
        for image, (one, other) in zip(batch, pairs, strict=True):
            difference += compare_detections(one, other, (image.height, image.width), limit)
    echo(f"{path.name}: largest differences: {difference}")
    speed = measure_runtime_speed(run, pack(images[:1]))
    echo(f"{path.name}: {speed}")
    return difference, speed


def _about(predictor: Predictor, least_side_px: int) -> dict[str, Any]:
    """Return what model.json says of the model, apart from the check."""
    from importlib.metadata import distributions

    from deta.platform.inference.export import ONNX_OPSET
    from deta.platform.inference.export_check import MAX_BOX_DIFFERENCE, MAX_SCORE_DIFFERENCE
    from deta.platform.run.config import flatten

    size = predictor.config.data.evaluation_size
    return {
        "weights": {"description": predictor.description, "sha256": predictor.weights_sha256},
        "allowed_difference": {"scores": MAX_SCORE_DIFFERENCE, "boxes": MAX_BOX_DIFFERENCE},
        "input": {
            "images": "B 3 H W, uint8, RGB, each resized image at the top left",
            "sizes_px": "B 2, int64, (height, width) of each resized image",
            "original_sizes_px": "B 2, int64, (height, width) before it was resized",
            "resize": "bilinear, antialiased (PIL); keep the ratio; ignore the EXIF orientation",
            "short_edge": size.short_edge,
            "max_long_edge": size.max_long_edge,
            "least_height_and_width": least_side_px,
        },
        "output": {
            "scores": "B N, float32, best first",
            "labels": "B N, int64, index among the classes; -1 where there is no detection",
            "boxes_px": "B N 4, float32, xyxy in pixels of the original image",
        },
        "classes": [asdict(category) for category in predictor.categories],
        "config": flatten(predictor.config),
        "onnx_opset": ONNX_OPSET,
        "versions": {one.name: one.version for one in distributions() if one.name in PACKAGES},
    }


def _require_onnx() -> None:
    from importlib.util import find_spec

    packages = ("onnx", "onnxscript", "onnxruntime")
    if missing := [package for package in packages if find_spec(package) is None]:
        raise ValueError(
            f"ONNX needs {', '.join(missing)}: pip install 'deta-platform[export]', or take "
            "--format pt2"
        )


if __name__ == "__main__":
    main()
