"""Images on a page to step through, each shown twice side by side with boxes over it.

Boxes are elements over the image, in shares of its size. They are sharp at any width, a screen
reader reads them, and both sides share one copy of the image. Without JavaScript all images are
in a column; with it one is shown at a time, with buttons and keys to step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from deta.platform.pages.content import Jpeg

TOP_SHARE = 0.08  # of the image: a box that begins above has its name within
RIGHT_SHARE = 0.62  # a box that begins beyond has its name at its right edge


@dataclass(frozen=True)
class SlideBox:
    """A box over an image, in shares of its width and height."""

    left: float
    top: float
    width: float
    height: float
    kind: str  # right, wrong or missed
    text: str
    is_strong: bool = False

    @property
    def css_class(self) -> str:
        left, top, *_ = self._visible_part
        names = ["box", self.kind] + ["strong"] * self.is_strong
        names += ["within"] * (top < TOP_SHARE) + ["to-left"] * (left > RIGHT_SHARE)
        return " ".join(names)

    @property
    def css_style(self) -> str:
        left, top, width, height = (100 * share for share in self._visible_part)
        return f"left:{left:.2f}%;top:{top:.2f}%;width:{width:.2f}%;height:{height:.2f}%"

    @property
    def _visible_part(self) -> tuple[float, float, float, float]:
        """Left, top, width and height of the part that lies on the image."""
        left, top = min(max(self.left, 0.0), 1.0), min(max(self.top, 0.0), 1.0)
        width = min(max(self.left + self.width, 0.0), 1.0) - left
        height = min(max(self.top + self.height, 0.0), 1.0) - top
        return left, top, width, height


@dataclass(frozen=True)
class SlideView:
    """One side of a slide: the boxes over the image."""

    caption: str
    boxes: Sequence[SlideBox]


@dataclass(frozen=True)
class Slide:
    """One image, shown once for each view."""

    title: str
    note: str
    group: str  # a button shows the slides of one group alone
    jpeg: Jpeg
    views: Sequence[SlideView]


@dataclass(frozen=True)
class SlideShow:
    """Slides with the key to their boxes."""

    macro: ClassVar[str] = "slide_show"

    name: str  # unique on its page; letters, digits, hyphens
    slides: Sequence[Slide]
    key: Sequence[tuple[str, str]] = ()  # kind of a box, or "strong", and what it means
