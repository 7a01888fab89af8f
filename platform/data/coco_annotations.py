"""Read an annotation file in COCO format into checked lists, or raise one error with all faults.

The structure is checked here, field by field; `coco_dataset.py` checks geometry and image files.
The rules are stricter than those of Python's `json` and of pycocotools:

- UTF-8, with or without byte order mark. Numbers are finite: NaN and Infinity are not JSON.
- All ids are 64-bit integers, so that they fit into tensors; the string "1" is not an id. Category
  ids are not negative, because -1 mostly means "ignore". Gaps, 0 and huge ids are allowed.
- `id`, `name`, `file_name`, `width`, `height`, `image_id`, `category_id` and `bbox` are required,
  even annotation ids, which are renumbered later: a file without some was cut or merged wrongly.
  `area` and `iscrowd` are optional; their defaults are w * h and 0.
- Values of another type that have one meaning are read, with a count: whole numbers with a decimal
  point (96.0), `iscrowd` as true or false, and null for a missing `area` or `iscrowd`.
- Ids are unique. An image record that is repeated with equal fields can be skipped.
- A file has one id. A second id without boxes, where the first has some, can be skipped: it would
  teach that the same objects are background.
- A negative width or height is a fault: the box was drawn backwards. It can be turned round.
- A file name is a relative path with `/` and without `..`: see `file_name_fault`.

`segmentation` is dropped while parsing: boxes need no masks, and masks take most of the memory.
"""

from __future__ import annotations

import json
import re
import reprlib
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, TypedDict, cast

from deta.platform.data.other_formats import (
    EXPORT,
    is_json_lines,
    kind_of_bytes,
    kind_of_document,
    kind_of_folder,
)
from deta.platform.system.safe_read import read_bounded

WARNING = "! "  # how a note begins that says that training will probably go wrong
NUM_SHOWN = 10  # problems listed in one error
NUM_IDS_SHOWN = 5  # ids listed in one note
MAX_ANNOTATION_BYTES = 4 << 30  # COCO has 0.5 GB; Objects365, the largest we know, has 2.5 GB

REPEATED_IMAGE = "image record given twice"
IMAGE_NOT_LISTED = "annotation of an image that is not listed"
EMPTY_TWIN = "image whose file has boxes under another id, and none under this one"
REVERSED_BOX = "box with a negative width or height: drawn backwards, and turned round"
REPAIRED = {REVERSED_BOX}  # all other kinds are skipped


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
    noted: dict[str, list[int]] = field(default_factory=dict)  # what is read all the same

    def add_error(self, record: str, field_name: str, what: str) -> None:
        """Record a fault that is an error in both modes."""
        self.errors.append(f"{record}, {field_name}: {what}")

    def add_skippable(self, kind: str, record_id: int, text: str) -> None:
        """Record a fault that makes lenient mode skip the record, or repair it."""
        self.skippable.setdefault(kind, []).append((record_id, text))

    def add_note(self, what: str, record_id: int) -> None:
        """Record what is odd about a record and no fault."""
        self.noted.setdefault(what, []).append(record_id)

    def raise_errors(self, lenient: bool, *, all_skipped: bool = False) -> None:
        """Raise one DatasetError with all faults that are errors in this mode.

        Args:
            all_skipped: lenient mode would skip all images, so it is no advice.
        """
        skippable = [text for faults in self.skippable.values() for _, text in faults]
        refused = self.errors if lenient else self.errors + skippable
        if not refused:
            return
        lines = [f"{self.path}: {len(refused)} problem{'s' * (len(refused) > 1)} found"]
        lines += [f"  {text}" for text in refused[:NUM_SHOWN]]
        if len(refused) > NUM_SHOWN:
            kinds = [f"{len(faults)} {kind}" for kind, faults in self.skippable.items()]
            counts = f" (of all: {', '.join(kinds)})" if kinds and not lenient else ""
            lines.append(f"  ... and {len(refused) - NUM_SHOWN} more{counts}")
        if all_skipped:
            lines.append("Repair them; data.lenient=true would skip all images.")
        elif not self.errors:
            repairs = " or turn round" * (REVERSED_BOX in self.skippable)
            lines.append(f"Repair them, or pass data.lenient=true to skip{repairs} such records.")
        elif len(refused) > len(self.errors):
            lines.append(
                f"Repair them; data.lenient=true would skip {len(refused) - len(self.errors)} "
                f"of them, but not the first {len(self.errors)}."
            )
        else:
            lines.append("Repair the file; data.lenient does not skip such faults.")
        raise DatasetError("\n".join(lines))

    def notes(self) -> list[str]:
        """Return a line for each kind of skipped or odd record, with the count and first ids."""
        skipped = [
            records_note(
                self.path,
                f"{'repaired' if kind in REPAIRED else 'skipped'}: {kind}",
                [record_id for record_id, _ in faults],
            )
            + f"; first: {faults[0][1]}"
            for kind, faults in self.skippable.items()
        ]
        return skipped + [records_note(self.path, what, ids) for what, ids in self.noted.items()]


def records_note(path: Path, what: str, ids: Sequence[int]) -> str:
    """Return one line that counts records and lists the first of their ids."""
    shown = ", ".join(str(i) for i in ids[:NUM_IDS_SHOWN])
    more = ", ..." if len(ids) > NUM_IDS_SHOWN else ""
    return f"{path}: {len(ids)} record{'s' * (len(ids) > 1)} {what} (ids {shown}{more})"


def read_coco_file(path: Path, problems: Problems, *, needs_annotations: bool = True) -> CocoFile:
    """Read the lists of an annotation file, without broken and repeated records.

    Args:
        path: the annotation file.
        problems: receives every fault in a record.
        needs_annotations: without it, a list of images and categories is enough.

    Raises:
        DatasetError: the file cannot be read or parsed, or is of another kind.
    """
    content = _content(path)
    quick = Problems(path)
    document = _parse_quickly(content)
    if document is not None:
        file = _read_document(document, quick)
        if not (quick.errors or quick.skippable):  # otherwise with all fields, for the messages
            problems.noted |= quick.noted
            return file
    return _read_document(_parse(path, content, needs_annotations), problems)


def _read_document(document: dict[str, Any], problems: Problems) -> CocoFile:
    categories = _records(document, "categories", problems)
    images = _records(document, "images", problems)
    annotations = _records(document, "annotations", problems)
    for name in ("categories", "images"):
        if document.get(name) == []:
            problems.add_error("top level", name, "is empty; at least one is needed")

    for records, noun in ((categories, "category"), (images, "image"), (annotations, "annotation")):
        _read_odd_types(records, noun, problems)
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
    _turn_round(listed, problems)
    return CocoFile(categories, _without_empty_twins(images, listed, problems), listed)


class _Category(TypedDict, total=False):
    id: Any
    name: Any


class _Image(TypedDict, total=False):
    id: Any
    file_name: Any
    width: Any
    height: Any
    neg_category_ids: Any  # of LVIS


class _Annotation(TypedDict, total=False):
    id: Any
    image_id: Any
    category_id: Any
    bbox: Any
    area: Any
    iscrowd: Any


class _Document(TypedDict):
    categories: list[_Category]
    images: list[_Image]
    annotations: list[_Annotation]


def _parse_quickly(content: bytes) -> dict[str, Any] | None:
    """Return the fields that are used, or None for what is not plainly a COCO file.

    Other fields, such as masks, are skipped without making objects of them: a tenth of the time.
    """
    import msgspec  # here, since a training step without a data set does not need it

    try:
        content.decode()  # all of it is to be UTF-8
        return cast(dict[str, Any], msgspec.json.decode(content, type=_Document))
    except (ValueError, RecursionError):  # of msgspec, too
        return None


def _content(path: Path) -> bytes:
    if path.is_dir():
        raise DatasetError(f"{path}: is {kind_of_folder(path)}")
    try:
        return read_bounded(path, MAX_ANNOTATION_BYTES)
    except ValueError as error:  # a folder, a device, or too large
        raise DatasetError(str(error)) from error
    except (FileNotFoundError, IsADirectoryError, PermissionError, NotADirectoryError) as error:
        raise DatasetError(
            f"{path}: cannot be read as annotation file: {error.strerror}"
        ) from error


def _parse(path: Path, content: bytes, needs_annotations: bool) -> dict[str, Any]:
    if what := kind_of_bytes(content):
        raise DatasetError(f"{path}: is {what}")
    encoding = json.detect_encoding(content)
    if not encoding.startswith("utf-8"):
        raise DatasetError(f"{path}: has the encoding {encoding}; save it as UTF-8")
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        raise DatasetError(
            f"{path}: is not UTF-8: {error.reason} at byte {error.start}; save it as UTF-8"
        ) from error

    def without_masks(record: dict[str, Any]) -> dict[str, Any]:
        record.pop("segmentation", None)
        return record

    try:
        document = json.loads(text, object_hook=without_masks)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and is_json_lines(text):
            raise DatasetError(
                f"{path}: is JSON Lines, one object a line, not COCO; {EXPORT}"
            ) from error
        raise DatasetError(
            f"{path}: is not JSON: {error.msg} at line {error.lineno}, column {error.colno}"
        ) from error
    except (ValueError, RecursionError) as error:  # a number too long, or nested too deeply
        raise DatasetError(f"{path}: cannot be read as JSON: {error}") from error
    if what := kind_of_document(document, needs_annotations=needs_annotations):
        raise DatasetError(f"{path}: is {what}")
    if not isinstance(document, dict):
        raise DatasetError(
            f"{path}: holds {_show(document)} at top level; an annotation file is an object "
            "with `images`, `annotations` and `categories`"
        )
    if not needs_annotations:
        document.setdefault("annotations", [])
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
OPTIONAL_FIELDS = ("area", "iscrowd")
INTEGERS = {
    "category": ("id",),
    "image": ("id", "width", "height"),
    "annotation": ("id", "image_id", "category_id", "iscrowd"),
}


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


def _read_odd_types(records: list[dict[str, Any]], noun: str, problems: Problems) -> None:
    """Read values of an odd type that can mean one thing only, and note how many there were."""
    for name in INTEGERS[noun]:
        for record in [r for r in records if type(r.get(name, 0)) is not int]:
            value = record[name]
            # Above 2**53 a float no longer holds every integer, so two ids may have become one.
            if type(value) is float and value.is_integer() and abs(value) < 2**53:
                record[name] = int(value)
                what = f"({noun}) whose {name} is a whole number with a decimal point, read so"
            elif name == "iscrowd" and type(value) is bool:
                record[name] = int(value)
                what = f"({noun}) whose iscrowd is true or false, read as 1 or 0"
            else:
                continue
            problems.add_note(what, _id_of(record))
    for name in OPTIONAL_FIELDS if noun == "annotation" else ():
        for record in [r for r in records if r.get(name, 0) is None]:
            del record[name]
            problems.add_note(f"({noun}) whose {name} is null, read as missing", _id_of(record))


def _id_of(record: dict[str, Any]) -> Any:
    return record.get("id", "without")


def _turn_round(annotations: list[dict[str, Any]], problems: Problems) -> None:
    """Make negative widths and heights positive, by moving the corner."""
    for annotation in annotations:
        x, y, width, height = annotation["bbox"]
        if width < 0 or height < 0:
            what = f"annotation {annotation['id']}, bbox: {_show(annotation['bbox'])} has a"
            what += f" negative {'width' if width < 0 else 'height'}, so it was drawn backwards"
            problems.add_skippable(REVERSED_BOX, annotation["id"], what)
            annotation["bbox"] = [
                x + min(width, 0), y + min(height, 0), abs(width), abs(height)
            ]  # fmt: skip


def _without_empty_twins(
    images: list[dict[str, Any]], annotations: list[dict[str, Any]], problems: Problems
) -> list[dict[str, Any]]:
    """Find files that are listed under several ids; leave out those ids without boxes."""
    by_file: dict[str, list[dict[str, Any]]] = {}
    for image in images:
        by_file.setdefault(str(PurePosixPath(image["file_name"])), []).append(image)
    twins = [records for records in by_file.values() if len(records) > 1]
    if not twins:
        return images
    num_boxes = Counter(annotation["image_id"] for annotation in annotations)
    empty: set[int] = set()
    for records in twins:
        full = [image for image in records if num_boxes[image["id"]]]
        for image in records:
            if full and not num_boxes[image["id"]]:
                empty.add(image["id"])
                what = (
                    f"image {image['id']}, file_name: {_show(image['file_name'])} is image "
                    f"{full[0]['id']} too, with {num_boxes[full[0]['id']]} boxes, which this id "
                    "would teach to be background"
                )
                problems.add_skippable(EMPTY_TWIN, image["id"], what)
        if len(kept := full or records) > 1:
            for image in kept[1:]:
                problems.add_note(
                    "whose file is listed under another id too; each is trained without the boxes "
                    "of the other", image["id"],
                )  # fmt: skip
    return [image for image in images if image["id"] not in empty]


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
