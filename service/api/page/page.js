"use strict";
// The page is made on the server; this keeps it up to date and sends what is asked of it.

const problem = document.getElementById("problem");
const connection = document.getElementById("connection");

function tell(text) {
  problem.textContent = text;
  problem.hidden = !text;
  if (text) problem.scrollIntoView({ block: "nearest" });
}

async function send(path, body, key) {
  const headers = { "Content-Type": "application/json" };
  if (key) headers["Idempotency-Key"] = key;
  const answer = await fetch(path, {
    method: "POST", headers, body: body === undefined ? undefined : JSON.stringify(body),
  });
  const said = await answer.json().catch(() => ({}));
  if (!answer.ok) throw new Error([said.error || `The server answered ${answer.status}.`, said.remedy].filter(Boolean).join("\n"));
  return said;
}

document.addEventListener("click", async (event) => {
  const button = event.target.closest("[data-post]");
  if (!button) return;
  if (button.dataset.confirm && !confirm(button.dataset.confirm)) return;
  button.disabled = true;
  try {
    await send(button.dataset.post, button.dataset.body ? JSON.parse(button.dataset.body) : undefined);
    tell("");
    if (button.dataset.then) location.href = button.dataset.then;
    else refresh();
  } catch (error) {
    tell(error.message);
  } finally {
    button.disabled = false;
  }
});

// Forms: without this script they would be sent as they are.

for (const button of document.querySelectorAll("[data-form] button[type=submit]")) button.disabled = false;

function settings(text) {
  const found = {};
  for (const line of text.split("\n")) {
    const [, name, value] = line.match(/^\s*(?:--)?([\w-]+)\s*[=:]\s*(.*?)\s*$/) || [];
    if (name === undefined) {
      if (line.trim()) throw new Error(`"${line.trim()}" is no setting: write name = value.`);
    } else if (value) {
      found[name.replaceAll("-", "_")] = { true: true, false: false }[value] ?? value;
    }
  }
  return found;
}

function bodyOf(form) {
  const fields = new FormData(form);
  if (fields.has("token")) return { token: fields.get("token") };
  const given = settings(fields.get("lines"));
  const body = { arguments: given };
  if (form.dataset.original) {  // a clone: only what differs, and null for what was removed
    const original = JSON.parse(form.dataset.original);
    for (const name of Object.keys(original)) {
      if (!(name in given)) given[name] = null;
      else if (String(given[name]) === String(original[name])) delete given[name];
    }
  } else {
    body.command = fields.get("command");
    if (body.command === "evaluate" && typeof given.models === "string") {
      given.given_models = given.models.split(",").map((one) => one.trim());
      delete given.models;
    }
  }
  if (fields.get("name")) body.name = fields.get("name");
  if (fields.get("warm_start")) body.warm_start = true;
  if (fields.get("hold")) body.hold = true;
  return body;
}

let key = crypto.randomUUID ? crypto.randomUUID() : String(Math.random()).slice(2);
document.addEventListener("submit", async (event) => {
  const form = event.target.closest("[data-form]");
  if (!form) return;
  event.preventDefault();
  const button = form.querySelector("button[type=submit]");
  button.disabled = true;
  try {
    const said = await send(form.dataset.form, bodyOf(form), form.dataset.then ? undefined : key);
    location.href = form.dataset.then || `/page/items/${said.id}`;
  } catch (error) {
    tell(error.message);
    key = `${key}x`;  // what was refused is another request once it is changed
  } finally {
    button.disabled = false;
  }
});

// What is live: a part of the page is fetched again after events, at most once a second.

const live = document.getElementById("live");
let isDue = false;
let isUnderWay = false;

async function refresh() {
  if (!live) return;
  if (isUnderWay) { isDue = true; return; }
  isUnderWay = true;
  try {
    const answer = await fetch(live.dataset.live);
    if (answer.status === 401) location.href = "/login";
    if (answer.ok) {
      const focused = live.contains(document.activeElement) ? document.activeElement.dataset.post : undefined;
      live.innerHTML = await answer.text();
      if (focused) live.querySelector(`[data-post="${focused}"]`)?.focus();
    }
    drawFigures();
  } catch { /* the stream of events says that the connection is lost */ }
  setTimeout(() => { isUnderWay = false; if (isDue) { isDue = false; refresh(); } }, 1000);
}

if (live) {
  const stream = new EventSource("/events");
  const concerns = (event) => !live.dataset.item || String(JSON.parse(event.data).id ?? JSON.parse(event.data).item) === live.dataset.item;
  for (const kind of ["queue", "devices"]) {
    stream.addEventListener(kind, () => { if (!live.dataset.item) refresh(); });
  }
  for (const kind of ["item", "trial"]) stream.addEventListener(kind, (event) => { if (concerns(event)) refresh(); });
  stream.addEventListener("missed", refresh);
  stream.addEventListener("hello", () => { connection.hidden = true; });
  stream.onerror = () => { connection.hidden = false; };
  setInterval(refresh, 30000);  // predicted times pass without an event
}

// Logs: fetched from where they ended, followed at the end only.

for (const place of document.querySelectorAll("[data-log]")) {
  let offset = 0;
  const follow = async () => {
    let isComplete = false;
    try {
      const answer = await fetch(`${place.dataset.log}?offset=${offset}`);
      if (answer.ok) {
        const said = await answer.json();
        const atEnd = place.scrollTop + place.clientHeight >= place.scrollHeight - 8;
        if (offset === 0) place.textContent = "";
        place.append(said.text);
        isComplete = said.is_complete && said.offset === offset;
        offset = said.offset;
        if (atEnd) place.scrollTop = place.scrollHeight;
        if (!place.textContent) place.textContent = isComplete ? "nothing was printed" : "";
      } else if (answer.status === 404) {
        place.textContent = "there is no log yet";
      }
    } catch { /* tried again */ }
    setTimeout(follow, isComplete ? 15000 : 2000);
  };
  follow();
}

// Figures: those of the report, drawn by plotly with the colours of this page.

function colored(value) {
  if (typeof value === "string") {
    return value[0] === "@" ? getComputedStyle(document.documentElement).getPropertyValue("--" + value.slice(1)).trim() : value;
  }
  if (Array.isArray(value)) return typeof value[0] === "number" ? value : value.map(colored);
  if (value && typeof value === "object") return Object.fromEntries(Object.entries(value).map(([name, one]) => [name, colored(one)]));
  return value;
}

let plotly;
function loadPlotly() {
  plotly ??= new Promise((resolve, reject) => {
    const script = document.createElement("script");
    script.src = "/assets/plotly.js";
    script.onload = resolve;
    script.onerror = reject;
    document.head.append(script);
  });
  return plotly;
}

const curves = document.getElementById("curves");
let drawn = "";
async function drawFigures(again = false) {
  if (!curves) return;
  const answer = await fetch(curves.dataset.figures);
  if (answer.status !== 200) return;
  const text = await answer.text();
  if (text === drawn && !again) return;
  drawn = text;
  const figure = JSON.parse(text);
  await loadPlotly();
  document.getElementById("curves-section").hidden = false;
  document.getElementById("curves-caption").textContent = figure.caption;
  await Plotly.react(curves, colored(figure.data), colored(figure.layout), { responsive: true, displayModeBar: false });
}
drawFigures();
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => drawFigures(true));
