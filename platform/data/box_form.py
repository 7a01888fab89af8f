"""Recognise boxes that are written in another form than COCO's [x, y, width, height] in pixels.

Every such guess is a warning and not an error, since a data set may be odd and right. COCO itself
gives none: its boxes lie inside their images.
"""

# A annotations

from __future__ import annotations

import numpy as np

SLACK_PX = 1.0  # tools round, and count pixels from 0 or from 1
MANY = 0.05  # share of boxes outside of their image from which on a form is looked for
VERY_MANY = 0.2  # from which on it is said without a form that fits
ALMOST_ALL = 0.95
SMALLEST_IMAGE_PX = 8  # where a box of one pixel may be right
PERCENT_IMAGE_PX, PERCENT_BOXES = 200, 20  # fewer or smaller ones prove nothing


def box_form_warning(bbox: np.ndarray, areas: np.ndarray, size_px: np.ndarray) -> str | None:
    """Return what the boxes of a data set probably are instead of xywh in pixels, or None.

    Args:
        bbox: A 4 float64, as in the file; no crowds.
        areas: A, `area` as in the file.
        size_px: A 2, (height, width) of each box's image.
    """
    count = len(bbox)
    if not count:
        return None
    edges = np.abs(bbox)
    large = size_px.min(axis=1) >= SMALLEST_IMAGE_PX
    unit = (edges <= 1).all(axis=1) & large
    if unit.mean() >= ALMOST_ALL:
        return (
            f"{unit.sum()} of {count} boxes have no number above 1, so each is smaller than 1 px; "
            "normalised boxes? COCO has pixels"
        )
    far = (bbox[:, :2] + bbox[:, 2:]).max(axis=1)
    if (
        count >= PERCENT_BOXES
        and size_px.min() >= PERCENT_IMAGE_PX
        and 50 < far.max() <= 100.5
        and (bbox >= 0).all()
    ):
        return f"all {count} boxes end within 100 px; percent of the image? COCO has pixels"

    outside = _outside(bbox, size_px)
    if _areas_are_of_corners(bbox, areas):
        return _advice(
            "x1 y1 x2 y2, corners instead of sizes", outside, count, "their areas say so too"
        )
    if outside.sum() < MANY * count or (count < 3 and not outside.all()):
        return None
    x, y, width, height = bbox.T
    for form, corners in (
        ("x1 y1 x2 y2, corners instead of sizes", bbox),
        (
            "centre x, centre y, width, height",
            np.stack([x - width / 2, y - height / 2, x + width / 2, y + height / 2], axis=1),
        ),
        ("y1 x1 y2 x2, corners instead of sizes", bbox[:, [1, 0, 3, 2]]),
        ("y, x, height, width", np.stack([y, x, y + height, x + width], axis=1)),
    ):
        fits = _inside(corners, size_px)
        if fits.mean() < ALMOST_ALL:
            continue
        # Sloppy boxes of large objects fit as corners too, but overhang little.
        if "corners" in form and np.median(_overhang(bbox, size_px)[outside]) < MANY:
            continue
        return _advice(form, outside, count, f"{fits.sum()} fit as that")
    fits = _inside(bbox, size_px)
    if outside.sum() >= VERY_MANY * count:
        many = fits[outside].mean() >= ALMOST_ALL and outside.sum() > 1
        if many and np.median(_overhang(bbox, size_px)[outside]) >= MANY:
            return _advice("in part x1 y1 x2 y2, corners instead of sizes", outside, count, "")
        return (
            f"{outside.sum()} of {count} boxes reach out of their image by more than "
            f"{SLACK_PX:g} px; annotated on images of another size?"
        )
    return None


def _advice(form: str, outside: np.ndarray, count: int, more: str) -> str:
    if not outside.any():
        return (
            f"the areas of {count} boxes say that these are {form}; COCO has [x, y, width, height]"
        )
    return (
        f"{outside.sum()} of {count} boxes reach out of their image by more than {SLACK_PX:g} px"
        f"; are they {form}{more and f' ({more})'}? "
        "COCO has [x, y, width, height] from the upper left corner"
    )


def _outside(bbox: np.ndarray, size_px: np.ndarray) -> np.ndarray:
    """Return whether each xywh box reaches out of its image: A."""
    corners = np.concatenate([bbox[:, :2], bbox[:, :2] + bbox[:, 2:]], axis=1)
    return ~_inside(corners, size_px, positive=False)


def _inside(corners: np.ndarray, size_px: np.ndarray, *, positive: bool = True) -> np.ndarray:
    """Return whether each xyxy box lies inside its image and, if asked, has an area: A."""
    high = size_px[:, ::-1] + SLACK_PX
    inside = (corners >= -SLACK_PX).all(axis=1)
    inside &= (corners[:, :2] <= high).all(axis=1) & (corners[:, 2:] <= high).all(axis=1)
    if positive:
        inside &= (corners[:, 2:] > corners[:, :2]).all(axis=1)
    return np.asarray(inside)


def _overhang(bbox: np.ndarray, size_px: np.ndarray) -> np.ndarray:
    """Return by which share of its image's side each xywh box reaches out at most: A."""
    sides = size_px[:, ::-1]
    over = np.maximum(bbox[:, :2] + bbox[:, 2:] - sides, -bbox[:, :2])
    return (over / sides).max(axis=1)


def _areas_are_of_corners(bbox: np.ndarray, areas: np.ndarray) -> bool:
    """Return True if `area` is that of xyxy boxes, and not that of xywh ones."""
    sides = bbox[:, 2:] - bbox[:, :2]
    as_corners = np.isclose(areas, sides.prod(axis=1), rtol=0.01, atol=1) & (sides > 0).all(axis=1)
    as_sizes = np.isclose(areas, bbox[:, 2:].prod(axis=1), rtol=0.01, atol=1)
    return bool(as_corners.mean() >= ALMOST_ALL and as_sizes.mean() < 1 - ALMOST_ALL)
