// Sends the chosen image to the service and shows its detections.
//
// Everything from a model or a file is set as text, never as HTML.
"use strict";
const byId = (id) => document.getElementById(id);
const drop = byId("drop"), file = byId("file"), shown = byId("shown"), score = byId("score");
const MIN_SCORE = 0.01;
let token = "", limits = null;
let lastImage = null, pending = null, imageUrl = null, result = null;

function headers(type) {
  const all = type ? { "Content-Type": type } : {};
  if (token) all.Authorization = "Bearer " + token;
  return all;
}

function showStatus(text) { byId("status").textContent = text; }

function showError(text) {
  byId("error").textContent = text;
  byId("error").hidden = false;
  showStatus("");
}

async function errorText(response) {
  if (response.status === 401) {
    byId("token-row").hidden = false;
    byId("token").focus();
  }
  let body = {};
  try { body = await response.json(); } catch (error) { /* not JSON: a proxy's own page */ }
  const detail = typeof body.detail === "string" ? body.detail : response.statusText;
  return detail + " (" + response.status + ")";
}

async function showModel() {
  try {
    const response = await fetch("v1/model", { headers: headers() });
    if (!response.ok) {
      byId("model").textContent = await errorText(response);
      return;
    }
    limits = await response.json();
    const model = limits.model, classes = limits.categories.length;
    byId("model").textContent = model.name + (model.version ? " version " + model.version : "")
      + ", " + classes + (classes === 1 ? " class" : " classes")
      + (limits.problem ? ". A newer model could not be loaded: " + limits.problem : "");
  } catch (error) {
    byId("model").textContent = "The service cannot be reached.";
  }
}

async function detect(image) {
  lastImage = image;
  if (pending) pending.abort();
  const own = pending = new AbortController();
  byId("error").hidden = true;
  byId("result").hidden = true;
  if (limits && image.size > limits.max_bytes) {
    showError(image.name + " has " + image.size.toLocaleString() + " bytes; at most "
      + limits.max_bytes.toLocaleString() + " are accepted.");
    return;
  }
  showStatus("Detecting objects in " + image.name + " …");
  const began = performance.now();
  try {
    const query = "v1/detect?upright=true&min_score=" + MIN_SCORE;
    const response = await fetch(query, { method: "POST", body: image, signal: own.signal,
      headers: headers("application/octet-stream") });
    if (!response.ok) {
      const text = await errorText(response);
      if (own === pending) showError(image.name + ": " + text);
      return;
    }
    result = await response.json();
    if (own !== pending) return;
    await show(image, result, performance.now() - began);
  } catch (error) {
    if (own === pending && error.name !== "AbortError") {
      showError(error instanceof TypeError ? "The service cannot be reached." : String(error));
    }
  }
}

async function show(chosen, found, tookMs) {
  const image = document.createElement("img");
  image.alt = chosen.name;
  if (imageUrl) URL.revokeObjectURL(imageUrl);
  imageUrl = URL.createObjectURL(chosen);
  image.src = imageUrl;
  try { await image.decode(); } catch (error) {
    showError("The service has read this image, but this browser cannot show it.");
    return;
  }
  shown.replaceChildren(image);
  const isRotated = image.naturalWidth !== found.image.width
    || image.naturalHeight !== found.image.height;
  if (isRotated) {
    showError("This browser rotates the image differently, so boxes may be in wrong places.");
  }
  byId("timing").textContent = found.image.width + " × " + found.image.height + " pixels, "
    + Math.round(tookMs) + " ms, of which the model took "
    + Math.round(found.seconds.model * 1000) + " ms";
  byId("result").hidden = false;
  draw();
  showModel();
}

function draw() {
  if (result === null) return;
  const minScore = Number(score.value);
  byId("score-value").textContent = minScore.toFixed(2);
  shown.querySelectorAll(".box").forEach((box) => box.remove());
  byId("found").replaceChildren();
  shown.classList.remove("dim");
  const visible = result.detections.filter((found) => found.score >= minScore);
  for (const found of visible) addDetection(found);
  const all = result.detections.length;
  showStatus(visible.length + " of " + all + (all === 1 ? " object" : " objects") + " shown"
    + (all > 0 && visible.length === 0 ? "; lower the score to see more" : ""));
}

function addDetection(found) {
  const { width, height } = result.image;
  const clip = (value, max) => Math.min(Math.max(value, 0), max);
  const [left, right] = [clip(found.box[0], width), clip(found.box[2], width)];
  const [top, bottom] = [clip(found.box[1], height), clip(found.box[3], height)];
  const color = "k" + (Math.abs(found.category_id) % 6);
  const text = found.category + " " + found.score.toFixed(2);
  const box = document.createElement("div"), label = document.createElement("span");
  box.className = "box " + color + (top < 0.06 * height ? " top" : "")
    + (left > 0.7 * width ? " right" : "");
  box.style.left = 100 * left / width + "%";
  box.style.top = 100 * top / height + "%";
  box.style.width = 100 * (right - left) / width + "%";
  box.style.height = 100 * (bottom - top) / height + "%";
  label.textContent = text;
  box.append(label);
  box.setAttribute("aria-hidden", "true");
  shown.append(box);

  const item = document.createElement("li"), button = document.createElement("button");
  const name = document.createElement("span"), value = document.createElement("span");
  button.type = "button";
  button.className = color;
  button.setAttribute("aria-pressed", "false");
  name.className = "name";
  name.textContent = found.category;
  value.className = "score";
  value.textContent = found.score.toFixed(2);
  button.append(name, value);
  button.title = found.box.map((edge) => Math.round(edge)).join(", ") + " px";
  const highlight = (on) => {
    const isPressed = button.getAttribute("aria-pressed") === "true";
    box.classList.toggle("strong", on || isPressed);
    shown.classList.toggle("dim", shown.querySelector(".strong") !== null);
  };
  button.addEventListener("pointerenter", () => highlight(true));
  button.addEventListener("pointerleave", () => highlight(false));
  button.addEventListener("focus", () => highlight(true));
  button.addEventListener("blur", () => highlight(false));
  button.addEventListener("click", () => {
    const pressed = button.getAttribute("aria-pressed") !== "true";
    button.setAttribute("aria-pressed", String(pressed));
    highlight(true);
  });
  item.append(button);
  byId("found").append(item);
}

function detectFirst(files) {
  if (files.length === 0) {
    showError("This is not a file; drop a JPEG or PNG from a folder.");
    return;
  }
  detect(files[0]);
}

file.addEventListener("change", () => {
  if (file.files.length > 0) detect(file.files[0]);
  file.value = "";  // so that the same file can be chosen again
});
score.addEventListener("input", draw);
byId("use-token").addEventListener("click", () => {
  token = byId("token").value.trim();
  byId("token-row").hidden = token !== "";
  showModel();
  if (lastImage) detect(lastImage);
});
byId("token").addEventListener("keydown", (event) => {
  if (event.key === "Enter") byId("use-token").click();
});
// On the whole page, so that an image dropped beside the field does not replace the page.
addEventListener("dragover", (event) => { event.preventDefault(); drop.classList.add("over"); });
addEventListener("dragleave", (event) => {
  if (event.relatedTarget === null) drop.classList.remove("over");
});
addEventListener("drop", (event) => {
  event.preventDefault();
  drop.classList.remove("over");
  detectFirst(event.dataTransfer.files);
});
addEventListener("paste", (event) => {
  if (event.clipboardData.files.length > 0) detectFirst(event.clipboardData.files);
});
showModel();
