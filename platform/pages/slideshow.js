// Shows one slide at a time, with buttons and keys to step. Without it, all stand in a column.
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
      button("\u2190 Previous", "Left arrow or K", () => step(-1)), count,
      button("Next \u2192", "Right arrow or J", () => step(1)),
      ...(groups.length > 1 ? choices : []), names);
    root.prepend(controls);
    root.classList.add("stepping");
    for (const image of root.querySelectorAll(".pair"))
      image.addEventListener("click", () => step(1));
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
