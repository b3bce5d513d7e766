"use strict";
const { figures, table } = JSON.parse(document.getElementById("data").textContent);

// Figures: drawn when they come near the window, and again when light turns dark.

const drawn = new Set();

function colored(value) {
  if (typeof value === "string") {
    return value[0] === "@"
      ? getComputedStyle(document.documentElement).getPropertyValue("--" + value.slice(1)).trim()
      : value;
  }
  if (Array.isArray(value)) {
    return typeof value[0] === "number" ? value : value.map(colored);
  }
  if (value && typeof value === "object") {
    return Object.fromEntries(Object.entries(value).map(([name, one]) => [name, colored(one)]));
  }
  return value;
}

function draw(name) {
  const { data, layout } = figures[name];
  drawn.add(name);
  Plotly.react(name, colored(data), colored(layout), { responsive: true, displayModeBar: false });
}

const near = new IntersectionObserver((entries) => {
  for (const entry of entries) {
    if (entry.isIntersecting && !drawn.has(entry.target.id)) draw(entry.target.id);
  }
}, { rootMargin: "600px" });
Object.keys(figures).forEach((name) => near.observe(document.getElementById(name)));
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => drawn.forEach(draw));
addEventListener("beforeprint", () => { Object.keys(figures).forEach(draw); show(Infinity); });

// Trials: sorted and filtered as values; only the first rows stand in the page until more are asked for.

const PAGE = 100;
const head = document.querySelector("#trials thead");
const body = document.querySelector("#trials tbody");
const filter = document.getElementById("filter");
const more = document.getElementById("more");
const text = (cell) => (cell === null ? "" : Array.isArray(cell) ? cell[0] : String(cell));
const key = (cell) => (Array.isArray(cell) ? cell[1] : cell === "" ? null : cell);
const searched = new Map(table.rows.map((row) => [row, row.map(text).join(" ").toLowerCase()]));
let sorted = { column: 2, ascending: table.ascending };
let numShown = PAGE;

function compare(a, b) {
  const [first, second] = [key(a[sorted.column]), key(b[sorted.column])];
  if (first === null || second === null) return (first === null) - (second === null);
  const order = typeof first === "number" && typeof second === "number"
    ? first - second : String(first).localeCompare(String(second));
  return sorted.ascending ? order : -order;
}

function show(num = numShown) {
  const words = filter.value.toLowerCase().split(/\s+/);
  const rows = table.rows.filter((row) => words.every((word) => searched.get(row).includes(word))).sort(compare);
  body.replaceChildren(...rows.slice(0, num).map((row) => {
    const line = document.createElement("tr");
    if (row[0] === table.best) line.className = "best";
    line.append(...row.map((cell, i) => {
      const field = document.createElement("td");
      field.textContent = text(cell);
      field.className = table.columns[i][1] ? "number" : i === row.length - 1 ? "long" : "";
      return field;
    }));
    return line;
  }));
  head.querySelectorAll("th").forEach((one, i) => {
    if (i === sorted.column) one.setAttribute("aria-sort", sorted.ascending ? "ascending" : "descending");
    else one.removeAttribute("aria-sort");
  });
  const all = table.rows.length;
  document.getElementById("count").textContent =
    rows.length === all ? `${all.toLocaleString()} trials` : `${rows.length.toLocaleString()} of ${all.toLocaleString()} trials`;
  more.hidden = rows.length <= num;
  more.textContent = `Show all ${rows.length.toLocaleString()}`;
}

const line = document.createElement("tr");
line.append(...table.columns.map(([name, isNumber], i) => {
  const heading = document.createElement("th");
  heading.textContent = name;
  heading.scope = "col";
  heading.tabIndex = 0;
  if (isNumber) heading.className = "number";
  const sort = () => {
    sorted = { column: i, ascending: sorted.column === i ? !sorted.ascending : true };
    show();
  };
  heading.addEventListener("click", sort);
  heading.addEventListener("keydown", (event) => { if (event.key === "Enter") sort(); });
  return heading;
}));
head.append(line);
filter.addEventListener("input", () => show());
more.addEventListener("click", () => { numShown = Infinity; show(); });
show();
