// Fills the leaderboard's table, sorts, filters, draws the figure, and asks for changes.
//
// Everything from MLflow is set as text, never as HTML. Links are built from addresses that the
// server made. The page's address holds the filters and the order, so that a view can be shared.
"use strict";
const byId = (id) => document.getElementById(id);
const setup = JSON.parse(byId("setup").textContent);
const STEP = 100, MAX_POINTS = 1500, POLL_MS = 1000, IDLE_MS = 15000, NUM_COLORS = 6;
const rows = new Map();
let promotions = [], numShown = STEP, visible = [], timer = 0;
let latest = {};  // the last answer of the server
let tag = "";  // of that answer
let empty = new Set();  // keys of columns without a value

const whole = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const fixed = (digits) => (value) => value.toFixed(digits);
const hours = (value) => value < 10 ? value.toFixed(2) : whole.format(value);
const COLUMNS = [
  { key: "name", title: "Run" },
  { key: "ap", title: "AP", number: true, text: fixed(1), best: "descending" },
  { key: "low", title: "95 % interval", number: true, best: "descending" },
  { key: "recipe", title: "Recipe" },
  { key: "data", title: "Data set" },
  { key: "gpu_hours", title: "GPU-hours", number: true, text: hours },
  { key: "cpu_hours", title: "CPU-hours", number: true, text: hours, minor: true, least: true },
  { key: "parameters", title: "Parameters", number: true, text: (v) => (v / 1e6).toFixed(1) + " M",
    minor: true },
  { key: "latency_ms", title: "Latency, ms", number: true, text: fixed(1), minor: true },
  { key: "images_per_s", title: "Images/s", number: true, text: fixed(1), minor: true,
    least: true },
  { key: "status", title: "Status", text: (value) => value.toLowerCase(), minor: true },
  { key: "started_s", title: "Began", best: "descending", minor: true },
  { key: "models", title: "Registered" },
  { key: "report", title: "Links", minor: true },
];
const X_AXES = { gpu_hours: "GPU-hours of the training", cpu_hours: "CPU-hours of the training",
  hours: "hours of the training", parameters: "parameters of the model",
  latency_ms: "latency, ms per image", images_per_s: "images/s of the evaluation" };
const MORE_IS_BETTER = new Set(["images_per_s"]);
const SELECTS = ["recipe", "data", "status"];
const START = { text: "", recipe: "", data: "", status: "", registered: "", sort: "ap",
  order: "descending", x: "" };
let state = { ...START };

function element(name, text, className) {
  const node = document.createElement(name);
  if (text !== undefined) node.textContent = text;
  if (className) node.className = className;
  return node;
}

/* The address of a run in MLflow, or of one of its artifacts; empty without a server. */
function address(row, path) {
  if (!/^https?:\/\//.test(setup.mlflow)) return "";
  const run = `${setup.mlflow}/#/experiments/${encodeURIComponent(row.experiment_id)}` +
    `/runs/${encodeURIComponent(row.id)}`;
  if (path === undefined) return run;
  return `${run}/artifacts/${path.split("/").map(encodeURIComponent).join("/")}`;
}

function link(text, to) {
  if (!to) return element("span", text);
  const anchor = element("a", text);
  anchor.href = to;
  anchor.rel = "noopener noreferrer";
  return anchor;
}

function dateTime(seconds) {
  return seconds ? new Date(1000 * seconds).toISOString().slice(0, 16).replace("T", " ") : "";
}

function take(content) {
  rows.clear();
  for (const values of content.rows) {
    const row = Object.fromEntries(content.columns.map((name, i) => [name, values[i]]));
    row.search = [row.name, row.recipe, row.data, row.experiment, row.models, row.commit, row.id]
      .join("\n").toLowerCase();
    rows.set(row.id, row);
  }
  promotions = content.promotions;
  latest = content;
}

function matches(row, except) {
  const words = state.text.toLowerCase().split(/\s+/);
  return words.every((word) => row.search.includes(word))
    && SELECTS.every((key) => key === except || !state[key] || row[key] === state[key])
    && (!state.registered || row.models);
}

/* Unknown values come last in either order. */
function compare(key, order) {
  const sign = order === "ascending" ? 1 : -1;
  return (a, b) => {
    const x = a[key], y = b[key];
    const noX = x === null || x === "", noY = y === null || y === "";
    if (noX || noY) return noX - noY || (a.id < b.id ? -1 : 1);
    const by = typeof x === "string" ? x.localeCompare(y, "en", { numeric: true }) : x - y;
    return sign * by || (b.ap ?? -1) - (a.ap ?? -1) || (a.id < b.id ? -1 : 1);
  };
}

function columnClasses(column) {
  const least = column.least && !(column.key === "cpu_hours" && empty.has("gpu_hours"));
  return (column.number ? "number" : "word") + (column.minor ? " minor" : "")
    + (least ? " least" : "");
}

function cell(row, column) {
  const value = row[column.key];
  const node = element(column.key === "name" ? "th" : "td", undefined, columnClasses(column));
  node.dataset.key = column.key;
  if (column.key === "name") {
    node.scope = "row";
    node.append(link(value, address(row)));
  } else if (column.key === "low") {
    if (value !== null) {
      node.append(`${value.toFixed(1)} – ${row.high.toFixed(1)} `,
        element("span", row.interval, "by"));
    }
  } else if (column.key === "started_s") {
    node.textContent = dateTime(value);
    node.classList.add("tight");
  } else if (column.key === "report") {
    node.classList.add("tight");
    if (value) node.append(link("report", address(row, value)), " ");
    node.append(link("files", setup.mlflow ? address(row) + "/artifacts" : ""));
    if (!setup.mlflow) node.textContent = "";
  } else if (value !== null && value !== "") {
    node.textContent = column.text ? column.text(value) : value;
    if (column.key === "ap") node.classList.add("ap");
    if (column.key === "status") node.classList.add("tight");
  }
  return node;
}

function renderTable() {
  visible = [...rows.values()].filter((row) => matches(row));
  visible.sort(compare(state.sort, state.order));
  const known = (key) => [...rows.values()].some((row) => row[key] !== null && row[key] !== "");
  empty = new Set(rows.size ? COLUMNS.map((c) => c.key).filter((key) => !known(key)) : []);
  empty.delete("report");  /* that column also links to a run's files */
  const used = COLUMNS.filter((column) => !empty.has(column.key));
  const body = document.createDocumentFragment();
  for (const row of visible.slice(0, numShown)) {
    const line = element("tr", undefined, row.is_champion ? "champion" : "");
    line.append(...used.map((column) => cell(row, column)));
    body.append(line);
  }
  byId("rows").replaceChildren(body);
  for (const head of byId("heads").children) {
    const column = COLUMNS.find((one) => one.key === head.dataset.key);
    head.hidden = empty.has(column.key);
    head.className = columnClasses(column);
    head.setAttribute("aria-sort", column.key === state.sort ? state.order : "none");
  }
  const left = visible.length - Math.min(numShown, visible.length);
  byId("more").hidden = left <= 0;
  byId("more").textContent = `Show ${Math.min(STEP, left)} more of ${whole.format(left)}`;
  byId("empty").hidden = visible.length > 0 || !latest.is_complete && rows.size === 0;
  byId("empty").textContent = rows.size
    ? "No run matches these filters." : "There are no runs in MLflow yet.";
}

function renderNote() {
  const all = `${whole.format(rows.size)} ${rows.size === 1 ? "run" : "runs"}`;
  const count = visible.length === rows.size ? all : `${whole.format(visible.length)} of ${all}`;
  const data = new Set(visible.filter((row) => row.ap !== null).map((row) => row.data)).size;
  byId("note").textContent = count
    + (latest.is_complete ? `, as of ${dateTime(latest.refreshed_s)} UTC` : "; loading more …")
    + (data > 1 ? `. AP on different data sets cannot be compared: there are ${data} here.` : ".");
  byId("error").hidden = !latest.error;
  byId("error").textContent = latest.error
    ? `Refreshing failed, so this may be outdated: ${latest.error}` : "";
}

function renderSelects() {
  for (const key of SELECTS) {
    const counts = new Map();
    for (const row of rows.values()) {
      if (row[key] && matches(row, key)) counts.set(row[key], (counts.get(row[key]) || 0) + 1);
    }
    if (state[key] && !counts.has(state[key])) counts.set(state[key], 0);
    const options = [...counts].sort((a, b) => b[1] - a[1] || (a[0] < b[0] ? -1 : 1));
    const select = byId(key);
    const text = JSON.stringify(options);
    if (select.dataset.options !== text) {
      select.dataset.options = text;
      const all = element("option", "all");
      all.value = "";
      select.replaceChildren(all, ...options.map(([value, count]) => {
        const option = element("option", `${value} (${whole.format(count)})`);
        option.value = value;
        return option;
      }));
    }
    select.value = state[key];
  }
}

function renderPromotions() {
  byId("champions").hidden = promotions.length === 0;
  const lines = promotions.map((one) => {
    const line = element("tr");
    const row = rows.get(one.run_id);
    const head = element("th", undefined, "word");
    head.scope = "row";
    head.append(`${one.model} ${one.version}`);
    const cells = [one.time.replace("T", " ").replace("+00:00", "").slice(0, 19), one.action,
      one.champion_after === null ? "" : `${one.model} ${one.champion_after}`, one.by, one.reason];
    const run = element("td", undefined, "word");
    if (row) run.append(link(row.name, address(row)));
    const kind = (i) => i === 0 ? "word tight" : "word";
    line.append(head, ...cells.map((text, i) => element("td", text, kind(i))), run);
    return line;
  });
  byId("promotions").replaceChildren(...lines);
}

/* Plotly interprets a few HTML tags in labels. */
const escaped = (text) => text.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");

function paretoFront(points, key) {
  const sign = MORE_IS_BETTER.has(key) ? -1 : 1;
  const best = [];
  for (const row of [...points].sort((a, b) => sign * (a[key] - b[key]) || b.ap - a.ap)) {
    if (!best.length || row.ap > best[best.length - 1].ap) best.push(row);
  }
  return best;
}

function renderFigure() {
  const keys = Object.keys(X_AXES).filter((key) => visible.some((r) => r[key] && r.ap !== null));
  const select = byId("x");
  if (select.dataset.options !== keys.join()) {
    select.dataset.options = keys.join();
    select.replaceChildren(...keys.map((key) => {
      const option = element("option", X_AXES[key]);
      option.value = key;
      return option;
    }));
  }
  byId("figure").hidden = keys.length === 0;
  if (!keys.length) return;
  const key = keys.includes(state.x) ? state.x : keys[0];
  select.value = key;
  const points = visible.filter((row) => row.ap !== null && row[key] > 0);
  const by = new Map();
  for (const row of points) {
    if (!by.has(row.data)) by.set(row.data, []);
    by.get(row.data).push(row);
  }
  const sets = [...by].sort((a, b) => b[1].length - a[1].length);
  const left = points.length - MAX_POINTS;
  byId("figure-note").textContent = "No run is both better and cheaper than one on the line"
    + (sets.length > 1 ? "; one line for each data set." : ".")
    + (left > 0 ? ` The figure shows the lines and the ${whole.format(MAX_POINTS)} best of`
      + ` ${whole.format(points.length)} runs.` : "");
  if (!window.Plotly) return;
  const kept = new Set(points.slice().sort((a, b) => b.ap - a.ap).slice(0, MAX_POINTS));
  const traces = [];
  const hover = (list) => list.map((r) => `${escaped(r.name)}<br>${escaped(r.recipe)}`);
  sets.forEach(([data, all], i) => {
    const color = colorOf(`c${i % NUM_COLORS}`), best = paretoFront(all, key);
    const rest = all.filter((row) => kept.has(row) && !best.includes(row));
    traces.push({ type: "scatter", mode: "markers", x: rest.map((r) => r[key]),
      y: rest.map((r) => r.ap), text: hover(rest), hoverinfo: "text+x+y", showlegend: false,
      marker: { color, size: 5, opacity: .3 } });
    traces.push({ type: "scatter", mode: "lines+markers", x: best.map((r) => r[key]),
      y: best.map((r) => r.ap), text: hover(best), hoverinfo: "text+x+y",
      name: escaped(data || "unknown"), line: { color, width: 2, shape: "hv" },
      marker: { color, size: 8 } });
  });
  const box = byId("pareto"), width = box.clientWidth;
  const axis = { gridcolor: colorOf("rule"), linecolor: colorOf("muted"), showline: true,
    zeroline: false, ticks: "outside", automargin: true };
  const legend_px = sets.length > 1 ? 22 * (width < 640 ? Math.min(sets.length, 6) : 1) : 0;
  Plotly.react(box, traces, {
    width, height: 420 + legend_px, autosize: false,
    margin: { l: 48, r: 16, t: 12 + legend_px, b: 48 },
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    font: { color: colorOf("muted"), size: 13 }, hovermode: "closest",
    showlegend: sets.length > 1, legend: { orientation: "h", y: 1.02, yanchor: "bottom", x: 0 },
    hoverlabel: { bgcolor: colorOf("shade"), font: { color: colorOf("ink") } },
    xaxis: { ...axis, type: "log", title: { text: X_AXES[key] }, showgrid: false },
    yaxis: { ...axis, title: { text: "AP" } },
  }, { displayModeBar: false, showTips: false });
}

/* A variable of theme.css as the colour that it has now, light or dark. */
function colorOf(name) {
  const probe = document.body.appendChild(document.createElement("span"));
  probe.style.color = `var(--${name})`;
  const color = getComputedStyle(probe).color;
  probe.remove();
  return color;
}

function render() {
  renderTable();
  renderSelects();
  renderNote();
  renderPromotions();
  /* After the browser has shown the table. */
  clearTimeout(render.later);
  render.later = setTimeout(renderFigure, 60);
}

function toHash() {
  const changed = Object.entries(state).filter(([key, value]) => value !== START[key]);
  history.replaceState(null, "", changed.length ? `#${new URLSearchParams(changed)}` : "#");
}

function fromHash() {
  const given = new URLSearchParams(location.hash.slice(1));
  state = Object.fromEntries(Object.entries(START).map(([k, v]) => [k, given.get(k) ?? v]));
  if (!COLUMNS.some((column) => column.key === state.sort)) state.sort = START.sort;
  if (state.order !== "ascending") state.order = "descending";
  byId("text").value = state.text;
  byId("registered").checked = Boolean(state.registered);
}

function change(values) {
  state = { ...state, ...values };
  numShown = STEP;
  toHash();
  render();
}

for (const column of COLUMNS) {
  const head = element("th", undefined, columnClasses(column));
  const button = element("button", column.title);
  head.scope = "col";
  head.dataset.key = column.key;
  button.type = "button";
  button.addEventListener("click", () => {
    const first = column.best || "ascending";
    const other = state.order === "ascending" ? "descending" : "ascending";
    change({ sort: column.key, order: state.sort === column.key ? other : first });
  });
  head.append(button);
  byId("heads").append(head);
}
for (const key of SELECTS) {
  byId(key).addEventListener("change", () => change({ [key]: byId(key).value }));
}
byId("x").addEventListener("change", () => change({ x: byId("x").value }));
byId("registered").addEventListener("change",
  () => change({ registered: byId("registered").checked ? "1" : "" }));
byId("text").addEventListener("input", () => {
  clearTimeout(timer);
  timer = setTimeout(() => change({ text: byId("text").value.trim() }), 120);
});
byId("clear").addEventListener("click", () => {
  byId("text").value = "";
  byId("registered").checked = false;
  change({ ...START });
});
byId("more").addEventListener("click", () => {
  const before = numShown;
  numShown += STEP;
  renderTable();
  /* Keep the keyboard focus at the first new row. */
  byId("rows").children[before]?.querySelector("a, button")?.focus();
});
addEventListener("keydown", (event) => {
  if (event.key === "/" && !/^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName)) {
    event.preventDefault();
    byId("text").focus();
  }
});
addEventListener("hashchange", () => { fromHash(); render(); });
addEventListener("resize", () => { clearTimeout(render.later);
  render.later = setTimeout(renderFigure, 150); });
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", renderFigure);
byId("plotly")?.addEventListener("load", renderFigure);
addEventListener("load", renderFigure);

async function poll() {
  try {
    const answer = await fetch("rows", { cache: "no-store", headers: { "If-None-Match": tag } });
    if (answer.status === 304) {
      latest.refreshed_s = Date.parse(answer.headers.get("Last-Modified")) / 1000;
      renderNote();
    } else if (!answer.ok) {
      throw new Error(`the leaderboard answered with status ${answer.status}`);
    } else {
      tag = answer.headers.get("ETag");
      take(await answer.json());
      render();
    }
  } catch (error) {
    latest = { ...latest, error: String(error.message || error) };
    renderNote();
  }
  setTimeout(poll, latest.is_complete ? IDLE_MS : POLL_MS);
}

take(setup.content);
fromHash();
render();
performance.mark("first-rows");
if (setup.is_live) poll();
