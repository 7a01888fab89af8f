"""Show the images of a comparison, gained and lost, with the detections of either model."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from deta.platform.comparison.compare import Comparison, ImageChange, ShownBox
from deta.platform.data.image_decoding import ImageError, decode
from deta.platform.pages.content import Column, Jpeg, Paragraph, Part, Section, Table
from deta.platform.pages.number_format import num_of
from deta.platform.pages.slideshow import Slide, SlideBox, SlideShow, SlideView

NUM_IMAGES = 20  # gained, and as many lost
LONGER_PX = 640
JPEG_QUALITY = 74
MAX_IMAGE_BYTES = 6_000_000  # of all images of a page; those beyond are left out
MAX_BOXES = 40  # on one image, those that changed and those of high score
KEY = (
    ("right", "✓ found"),
    ("wrong", "✗ wrong: nothing there, or an inaccurate box"),
    ("missed", "missed"),
    ("strong", "thick: the other model differs here"),
)
WORDS = {"right": "✓", "wrong": "✗", "missed": "missed"}


def slides_of(comparison: Comparison, folder: Path | None) -> list[Slide]:
    """Return the images that changed most and whose files exist."""
    slides: list[Slide] = []
    used = 0
    groups = (("Gained", comparison.gained), ("Lost", comparison.lost))
    for group, changes in groups:
        # At least half of the bytes are for images that are lost.
        limit = MAX_IMAGE_BYTES // 2 if group == "Gained" else MAX_IMAGE_BYTES
        for change in changes[:NUM_IMAGES]:
            slide = _slide(comparison, change, group, folder)
            if slide is not None and used + len(slide.jpeg.content) <= limit:
                used += len(slide.jpeg.content)
                slides.append(slide)
    return slides


def _slide(
    comparison: Comparison, change: ImageChange, group: str, folder: Path | None
) -> Slide | None:
    """Return a slide, or None if the image is missing or broken."""
    if folder is None or not change.file_name:
        return None
    try:
        image = decode(folder / change.file_name)
    except (ImageError, OSError):
        return None
    size = image.size
    scale = min(1.0, LONGER_PX / max(size))
    small = image.convert("RGB").resize(
        (max(1, round(size[0] * scale)), max(1, round(size[1] * scale))),
        Image.Resampling.BILINEAR,
    )
    content = io.BytesIO()
    small.save(content, "JPEG", quality=JPEG_QUALITY)
    note = (
        f"{num_of(change.errors[0], 'error')} in A, {change.errors[1]} in B; "
        f"{change.gained} true boxes gained, {change.lost} lost."
    )
    views = [
        SlideView(
            f"{letter}: {name}, {_counts(boxes)}", [_share(box, size) for box in _drawn(boxes)]
        )
        for letter, name, boxes in zip("AB", comparison.names, change.boxes, strict=True)
    ]
    return Slide(change.file_name, note, group, Jpeg(content.getvalue(), small.size), views)


def _drawn(boxes: Sequence[ShownBox]) -> list[ShownBox]:
    """Return at most `MAX_BOXES`: changed ones first, others as they come, missed ones last."""
    ordered = sorted(boxes, key=lambda box: not box.is_change)[:MAX_BOXES]
    return sorted(ordered, key=lambda box: box.is_change)  # drawn above the others


def _counts(boxes: Sequence[ShownBox]) -> str:
    num = {kind: sum(box.verdict == kind for box in boxes) for kind in WORDS}
    return f"{num['right']} found, {num['wrong']} wrong, {num['missed']} missed"


def _share(box: ShownBox, size: tuple[int, int]) -> SlideBox:
    x, y, w, h = box.box
    score = "" if box.score is None else f" {box.score:.2f}"
    return SlideBox(
        x / size[0], y / size[1], w / size[0], h / size[1],
        box.verdict, f"{WORDS[box.verdict]} {box.category}{score}", box.is_change,
    )  # fmt: skip


def images_section(comparison: Comparison, slides: Sequence[Slide]) -> Section:
    """Return the section of images gained and lost."""
    scores = [explanation.operating_score for explanation in comparison.explanations]
    text = (
        f"{len(comparison.gained)} images are gained, with fewer errors in B, "
        f"{len(comparison.lost)} lost, {comparison.num_same} unchanged. Detections count from a "
        f"score of {scores[0]:.2f} in A and {scores[1]:.2f} in B, where each has its highest F1."
    )
    parts: list[Part] = [Paragraph(text)]
    if slides:
        parts += [
            Paragraph(
                "Step with ← and →, J and K, the buttons, or a click on the image.",
                style="aside",
            ),
            SlideShow("images-shown", slides, KEY),
        ]
    else:
        parts.append(Paragraph("No image files were found; --images FOLDER names their folder."))
    changed = [*comparison.gained[:NUM_IMAGES], *comparison.lost[:NUM_IMAGES]]
    if changed:
        parts.append(_changes_table(changed))
    return Section(name="images", title="Images gained and lost", parts=parts)


def _changes_table(changed: Sequence[ImageChange]) -> Table:
    return Table(
        caption="Errors (wrong and missed) of the images that changed most",
        columns=[
            Column(title="Image"),
            Column(title="Id"),
            Column(title="A", unit="errors", is_number=True),
            Column(title="B", unit="errors", is_number=True),
            Column(title="Gained", unit="true boxes", is_number=True),
            Column(title="Lost", unit="true boxes", is_number=True),
        ],
        rows=[
            [
                one.file_name or "-", str(one.image_id), str(one.errors[0]), str(one.errors[1]),
                str(one.gained), str(one.lost),
            ]
            for one in changed
        ],
    )  # fmt: skip
