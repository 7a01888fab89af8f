#!/usr/bin/env python
"""What a model sees in pictures: boxes drawn on each, and one list of all detections.

  python jobs/predict.py ~/deta-runs/deta-r50-12ep holiday.jpg street/ --output found

WEIGHTS is as for jobs/evaluate.py: a run, a checkpoint or a file of published weights. Pictures are
files, folders, whose pictures are taken with those in folders below, or patterns in quotes, such as
'street/**/*.jpg'. Into --output go

  pictures/           each picture with its boxes, of a score of --threshold or more
  results.json        all detections, up to 100 a picture whatever their score, as COCO results
  images.json         which image_id is which file, as COCO images and categories
  detections.parquet  the same detections as a table (platform/evaluation/detections_parquet.py)

Detections do not depend on --batch-size, up to the order of float32 sums: only pictures of one size
go through the model together, so none is padded to the size of another.

--annotations names a COCO file that lists the pictures and so gives their ids. Of a published file
with a row for every COCO id it also gives names; without it, classes are shown as row numbers.

A picture whose header is broken stops everything before the start. One that turns out damaged later
is told of, listed in images.json as unreadable, and makes the exit code 1.
"""

from __future__ import annotations

import argparse
import glob
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from deta.jobs.command_line import echo, run_tool
from deta.jobs.model_options import PREDICTION_KEYS, known_changes, model_parser, open_predictor
from deta.platform.run.config import RunConfig, flatten
from deta.platform.system.atomic_write import write_json

if TYPE_CHECKING:
    from deta.model.postprocess import Detections
    from deta.platform.inference.predictor import Predictor

WRITTEN_SUFFIXES = frozenset({".jpg", ".jpeg", ".png"})  # others get .png added
JPEG_QUALITY = 92


@dataclass(frozen=True)
class _Picture:
    path: Path
    name: str  # below the folder that was given
    image_id: int
    target: Path  # where it goes with its boxes


@dataclass(frozen=True)
class _Inputs:
    predictor: Predictor
    pictures: list[_Picture]


def main() -> NoReturn:
    parser = model_parser(
        __doc__ or "",
        "Keys of the configuration that matter here: postprocess.*, data.evaluation_size.*, "
        "data.max_pixels,\nprecision and model.*",
    )
    parser.add_argument(
        "pictures",
        nargs="+",
        metavar="PICTURE",
        help="file, folder or quoted pattern; key=value is a setting",
    )
    parser.add_argument("--output", metavar="FOLDER", type=Path, required=True)
    parser.add_argument(
        "--threshold", metavar="SCORE", type=float, default=0.3, help="of drawn boxes, default 0.3"
    )
    parser.add_argument("--annotations", metavar="FILE", type=Path, help="COCO format")
    parser.add_argument(
        "--batch-size",
        metavar="N",
        type=int,
        default=1,
        help="pictures at a time; of one size, so no answer depends on it; default 1",
    )
    parser.add_argument("--no-pictures", action="store_true", help="draw none, which is faster")
    arguments = parser.parse_intermixed_args()
    run_tool(lambda: _prepare(arguments), lambda inputs: _predict(inputs, arguments))


def _prepare(arguments: argparse.Namespace) -> _Inputs:
    from deta.platform.inference.predictor import check_headers, read_listing

    if not 0 <= arguments.threshold <= 1:
        raise ValueError(f"--threshold {arguments.threshold} is not in 0..1")
    if arguments.batch_size < 1:
        raise ValueError(f"--batch-size {arguments.batch_size} must be at least 1")
    known = flatten(RunConfig())
    settings = [text for text in arguments.pictures if text.partition("=")[0] in known]
    changes = known_changes(settings, PREDICTION_KEYS)
    texts = [text for text in arguments.pictures if text not in settings]
    if not texts:
        raise ValueError("no pictures are given; name files or folders")
    named_files = _find_pictures(texts, arguments.output)

    categories, image_ids = None, None
    if arguments.annotations is not None:
        categories, image_ids = read_listing(arguments.annotations)
    pictures = _number(named_files, arguments.output, arguments.annotations, image_ids)
    predictor = open_predictor(arguments, changes, categories)
    if categories is not None:
        predictor.check_categories(categories, str(arguments.annotations))
    check_headers([picture.path for picture in pictures], predictor.config.data.max_pixels)
    (arguments.output if arguments.no_pictures else arguments.output / "pictures").mkdir(
        parents=True, exist_ok=True
    )
    return _Inputs(predictor, pictures)


def _predict(inputs: _Inputs, arguments: argparse.Namespace) -> int:
    from tqdm import tqdm

    from deta.platform.data.image_decoding import ImageError
    from deta.platform.evaluation.coco_metrics import to_coco_results
    from deta.platform.evaluation.detections_parquet import DetectionTable

    predictor, pictures = inputs.predictor, inputs.pictures
    echo(f"model: {predictor.description}")
    by_path = {picture.path: picture for picture in pictures}
    results: list[dict[str, Any]] = []
    images: list[dict[str, Any]] = []
    unreadable: list[dict[str, Any]] = []
    num_width = len(str(len(pictures)))
    # disable=None: no bar where nobody watches
    bar = tqdm(total=len(pictures), unit=" pictures", file=sys.stderr, disable=None)

    def tell(text: str) -> None:
        number = len(images) + len(unreadable)
        bar.write(f"{number:>{num_width}}/{len(pictures)}  {text}", file=sys.stdout)
        sys.stdout.flush()
        bar.update()

    def on_unreadable(path: Path, error: ImageError) -> None:
        picture = by_path[path]
        unreadable.append(_entry(picture) | {"reason": str(error)})
        tell(f"not readable: {error}")

    began_s = time.perf_counter()
    table = DetectionTable(
        arguments.output / "detections.parquet", predictor.categories, predictor.weights_sha256
    )
    with bar, table:
        for path, found in predictor.predict_files(
            by_path, batch_size=arguments.batch_size, on_unreadable=on_unreadable
        ):
            picture = by_path[path]
            width, height = _draw(picture, found, predictor, arguments)
            results += to_coco_results(found, picture.image_id, predictor.category_ids)
            table.add(str(path), picture.image_id, found)
            images.append(_entry(picture) | {"width": width, "height": height})
            shown = found.labels[found.scores >= arguments.threshold].tolist()
            tell(f"{picture.name}  {_counts(shown, predictor.names)}")
    elapsed_s = time.perf_counter() - began_s

    categories = [{"id": c.id, "name": c.name} for c in predictor.categories]
    listing = {
        "images": images,
        "annotations": [],
        "categories": categories,
        "unreadable": unreadable,
    }
    write_json(arguments.output / "images.json", listing)
    write_json(arguments.output / "results.json", results)
    echo("")
    echo(
        f"{len(images)} pictures, {len(images) / elapsed_s:.1f} images/s on "
        f"{predictor.device.type}: {arguments.output}"
    )
    if unreadable:
        echo(f"{len(unreadable)} of {len(pictures)} pictures could not be read, see above")
    return 1 if unreadable else 0


def _draw(
    picture: _Picture, found: Detections, predictor: Predictor, arguments: argparse.Namespace
) -> tuple[int, int]:
    """Draw the picture with its boxes, if wanted. Returns its (width, height)."""
    from deta.platform.data.draw_boxes import draw_detections
    from deta.platform.data.image_decoding import decode, read_header

    max_pixels = predictor.config.data.max_pixels
    if arguments.no_pictures:
        header = read_header(picture.path, max_pixels)
        return header.width, header.height
    # Decoded once more: pictures are large, and detections only need their size.
    image = decode(picture.path, max_pixels)
    shown = found.scores >= arguments.threshold
    drawing = draw_detections(
        image, found.boxes_px[shown], found.labels[shown], found.scores[shown], predictor.names
    )
    picture.target.parent.mkdir(parents=True, exist_ok=True)
    drawing.save(picture.target, quality=JPEG_QUALITY)
    return image.width, image.height


def _find_pictures(texts: Sequence[str], output: Path) -> list[tuple[str, Path]]:
    """Each picture file once, with its name; none of those that this tool writes."""
    from deta.platform.inference.image_paths import find_pictures

    for text in texts:
        if "=" in text and not glob.has_magic(text) and not Path(text).exists():
            raise ValueError(
                f"{text}: there is no such file or folder, nor a key of the configuration"
            )
    found = find_pictures(texts, echo)
    own = output.resolve()
    if inside := [file.path for file in found if file.path.resolve().is_relative_to(own)]:
        raise ValueError(
            f"{inside[0]}: lies in --output {output}, where it could be written over; choose "
            "another folder"
        )
    return [(file.name, file.path) for file in found]


def _number(
    named_files: Sequence[tuple[str, Path]],
    output: Path,
    annotations: Path | None,
    image_ids: dict[str, int] | None,
) -> list[_Picture]:
    """Give each picture its id, by name where there are annotations, and its target."""
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
                f"{annotations}: does not say which images {', '.join(missing[:5])}{more} are; "
                "leave --annotations out, or those pictures"
            )
    pictures = []
    by_target: dict[Path, _Picture] = {}
    by_id: dict[int, _Picture] = {}
    for (name, path), image_id in zip(named_files, ids, strict=True):
        target = output / "pictures" / name
        if target.suffix.lower() not in WRITTEN_SUFFIXES:
            target = target.with_name(target.name + ".png")
        picture = _Picture(path, name, image_id, target)
        other = by_target.setdefault(target, picture)
        if other is picture:
            other = by_id.setdefault(image_id, picture)
        if other is not picture:
            raise ValueError(
                f"{other.path} and {path} have the same name, so one would replace the other; give "
                "the folder above them, or make two calls"
            )
        pictures.append(picture)
    return pictures


def _entry(picture: _Picture) -> dict[str, Any]:
    return {"id": picture.image_id, "file_name": picture.name}


def _counts(labels: Sequence[int], names: Sequence[str]) -> str:
    """3 objects: 2 disc, 1 star."""
    objects = "object" if len(labels) == 1 else "objects"
    counts = Counter(labels).most_common()
    kinds = ", ".join(f"{count} {names[label]}" for label, count in counts)
    return f"{len(labels)} {objects}" + (f": {kinds}" if kinds else "")


if __name__ == "__main__":
    main()
