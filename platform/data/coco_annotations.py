"""Read an annotation file in COCO format into checked lists, or raise one error with all faults.

The structure is checked here, field by field; `coco_dataset.py` checks geometry and image files.
The rules are stricter than those of Python's `json` and of pycocotools:

- UTF-8, with or without byte order mark. Numbers are finite: NaN and Infinity are not JSON.
- All ids are 64-bit integers, so that they fit into tensors; the string "1" is not an id. Category
  ids are not negative, because -1 mostly means "ignore". Gaps, 0 and huge ids are allowed.
- `id`, `name`, `file_name`, `width`, `height`, `image_id`, `category_id` and `bbox` are required,
  even annotation ids, which are renumbered later: a file without some was cut or merged wrongly.
  `area` and `iscrowd` are optional; their defaults are w * h and 0.
- Ids are unique. An image record that is repeated with equal fields can be skipped.
- A file name is a relative path with `/` and without `..`: see `file_name_fault`.

`segmentation` is dropped while parsing: boxes need no masks, and masks take most of the memory.
"""

from __future__ import annotations

import json
import re
import reprlib
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deta.platform.system.safe_read import read_bounded

NUM_SHOWN = 10  # problems listed in one error
NUM_IDS_SHOWN = 5  # ids listed in one note
MAX_ANNOTATION_BYTES = 4 << 30  # COCO has 0.5 GB; Objects365, the largest we know, has 2.5 GB

REPEATED_IMAGE = "image record given twice"
IMAGE_NOT_LISTED = "annotation of an image that is not listed"


class DatasetError(ValueError):
    """An unusable data set; the message names file, record and field of each fault."""


@dataclass(frozen=True)
class CocoFile:
    """The three lists of a COCO file, in file order."""

    categories: list[dict[str, Any]]
    images: list[dict[str, Any]]
    annotations: list[dict[str, Any]]


@dataclass
class Problems:
    """All faults of one data set, collected so that a single run reports all of them."""

    path: Path
    errors: list[str] = field(default_factory=list)
    skippable: dict[str, list[tuple[int, str]]] = field(default_factory=dict)

    def add_error(self, record: str, field_name: str, what: str) -> None:
        """Record a fault that is an error in both modes."""
        self.errors.append(f"{record}, {field_name}: {what}")

    def add_skippable(self, kind: str, record_id: int, text: str) -> None:
        """Record a fault that makes lenient mode skip the record."""
        self.skippable.setdefault(kind, []).append((record_id, text))

    def raise_errors(self, lenient: bool) -> None:
        """Raise one DatasetError with all faults that are errors in this mode."""
        skippable = [text for faults in self.skippable.values() for _, text in faults]
        refused = self.errors if lenient else self.errors + skippable
        if not refused:
            return
        lines = [f"{self.path}: {len(refused)} problem{'s' * (len(refused) > 1)} found"]
        lines += [f"  {text}" for text in refused[:NUM_SHOWN]]
        if len(refused) > NUM_SHOWN:
            lines.append(f"  ... and {len(refused) - NUM_SHOWN} more")
        if not self.errors:
            lines.append("Repair them, or pass data.lenient=true to skip such records.")
        elif len(refused) > len(self.errors):
            lines.append(
                f"Repair them; data.lenient=true would skip {len(refused) - len(self.errors)} "
                f"of them, but not the first {len(self.errors)}."
            )
        else:
            lines.append("Repair the file; data.lenient does not skip such faults.")
        raise DatasetError("\n".join(lines))

    def notes(self) -> list[str]:
        """Return a line for each kind of skipped record, with the count and the first ids."""
        return [
            records_note(self.path, f"skipped: {kind}", [record_id for record_id, _ in faults])
            + f"; first: {faults[0][1]}"
            for kind, faults in self.skippable.items()
        ]


def records_note(path: Path, what: str, ids: list[int]) -> str:
    """Return one line that counts records and lists the first of their ids."""
    shown = ", ".join(str(i) for i in ids[:NUM_IDS_SHOWN])
    more = ", ..." if len(ids) > NUM_IDS_SHOWN else ""
    return f"{path}: {len(ids)} record{'s' * (len(ids) > 1)} {what} (ids {shown}{more})"


def read_coco_file(path: Path, problems: Problems) -> CocoFile:
    """Read the lists of an annotation file, without broken and repeated records.

    Args:
        path: the annotation file.
        problems: receives every fault in a record.

    Raises:
        DatasetError: the file cannot be read or parsed.
    """
    document = _parse(path, problems)
    categories = _records(document, "categories", problems)
    images = _records(document, "images", problems)
    annotations = _records(document, "annotations", problems)
    for name in ("categories", "images"):
        if document.get(name) == []:
            problems.add_error("top level", name, "is empty; at least one is needed")

    # Ids of broken records count as known: an error on a reference would only repeat the fault.
    known_categories = {c.get("id") for c in categories if type(c.get("id")) is int}
    known_images = {i.get("id") for i in images if type(i.get("id")) is int}

    categories = _checked(categories, CATEGORY_FIELDS, "category", problems)
    images = _without_repeats(_checked(images, IMAGE_FIELDS, "image", problems), problems)
    annotations = _checked(annotations, ANNOTATION_FIELDS, "annotation", problems)
    for records, noun in ((categories, "category"), (images, "image"), (annotations, "annotation")):
        for record_id, count in Counter(record["id"] for record in records).items():
            if count > 1:
                problems.add_error(f"{noun} {record_id}", "id", f"is used by {count} records")

    listed = []
    for a in annotations:
        if known_categories and a["category_id"] not in known_categories:
            what = f"{a['category_id']} is not among the ids of `categories`"
            problems.add_error(f"annotation {a['id']}", "category_id", what)
        if a["image_id"] in known_images or not known_images:
            listed.append(a)
        else:
            what = f"annotation {a['id']}, image_id: no image has the id {a['image_id']}"
            problems.add_skippable(IMAGE_NOT_LISTED, a["id"], what)
    return CocoFile(categories, images, listed)


def _parse(path: Path, problems: Problems) -> dict[str, Any]:
    try:
        content = read_bounded(path, MAX_ANNOTATION_BYTES)
    except ValueError as error:  # a folder, a device, or too large
        raise DatasetError(str(error)) from error
    except (FileNotFoundError, IsADirectoryError, PermissionError, NotADirectoryError) as error:
        raise DatasetError(
            f"{path}: cannot be read as annotation file: {error.strerror}"
        ) from error
    encoding = json.detect_encoding(content)
    if not encoding.startswith("utf-8"):
        raise DatasetError(f"{path}: has the encoding {encoding}; save it as UTF-8")
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        raise DatasetError(
            f"{path}: is not UTF-8: {error.reason} at byte {error.start}; save it as UTF-8"
        ) from error
    del content  # half a gigabyte for COCO

    def without_masks(record: dict[str, Any]) -> dict[str, Any]:
        record.pop("segmentation", None)
        return record

    try:
        document = json.loads(text, object_hook=without_masks)
    except json.JSONDecodeError as error:
        raise DatasetError(
            f"{path}: is not JSON: {error.msg} at line {error.lineno}, column {error.colno}"
        ) from error
    except (ValueError, RecursionError) as error:  # a number too long, or nested too deeply
        raise DatasetError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(document, dict):
        hint = "; is this a results file?" if isinstance(document, list) else ""
        raise DatasetError(
            f"{path}: holds {_show(document)} at top level{hint}; an annotation file is an object "
            "with `images`, `annotations` and `categories`"
        )
    return document


def _records(document: dict[str, Any], name: str, problems: Problems) -> list[dict[str, Any]]:
    if name not in document:
        problems.add_error("top level", name, "is missing")
        return []
    records = document[name]
    if not isinstance(records, list):
        problems.add_error("top level", name, f"is {_show(records)}, not a list")
        return []
    for position, record in enumerate(records):
        if not isinstance(record, dict):
            problems.add_error(
                "top level", name, f"{_show(record)} at position {position} is not an object"
            )
    return [record for record in records if isinstance(record, dict)]


def _show(value: object) -> str:
    """Return a value for a message, shortened: it may be a list of millions, or 4000 digits."""
    return _SHORT.repr(value)


_SHORT = reprlib.Repr()
_SHORT.maxstring = 120  # a complete path


def file_name_fault(value: object) -> str | None:
    """Return why a `file_name` cannot be a path below the image folder, or None.

    It comes from an untrusted file and is passed to `open`, so everything that could lead out of
    the folder is refused. `image_folder.py` checks links.
    """
    if type(value) is not str:
        return f"is {_show(value)}, not a string"
    for found, what in (
        (not value, "is empty"),
        ("\0" in value, "holds a NUL character"),
        ("\\" in value, "holds a backslash; write folders with /"),
        ("://" in value, "is a URL; download the file and give its path"),
        (
            re.match("/|[A-Za-z]:", value),
            "is an absolute path; make it relative to the image folder",
        ),
        (".." in value.split("/"), "holds .. and could leave the image folder"),
        (re.search("[\ud800-\udfff]", value), "is not valid Unicode"),
    ):
        if found:
            return f"{_show(value)} {what}"
    return None


# Types are compared, not tested by isinstance: True is an int in Python, but not a number here.


def _is_int(value: object, least: int = -(2**63)) -> bool:
    return type(value) is int and least <= value < 2**63


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and -sys.float_info.max <= value <= sys.float_info.max  # type: ignore[operator]


def _expect(is_valid: Callable[[Any], bool], what: str) -> Callable[[object], str | None]:
    """Return a function that describes what is wrong with a value, or returns None."""
    return lambda value: None if is_valid(value) else f"is {_show(value)}, not {what}"


_id_fault = _expect(_is_int, "an integer of 64 bits")
_length_fault = _expect(lambda v: _is_int(v, 1), "an integer number of pixels of at least 1")
Faults = dict[str, Callable[[object], str | None]]
CATEGORY_FIELDS: Faults = {
    "id": _expect(lambda v: _is_int(v, 0), "an integer of 64 bits from 0 on"),
    "name": _expect(lambda v: type(v) is str, "a string"),
}
IMAGE_FIELDS: Faults = {
    "id": _id_fault,
    "file_name": file_name_fault,
    "width": _length_fault,
    "height": _length_fault,
}
ANNOTATION_FIELDS: Faults = {
    "id": _id_fault,
    "image_id": _id_fault,
    "category_id": CATEGORY_FIELDS["id"],
    "bbox": _expect(
        lambda v: type(v) is list and len(v) == 4 and all(map(_is_number, v)),
        "a list of four finite numbers [x, y, width, height]",
    ),
    "area": _expect(_is_number, "a finite number"),
    "iscrowd": _expect(lambda v: type(v) is int and v in (0, 1), "0 or 1"),
}
OPTIONAL_FIELDS = frozenset({"area", "iscrowd"})


def _checked(
    records: list[dict[str, Any]], fields: Faults, noun: str, problems: Problems
) -> list[dict[str, Any]]:
    """Return the records without faults; add the others to `problems`, in file order."""
    faults: dict[int, list[tuple[str, str]]] = {}  # position -> (field, what)
    for field_name, fault_of in fields.items():
        for position, record in enumerate(records):
            if field_name in record:
                what = fault_of(record[field_name])
            else:
                what = None if field_name in OPTIONAL_FIELDS else "is missing"
            if what is not None:
                faults.setdefault(position, []).append((field_name, what))
    if not faults:
        return records
    for position in sorted(faults):
        record_id = records[position].get("id")
        where = str(record_id) if type(record_id) is int else f"at position {position}"
        for field_name, what in faults[position]:
            problems.add_error(f"{noun} {where}", field_name, what)
    return [record for position, record in enumerate(records) if position not in faults]


def _without_repeats(images: list[dict[str, Any]], problems: Problems) -> list[dict[str, Any]]:
    first: dict[int, dict[str, Any]] = {}
    unique = []
    for image in images:
        if first.setdefault(image["id"], image) is image or first[image["id"]] != image:
            unique.append(image)
        else:
            what = f"image {image['id']}, id: the same record is given twice"
            problems.add_skippable(REPEATED_IMAGE, image["id"], what)
    return unique
