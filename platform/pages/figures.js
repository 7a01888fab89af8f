// Draws every figure of a page with plotly, in the page's colours and at the window's width.
"use strict";
const NARROW_PX = 640, PRINT_PX = 660;
const { figures, palettes } = JSON.parse(document.getElementById("figures").textContent);
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
  const palette = dark.matches && !isPrint ? palettes.dark : palettes.light;
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
