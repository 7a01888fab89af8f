// Sends the chosen image to the service and shows its detections.
//
// Everything from a model or a file is set as text, never as HTML.
"use strict";
const part = (id) => document.getElementById(id);
const drop = part("drop"), file = part("file"), shown = part("shown"), score = part("score");
const MIN_SCORE = 0.01;
let token = "", limits = null, last = null, waiting = null, address = null, answer = null;

function headers(type) {
  const all = type ? { "Content-Type": type } : {};
  if (token) all.Authorization = "Bearer " + token;
  return all;
}

function tell(text) { part("status").textContent = text; }

function fail(text) {
  part("error").textContent = text;
  part("error").hidden = false;
  tell("");
}

async function problem(response) {
  if (response.status === 401) {
    part("token-row").hidden = false;
    part("token").focus();
  }
  let told = {};
  try { told = await response.json(); } catch (error) { /* a proxy's own page */ }
  const what = typeof told.detail === "string" ? told.detail : response.statusText;
  return what + " (" + response.status + ")";
}

async function introduce() {
  try {
    const response = await fetch("v1/model", { headers: headers() });
    if (!response.ok) {
      part("model").textContent = await problem(response);
      return;
    }
    limits = await response.json();
    const model = limits.model, classes = limits.categories.length;
    part("model").textContent = model.name + (model.version ? " version " + model.version : "")
      + ", " + classes + (classes === 1 ? " class" : " classes")
      + (limits.problem ? ". A newer model could not be loaded: " + limits.problem : "");
  } catch (error) {
    part("model").textContent = "The service cannot be reached.";
  }
}

async function look(picture) {
  last = picture;
  if (waiting) waiting.abort();
  const mine = waiting = new AbortController();
  part("error").hidden = true;
  part("result").hidden = true;
  if (limits && picture.size > limits.max_bytes) {
    fail(picture.name + " has " + picture.size.toLocaleString() + " bytes; at most "
      + limits.max_bytes.toLocaleString() + " are taken.");
    return;
  }
  tell("Looking at " + picture.name + " …");
  const began = performance.now();
  try {
    const query = "v1/detect?upright=true&min_score=" + MIN_SCORE;
    const response = await fetch(query, { method: "POST", body: picture, signal: mine.signal,
      headers: headers("application/octet-stream") });
    if (!response.ok) {
      const what = await problem(response);
      if (mine === waiting) fail(picture.name + ": " + what);
      return;
    }
    answer = await response.json();
    if (mine !== waiting) return;
    await show(picture, answer, performance.now() - began);
  } catch (error) {
    if (mine === waiting && error.name !== "AbortError") {
      fail(error instanceof TypeError ? "The service cannot be reached." : String(error));
    }
  }
}

async function show(picture, found, tookMs) {
  const image = document.createElement("img");
  image.alt = picture.name;
  if (address) URL.revokeObjectURL(address);
  address = URL.createObjectURL(picture);
  image.src = address;
  try { await image.decode(); } catch (error) {
    fail("The service has read this picture, but this browser cannot show it.");
    return;
  }
  shown.replaceChildren(image);
  const isTurned = image.naturalWidth !== found.image.width
    || image.naturalHeight !== found.image.height;
  if (isTurned) fail("This browser turns the picture otherwise; boxes may be in wrong places.");
  part("timing").textContent = found.image.width + " × " + found.image.height + " pixels, "
    + Math.round(tookMs) + " ms, of which the model took "
    + Math.round(found.seconds.model * 1000) + " ms";
  part("result").hidden = false;
  draw();
  introduce();
}

function draw() {
  if (answer === null) return;
  const least = Number(score.value);
  part("score-value").textContent = least.toFixed(2);
  shown.querySelectorAll(".box").forEach((box) => box.remove());
  part("found").replaceChildren();
  shown.classList.remove("dim");
  const kept = answer.detections.filter((found) => found.score >= least);
  for (const found of kept) mark(found);
  const all = answer.detections.length;
  tell(kept.length + " of " + all + (all === 1 ? " object" : " objects") + " shown"
    + (all > 0 && kept.length === 0 ? "; lower the score to see more" : ""));
}

function mark(found) {
  const { width, height } = answer.image;
  const clip = (value, most) => Math.min(Math.max(value, 0), most);
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
  const stress = (on) => {
    const stays = button.getAttribute("aria-pressed") === "true";
    box.classList.toggle("strong", on || stays);
    shown.classList.toggle("dim", shown.querySelector(".strong") !== null);
  };
  button.addEventListener("pointerenter", () => stress(true));
  button.addEventListener("pointerleave", () => stress(false));
  button.addEventListener("focus", () => stress(true));
  button.addEventListener("blur", () => stress(false));
  button.addEventListener("click", () => {
    const pressed = button.getAttribute("aria-pressed") !== "true";
    button.setAttribute("aria-pressed", String(pressed));
    stress(true);
  });
  item.append(button);
  part("found").append(item);
}

function take(files) {
  if (files.length === 0) {
    fail("That was no file; drop a JPEG or PNG from a folder.");
    return;
  }
  look(files[0]);
}

file.addEventListener("change", () => {
  if (file.files.length > 0) look(file.files[0]);
  file.value = "";  // so that the same file can be chosen again
});
score.addEventListener("input", draw);
part("use-token").addEventListener("click", () => {
  token = part("token").value.trim();
  part("token-row").hidden = token !== "";
  introduce();
  if (last) look(last);
});
part("token").addEventListener("keydown", (event) => {
  if (event.key === "Enter") part("use-token").click();
});
// Everywhere, so that a picture that misses the field does not replace the page.
addEventListener("dragover", (event) => { event.preventDefault(); drop.classList.add("over"); });
addEventListener("dragleave", (event) => {
  if (event.relatedTarget === null) drop.classList.remove("over");
});
addEventListener("drop", (event) => {
  event.preventDefault();
  drop.classList.remove("over");
  take(event.dataTransfer.files);
});
addEventListener("paste", (event) => {
  if (event.clipboardData.files.length > 0) take(event.clipboardData.files);
});
introduce();
