"use strict";
// Without this script everything is shown, in the order in which the runs were named.

function key(cell) {
  const text = cell.textContent.trim();
  return text === "best" ? 0 : parseFloat(text.replace(/^\u2212/, "-"));
}

function sort(table, column, ascending) {
  const rows = [...table.tBodies[0].rows];
  const numeric = column > 0 && rows.some((row) => !isNaN(key(row.cells[column])));
  rows.sort((one, other) => {
    const [a, b] = [one, other].map((row) => row.cells[column]);
    if (!numeric) {
      const order = a.textContent.trim().localeCompare(b.textContent.trim(), "en", { numeric: true });
      return ascending ? order : -order;
    }
    const [x, y] = [key(a), key(b)];
    if (isNaN(x) || isNaN(y)) return isNaN(x) - isNaN(y); // what was not measured comes last
    return ascending ? x - y : y - x;
  });
  table.tBodies[0].append(...rows);
  [...table.tHead.rows[0].cells].forEach((head, index) => {
    if (index === column) head.setAttribute("aria-sort", ascending ? "ascending" : "descending");
    else head.removeAttribute("aria-sort");
  });
}

for (const table of document.querySelectorAll("table.sorts")) {
  [...table.tHead.rows[0].cells].forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    button.addEventListener("click", () =>
      sort(table, column, head.getAttribute("aria-sort") !== "ascending"));
    head.append(button);
  });
}

for (const filter of document.querySelectorAll(".filter")) {
  filter.hidden = false;
  const rows = document.getElementById(filter.dataset.of).tBodies[0].rows;
  filter.querySelector("input").addEventListener("input", (event) => {
    const words = event.target.value.toLowerCase().split(/\s+/);
    for (const row of rows) {
      const text = row.textContent.toLowerCase();
      row.hidden = !words.every((word) => text.includes(word));
    }
  });
}

for (const section of document.querySelectorAll(".samples")) {
  const drawings = [...section.querySelectorAll(".triangle")];
  if (!drawings.length) continue;
  const select = section.querySelector("select");
  const cards = [...section.querySelectorAll(".cards a")];
  const choose = (id) => {
    select.value = id;
    drawings.forEach((drawing) => { drawing.hidden = drawing.id !== id; });
    cards.forEach((card) => card.setAttribute("aria-current", card.hash === "#" + id));
  };
  drawings.forEach((drawing) => select.add(new Option(drawing.dataset.title, drawing.id)));
  select.addEventListener("change", () => choose(select.value));
  cards.forEach((card) => card.addEventListener("click", (event) => {
    event.preventDefault();
    choose(card.hash.slice(1));
    document.getElementById(select.value).scrollIntoView({ block: "nearest" });
  }));
  section.querySelector(".chooser").hidden = false;
  const linked = drawings.find((drawing) => "#" + drawing.id === location.hash);
  choose((linked || drawings[0]).id);
}
