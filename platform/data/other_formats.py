"""Recognise annotations of another kind than COCO detection, to say what they are and what to do.

A wrong kind of file would otherwise be refused as three faults in each of its records.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

NUM_LOOKED_AT = 100  # records, lines and files that show the kind of the rest
EXPORT = "export the labels in COCO format with the tool that made them"

# How files begin, in lower case.
_BEGINNINGS = {
    (b"pk\x03\x04",): "a zip archive; unpack it and give the .json file in it",
    (b"\x1f\x8b",): "a gzip file; unpack it with gunzip and give the .json file",
    (b"bzh", b"\xfd7zxz", b"7z\xbc\xaf", b"rar!"): "an archive; unpack it and give the .json file "
    "in it",
    (b"\xff\xd8\xff", b"\x89png", b"ii*\0", b"mm\0*"): "an image; the folder of images and the "
    "annotation file may be in each other's place",
    (b"par1",): "a Parquet file; shards of jobs/pack.py are given as the images, by their folder",
    (b"version https://git-lfs",): "a Git LFS pointer; run `git lfs pull` in its clone",
    (b"<!doctype html", b"<html"): "a web page, from a link that needs a login or a confirmation; "
    "download the file again",
}


def kind_of_bytes(content: bytes) -> str | None:
    """Return what a file is that cannot be JSON of COCO, with what to do, or None."""
    start = content[:512].removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    for begins, what in _BEGINNINGS.items():
        if start.startswith(begins):
            return what
    if content[257:262] == b"ustar":
        return "a tar archive; unpack it and give the .json file in it"
    if not start:
        return "an empty file; copy or export it again"
    if start.startswith(b"<"):
        what = "of Pascal VOC" if b"<annotation>" in content[:4096] else "such as CVAT's"
        return f"XML {what}, not COCO; {EXPORT}"
    try:
        lines = content[: 1 << 16].decode("utf-8-sig").splitlines()[:NUM_LOOKED_AT]
    except UnicodeDecodeError:
        return None
    return None if start[:1] in (b"{", b"[") else _kind_of_text([one for one in lines if one])


def _kind_of_text(lines: list[str]) -> str | None:
    number = r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?"
    if lines and all(re.fullmatch(rf"\s*\d+(\s+{number}){{4,}}\s*", line) for line in lines):
        return f"a label file of one image in YOLO's format, not COCO; {EXPORT}"
    if any(re.match(r"(names|nc)\s*:", line) for line in lines):
        return f"the description of a YOLO data set (data.yaml), not COCO; {EXPORT}"
    if lines and all(re.search(r"\.(jpe?g|png|bmp|tiff?|webp)\s*$", line, re.I) for line in lines):
        return f"a list of image files, not annotations; {EXPORT}"
    if len(lines) > 1 and all(line.count(",") == lines[0].count(",") > 2 for line in lines[:-1]):
        return f"a table (CSV), not COCO; {EXPORT}"
    return None


def kind_of_folder(folder: Path) -> str:
    """Return what a folder is that was given as annotation file, with what to do."""
    names = [path.name for path in sorted(folder.rglob("*")) if path.is_file()]
    jsons = [name for name in names if name.endswith(".json")]
    likely = [name for name in jsons if re.search("instances|coco", name)] or jsons[:1]
    labels = [name for name in names if name.endswith(".txt")]
    if likely:
        return f"a folder; give a file in it, such as {likely[0]}"
    if labels or "data.yaml" in names:
        return f"a folder with {len(labels)} label files, as YOLO has them, not COCO; {EXPORT}"
    if boxes := [name for name in names if name.endswith(".xml")]:
        return f"a folder with {len(boxes)} XML files, as Pascal VOC has them, not COCO; {EXPORT}"
    return "a folder; give a .json file in COCO format"


def kind_of_document(document: object, *, needs_annotations: bool = True) -> str | None:
    """Return what parsed JSON is if it is no COCO detection file, with what to do, or None."""
    if isinstance(document, list):
        return _kind_of_list(_looked_at(document))
    if not isinstance(document, Mapping):
        return None
    for keys, tool in (
        ({"shapes", "imagePath"}, "LabelMe"),
        ({"_via_img_metadata"}, "VGG Image Annotator"),
        ({"items", "categories", "info"}, "Datumaro"),
        ({"objects", "size"}, "Supervisely"),
        ({"features", "type"}, "GeoJSON"),
    ):
        if keys <= document.keys() and "annotations" not in document:
            return f"a file of {tool}, not COCO; {EXPORT}"
    images, annotations = (_looked_at(document.get(key)) for key in ("images", "annotations"))
    if _all(annotations, lambda one: "segments_info" in one and "bbox" not in one):
        return (
            "a file of panoptic annotations (segments_info, one record an image); take the "
            "detection file of the same data set, instances_*.json"
        )
    if _all(annotations, lambda one: "caption" in one and "bbox" not in one):
        return "a file of captions, without boxes; take the detection file, instances_*.json"
    if _all(annotations, lambda one: "keypoints" in one and "bbox" not in one):
        return (
            "a file of keypoints without boxes; add a bbox to each record, or take instances_*.json"
        )
    if _all(annotations, lambda one: "score" in one and "id" not in one):
        return (
            "a file of results (its annotations have a score), not ground truth; take the "
            "annotation file that they were computed on"
        )
    if _all(images, lambda one: "file_name" not in one and "coco_url" in one):
        return (
            "a file of LVIS (its images have coco_url and no file_name); give each image a "
            "`file_name`, the last two parts of its coco_url, such as train2017/000000000009.jpg"
        )
    if needs_annotations and images and "annotations" not in document:
        return (
            "a list of images without annotations, as COCO's image_info_test-dev; "
            "jobs/predict.py --annotations reads it, training and AP need a split with boxes"
        )
    return None


def _kind_of_list(records: list[Mapping[str, Any]]) -> str | None:
    if _all(records, lambda one: "image_id" in one and bool({"score", "caption"} & one.keys())):
        return (
            "a results file (a list of detections), not ground truth; take the annotation file "
            "that they were computed on. jobs/compare.py reads results"
        )
    for keys, tool in (
        ({"data", "annotations"}, "Label Studio"),
        ({"data", "completions"}, "Label Studio"),
        ({"image", "annotations"}, "CreateML"),
        ({"name", "labels"}, "BDD100K or Scalabel"),
    ):
        if _all(records, lambda one, keys=keys: keys <= one.keys()):  # type: ignore[misc]
            return f"a file of {tool}, not COCO; {EXPORT}"
    return None


def is_json_lines(text: str) -> bool:
    """Return True for text with a JSON object on each of its first lines."""
    try:
        return all(isinstance(json.loads(line), dict) for line in text.splitlines()[:2])
    except ValueError:
        return False


def _looked_at(records: object) -> list[Mapping[str, Any]]:
    if not isinstance(records, list):
        return []
    return [one for one in records[:NUM_LOOKED_AT] if isinstance(one, Mapping)]


def _all(records: list[Mapping[str, Any]], holds: Callable[[Mapping[str, Any]], bool]) -> bool:
    return bool(records) and all(map(holds, records))
