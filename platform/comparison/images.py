"""Show the images of a comparison, gained and lost, with the detections of either model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from deta.platform.analysis.analysis import outcomes
from deta.platform.analysis.images import KEY, LONGER_PX, boxes_of, drawn, small_jpeg
from deta.platform.comparison.compare import Comparison, ImageChange
from deta.platform.data.image_decoding import ImageError, decode
from deta.platform.data.image_sizes import PixelRules
from deta.platform.pages.content import Number, Paragraph, Part, Section, Slide, SlideShow, table
from deta.platform.pages.number_format import num_of

NUM_IMAGES = 20  # gained, and as many lost
MAX_IMAGE_BYTES = 6_000_000  # of all images of a page; those beyond are left out


def slides_of(comparison: Comparison, folder: Path | None) -> list[Slide]:
    """Return the images that changed most and whose files exist."""
    slides: list[Slide] = []
    used = 0
    for group, changes in (("Gained", comparison.gained), ("Lost", comparison.lost)):
        # At least half of the bytes are for images that are lost.
        limit = MAX_IMAGE_BYTES // 2 if group == "Gained" else MAX_IMAGE_BYTES
        for change in changes[:NUM_IMAGES] if folder else ():
            slide = _slide(comparison, change, group, folder) if folder else None
            if slide is not None and used + len(slide.jpeg.content) <= limit:
                used += len(slide.jpeg.content)
                slides.append(slide)
    return slides


def rules_of(config: Mapping[str, Any]) -> PixelRules:
    """Return how a flat configuration reads pixels; older ones, and files, do not say it."""
    keys = ("exif", "sixteen_bit", "sixteen_bit_range")
    given = {key: config.get(f"data.{key}") for key in keys}
    return PixelRules(**{key: value for key, value in given.items() if value is not None})


def _slide(comparison: Comparison, change: ImageChange, group: str, folder: Path) -> Slide | None:
    """Return a slide, or None if the image is missing or broken."""
    try:
        rules = rules_of(comparison.sides[1].config)
        image = decode(folder / change.file_name, rules=rules)
    except (ImageError, OSError):
        return None
    note = (
        f"{num_of(change.errors[0], 'error')} in A, {change.errors[1]} in B; "
        f"{change.gained} true boxes gained, {change.lost} lost."
    )
    sides = comparison.explanations
    found = [outcomes(one.matched, one.errors, one.operating_score)[1] for one in sides]
    views = []
    for letter, name, one, other in zip("AB", comparison.names, sides, found[::-1], strict=True):
        boxes = boxes_of(one, change.image_id, image.size, other)
        num = {kind: sum(box.kind == kind for box in boxes) for kind in ("right", "wrong")}
        num_missed = len(boxes) - sum(num.values())
        counts = f"{num['right']} found, {num['wrong']} wrong, {num_missed} missed"
        views.append((f"{letter}: {name}, {counts}", drawn(boxes)))
    return Slide(change.file_name, note, group, small_jpeg(image, LONGER_PX), views)


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
        key = (*KEY, ("strong", "thick: the other model differs here"))
        how = "Step with ← and →, J and K, the buttons, or a click on the image."
        parts += [Paragraph(how, style="aside"), SlideShow("images-shown", slides, key)]
    else:
        parts.append(Paragraph("No image files were found; --images FOLDER names their folder."))
    changed = [*comparison.gained[:NUM_IMAGES], *comparison.lost[:NUM_IMAGES]]
    if changed:
        rows = [
            [one.file_name or None, str(one.image_id), *one.errors, one.gained, one.lost]
            for one in changed
        ]
        parts.append(
            table(
                "Errors (wrong and missed) of the images that changed most",
                ["Image", "Id", Number("A", "errors"), Number("B", "errors"),
                 Number("Gained", "true boxes"), Number("Lost", "true boxes")],
                rows,
            )
        )  # fmt: skip
    return Section("images", "Images gained and lost", parts)
