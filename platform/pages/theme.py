"""How a page looks: its style sheet, the colours of its figures, and the script that draws them.

Six colours that people with any colour vision can tell apart (after Okabe and Ito 2008, with the
light ones darkened for a white page and the dark ones lightened for a black one, so that each has
a contrast of at least 3 to its ground), and nine steps of one hue for quantities.
"""

from __future__ import annotations

import json

LIGHT = {
    "paper": "#ffffff",
    "ink": "#1b1f24",
    "muted": "#59616b",
    "rule": "#dfe2e6",
    "shade": "#f5f6f8",
    "shadow": "#d5d9de",
    "accent": "#0a5c9e",
    "c0": "#0067a8",
    "c1": "#c2500a",
    "c2": "#00775c",
    "c3": "#a5407e",
    "c4": "#866600",
    "c5": "#4a5568",
}
DARK = {
    "paper": "#14171a",
    "ink": "#e8eaed",
    "muted": "#a3abb5",
    "rule": "#333940",
    "shade": "#1d2125",
    "shadow": "#000000",
    "accent": "#7cc0f5",
    "c0": "#62b4f2",
    "c1": "#ff9657",
    "c2": "#3fc89d",
    "c3": "#e796cb",
    "c4": "#dcb63c",
    "c5": "#a9b4c4",
}
NUM_COLORS = 6
NUM_STEPS = 9
BAND_ALPHA = 0.16


def _palette(colors: dict[str, str], pale: str, strong: str) -> dict[str, str]:
    """The colours, their translucent forms (b0, b1, ...) and the steps of quantity (s0 ... s8)."""
    bands = {
        f"b{i}": "rgba({}, {}, {}, {})".format(*_rgb(colors[f"c{i}"]), BAND_ALPHA)
        for i in range(NUM_COLORS)
    }
    ends = list(zip(_rgb(pale), _rgb(strong), strict=True))
    steps = {
        f"s{i}": "rgb({}, {}, {})".format(
            *(round(a + (b - a) * i / (NUM_STEPS - 1)) for a, b in ends)
        )
        for i in range(NUM_STEPS)
    }
    return colors | bands | steps


def _rgb(color: str) -> tuple[int, int, int]:
    return int(color[1:3], 16), int(color[3:5], 16), int(color[5:7], 16)


PALETTES = {
    "light": _palette(LIGHT, "#c3d3e2", "#003e75"),
    "dark": _palette(DARK, "#3b4a5a", "#a8dcff"),
}


def _variables(colors: dict[str, str]) -> str:
    return " ".join(
        f"--{name}: {colors[name]};"
        for name in ("paper", "ink", "muted", "rule", "shade", "shadow", "accent")
    )


STYLE = (
    f":root {{ {_variables(LIGHT)} color-scheme: light dark; }}\n"
    f"@media (prefers-color-scheme: dark) {{ :root {{ {_variables(DARK)} }} }}\n"
    f"@media print {{ :root {{ {_variables(LIGHT)} color-scheme: light; }} }}\n"
    """
*, *::before, *::after { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; text-size-adjust: 100%; scroll-padding-top: 1rem; }
body {
  margin: 0 auto; padding: 2.5rem clamp(1rem, 4vw, 3rem) 4rem; max-width: 84rem;
  background: var(--paper); color: var(--ink);
  font: 1rem/1.55 -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
  overflow-wrap: break-word;
}
a { color: var(--accent); text-underline-offset: .15em; text-decoration-thickness: 1px; }
:focus-visible { outline: 2px solid var(--accent); outline-offset: 3px; border-radius: 2px; }
.skip { position: absolute; left: -99rem; }
.skip:focus { left: 1rem; top: .5rem; background: var(--paper); padding: .3rem .6rem; z-index: 9; }

h1 { margin: 0 0 1.1rem; font-size: 1rem; font-weight: 600; color: var(--muted); }
h2 { margin: 0 0 .6rem; font-size: 1.4rem; line-height: 1.25; letter-spacing: -.012em; }
h3 { margin: 0 0 .25rem; font-size: 1rem; line-height: 1.4; }
p { margin: 0 0 .9rem; max-width: 42rem; }
ul { margin: 0 0 1rem; padding-left: 1.2rem; max-width: 42rem; }
li { margin-bottom: .35rem; }
nav li { margin: 0; }
.verdict {
  max-width: 30em; margin-bottom: .55rem; font-size: clamp(1.4rem, 1.05rem + 1.5vw, 2.05rem);
  line-height: 1.24; letter-spacing: -.018em; font-weight: 650; text-wrap: pretty;
}
.verdict + .verdict { font-size: clamp(1.1rem, 1rem + .5vw, 1.3rem); line-height: 1.4;
  letter-spacing: -.005em; font-weight: 450; max-width: 38em; }
.facts { color: var(--muted); margin-top: 1.1rem; }
.aside { color: var(--muted); font-size: .92rem; }
code { font: .9em ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }
pre { margin: 0 0 1rem; padding: .8rem 1rem; overflow-x: auto; background: var(--shade);
  font-size: .85rem; line-height: 1.5; }

header { padding-bottom: 1.6rem; }
section { padding: 2.4rem 0 .6rem; border-top: 1px solid var(--rule); }
footer { padding-top: 1.5rem; border-top: 1px solid var(--rule); color: var(--muted);
  font-size: .85rem; }
nav { font-size: .875rem; padding-bottom: 1.6rem; }
nav ol { list-style: none; margin: 0; padding: 0; max-width: none; display: flex; flex-wrap: wrap;
  gap: .3rem 1.1rem; }
nav a { color: var(--muted); text-decoration: none; }
nav a:hover { color: var(--accent); text-decoration: underline; }

/* A table that is cut shows a shadow on that side (after Lea Verou's four backgrounds). */
.scroll {
  overflow-x: auto; margin: 0 0 1.8rem; max-width: 100%; width: fit-content;
  padding-right: 2px;
  background:
    linear-gradient(to right, var(--paper) 40%, transparent) left / 2.4rem 100%,
    linear-gradient(to left, var(--paper) 40%, transparent) right / 2.4rem 100%,
    linear-gradient(to right, var(--shadow), transparent) left / .45rem 100%,
    linear-gradient(to left, var(--shadow), transparent) right / .45rem 100%;
  background-repeat: no-repeat; background-attachment: local, local, scroll, scroll;
}
table { border-collapse: collapse; font-size: .9rem; line-height: 1.4;
  font-variant-numeric: tabular-nums lining-nums; }
caption { text-align: left; padding: 0 0 .5rem; color: var(--muted);
  max-width: min(42rem, calc(100vw - 2.2rem)); }
th, td { padding: .42rem 1.4rem .42rem 0; text-align: left; vertical-align: baseline;
  border-bottom: 1px solid var(--rule); }
th:last-child, td:last-child { padding-right: .2rem; }
thead th { font-weight: 600; vertical-align: bottom; border-bottom: 1px solid var(--muted); }
tbody th { font-weight: 500; min-width: 8rem; }
tbody tr:last-child > * { border-bottom-color: var(--muted); }
th.number, td.number { text-align: right; white-space: nowrap; }
td.word { max-width: 28rem; }
td.long { min-width: 15rem; }
.unit { display: block; font-weight: 400; font-size: .82em; color: var(--muted); }

figure { margin: 0 0 2.2rem; }
.plot { width: 100%; min-height: 1px; overflow: hidden; }
figcaption { font-size: .9rem; color: var(--muted); }
figcaption p { margin: .3rem 0 .4rem; }
figcaption .table { margin-top: .8rem; }
details { margin: 0 0 .3rem; }
summary { cursor: pointer; width: fit-content; }
summary:hover { color: var(--accent); }
details[open] > summary { margin-bottom: .8rem; }
button { font: inherit; color: inherit; background: none; border: 0; padding: 0; cursor: pointer;
  text-decoration: underline; text-underline-offset: .15em; text-decoration-thickness: 1px; }
button:hover { color: var(--accent); }

img { max-width: 100%; height: auto; background: var(--shade); }
.pictures { display: grid; gap: 1.6rem 1.4rem; margin: 0 0 2.2rem; padding: 0; list-style: none;
  max-width: none; grid-template-columns: repeat(auto-fill, minmax(min(100%, 26rem), 1fr)); }
.pictures.small { grid-template-columns: repeat(auto-fill, minmax(min(100%, 13rem), 1fr)); }
.pictures > li { margin: 0; min-width: 0; font-size: .9rem; line-height: 1.4; }
.pictures img { display: block; margin-bottom: .35rem; }
.pair { display: grid; gap: .35rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 12.5rem), 1fr)); }
.pictures span { display: block; color: var(--muted); }

@media (min-width: 72rem) {
  body { display: grid; grid-template-columns: 11.5rem minmax(0, 1fr); column-gap: 3.5rem;
    grid-template-rows: auto 1fr; padding-top: 3.5rem; }
  header, main { grid-column: 2; min-width: 0; }
  nav { grid-column: 1; grid-row: 1 / 3; padding-top: .1rem; }
  nav ol { position: sticky; top: 2rem; flex-direction: column; gap: .5rem; }
}
@media (max-width: 40rem) {
  body { padding-top: 1.5rem; }
  section { padding-top: 1.8rem; }
  table { font-size: .86rem; }
  th, td { padding-right: 1rem; }
  .pictures.small { grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 1.2rem .8rem; }
}
@media print {
  @page { margin: 16mm; }
  body { display: block; padding: 0; max-width: none; font-size: 9.5pt; }
  nav, button, .skip { display: none; }
  .scroll { overflow: visible; }
  table { font-size: 8pt; }
  th, td { padding: .25rem .7rem .25rem 0; }
  thead { display: table-header-group; }
  figure, tr { break-inside: avoid; }
  h2, h3, caption { break-after: avoid; }
  section { padding-top: 1rem; }
  a { color: inherit; }
}
"""
)

SCRIPT = (
    f"const PALETTES = {json.dumps(PALETTES)};"
    + """
"use strict";
const NARROW_PX = 640, PRINT_PX = 660;
const figures = JSON.parse(document.getElementById("figures").textContent);
const dark = matchMedia("(prefers-color-scheme: dark)");
const touch = matchMedia("(pointer: coarse)");
const widths = new Map();

/* "@name" as a value of ...color, ...colorway or colorscale becomes that colour of the palette. */
function painted(value, palette, key) {
  if (typeof value === "string")
    return /color(way|scale)?$/i.test(key) && value.startsWith("@")
      ? palette[value.slice(1)] || value : value;
  if (Array.isArray(value)) return value.map((item) => painted(item, palette, key));
  if (value === null || typeof value !== "object") return value;
  return Object.fromEntries(
    Object.entries(value).map(([name, item]) => [name, painted(item, palette, name)]));
}

/* What all figures share. */
function common(palette, width) {
  const axis = {
    gridcolor: palette.rule, linecolor: palette.muted, tickcolor: palette.muted, ticks: "outside",
    ticklen: 4, zeroline: false, showline: true, automargin: true,
    title: { standoff: 10, font: { size: 13 } },
    fixedrange: touch.matches,
  };
  return {
    width, autosize: false, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    font: {
      family: "-apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif",
      size: 13, color: palette.muted,
    },
    margin: { l: 56, r: 24, t: 16, b: 48 }, showlegend: false, hovermode: "closest",
    dragmode: touch.matches ? false : "zoom", separators: ". ",
    hoverlabel: { bgcolor: palette.shade, bordercolor: palette.muted, align: "left",
      font: { color: palette.ink, size: 13 } },
    template: { layout: { xaxis: { ...axis, showgrid: false }, yaxis: axis } },
  };
}

function draw(name, width, isPrint) {
  const box = document.getElementById(name), figure = figures[name];
  const palette = dark.matches && !isPrint ? PALETTES.dark : PALETTES.light;
  const isNarrow = width < NARROW_PX && figure.narrow.data !== undefined;
  const shape = painted(isNarrow ? figure.narrow : figure.wide, palette, "");
  const base = common(palette, width);
  const layout = { ...base, ...shape.layout, margin: { ...base.margin, ...shape.layout.margin } };
  return Plotly.react(box, shape.data, layout, { displayModeBar: false, showTips: false });
}

function drawAll(isPrint) {
  for (const name of Object.keys(figures)) {
    const width = isPrint ? PRINT_PX : document.getElementById(name).clientWidth;
    widths.set(name, width);
    draw(name, width, isPrint);
  }
}

for (const name of Object.keys(figures)) {
  const box = document.getElementById(name), button = document.createElement("button");
  button.type = "button";
  button.textContent = "Save as SVG";
  button.addEventListener("click", () => Plotly.downloadImage(
    box, { format: "svg", filename: name, width: box.clientWidth, height: box.clientHeight }));
  box.parentElement.querySelector("figcaption").append(button);
}
drawAll(false);
dark.addEventListener("change", () => drawAll(false));
addEventListener("beforeprint", () => drawAll(true));
addEventListener("afterprint", () => drawAll(false));
const watcher = new ResizeObserver((entries) => {
  for (const { target, contentRect } of entries) {
    const width = Math.round(contentRect.width);
    if (width > 0 && Math.abs(width - widths.get(target.id)) > 1
        && !matchMedia("print").matches) {
      widths.set(target.id, width);
      draw(target.id, width, false);
    }
  }
});
for (const name of Object.keys(figures)) watcher.observe(document.getElementById(name));
"""
)
