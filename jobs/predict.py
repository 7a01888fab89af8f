#!/usr/bin/env python
"""Detect objects in images: draw their boxes and list all detections.

  python jobs/predict.py ~/deta-runs/deta-r50-12ep holiday.jpg street/ --out found

WEIGHTS is as for jobs/evaluate.py: a run, a checkpoint or a file of published weights. Images are
files, folders (with all folders below them), or patterns in quotes, such as
'street/**/*.jpg'. The files in --out are

  pictures/           each image with its boxes, with a score of at least --threshold
  results.json        all detections of any score, up to 100 per image, as COCO results
  images.json         the file of each image_id, as COCO images and categories
  detections.parquet  the same detections as a table (platform/evaluation/detections_parquet.py)

Only images of equal size form a batch, so none is padded, and detections do not depend on the size
of a batch, up to the order of float32 sums. By default a batch is large enough to keep the device
busy.

--annotations names a COCO file that lists the images and so gives their ids. For a published file
with a row for every COCO id it also gives class names; otherwise classes are shown as row numbers.

An image that cannot be read is reported, listed in images.json as unreadable, and makes the exit
code 1. With --strict, one with a broken header is an error before anything runs.
"""

from __future__ import annotations

import glob
import os
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

from tyro.conf import Positional

from deta.jobs.command_line import OUTPUT, echo, run_tool
from deta.jobs.model_options import (
    PREDICTION_KEYS,
    ModelOptions,
    open_predictor,
    read_model_options,
    require_weights,
)
from deta.platform.system.atomic_write import write_json
from deta.platform.system.short_list import short_list

if TYPE_CHECKING:
    from deta.model.postprocess import Detections
    from deta.platform.inference.predictor import Predictor

WRITTEN_SUFFIXES = frozenset({".jpg", ".jpeg", ".png"})  # others get .png added
JPEG_QUALITY = 92
_SAME_NAME = "{} and {} have the same name: one would overwrite the other; run the job twice"


@dataclass(frozen=True)
class _Image:
    path: Path
    name: str  # below the folder that was given
    image_id: int
    target: Path  # of the image with its boxes


@dataclass(frozen=True, kw_only=True)
class PredictOptions(ModelOptions):
    image: Positional[tuple[str, ...]] = ()  # files, folders or quoted patterns
    out: Annotated[Path, OUTPUT]  # a folder
    threshold: float = 0.3  # least score to draw
    annotations: Path | None = None  # a file, COCO format
    # Images of equal size per batch; does not change the results. Default: enough to keep it busy.
    batch_size: int | None = None
    no_pictures: bool = False  # draw no images, which is faster
    strict: bool = False  # predict nothing if the header of an image is broken


def main() -> NoReturn:
    options, changes = read_model_options(PredictOptions, __doc__, PREDICTION_KEYS)
    run_tool(lambda: _prepare(options, changes), lambda opened: _predict(*opened, options))


def _prepare(options: PredictOptions, changes: dict[str, str]) -> tuple[Predictor, list[_Image]]:
    require_weights(options.weights)
    from deta.platform.inference.image_paths import read_listing

    if not 0 <= options.threshold <= 1:
        raise ValueError(f"--threshold {options.threshold} is not in 0..1")
    if options.batch_size is not None and options.batch_size < 1:
        raise ValueError(f"--batch-size {options.batch_size} must be at least 1")
    if not options.image:
        raise ValueError("no images are given; name files or folders")
    images = _find_images(options)
    categories = None
    if options.annotations is not None:
        categories, image_ids = read_listing(options.annotations)
        images = _with_ids(images, image_ids, options.annotations)
    predictor = open_predictor(options, changes, categories)
    if categories is not None:
        predictor.check_categories(categories, str(options.annotations))
    if options.strict:
        from deta.platform.inference.batching import check_headers

        check_headers([image.path for image in images], predictor.config.data.max_pixels)
    (options.out if options.no_pictures else options.out / "pictures").mkdir(
        parents=True, exist_ok=True
    )
    return predictor, images


def _find_images(options: PredictOptions) -> list[_Image]:
    """Find each image file once and number it; refuse those that this job would overwrite."""
    from deta.platform.inference.image_paths import find_images

    for text in options.image:
        if "=" in text and not glob.has_magic(text) and not Path(text).exists():
            raise ValueError(f"{text}: there is no such file, folder or configuration key")
    found = find_images(options.image, echo)
    if len({image.name for image in found}) < len(found):  # in two folders: name them by these
        above = os.path.commonpath([os.path.abspath(image.path.parent) for image in found])
        found = [replace(one, name=os.path.relpath(one.path, above)) for one in found]
    images: dict[Path, _Image] = {}  # by target
    for number, (path, name) in enumerate(map(astuple, found), 1):
        if path.resolve().is_relative_to(options.out.resolve()):
            raise ValueError(
                f"{path}: lies in --out {options.out}, where it could be overwritten; choose "
                "another folder"
            )
        target = options.out / "pictures" / name
        if target.suffix.lower() not in WRITTEN_SUFFIXES:
            target = target.with_name(target.name + ".png")
        image = _Image(path, name, number, target)
        if (other := images.setdefault(target, image)) is not image:
            raise ValueError(_SAME_NAME.format(other.path, path))
    return list(images.values())


def _with_ids(images: Sequence[_Image], ids: dict[str, int], annotations: Path) -> list[_Image]:
    """Give each image the id that the annotations list under its name, or its last part."""
    last_parts = Counter(name.rpartition("/")[2] for name in ids)
    by_last_part = {name.rpartition("/")[2]: image_id for name, image_id in ids.items()}
    found: dict[int, _Image] = {}
    missing = []
    for image in images:
        image_id = ids.get(image.name)
        if image_id is None and last_parts[image.path.name] == 1:
            image_id = by_last_part[image.path.name]
        if image_id is None:
            missing.append(image.path)
        elif image_id in found:
            raise ValueError(_SAME_NAME.format(found[image_id].path, image.path))
        else:
            found[image_id] = replace(image, image_id=image_id)
    if missing:
        raise ValueError(
            f"{annotations}: does not list the images {short_list(missing)}; "
            "leave out --annotations, or these images"
        )
    return list(found.values())


def _predict(predictor: Predictor, images: list[_Image], options: PredictOptions) -> int:
    from deta.platform.data.image_decoding import ImageError
    from deta.platform.evaluation.coco_metrics import to_coco_results
    from deta.platform.evaluation.detections_parquet import DetectionTable
    from deta.platform.system.progress import progress_bar

    echo(f"model: {predictor.description}")
    by_path = {image.path: image for image in images}
    results: list[dict[str, Any]] = []
    listed: list[dict[str, Any]] = []
    unreadable: list[dict[str, Any]] = []
    num_width = len(str(len(images)))

    def print_line(text: str) -> None:
        number = len(listed) + len(unreadable)
        echo(f"{number:>{num_width}}/{len(images)}  {text}")
        advance(1)

    def on_unreadable(path: Path, error: ImageError) -> None:
        image = by_path[path]
        unreadable.append({"id": image.image_id, "file_name": image.name, "reason": str(error)})
        print_line(f"not readable: {error}")

    began_s = time.perf_counter()
    table = DetectionTable(
        options.out / "detections.parquet", predictor.categories, predictor.weights_sha256
    )
    with progress_bar("images", len(images)) as advance, table:
        for path, found in predictor.predict_files(
            by_path, batch_size=options.batch_size, on_unreadable=on_unreadable
        ):
            image = by_path[path]
            width, height = _draw(image, found, predictor, options)
            results += to_coco_results(found, image.image_id, predictor.category_ids)
            table.add(str(path), image.image_id, found)
            about = {"id": image.image_id, "file_name": image.name}
            listed.append(about | {"width": width, "height": height})
            shown = found.labels[found.scores >= options.threshold].tolist()
            print_line(f"{image.name}  {_counts(shown, predictor.names)}")
    elapsed_s = time.perf_counter() - began_s

    listing = {
        "images": listed,
        "annotations": [],
        "categories": [{"id": c.id, "name": c.name} for c in predictor.categories],
        "unreadable": unreadable,
    }
    write_json(options.out / "images.json", listing)
    write_json(options.out / "results.json", results)
    echo(
        f"\n{len(listed)} images, {len(listed) / elapsed_s:.1f} images/s on "
        f"{predictor.device.type}: {options.out}"
    )
    if unreadable:
        echo(f"{len(unreadable)} of {len(images)} images could not be read, see above")
    return 1 if unreadable else 0


def _draw(
    image: _Image, found: Detections, predictor: Predictor, options: PredictOptions
) -> tuple[int, int]:
    """Draw an image with its boxes unless --no-pictures. Returns its (width, height)."""
    from deta.platform.data.image_decoding import decode, read_header
    from deta.platform.pages.draw_boxes import draw_detections

    max_pixels, rules = predictor.config.data.max_pixels, predictor.config.data.pixel_rules
    if options.no_pictures:
        header = read_header(image.path, max_pixels, rules)
        return header.width, header.height
    # Decoded again: images are large, and detections only need their size.
    pixels = decode(image.path, max_pixels, rules)
    shown = found.scores >= options.threshold
    drawing = draw_detections(
        pixels, found.boxes_px[shown], found.labels[shown], found.scores[shown], predictor.names
    )
    image.target.parent.mkdir(parents=True, exist_ok=True)
    drawing.save(image.target, quality=JPEG_QUALITY)
    return pixels.width, pixels.height


def _counts(labels: Sequence[int], names: Sequence[str]) -> str:
    """Return, for example, "3 objects: 2 disc, 1 star"."""
    objects = "object" if len(labels) == 1 else "objects"
    counts = Counter(labels).most_common()
    kinds = ", ".join(f"{count} {names[label]}" for label, count in counts)
    return f"{len(labels)} {objects}" + (f": {kinds}" if kinds else "")


if __name__ == "__main__":
    main()
