"""Match the rows of a weight file's class heads with the classes of a data set.

Classes are matched by name, never by id: data sets give different ids to the same class, and the
same id to different classes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import deta.model.without_dynamo  # noqa: F401

# isort: split
from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights

from deta.platform.data.coco_annotations import MAX_ANNOTATION_BYTES
from deta.platform.data.coco_dataset import Category
from deta.platform.system.safe_read import read_bounded, read_json
from deta.platform.system.short_list import short_list

# "by_name": a class of the data set starts from the file's class of that name, or untrained.
# "in_order": the file's rows are the data set's classes, sorted by id.
# "drop": all class heads start untrained, as the official code fine-tunes from Objects365.
InitClasses = Literal["by_name", "in_order", "drop"]
NUM_SHOWN = 12  # classes listed in one line
# COCO's 91 ids, of which 80 have a name.
_NAMES_BY_ID = FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
COCO_CATEGORIES = tuple(
    Category(id_, name)
    for id_, name in enumerate(_NAMES_BY_ID)
    if name not in ("__background__", "N/A")
)


@dataclass(frozen=True)
class FileClasses:
    """The classes of the rows of a file's class heads."""

    num_rows: int
    by_row: Mapping[int, Category]  # without unused rows; empty: classes unknown
    origin: str  # the source of this information, for messages

    @property
    def rows_and_categories(self) -> tuple[list[int], tuple[Category, ...]]:
        """Used rows and their categories, sorted by category id.

        If the classes are unknown, all rows, named by their numbers.
        """
        known = self.by_row or {row: Category(row, str(row)) for row in range(self.num_rows)}
        rows = sorted(known, key=lambda row: known[row].id)
        return rows, tuple(known[row] for row in rows)


@dataclass(frozen=True)
class ClassPlan:
    """For each class of a data set, the row of the file that it starts from, or None."""

    rows: tuple[int | None, ...]
    lines: tuple[str, ...]  # to print: matched, new and dropped classes


def published_classes(num_rows: int) -> FileClasses:
    """Return the classes of a published file without names: COCO's if the number of rows fits."""
    by_row: dict[int, Category] = {}
    origin = f"{num_rows} rows, whose classes the file does not name"
    if num_rows == len(_NAMES_BY_ID):
        by_row = {category.id: category for category in COCO_CATEGORIES}
        origin = f"{num_rows} rows, so they are COCO's ids"
    elif num_rows == len(COCO_CATEGORIES):
        by_row = dict(enumerate(COCO_CATEGORIES))
        origin = f"{num_rows} rows, so they are COCO's classes in order"
    return FileClasses(num_rows, by_row, origin)


def own_classes(categories: Sequence[Category], origin: str) -> FileClasses:
    """Return the classes of weights trained here, which have a row for each category."""
    return FileClasses(len(categories), dict(enumerate(categories)), origin)


def listed_classes(path: Path, num_rows: int) -> FileClasses:
    """Read the classes of the rows of class heads from a file of the user.

    Args:
        path: annotations in COCO format; a `config.json` of Hugging Face with `id2label`; or
            text with a name on each line, where `-` marks an unused row.

    Raises:
        ValueError: the file cannot be read, or does not fit the number of rows.
    """
    try:
        if path.suffix == ".json":
            content = read_json(path, MAX_ANNOTATION_BYTES)
        else:
            content = read_bounded(path, MAX_ANNOTATION_BYTES).decode().splitlines()
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read ({error})") from error
    if path.suffix != ".json":
        if len(content) != num_rows:
            raise ValueError(f"{path}: has {len(content)} lines, the class heads {num_rows} rows")
        names = {row: line.strip() for row, line in enumerate(content)}
        by_row = {row: Category(row, n) for row, n in names.items() if n not in ("", "-")}
        return FileClasses(num_rows, by_row, f"from {path}")
    if isinstance(content, dict) and isinstance(content.get("id2label"), dict):
        by_row = {}
        for key, value in content["id2label"].items():
            if not key.isdecimal() or int(key) >= num_rows:
                raise ValueError(
                    f"{path}: id2label has {key!r}, the class heads have {num_rows} rows"
                )
            if str(value) not in ("N/A", "", f"LABEL_{key}"):
                by_row[int(key)] = Category(int(key), str(value))
        return FileClasses(num_rows, by_row, f"from id2label in {path}")
    try:
        listed = sorted((int(entry["id"]), str(entry["name"])) for entry in content["categories"])
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError(f"{path}: has neither `categories` nor `id2label` with names") from error
    categories = [Category(id_, name) for id_, name in listed]
    if len(categories) == num_rows:
        return own_classes(categories, f"from {path}, in the order of their ids")
    if categories and categories[0].id >= 0 and categories[-1].id < num_rows:
        by_id = {category.id: category for category in categories}
        return FileClasses(num_rows, by_id, f"from {path}, rows are ids")
    raise ValueError(
        f"{path}: lists {len(categories)} categories with ids up to "
        f"{categories[-1].id if categories else 'none'}; the class heads have {num_rows} rows, "
        "which fits neither one row per category nor one row per id"
    )


def plan_classes(
    file: FileClasses, categories: Sequence[Category], how: InitClasses = "by_name"
) -> ClassPlan:
    """Choose the row that each class of a data set starts from.

    Raises:
        ValueError: the file's classes have no names, or in_order does not fit; names the
            alternatives.
    """
    new = len(categories)
    if how == "drop":
        line = f"classes: all {new} start untrained; {file.num_rows} of the file are dropped"
        return ClassPlan((None,) * new, (line,))
    if how == "in_order":
        if file.num_rows != new:
            raise ValueError(
                f"init_classes=in_order: the file has {file.num_rows} rows, the data set {new} "
                "classes; use init_classes=by_name or drop"
            )
        pairs = [f"{row} is {category.name}" for row, category in enumerate(categories)]
        return ClassPlan(tuple(range(new)), (f"classes: row {short_list(pairs, NUM_SHOWN)}",))
    if not file.by_row:
        raise ValueError(
            f"the file has {file.origin}. Give them with jobs/convert.py --classes FILE; or start "
            "with untrained class heads, init_classes=drop; or use the rows as the data set's "
            "classes in order, init_classes=in_order"
        )
    return _match(file, categories)


def _match(file: FileClasses, categories: Sequence[Category]) -> ClassPlan:
    by_exact = {category.name: row for row, category in file.by_row.items()}
    rows: list[int | None] = [by_exact.get(category.name) for category in categories]
    left: dict[str, list[int]] = defaultdict(list)  # rows without an exactly equal name
    for row, category in file.by_row.items():
        if row not in rows:
            left[normalized_name(category.name)].append(row)
    for place, category in enumerate(categories):
        if rows[place] is None and left[normalized_name(category.name)]:
            rows[place] = left[normalized_name(category.name)].pop(0)
    matched = [
        category.name if category.name == file.by_row[row].name
        else f"{category.name} (there {file.by_row[row].name})"
        for category, row in zip(categories, rows, strict=True)
        if row is not None
    ]  # fmt: skip
    new = [c.name for c, row in zip(categories, rows, strict=True) if row is None]
    dropped = [category.name for row, category in file.by_row.items() if row not in rows]
    lines = [f"classes: the file has {file.origin}"]
    for what, names in (
        (f"of {len(categories)} by name", matched),
        ("new, which start untrained", new),
        ("of the file are dropped", dropped),
    ):
        if names or names is matched:
            listed = f": {short_list(names, NUM_SHOWN)}" if names else ""
            lines.append(f"  {len(names)} {what}{listed}")
    return ClassPlan(tuple(rows), tuple(lines))


def normalized_name(name: str) -> str:
    """Return a name for comparison: without case, and with spaces for `_` and `-`."""
    return " ".join(name.casefold().replace("_", " ").replace("-", " ").split())
