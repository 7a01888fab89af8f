"""Draw a small data set in COCO format that needs no download: shapes on textured backgrounds.

It serves the demo, end-to-end tests, and first tests on a new machine. A small detector learns its
five kinds of shape from scratch within minutes. Colour, size, rotation and texture are independent
of the kind, shapes overlap and reach out of the image, and images differ in aspect ratio, so that
batches have padding.
"""

# H W pixels of an image   V corners of an outline

from __future__ import annotations

import colorsys
import json
import os
import shutil
import uuid
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

CATEGORY_NAMES = ("disc", "square", "triangle", "star", "ring")  # ids 1 to 5
ASPECT_RATIOS = [(1.0, 1.0), (1.0, 0.875), (0.875, 1.0)]  # width, height
MAX_SHAPES = 4
MIN_SIDE, MAX_SIDE = 24 / 128, 62 / 128  # of a box, as a fraction of size_px
MIN_VISIBLE = 0.7  # of a shape's area; the rest may be covered or outside of the image
MAX_ROTATION = np.radians(12)
SUPERSAMPLING = 4
RING_HOLE = 0.55  # of the radius
JPEG_QUALITY = 92
FIRST_IMAGE_ID = {"train": 1, "val": 1_000_001}
MARKER = "shapes.json"  # the arguments of the data set; written last
DRAWING_VERSION = 6  # increases when the same seed gives other images


class ShapesDataset:
    """The paths of a written data set."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.train_images, self.val_images = folder / "train", folder / "val"
        self.train_annotations = folder / "annotations" / "instances_train.json"
        self.val_annotations = folder / "annotations" / "instances_val.json"


class Shape(NamedTuple):
    """One shape of an image, with the masks for checking its box."""

    category_id: int
    # xyxy, of its part within the image, including what other shapes cover
    box_px: tuple[float, float, float, float]
    area_px: float  # of the complete shape, including what is covered or outside
    coverage: np.ndarray  # H W float32 in 0..1, as if the shape were on top
    visible: np.ndarray  # H W float32 in 0..1, without what other shapes cover


def write_shapes(
    folder: Path, *, num_train: int = 1000, num_val: int = 200, size_px: int = 128, seed: int = 0
) -> ShapesDataset:
    """Write images and COCO annotations, unless the same data set exists already.

    The same arguments give the same bytes with the same versions of numpy and Pillow, and the i-th
    image of a split does not depend on the number of images. The write is atomic, and several
    processes may write the same data set at once.

    Args:
        folder: gets `train/`, `val/` and `annotations/instances_{train,val}.json`. A data set of
            shapes with other arguments is replaced.
        size_px: the longer side of every image.

    Raises:
        ValueError: the folder contains something other than a data set of shapes, or an argument is
            out of range.
    """
    if num_train < 1 or num_val < 1 or size_px < 32 or seed < 0:
        raise ValueError(
            f"num_train={num_train}, num_val={num_val} must be 1 or more, seed={seed} 0 or more "
            f"and size_px={size_px} 32 or more, since smaller shapes are not distinguishable"
        )
    recipe = {
        "drawing_version": DRAWING_VERSION,
        "num_train": num_train,
        "num_val": num_val,
        "size_px": size_px,
        "seed": seed,
    }
    folder = Path(folder)
    dataset = ShapesDataset(folder)
    if _is_complete(dataset, recipe):
        return dataset
    if folder.exists() and any(folder.iterdir()) and not (folder / MARKER).exists():
        raise ValueError(
            f"{folder} has files but no {MARKER}, so it is not a data set of shapes and is not "
            "overwritten; choose another folder"
        )
    unfinished = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}")
    outdated = unfinished.with_suffix(".outdated")
    try:
        (unfinished / "annotations").mkdir(parents=True)
        _write_split(unfinished, "train", num_train, size_px, seed)
        _write_split(unfinished, "val", num_val, size_px, seed)
        (unfinished / MARKER).write_text(json.dumps(recipe, indent=1) + "\n")
        if folder.exists() and any(folder.iterdir()) and not _is_complete(dataset, recipe):
            folder.rename(outdated)
        os.replace(unfinished, folder)
    except OSError:
        if not _is_complete(dataset, recipe):  # otherwise another process was faster
            raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
        shutil.rmtree(outdated, ignore_errors=True)
    return dataset


def _is_complete(dataset: ShapesDataset, recipe: dict[str, int]) -> bool:
    marker = dataset.folder / MARKER
    return (
        marker.exists()
        and json.loads(marker.read_text()) == recipe
        and dataset.train_annotations.exists()
        and dataset.val_annotations.exists()
        and len(list(dataset.train_images.glob("*.jpg"))) == recipe["num_train"]
        and len(list(dataset.val_images.glob("*.jpg"))) == recipe["num_val"]
    )


def _write_split(folder: Path, split: str, num_images: int, size_px: int, seed: int) -> None:
    images: list[dict[str, object]] = []
    annotations: list[dict[str, object]] = []
    (folder / split).mkdir()
    for index in range(num_images):
        image_id = FIRST_IMAGE_ID[split] + index
        rng = np.random.default_rng([seed, FIRST_IMAGE_ID[split], index])
        image, shapes = draw_scene(rng, size_px)
        file_name = f"{image_id:07d}.jpg"
        image.save(folder / split / file_name, quality=JPEG_QUALITY)
        width, height = image.size
        images.append({"id": image_id, "file_name": file_name, "width": width, "height": height})
        for shape in shapes:
            x1, y1, x2, y2 = shape.box_px
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": shape.category_id,
                    "bbox": [round(v, 2) for v in (x1, y1, x2 - x1, y2 - y1)],
                    "area": round(float(shape.coverage.sum()), 2),
                    "iscrowd": 0,
                }
            )
    categories = [
        {"id": number, "name": name, "supercategory": "shape"}
        for number, name in enumerate(CATEGORY_NAMES, start=1)
    ]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))


def draw_scene(rng: np.random.Generator, size_px: int) -> tuple[Image.Image, list[Shape]]:
    """Draw one image and return it with its shapes, the lowest first.

    A shape that would hide too much of another, or that is too far outside of the image, is drawn
    elsewhere or left out. So every visible shape has an annotation.
    """
    width_part, height_part = ASPECT_RATIOS[rng.integers(len(ASPECT_RATIOS))]
    width, height = round(width_part * size_px), round(height_part * size_px)
    pixels, background_rgb = _background(rng, height, width)
    shapes: list[Shape] = []
    num_shapes = rng.integers(1, MAX_SHAPES + 1)

    for _ in range(4 * MAX_SHAPES):
        if len(shapes) == num_shapes:
            break
        shape = _place(rng, height, width, size_px)
        x1, y1, x2, y2 = shape.box_px
        lower = [below._replace(visible=below.visible * (1 - shape.coverage)) for below in shapes]
        if min(x2 - x1, y2 - y1) < MIN_SIDE * size_px or any(
            one.visible.sum() < MIN_VISIBLE * one.area_px for one in (*lower, shape)
        ):
            continue
        shapes = [*lower, shape]
        window = np.s_[int(y1) : int(np.ceil(y2)), int(x1) : int(np.ceil(x2))]
        coverage, under = shape.coverage[window][..., None], pixels[window]
        paint = _paint(rng, under.shape[0], under.shape[1], background_rgb)
        under += coverage * (paint - under)

    noise = rng.standard_normal(pixels.shape, np.float32)
    pixels += rng.uniform(1, 5) * noise  # as from a camera
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8)), shapes


def _place(rng: np.random.Generator, height: int, width: int, size_px: int) -> Shape:
    """Return a shape of random kind, size, rotation and place; it may reach out of the image."""
    category = int(rng.integers(len(CATEGORY_NAMES)))
    name = CATEGORY_NAMES[category]
    angle = rng.uniform(-MAX_ROTATION, MAX_ROTATION)
    rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    stretch = np.array([1.0, rng.uniform(0.85, 1.0)])
    corners = _outline(name) * stretch @ rotation.T  # V 2, xy around the origin

    side = np.exp(rng.uniform(np.log(1.1 * MIN_SIDE), np.log(MAX_SIDE))) * size_px
    corners *= side / np.ptp(corners, axis=0).max()
    centre = rng.uniform(0.05, 0.95, 2) * (width, height)

    x, y = corners.T
    # Shoelace formula.
    area = abs(x[:-1] @ y[1:] - y[:-1] @ x[1:] + x[-1] * y[0] - y[-1] * x[0]) / 2
    canvas = Image.new("L", (width * SUPERSAMPLING, height * SUPERSAMPLING))
    draw = ImageDraw.Draw(canvas)
    draw.polygon(((corners + centre) * SUPERSAMPLING).ravel().tolist(), fill=255)
    if name == "ring":
        hole = corners * RING_HOLE + centre
        draw.polygon((hole * SUPERSAMPLING).ravel().tolist(), fill=0)
        area *= 1 - RING_HOLE**2
    coverage = np.asarray(canvas.reduce(SUPERSAMPLING), np.float32) / 255

    within = _clip_outline(corners + centre, height, width)
    (x1, y1), (x2, y2) = within.min(axis=0).tolist(), within.max(axis=0).tolist()
    return Shape(category + 1, (x1, y1, x2, y2), float(area), coverage, coverage)


def _clip_outline(corners: np.ndarray, height: int, width: int) -> np.ndarray:
    """Clip an outline to the image: V 2, xy.

    Source: Sutherland and Hodgman 1974, one side of the image after the other.
    """
    for axis, limit, sign in ((0, 0, 1), (0, width, -1), (1, 0, 1), (1, height, -1)):
        depth = sign * (corners[:, axis] - limit)  # V, negative outside
        if depth.min() >= 0:
            continue
        following, following_depth = np.roll(corners, -1, axis=0), np.roll(depth, -1)
        crosses = depth * following_depth < 0
        share = np.divide(depth, depth - following_depth, out=np.zeros_like(depth), where=crosses)
        crossing = corners + share[:, None] * (following - corners)
        corners = np.stack([corners, crossing], axis=1)[np.stack([depth >= 0, crosses], axis=1)]
    return corners


def _outline(name: str) -> np.ndarray:
    """Return the corners of a shape around the origin: V 2, xy."""
    if name == "star":
        radii, num_corners = np.array([1.0, 0.45] * 5), 10
    else:
        num_corners = {"disc": 72, "square": 4, "triangle": 3, "ring": 72}[name]
        radii = np.ones(num_corners)
    upright = np.pi / 4 if name == "square" else -np.pi / 2
    angles = upright + np.arange(num_corners) * 2 * np.pi / num_corners
    return np.stack([np.cos(angles), np.sin(angles)], axis=1) * radii[:, None]


def _background(
    rng: np.random.Generator, height: int, width: int
) -> tuple[np.ndarray, tuple[float, float, float]]:
    """Return clouds and stripes of two dull colours, H W 3 float32 in 0..255, and their mean."""
    first, second = (
        np.array(
            colorsys.hsv_to_rgb(rng.random(), rng.uniform(0, 0.45), rng.uniform(0.2, 0.85)),
            np.float32,
        )
        for _ in range(2)
    )
    blend: np.ndarray = np.zeros((height, width), np.float32)
    for cells, weight in ((3, 0.5), (8, 0.3), (24, 0.2)):
        grid = rng.random((cells, cells), dtype=np.float32)
        clouds = Image.fromarray(grid).resize((width, height), Image.Resampling.BICUBIC)
        blend += weight * np.asarray(clouds)
    if rng.random() < 0.4:
        blend = 0.7 * blend + 0.3 * _stripes(rng, height, width)
    pixels = 255 * (first + blend[..., None] * (second - first))  # H W 3
    red, green, blue = pixels.mean(axis=(0, 1)).tolist()
    return pixels, (red, green, blue)


def _stripes(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Return soft parallel stripes: H W in 0..1."""
    angle, wavelength_px = rng.uniform(0, np.pi), rng.uniform(5, 20)
    y, x = np.ogrid[:height, :width]
    wave = 2 * np.pi / wavelength_px
    phase = (wave * np.cos(angle) * x + wave * np.sin(angle) * y).astype(np.float32)
    return 0.5 + 0.5 * np.sin(phase)


def _paint(
    rng: np.random.Generator, height: int, width: int, background_rgb: tuple[float, float, float]
) -> np.ndarray:
    """Return the fill of a shape, unlike its background: H W 3 float32 in 0..255."""
    while True:
        hue, saturation, value = rng.random(), rng.uniform(0.3, 1), rng.uniform(0.25, 1)
        colour = 255 * np.array(colorsys.hsv_to_rgb(hue, saturation, value), np.float32)
        if np.abs(colour - background_rgb).max() > 70:
            break
    angle = rng.uniform(0, 2 * np.pi)
    y, x = np.ogrid[:height, :width]
    slope_x, slope_y = 0.25 * float(np.cos(angle)), 0.25 * float(np.sin(angle))
    light = 1 + slope_x * (x / width - 0.5) + slope_y * (y / height - 0.5)
    light = light.astype(np.float32)  # H W
    if rng.random() < 0.25:
        light *= 0.8 + 0.4 * _stripes(rng, height, width)
    return light[..., None] * colour
