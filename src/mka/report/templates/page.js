"use strict";

// Sorting: numbers by data-number, words by the alphabet, what has no number last.
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    head.querySelector("button").addEventListener("click", () => {
      const up = head.getAttribute("aria-sort") !== "ascending";
      const rows = [...table.tBodies[0].rows];
      const isNumber = rows.some((row) => row.cells[column].dataset.number !== undefined);
      const key = (row) => (isNumber ? parseFloat(row.cells[column].dataset.number) : row.cells[column].textContent);
      rows.sort((a, b) => {
        const [x, y] = [key(a), key(b)];
        if (!isNumber) return up ? x.localeCompare(y) : y.localeCompare(x);
        if (Number.isNaN(x) || Number.isNaN(y)) return Number.isNaN(x) - Number.isNaN(y);
        return up ? x - y : y - x;
      });
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      table.tBodies[0].append(...rows);
    });
  });
}

// Words about the mark that is pointed at, or that the arrow keys have come to.
const tip = document.getElementById("tip");
let shown = null;

function show(mark) {
  if (mark === shown) return;
  if (shown) shown.classList.remove("on");
  shown = mark;
  tip.hidden = !mark;
  if (!mark) return;
  mark.classList.add("on");
  tip.textContent = mark.dataset.words || mark.getAttribute("aria-label");
  place();
}

// Beside its mark, also while the page scrolls under it.
function place() {
  if (!shown) return;
  const box = shown.getBoundingClientRect();
  const x = Math.min(Math.max(box.left + box.width / 2 - tip.offsetWidth / 2, 4), innerWidth - tip.offsetWidth - 4);
  const above = box.top - tip.offsetHeight - 8;
  tip.style.left = `${Math.max(x, 4)}px`;
  tip.style.top = `${above > 4 ? above : box.bottom + 8}px`;
}

const REACH = 28;

for (const chart of document.querySelectorAll(".chart, .passage")) {
  const isDrawn = chart.matches(".chart");
  const words = isDrawn ? ".role-mark path[aria-label]" : "[data-words]";
  const marks = [...chart.querySelectorAll(words)];
  const inside = (event) => event.target.closest(words);
  chart.addEventListener("pointermove", (event) => {
    if (inside(event) || !isDrawn) return show(inside(event));
    let best = null, least = REACH;
    for (const mark of marks) {
      const box = mark.getBoundingClientRect();
      const far = Math.hypot(event.clientX - box.left - box.width / 2, event.clientY - box.top - box.height / 2);
      if (far < least) [best, least] = [mark, far];
    }
    show(best);
  });
  chart.addEventListener("pointerleave", () => show(null));
  chart.addEventListener("blur", () => show(null));
  chart.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    if (event.key === "Escape") return show(null);
    if (!step || !marks.length) return;
    event.preventDefault();
    const at = marks.indexOf(shown);
    const next = at < 0 ? (step > 0 ? 0 : marks.length - 1) : (at + step + marks.length) % marks.length;
    marks[next].scrollIntoView({ block: "nearest" });
    show(marks[next]);
  });
}
addEventListener("scroll", place, { passive: true, capture: true });
addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((one) => (one.open = true)));
