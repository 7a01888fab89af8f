"""Pictures on a page to step through, two at a time, with boxes over them.

Boxes are elements over the picture, in shares of its size: sharp at any width, read out by a screen
reader, and both sides share one copy of the picture. Without JavaScript all pictures stand one
below the other; with it there is one at a time, and buttons and keys to step.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass

from deta.platform.pages.html import Markup, element, paragraph
from deta.platform.pages.theme import LIGHT

TOP_SHARE = 0.08  # of the picture: a box that begins above has its name within
RIGHT_SHARE = 0.62  # a box that begins beyond has its name at its right edge


@dataclass(frozen=True)
class SlideBox:
    """A box over a picture, in shares of its width and height."""

    left: float
    top: float
    width: float
    height: float
    kind: str  # right, wrong or missed
    text: str
    is_strong: bool = False


@dataclass(frozen=True)
class Slide:
    """One picture, shown twice with different boxes."""

    title: str
    note: str
    group: str  # of which one can choose to see only these
    jpeg: bytes
    size_px: tuple[int, int]  # (width, height)
    shots: Sequence[tuple[str, Sequence[SlideBox]]]  # caption and boxes of each side


def slide_show(name: str, slides: Sequence[Slide]) -> Markup:
    """All slides; page with `SLIDE_STYLE` and `SLIDE_SCRIPT`.

    Args:
        name: unique on its page; letters, digits, hyphens.
    """
    items = [_slide(slide, place, len(slides)) for place, slide in enumerate(slides, start=1)]
    return element(
        "div",
        element("ol", *items, class_="slides-list"),
        id=name,
        class_="slides",
        role="group",
        aria_label="Pictures; the arrow keys or J and K step through them",
    )


def _slide(slide: Slide, place: int, num: int) -> Markup:
    width, height = slide.size_px
    data = base64.b64encode(slide.jpeg).decode()
    shots = [
        element(
            "div",
            element("div", caption, class_="shot-caption"),
            element(
                "div",
                *(_box(box) for box in boxes),
                class_="shot",
                role="img",
                aria_label=f"{slide.title}, {caption}",
                style=f"aspect-ratio: {width} / {height}",
            ),
        )
        for caption, boxes in slide.shots
    ]
    return element(
        "li",
        element("h3", slide.title),
        paragraph(slide.note, class_="aside"),
        element("div", *shots, class_="pair"),
        class_="slide",
        data_group=slide.group,
        aria_label=f"Picture {place} of {num}",
        style=f"--picture: url(data:image/jpeg;base64,{data})",
    )


def _box(box: SlideBox) -> Markup:
    left, top = min(max(box.left, 0.0), 1.0), min(max(box.top, 0.0), 1.0)
    width = min(max(box.left + box.width, 0.0), 1.0) - left
    height = min(max(box.top + box.height, 0.0), 1.0) - top
    kinds = [box.kind] + ["strong"] * box.is_strong
    kinds += ["within"] * (top < TOP_SHARE) + ["to-left"] * (left > RIGHT_SHARE)
    return element(
        "span",
        element("b", box.text),
        class_="box " + " ".join(kinds),
        style=f"left:{100 * left:.2f}%;top:{100 * top:.2f}%;"
        f"width:{100 * width:.2f}%;height:{100 * height:.2f}%",
    )


SLIDE_STYLE = (
    # Over a photograph, so the same by day and by night.
    f".shot, .key {{ --right: {LIGHT['c2']}; --wrong: {LIGHT['c1']}; --missed: {LIGHT['c3']}; }}"
    + """
.slides-list { list-style: none; margin: 0; padding: 0; max-width: none; }
.slide { margin: 0 0 2rem; }
.pair { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: .8rem; }
.shot-caption { font-size: .9rem; margin-bottom: .3rem; }
.shot { position: relative; overflow: hidden; background: var(--shade) var(--picture) center /
  100% 100% no-repeat; print-color-adjust: exact; -webkit-print-color-adjust: exact; }
.box { position: absolute; border: 2px solid var(--kind); box-shadow: 0 0 0 1px #0006,
  inset 0 0 0 1px #0006; }
.box.right, .key .right { --kind: var(--right); }
.box.wrong, .key .wrong { --kind: var(--wrong); }
.box.missed, .key .missed { --kind: var(--missed); }
.box.missed { border-style: dashed; }
.box.strong { border-width: 4px; }
.box b { position: absolute; left: -2px; bottom: 100%; background: var(--kind); color: #fff;
  font: 600 .72rem/1.35 system-ui, sans-serif; padding: 0 .3em; white-space: nowrap; }
.box.within b { bottom: auto; top: 0; }
.box.to-left b { left: auto; right: -2px; }
.no-names .box b { display: none; }
.key { display: flex; flex-wrap: wrap; gap: .3rem 1.2rem; margin: 0 0 1rem; padding: 0;
  list-style: none; max-width: none; font-size: .9rem; }
.key li { margin: 0; }
.key i { display: inline-block; width: 1.5em; height: .95em; margin-right: .4em;
  vertical-align: -.1em; border: 2px solid var(--kind); }
.key i.missed { border-style: dashed; }
.key i.strong { border-width: 4px; border-color: var(--ink); }
.slide-controls { display: flex; flex-wrap: wrap; align-items: center; gap: .5rem .8rem;
  margin: 0 0 1rem; }
.slide-controls button { text-decoration: none; border: 1px solid var(--muted);
  padding: .3rem .8rem; border-radius: 4px; min-height: 2.4rem; }
.slide-controls button[aria-pressed="true"] { background: var(--ink); color: var(--paper); }
.slide-controls .count { font-variant-numeric: tabular-nums; min-width: 4.5em; text-align: center; }
.stepping .slide { display: none; }
.stepping .slide.current { display: block; }
@media (max-width: 40rem) { .pair { grid-template-columns: minmax(0, 1fr); } }
@media print {
  .stepping .slide { display: block; break-inside: avoid; }
  .slide-controls { display: none; }
}
"""
)

SLIDE_SCRIPT = """
"use strict";
(() => {
  const shows = [];

  function button(label, title, act) {
    const made = document.createElement("button");
    made.type = "button";
    made.textContent = label;
    made.title = title;
    made.addEventListener("click", act);
    return made;
  }

  function stepper(root) {
    const all = [...root.querySelectorAll(".slide")];
    const groups = [...new Set(all.map((slide) => slide.dataset.group))];
    let group = "", place = 0;
    const shown = () => all.filter((slide) => !group || slide.dataset.group === group);
    const count = document.createElement("span");
    count.className = "count";
    count.setAttribute("aria-live", "polite");

    function show() {
      const slides = shown();
      for (const slide of all) slide.classList.toggle("current", slide === slides[place]);
      count.textContent = `${place + 1} of ${slides.length}`;
      for (const one of choices) one.setAttribute("aria-pressed", String(one.value === group));
    }
    function step(by) {
      const num = shown().length;
      place = (place + by + num) % num;
      show();
      const edge = controls.getBoundingClientRect();
      if (edge.top < 0 || edge.bottom > innerHeight) controls.scrollIntoView({ block: "start" });
    }

    const controls = document.createElement("div");
    controls.className = "slide-controls";
    const choices = ["", ...groups].map((name) => {
      const num = all.filter((slide) => !name || slide.dataset.group === name).length;
      const made = button(`${name || "All"} (${num})`, "", () => {
        group = name;
        place = 0;
        show();
      });
      made.value = name;
      return made;
    });
    const names = button("Names", "Show or hide the names of the boxes", () => {
      const hidden = root.classList.toggle("no-names");
      names.setAttribute("aria-pressed", String(!hidden));
    });
    names.setAttribute("aria-pressed", "true");
    controls.append(
      button("\\u2190 Previous", "Left arrow or K", () => step(-1)), count,
      button("Next \\u2192", "Right arrow or J", () => step(1)),
      ...(groups.length > 1 ? choices : []), names);
    root.prepend(controls);
    root.classList.add("stepping");
    for (const picture of root.querySelectorAll(".pair"))
      picture.addEventListener("click", () => step(1));
    show();
    return { root, step };
  }

  for (const root of document.querySelectorAll(".slides"))
    if (root.querySelector(".slide")) shows.push(stepper(root));

  const STEPS = { ArrowRight: 1, j: 1, J: 1, ArrowLeft: -1, k: -1, K: -1 };
  addEventListener("keydown", (event) => {
    const by = STEPS[event.key];
    if (!by || !shows.length || event.ctrlKey || event.metaKey || event.altKey) return;
    // A table that is wider than the page is moved by the arrow keys.
    if (event.target.closest?.("input, select, textarea, .scroll")) return;
    const seen = shows.find(({ root }) => {
      const box = root.getBoundingClientRect();
      return box.bottom > 0 && box.top < innerHeight;
    });
    (seen || shows[0]).step(by);
    event.preventDefault();
  });
})();
"""
