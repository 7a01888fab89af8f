// Fills the leaderboard's table, sorts, filters, draws the figure, and polls for changes.
//
// Everything from MLflow is set as text, never as HTML. Links are built from addresses that the
// server made. The page's address holds the filters and the order, so that a view can be shared.
"use strict";
const part = (id) => document.getElementById(id);
const setup = JSON.parse(part("setup").textContent);
const STEP = 100, MAX_POINTS = 1500, POLL_MS = 1000, IDLE_MS = 15000, NUM_COLORS = 6;
const rows = new Map();
let revision = 0, promotions = [], shown = STEP, visible = [], timer = 0;
let recency = {}, empty = new Set();

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
  { key: "report", title: "Opens", minor: true },
];
const X_AXES = { gpu_hours: "GPU-hours of the training", cpu_hours: "CPU-hours of the training",
  hours: "hours of the training", parameters: "parameters of the model",
  latency_ms: "latency, ms per picture", images_per_s: "images/s of the evaluation" };
const MORE_IS_BETTER = new Set(["images_per_s"]);
const SELECTS = ["recipe", "data", "status"];
const START = { text: "", recipe: "", data: "", status: "", registered: "", sort: "ap",
  order: "descending", x: "" };
let state = { ...START };

function element(name, text, className) {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text;
  if (className) made.className = className;
  return made;
}

/* Addresses in MLflow, from ids that MLflow made. */
function address(row, path) {
  if (!/^https?:\/\//.test(setup.mlflow)) return "";
  const run = `${setup.mlflow}/#/experiments/${encodeURIComponent(row.experiment_id)}` +
    `/runs/${encodeURIComponent(row.id)}`;
  if (path === undefined) return run;
  return `${run}/artifacts/${path.split("/").map(encodeURIComponent).join("/")}`;
}

function link(text, to) {
  if (!to) return element("span", text);
  const made = element("a", text);
  made.href = to;
  made.rel = "noopener noreferrer";
  return made;
}

function when(seconds) {
  return seconds ? new Date(1000 * seconds).toISOString().slice(0, 16).replace("T", " ") : "";
}

function take(content) {
  for (const values of content.rows) {
    const row = Object.fromEntries(content.columns.map((name, i) => [name, values[i]]));
    row.search = [row.name, row.recipe, row.data, row.experiment, row.models, row.commit, row.id]
      .join("\n").toLowerCase();
    rows.set(row.id, row);
  }
  for (const id of content.removed) rows.delete(id);
  const isNew = content.rows.length || content.removed.length || content.revision !== revision;
  revision = content.revision;
  promotions = content.promotions;
  recency = content;
  return isNew;
}

function matches(row, but) {
  const words = state.text.toLowerCase().split(/\s+/);
  return words.every((word) => row.search.includes(word))
    && SELECTS.every((key) => key === but || !state[key] || row[key] === state[key])
    && (!state.registered || row.models);
}

/* What is not known comes last, whichever way the order goes. */
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

function kinds(column) {
  const least = column.least && !(column.key === "cpu_hours" && empty.has("gpu_hours"));
  return (column.number ? "number" : "word") + (column.minor ? " minor" : "")
    + (least ? " least" : "");
}

function cell(row, column) {
  const value = row[column.key];
  const made = element(column.key === "name" ? "th" : "td", undefined, kinds(column));
  made.dataset.key = column.key;
  if (column.key === "name") {
    made.scope = "row";
    made.append(link(value, address(row)));
  } else if (column.key === "low") {
    if (value !== null) {
      made.append(`${value.toFixed(1)} – ${row.high.toFixed(1)} `,
        element("span", row.interval, "by"));
    }
  } else if (column.key === "started_s") {
    made.textContent = when(value);
    made.classList.add("tight");
  } else if (column.key === "report") {
    made.classList.add("tight");
    if (value) made.append(link("report", address(row, value)), " ");
    made.append(link("files", setup.mlflow ? address(row) + "/artifacts" : ""));
    if (!setup.mlflow) made.textContent = "";
  } else if (value !== null && value !== "") {
    made.textContent = column.text ? column.text(value) : value;
    if (column.key === "ap") made.classList.add("ap");
    if (column.key === "status") made.classList.add("tight");
  }
  return made;
}

function renderTable() {
  visible = [...rows.values()].filter((row) => matches(row));
  visible.sort(compare(state.sort, state.order));
  const known = (key) => [...rows.values()].some((row) => row[key] !== null && row[key] !== "");
  empty = new Set(rows.size ? COLUMNS.map((c) => c.key).filter((key) => !known(key)) : []);
  empty.delete("report");  /* it leads to a run's files, too */
  const used = COLUMNS.filter((column) => !empty.has(column.key));
  const body = document.createDocumentFragment();
  for (const row of visible.slice(0, shown)) {
    const line = element("tr", undefined, row.is_champion ? "champion" : "");
    line.append(...used.map((column) => cell(row, column)));
    body.append(line);
  }
  part("rows").replaceChildren(body);
  for (const head of part("heads").children) {
    const column = COLUMNS.find((one) => one.key === head.dataset.key);
    head.hidden = empty.has(column.key);
    head.className = kinds(column);
    head.setAttribute("aria-sort", column.key === state.sort ? state.order : "none");
  }
  const left = visible.length - Math.min(shown, visible.length);
  part("more").hidden = left <= 0;
  part("more").textContent = `Show ${Math.min(STEP, left)} more of ${whole.format(left)}`;
  part("empty").hidden = visible.length > 0 || !recency.is_complete && rows.size === 0;
  part("empty").textContent = rows.size
    ? "No run fits these filters." : "There are no runs in MLflow yet.";
}

function renderNote() {
  const all = `${whole.format(rows.size)} ${rows.size === 1 ? "run" : "runs"}`;
  const count = visible.length === rows.size ? all : `${whole.format(visible.length)} of ${all}`;
  const data = new Set(visible.filter((row) => row.ap !== null).map((row) => row.data)).size;
  part("note").textContent = count
    + (recency.is_complete ? `, as of ${when(recency.refreshed_s)} UTC` : "; reading more …")
    + (data > 1 ? `. AP on different data sets cannot be compared: there are ${data} here.` : ".");
  part("error").hidden = !recency.error;
  part("error").textContent = recency.error
    ? `MLflow does not answer, so this may be old: ${recency.error}` : "";
}

function renderSelects() {
  for (const key of SELECTS) {
    const counts = new Map();
    for (const row of rows.values()) {
      if (row[key] && matches(row, key)) counts.set(row[key], (counts.get(row[key]) || 0) + 1);
    }
    if (state[key] && !counts.has(state[key])) counts.set(state[key], 0);
    const made = [...counts].sort((a, b) => b[1] - a[1] || (a[0] < b[0] ? -1 : 1));
    const select = part(key);
    const text = JSON.stringify(made);
    if (select.dataset.made !== text) {
      select.dataset.made = text;
      const all = element("option", "all");
      all.value = "";
      select.replaceChildren(all, ...made.map(([value, count]) => {
        const option = element("option", `${value} (${whole.format(count)})`);
        option.value = value;
        return option;
      }));
    }
    select.value = state[key];
  }
}

function renderPromotions() {
  part("champions").hidden = promotions.length === 0;
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
  part("promotions").replaceChildren(...lines);
}

/* Plotly reads a few tags in labels. */
const shownText = (text) => text.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");

function front(points, key) {
  const sign = MORE_IS_BETTER.has(key) ? -1 : 1;
  const best = [];
  for (const row of [...points].sort((a, b) => sign * (a[key] - b[key]) || b.ap - a.ap)) {
    if (!best.length || row.ap > best[best.length - 1].ap) best.push(row);
  }
  return best;
}

function renderFigure() {
  const keys = Object.keys(X_AXES).filter((key) => visible.some((r) => r[key] && r.ap !== null));
  const select = part("x");
  if (select.dataset.made !== keys.join()) {
    select.dataset.made = keys.join();
    select.replaceChildren(...keys.map((key) => {
      const option = element("option", X_AXES[key]);
      option.value = key;
      return option;
    }));
  }
  part("figure").hidden = keys.length === 0;
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
  part("figure-note").textContent = "On the line nothing is both better and cheaper"
    + (sets.length > 1 ? "; one line for each data set." : ".")
    + (left > 0 ? ` Shown are the lines and the ${whole.format(MAX_POINTS)} best of`
      + ` ${whole.format(points.length)} runs.` : "");
  if (!window.Plotly) return;
  const isDark = matchMedia("(prefers-color-scheme: dark)").matches;
  const palette = isDark ? setup.palettes.dark : setup.palettes.light;
  const kept = new Set(points.slice().sort((a, b) => b.ap - a.ap).slice(0, MAX_POINTS));
  const traces = [];
  const hover = (list) => list.map((r) => `${shownText(r.name)}<br>${shownText(r.recipe)}`);
  sets.forEach(([data, all], i) => {
    const color = palette[`c${i % NUM_COLORS}`], best = front(all, key);
    const rest = all.filter((row) => kept.has(row) && !best.includes(row));
    traces.push({ type: "scatter", mode: "markers", x: rest.map((r) => r[key]),
      y: rest.map((r) => r.ap), text: hover(rest), hoverinfo: "text+x+y", showlegend: false,
      marker: { color, size: 5, opacity: .3 } });
    traces.push({ type: "scatter", mode: "lines+markers", x: best.map((r) => r[key]),
      y: best.map((r) => r.ap), text: hover(best), hoverinfo: "text+x+y",
      name: shownText(data || "unknown"), line: { color, width: 2, shape: "hv" },
      marker: { color, size: 8 } });
  });
  const box = part("pareto"), width = box.clientWidth;
  const axis = { gridcolor: palette.rule, linecolor: palette.muted, showline: true, zeroline: false,
    ticks: "outside", automargin: true };
  const legend_px = sets.length > 1 ? 22 * (width < 640 ? Math.min(sets.length, 6) : 1) : 0;
  Plotly.react(box, traces, {
    width, height: 420 + legend_px, autosize: false,
    margin: { l: 48, r: 16, t: 12 + legend_px, b: 48 },
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    font: { color: palette.muted, size: 13 }, hovermode: "closest",
    showlegend: sets.length > 1, legend: { orientation: "h", y: 1.02, yanchor: "bottom", x: 0 },
    hoverlabel: { bgcolor: palette.shade, font: { color: palette.ink } },
    xaxis: { ...axis, type: "log", title: { text: X_AXES[key] }, showgrid: false },
    yaxis: { ...axis, title: { text: "AP" } },
  }, { displayModeBar: false, showTips: false });
}

function render() {
  renderTable();
  renderSelects();
  renderNote();
  renderPromotions();
  /* After the table is on the screen. */
  clearTimeout(render.later);
  render.later = setTimeout(renderFigure, 60);
}

function toHash() {
  const told = Object.entries(state).filter(([key, value]) => value !== START[key]);
  history.replaceState(null, "", told.length ? `#${new URLSearchParams(told)}` : "#");
}

function fromHash() {
  const told = new URLSearchParams(location.hash.slice(1));
  state = Object.fromEntries(Object.entries(START).map(([k, v]) => [k, told.get(k) ?? v]));
  if (!COLUMNS.some((column) => column.key === state.sort)) state.sort = START.sort;
  if (state.order !== "ascending") state.order = "descending";
  part("text").value = state.text;
  part("registered").checked = Boolean(state.registered);
}

function change(what) {
  state = { ...state, ...what };
  shown = STEP;
  toHash();
  render();
}

for (const column of COLUMNS) {
  const head = element("th", undefined, kinds(column));
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
  part("heads").append(head);
}
for (const key of SELECTS) {
  part(key).addEventListener("change", () => change({ [key]: part(key).value }));
}
part("x").addEventListener("change", () => change({ x: part("x").value }));
part("registered").addEventListener("change",
  () => change({ registered: part("registered").checked ? "1" : "" }));
part("text").addEventListener("input", () => {
  clearTimeout(timer);
  timer = setTimeout(() => change({ text: part("text").value.trim() }), 120);
});
part("clear").addEventListener("click", () => {
  part("text").value = "";
  part("registered").checked = false;
  change({ ...START });
});
part("more").addEventListener("click", () => {
  const before = shown;
  shown += STEP;
  renderTable();
  /* The keyboard goes on where it was. */
  part("rows").children[before]?.querySelector("a, button")?.focus();
});
addEventListener("keydown", (event) => {
  if (event.key === "/" && !/^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName)) {
    event.preventDefault();
    part("text").focus();
  }
});
addEventListener("hashchange", () => { fromHash(); render(); });
addEventListener("resize", () => { clearTimeout(render.later);
  render.later = setTimeout(renderFigure, 150); });
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", renderFigure);
part("plotly")?.addEventListener("load", renderFigure);
addEventListener("load", renderFigure);

async function poll() {
  let wait = IDLE_MS;
  try {
    const answer = await fetch(`rows?since=${revision}&of=${setup.of}`, { cache: "no-store" });
    if (!answer.ok) throw new Error(`the leaderboard answers ${answer.status}`);
    const content = await answer.json();
    if (content.of !== setup.of) return location.reload();  /* it was started again */
    if (take(content)) render(); else renderNote();
    if (!content.is_complete) wait = POLL_MS;
  } catch (error) {
    recency = { ...recency, error: String(error.message || error) };
    renderNote();
  }
  setTimeout(poll, wait);
}

take(setup.content);
fromHash();
render();
performance.mark("first-rows");
if (setup.is_live) poll();
