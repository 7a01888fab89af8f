"""Annotation file in COCO's format to checked lists, or one error that names every fault.

The structure is checked here, field by field; geometry and image files are left to `coco.py`.
What is asked of the file is narrower than what Python's `json` and pycocotools let pass:

- UTF-8, with or without byte order mark. NaN and Infinity are not JSON and refused in any field.
- All ids are whole numbers of 64 bits, so that tensors hold them; a text "1" is no id. Category
  ids are not negative, as -1 mostly means "ignore". Gaps, 0 and huge ids are fine.
- `id`, `name`, `file_name`, `width`, `height`, `image_id`, `category_id` and `bbox` must be there,
  though ids of annotations are renumbered later: a file that lacks some was cut or merged wrongly.
  `area` and `iscrowd` may be missing, and mean w * h and 0.
- Ids are unique. An image record that is there twice, equal in all fields, can be skipped.
- A file name is a relative path with `/` and without `..`: see `file_name_fault`.

`segmentation` is dropped while reading, unseen: boxes need no masks, and it is most of the memory.
"""

from __future__ import annotations

import json
import re
import reprlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deta.platform.system.safe_read import read_bounded

NUM_SHOWN = 10  # problems written out in one error
NUM_IDS_SHOWN = 5  # ids written out in one note
INT64 = range(-(2**63), 2**63)
MAX_ANNOTATION_BYTES = 4 << 30  # COCO has 0.5 GB, and Objects365, the largest known here, 2.5
LARGEST_FLOAT = 1.7976931348623157e308

REPEATED_IMAGE = "image record given twice"
IMAGE_NOT_LISTED = "annotation of an image that is not listed"


class DatasetError(ValueError):
    """A data set that cannot be used; the message names file, record and field of each fault."""


@dataclass(frozen=True)
class CocoFile:
    """The three lists of a COCO file, in the order of the file, with only the fields we read."""

    categories: list[dict[str, Any]]
    images: list[dict[str, Any]]
    annotations: list[dict[str, Any]]


@dataclass
class Problems:
    """What is wrong with one data set, collected so that a single run shows all of it."""

    path: Path
    errors: list[str] = field(default_factory=list)
    skippable: dict[str, list[tuple[int, str]]] = field(default_factory=dict)

    def refuse(self, record: str, field_name: str, what: str) -> None:
        """Note a fault that no mode accepts."""
        self.errors.append(f"{record}, {field_name}: {what}")

    def skip(self, kind: str, record_id: int, text: str) -> None:
        """Note a fault that lenient mode answers by leaving the record out."""
        self.skippable.setdefault(kind, []).append((record_id, text))

    def raise_if_refused(self, lenient: bool) -> None:
        """Raise one DatasetError for all faults that this mode does not accept."""
        skippable = [text for faults in self.skippable.values() for _, text in faults]
        refused = self.errors if lenient else self.errors + skippable
        if not refused:
            return
        lines = [f"{self.path}: {len(refused)} {_plural('problem', len(refused))} found"]
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
        """One line for each kind of skipped record: how many, and the first ids."""
        return [
            counted_note(self.path, f"skipped: {kind}", [record_id for record_id, _ in faults])
            + f"; first: {faults[0][1]}"
            for kind, faults in self.skippable.items()
        ]


def counted_note(path: Path, what: str, ids: list[int]) -> str:
    shown = ", ".join(str(i) for i in ids[:NUM_IDS_SHOWN])
    more = ", ..." if len(ids) > NUM_IDS_SHOWN else ""
    return f"{path}: {len(ids)} {_plural('record', len(ids))} {what} (ids {shown}{more})"


def read_coco_file(path: Path, problems: Problems) -> CocoFile:
    """The lists of an annotation file, without records that are broken or given twice.

    Args:
        path: the annotation file.
        problems: is told of every fault in a record.

    Raises:
        DatasetError: the file cannot be read at all, so that there is nothing to collect.
    """
    document = _parse(path, problems)
    categories = _records(document, "categories", problems)
    images = _records(document, "images", problems)
    annotations = _records(document, "annotations", problems)
    for name in ("categories", "images"):
        if document.get(name) == []:
            problems.refuse("top level", name, "is empty; at least one is needed")

    known_categories = {c.get("id") for c in categories if type(c.get("id")) is int}
    known_images = {i.get("id") for i in images if type(i.get("id")) is int}

    categories = _checked(categories, CATEGORY_FIELDS, "category", problems)
    images = _checked(images, IMAGE_FIELDS, "image", problems)
    annotations = _checked(annotations, ANNOTATION_FIELDS, "annotation", problems)
    images = _without_repeats(images, problems)
    _refuse_shared_ids(categories, "category", problems)
    _refuse_shared_ids(images, "image", problems)
    _refuse_shared_ids(annotations, "annotation", problems)

    # Known are the ids of broken records too: a reference to one would only repeat its fault.
    listed = []
    for a in annotations:
        if known_categories and a["category_id"] not in known_categories:
            what = f"{a['category_id']} is not among the ids of `categories`"
            problems.refuse(f"annotation {a['id']}", "category_id", what)
        if a["image_id"] in known_images or not known_images:
            listed.append(a)
        else:
            what = f"annotation {a['id']}, image_id: no image has the id {a['image_id']}"
            problems.skip(IMAGE_NOT_LISTED, a["id"], what)
    return CocoFile(categories, images, listed)


def _parse(path: Path, problems: Problems) -> dict[str, Any]:
    try:
        content = read_bounded(path, MAX_ANNOTATION_BYTES)
    except ValueError as error:  # a folder, a device, a giant
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
            f"{path}: is not UTF-8: {error.reason} at byte {error.start}; save it in that encoding"
        ) from error
    del content  # half a gigabyte for COCO

    constants: list[str] = []

    def constant(name: str) -> float:
        constants.append(name)
        return float(name)

    def finished(record: dict[str, Any]) -> dict[str, Any]:
        if constants:
            _refuse_constants(record, constants[0], problems)
            constants.clear()
        record.pop("segmentation", None)
        return record

    try:
        document = json.loads(text, object_hook=finished, parse_constant=constant)
    except json.JSONDecodeError as error:
        raise DatasetError(
            f"{path}: is not JSON: {error.msg} at line {error.lineno}, column {error.colno}"
        ) from error
    except (ValueError, RecursionError) as error:  # a number too long, lists too deep
        raise DatasetError(f"{path}: cannot be read as JSON: {error}") from error

    if isinstance(document, list):
        raise DatasetError(
            f"{path}: is a list at top level; is this a results file? An annotation file is an "
            "object with `images`, `annotations` and `categories`"
        )
    if not isinstance(document, dict):
        raise DatasetError(
            f"{path}: holds {_show(document)}, not an object with `images`, `annotations` and "
            "`categories`"
        )
    return document


def _refuse_constants(record: dict[str, Any], name: str, problems: Problems) -> None:
    """Tell of NaN and Infinity in fields that no later check reads."""
    noun = "annotation" if "image_id" in record else "image" if "file_name" in record else "object"
    fields = ANNOTATION_FIELDS | IMAGE_FIELDS | CATEGORY_FIELDS if noun != "object" else {}
    for field_name, value in record.items():
        if field_name not in fields and _holds_constant(value):
            where = f"{noun} {_show(record['id'])}" if "id" in record else f"{noun} without id"
            problems.refuse(where, field_name, f"holds {name}, which is not JSON")


def _holds_constant(value: object) -> bool:
    if isinstance(value, list):
        return any(_holds_constant(element) for element in value)
    return isinstance(value, float) and not -LARGEST_FLOAT <= value <= LARGEST_FLOAT


def _records(document: dict[str, Any], name: str, problems: Problems) -> list[dict[str, Any]]:
    if name not in document:
        problems.refuse("top level", name, "is missing")
        return []
    records = document[name]
    if not isinstance(records, list):
        problems.refuse("top level", name, f"is {_show(records)}, not a list")
        return []
    for position, record in enumerate(records):
        if not isinstance(record, dict):
            problems.refuse(
                "top level", name, f"{_show(record)} at position {position} is not an object"
            )
    return [record for record in records if isinstance(record, dict)]


# A fault function says what is wrong with a value, or None. Types are compared, not tested by
# isinstance: True is an int to Python, and no number to us.


def _id_fault(value: object) -> str | None:
    if type(value) is not int:
        return f"is {_show(value)}, not a whole number"
    if value not in INT64:
        return f"is {_show(value)}, which 64 bits do not hold"
    return None


def _category_id_fault(value: object) -> str | None:
    if type(value) is int and value < 0:
        return f"is {_show(value)}; category ids start at 0"
    return _id_fault(value)


def _length_fault(value: object) -> str | None:
    if type(value) is not int or value < 1:
        return f"is {_show(value)}, not a whole number of pixels from 1 up"
    return None


def _number_fault(value: object) -> str | None:
    if type(value) is not float and type(value) is not int:
        return f"is {_show(value)}, not a number"
    if not -LARGEST_FLOAT <= value <= LARGEST_FLOAT:  # NaN fails this too
        return f"is {_show(value)}, not a finite number"
    return None


def _box_fault(value: object) -> str | None:
    if type(value) is not list or len(value) != 4:
        return f"is {_show(value)}, not a list of four numbers [x, y, width, height]"
    for number in value:
        if _number_fault(number):
            return f"{_show(value)} holds {_show(number)}, not a finite number"
    return None


def _crowd_fault(value: object) -> str | None:
    return None if type(value) is int and value in (0, 1) else f"is {_show(value)}, not 0 or 1"


def _text_fault(value: object) -> str | None:
    return None if type(value) is str else f"is {_show(value)}, not a text"


def file_name_fault(value: object) -> str | None:
    """Why a `file_name` cannot be a path below the image folder, or None.

    It comes from a file of unknown origin and ends in `open`, so everything that could lead
    elsewhere is refused. Links are followed, and refused if they lead out, by `coco.py`.
    """
    if type(value) is not str:
        return f"is {_show(value)}, not a text"
    if not value:
        return "is empty"
    if "\0" in value:
        return f"{_show(value)} holds a NUL character"
    if "\\" in value:
        return f"{_show(value)} holds a backslash; write folders with /"
    if "://" in value:
        return f"{_show(value)} is a URL; fetch the file and name it"
    if value.startswith("/") or re.match("[A-Za-z]:", value):
        return f"{_show(value)} is an absolute path; name it relative to the image folder"
    if ".." in value.split("/"):
        return f"{_show(value)} holds .. and could leave the image folder"
    try:
        value.encode()
    except UnicodeEncodeError:
        return f"{_show(value)} is not valid Unicode"
    return None


Faults = dict[str, Callable[[object], str | None]]
CATEGORY_FIELDS: Faults = {"id": _category_id_fault, "name": _text_fault}
IMAGE_FIELDS: Faults = {
    "id": _id_fault,
    "file_name": file_name_fault,
    "width": _length_fault,
    "height": _length_fault,
}
ANNOTATION_FIELDS: Faults = {
    "id": _id_fault,
    "image_id": _id_fault,
    "category_id": _id_fault,
    "bbox": _box_fault,
    "area": _number_fault,
    "iscrowd": _crowd_fault,
}
OPTIONAL_FIELDS = frozenset({"area", "iscrowd"})


def _checked(
    records: list[dict[str, Any]], fields: Faults, noun: str, problems: Problems
) -> list[dict[str, Any]]:
    """The records without a fault; the others go to `problems`, in the order of the file."""
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
            problems.refuse(f"{noun} {where}", field_name, what)
    return [record for position, record in enumerate(records) if position not in faults]


def _without_repeats(images: list[dict[str, Any]], problems: Problems) -> list[dict[str, Any]]:
    first: dict[int, dict[str, Any]] = {}
    kept = []
    for image in images:
        if first.setdefault(image["id"], image) is image or first[image["id"]] != image:
            kept.append(image)
        else:
            what = f"image {image['id']}, id: the same record is given twice"
            problems.skip(REPEATED_IMAGE, image["id"], what)
    return kept


def _refuse_shared_ids(records: list[dict[str, Any]], noun: str, problems: Problems) -> None:
    counts = Counter(record["id"] for record in records)
    if len(counts) < len(records):
        for record_id, count in counts.items():
            if count > 1:
                problems.refuse(f"{noun} {record_id}", "id", f"is used by {count} records")


def _plural(noun: str, count: int) -> str:
    return noun if count == 1 else f"{noun}s"


def _show(value: object) -> str:
    """A value for a message, cut short: it may be a list of millions, or 4000 digits."""
    return _SHORT.repr(value)


_SHORT = reprlib.Repr()
_SHORT.maxstring = 120  # a path, whole
