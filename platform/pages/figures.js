// Draws every figure of a page with plotly, in the page's colours and at the window's width.
"use strict";
const PRINT_PX = 660;
const figures = JSON.parse(document.getElementById("figures").textContent);
const touch = matchMedia("(pointer: coarse)").matches;
const probe = document.body.appendChild(document.createElement("span"));

/* A variable of the style sheet as a value of ...color, ...colorway or colorscale: its colour. */
function painted(value, key) {
  if (typeof value === "string") {
    if (!/color(way|scale)?$/i.test(key) || !/^var\(--\w+\)$/.test(value)) return value;
    probe.style.color = value;
    return getComputedStyle(probe).color;
  }
  if (Array.isArray(value)) return value.map((item) => painted(item, key));
  if (value === null || typeof value !== "object") return value;
  return Object.fromEntries(
    Object.entries(value).map(([name, item]) => [name, painted(item, name)]));
}

function drawAll(width) {
  for (const [name, figure] of Object.entries(figures)) {
    const { data, layout } = painted(figure, "");
    for (const axis of ["xaxis", "yaxis"]) layout.template.layout[axis].fixedrange = touch;
    // The element has the height, so that both follow it when the window changes.
    Plotly.react(name, data,
      { ...layout, width, height: undefined, dragmode: touch ? false : "zoom" },
      { displayModeBar: false, showTips: false, responsive: true });
  }
}

for (const name of Object.keys(figures)) {
  const box = document.getElementById(name), button = document.createElement("button");
  button.type = "button";
  button.textContent = "Save as SVG";
  button.addEventListener("click", () => Plotly.downloadImage(
    box, { format: "svg", filename: name, width: box.clientWidth, height: box.clientHeight }));
  box.closest("figure").querySelector("figcaption").append(button, " ");
}
drawAll();
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => drawAll());
addEventListener("beforeprint", () => {
  document.documentElement.style.colorScheme = "light";
  drawAll(PRINT_PX);
});
addEventListener("afterprint", () => {
  document.documentElement.style.colorScheme = "";
  drawAll();
});
