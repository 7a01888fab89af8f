#!/usr/bin/env python
"""Detect objects in images: draw their boxes and list all detections.

  python jobs/predict.py ~/deta-runs/deta-r50-12ep holiday.jpg street/ --output found

WEIGHTS is as for jobs/evaluate.py: a run, a checkpoint or a file of published weights. Images are
files, folders (with all folders below them), or patterns in quotes, such as
'street/**/*.jpg'. The files in --output are

  pictures/           each image with its boxes, with a score of at least --threshold
  results.json        all detections of any score, up to 100 per image, as COCO results
  images.json         the file of each image_id, as COCO images and categories
  detections.parquet  the same detections as a table (platform/evaluation/detections_parquet.py)

Detections do not depend on --batch-size, up to the order of float32 sums: only images of equal size
form a batch, so none is padded.

--annotations names a COCO file that lists the images and so gives their ids. For a published file
with a row for every COCO id it also gives class names; otherwise classes are shown as row numbers.

An image with a broken header is an error before anything runs. An image that turns out damaged
later is reported, listed in images.json as unreadable, and makes the exit code 1.
"""

from __future__ import annotations

import glob
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from tyro.conf import Positional

from deta.jobs.command_line import echo, run_tool
from deta.jobs.model_options import (
    PREDICTION_KEYS,
    ModelOptions,
    open_predictor,
    read_model_options,
)
from deta.platform.system.atomic_write import write_json

if TYPE_CHECKING:
    from deta.model.postprocess import Detections
    from deta.platform.inference.predictor import Predictor

WRITTEN_SUFFIXES = frozenset({".jpg", ".jpeg", ".png"})  # others get .png added
JPEG_QUALITY = 92


@dataclass(frozen=True)
class _Image:
    path: Path
    name: str  # below the folder that was given
    image_id: int
    target: Path  # of the image with its boxes


@dataclass(frozen=True, kw_only=True)
class PredictOptions(ModelOptions):
    image: Positional[tuple[str, ...]] = ()  # files, folders or quoted patterns
    output: Path  # a folder
    threshold: float = 0.3  # least score to draw
    annotations: Path | None = None  # a file, COCO format
    batch_size: int = 1  # images of equal size per batch; does not change the results
    no_pictures: bool = False  # draw no images, which is faster


def main() -> NoReturn:
    options, changes = read_model_options(PredictOptions, __doc__, PREDICTION_KEYS)
    run_tool(lambda: _prepare(options, changes), lambda opened: _predict(*opened, options))


def _prepare(options: PredictOptions, changes: dict[str, str]) -> tuple[Predictor, list[_Image]]:
    from deta.platform.inference.batching import check_headers
    from deta.platform.inference.image_paths import read_listing

    if not 0 <= options.threshold <= 1:
        raise ValueError(f"--threshold {options.threshold} is not in 0..1")
    if options.batch_size < 1:
        raise ValueError(f"--batch-size {options.batch_size} must be at least 1")
    if not options.image:
        raise ValueError("no images are given; name files or folders")
    named_files = _find_pictures(options.image, options.output)

    categories, image_ids = None, None
    if options.annotations is not None:
        categories, image_ids = read_listing(options.annotations)
    image_files = _number(named_files, options.output, options.annotations, image_ids)
    predictor = open_predictor(options, changes, categories)
    if categories is not None:
        predictor.check_categories(categories, str(options.annotations))
    check_headers([image_file.path for image_file in image_files], predictor.config.data.max_pixels)
    (options.output if options.no_pictures else options.output / "pictures").mkdir(
        parents=True, exist_ok=True
    )
    return predictor, image_files


def _predict(predictor: Predictor, image_files: list[_Image], options: PredictOptions) -> int:
    from deta.platform.data.image_decoding import ImageError
    from deta.platform.data.progress import progress_bar
    from deta.platform.evaluation.coco_metrics import to_coco_results
    from deta.platform.evaluation.detections_parquet import DetectionTable

    echo(f"model: {predictor.description}")
    by_path = {image_file.path: image_file for image_file in image_files}
    results: list[dict[str, Any]] = []
    images: list[dict[str, Any]] = []
    unreadable: list[dict[str, Any]] = []
    num_width = len(str(len(image_files)))

    def print_line(text: str) -> None:
        number = len(images) + len(unreadable)
        echo(f"{number:>{num_width}}/{len(image_files)}  {text}")
        advance(1)

    def on_unreadable(path: Path, error: ImageError) -> None:
        unreadable.append(_entry(by_path[path]) | {"reason": str(error)})
        print_line(f"not readable: {error}")

    began_s = time.perf_counter()
    table = DetectionTable(
        options.output / "detections.parquet", predictor.categories, predictor.weights_sha256
    )
    with progress_bar("images", len(image_files)) as advance, table:
        for path, found in predictor.predict_files(
            by_path, batch_size=options.batch_size, on_unreadable=on_unreadable
        ):
            image_file = by_path[path]
            width, height = _draw(image_file, found, predictor, options)
            results += to_coco_results(found, image_file.image_id, predictor.category_ids)
            table.add(str(path), image_file.image_id, found)
            images.append(_entry(image_file) | {"width": width, "height": height})
            shown = found.labels[found.scores >= options.threshold].tolist()
            print_line(f"{image_file.name}  {_counts(shown, predictor.names)}")
    elapsed_s = time.perf_counter() - began_s

    categories = [{"id": c.id, "name": c.name} for c in predictor.categories]
    listing = {
        "images": images,
        "annotations": [],
        "categories": categories,
        "unreadable": unreadable,
    }
    write_json(options.output / "images.json", listing)
    write_json(options.output / "results.json", results)
    echo("")
    echo(
        f"{len(images)} images, {len(images) / elapsed_s:.1f} images/s on "
        f"{predictor.device.type}: {options.output}"
    )
    if unreadable:
        echo(f"{len(unreadable)} of {len(image_files)} images could not be read, see above")
    return 1 if unreadable else 0


def _draw(
    image_file: _Image, found: Detections, predictor: Predictor, options: PredictOptions
) -> tuple[int, int]:
    """Draw an image with its boxes unless --no-pictures. Returns its (width, height)."""
    from deta.platform.data.draw_boxes import draw_detections
    from deta.platform.data.image_decoding import decode, read_header

    max_pixels = predictor.config.data.max_pixels
    if options.no_pictures:
        header = read_header(image_file.path, max_pixels)
        return header.width, header.height
    # Decoded again: images are large, and detections only need their size.
    image = decode(image_file.path, max_pixels)
    shown = found.scores >= options.threshold
    drawing = draw_detections(
        image, found.boxes_px[shown], found.labels[shown], found.scores[shown], predictor.names
    )
    image_file.target.parent.mkdir(parents=True, exist_ok=True)
    drawing.save(image_file.target, quality=JPEG_QUALITY)
    return image.width, image.height


def _find_pictures(texts: Sequence[str], output: Path) -> list[tuple[str, Path]]:
    """Find each image file once, with its name, except those that this job writes."""
    from deta.platform.inference.image_paths import find_images

    for text in texts:
        if "=" in text and not glob.has_magic(text) and not Path(text).exists():
            raise ValueError(f"{text}: there is no such file, folder or configuration key")
    found = find_images(texts, echo)
    own = output.resolve()
    if inside := [file.path for file in found if file.path.resolve().is_relative_to(own)]:
        raise ValueError(
            f"{inside[0]}: lies in --output {output}, where it could be overwritten; choose "
            "another folder"
        )
    return [(file.name, file.path) for file in found]


def _number(
    named_files: Sequence[tuple[str, Path]],
    output: Path,
    annotations: Path | None,
    image_ids: dict[str, int] | None,
) -> list[_Image]:
    """Give each image its id (by name if there are annotations) and its output path."""
    if image_ids is None:
        ids = list(range(1, len(named_files) + 1))
    else:
        by_last_part: dict[str, list[int]] = {}
        for name, image_id in image_ids.items():
            by_last_part.setdefault(name.rpartition("/")[2], []).append(image_id)
        ids, missing = [], []
        for name, path in named_files:
            candidates = by_last_part.get(path.name, [])
            if name in image_ids:
                ids.append(image_ids[name])
            elif len(candidates) == 1:
                ids.append(candidates[0])
            else:
                missing.append(str(path))
        if missing:
            more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
            raise ValueError(
                f"{annotations}: does not list the images {', '.join(missing[:5])}{more}; "
                "leave out --annotations, or these images"
            )
    image_files = []
    by_target: dict[Path, _Image] = {}
    by_id: dict[int, _Image] = {}
    for (name, path), image_id in zip(named_files, ids, strict=True):
        target = output / "pictures" / name
        if target.suffix.lower() not in WRITTEN_SUFFIXES:
            target = target.with_name(target.name + ".png")
        image_file = _Image(path, name, image_id, target)
        other = by_target.setdefault(target, image_file)
        if other is image_file:
            other = by_id.setdefault(image_id, image_file)
        if other is not image_file:
            raise ValueError(
                f"{other.path} and {path} have the same name: one would overwrite the other; give "
                "the folder above them, or run the job twice"
            )
        image_files.append(image_file)
    return image_files


def _entry(image_file: _Image) -> dict[str, Any]:
    return {"id": image_file.image_id, "file_name": image_file.name}


def _counts(labels: Sequence[int], names: Sequence[str]) -> str:
    """Return, for example, "3 objects: 2 disc, 1 star"."""
    objects = "object" if len(labels) == 1 else "objects"
    counts = Counter(labels).most_common()
    kinds = ", ".join(f"{count} {names[label]}" for label, count in counts)
    return f"{len(labels)} {objects}" + (f": {kinds}" if kinds else "")


if __name__ == "__main__":
    main()
