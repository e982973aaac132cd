// The page of the service: files go to this machine's API and nowhere else; nothing is stored in the browser.
"use strict";
const $ = id => document.getElementById(id);
const PART = 8; // files a request
const state = { normals: [], cases: [], session: null, results: [], chosen: null, run: 0, queue: null, needs: true, token: "" };

function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}
const png = data => `data:image/png;base64,${data}`;
const number = value => (value === null || value === undefined ? "none" : Number(value).toPrecision(4));
const wait = seconds => new Promise(done => setTimeout(done, 1000 * seconds));
const error = (line, status) => Object.assign(new Error(line), { status });

async function ask(path, options = {}) {
  for (;;) {
    const headers = state.token ? { Authorization: `Bearer ${state.token}` } : {};
    let response;
    try {
      response = await fetch(path, { ...options, headers });
    } catch {
      throw error("The service does not answer. Is it still running?", 0);
    }
    if (response.status === 204) return null;
    const answer = await response.json().catch(() => ({ error: `The service answered with status ${response.status}.` }));
    if (response.status === 429) {
      await wait(Number(response.headers.get("Retry-After")) || 1);
      continue;
    }
    if (response.status === 401) $("ask").hidden = false;
    if (!response.ok && !answer.results) throw error(answer.error, response.status);
    return answer;
  }
}

function form(field, files) {
  const data = new FormData();
  for (const file of files) data.append(field, file, file.name);
  return data;
}

function intensity() {
  const rule = $("rule").value;
  if (rule === "auto") return "";
  return JSON.stringify({ rule, low: Number($("low").value), high: Number($("high").value) });
}

async function openSession() {
  const old = state.session;
  state.session = null;
  if (old) await ask(`sessions/${old.id}`, { method: "DELETE" }).catch(() => null);
  const data = form("normals", state.normals);
  data.append("task", $("task").value || "task");
  data.append("intensity", intensity());
  return ask("sessions?pictures=true", { method: "POST", body: data });
}

async function start() {
  const run = ++state.run;
  state.results = [];
  state.chosen = null;
  $("errors").replaceChildren();
  $("gallery").replaceChildren();
  show();
  if (!state.normals.length && state.needs) return tell();
  $("normals-told").textContent = `Reading ${state.normals.length} normal images ...`;
  try {
    const session = await openSession();
    if (run !== state.run) return ask(`sessions/${session.id}`, { method: "DELETE" });
    state.session = session;
  } catch (problem) {
    if (run === state.run) $("normals-told").textContent = problem.message;
    return undefined;
  }
  $("gallery").replaceChildren(...state.session.normals.map(each => make("li", {},
    make("img", { src: png(each.picture), alt: "" }), make("span", { textContent: each.name }))));
  const scores = state.session.normals.map(each => each.score).filter(score => score !== null);
  const among = scores.length ? ` Among themselves they score ${number(Math.min(...scores))} to ${number(Math.max(...scores))}.` : "";
  $("normals-told").textContent = `${state.session.shots} normal images.${among} ${state.session.p_values || ""}`;
  state.queue = judge(run, [...state.cases]);
  return state.queue;
}

async function judge(run, files) {
  for (let first = 0; first < files.length; first += PART) {
    const part = files.slice(first, first + PART);
    $("cases-told").textContent = `Judging ${first + 1} to ${first + part.length} of ${files.length} ...`;
    try {
      const path = `sessions/${state.session.id}/queries?pictures=image&pictures=overlay&side=720`;
      const answer = await ask(path, { method: "POST", body: form("images", part) });
      if (run !== state.run) return;
      for (const each of answer.results) each.error === null ? state.results.push(each) : complain(each.error);
    } catch (problem) {
      if (run !== state.run) return;
      if (problem.status === 404 || problem.status === 410) return start(); // it gave way: the files are still here
      for (const file of part) complain(`${file.name}: ${problem.message}`);
      if (problem.status === 0 || problem.status === 401) break;
    }
    state.results.sort((a, b) => b.score - a.score);
    show();
  }
  tell();
}

function complain(line) {
  if ([...$("errors").children].some(each => each.textContent === line)) return; // all slices of one file
  $("errors").append(make("li", { textContent: line }));
}

function tell() {
  const waits = state.cases.length && !state.session ? `${state.cases.length} cases wait for normal images.` : "";
  const failed = $("errors").children.length;
  const done = state.results.length || failed ? `${state.results.length} judged, ${failed} not.` : "";
  $("cases-told").textContent = waits || done;
}

const title = each => (each.frame === null ? each.name : `${each.name} #${each.frame}`);

function show() {
  $("found").hidden = !state.results.length;
  if (!state.results.length) return;
  if (!state.results.includes(state.chosen)) state.chosen = state.results[0];
  $("list").replaceChildren(...state.results.map(each => {
    const row = make("button", { type: "button", onclick: () => choose(each) },
      make("b", { textContent: title(each) }), make("span", { className: "value", textContent: number(each.score) }));
    row.tabIndex = each === state.chosen ? 0 : -1;
    row.setAttribute("aria-current", each === state.chosen);
    return make("li", {}, row);
  }));
  detail(state.chosen);
}

function choose(each, focus = false) {
  state.chosen = each;
  [...$("list").querySelectorAll("button")].forEach((row, at) => {
    const on = state.results[at] === each;
    row.tabIndex = on ? 0 : -1;
    row.setAttribute("aria-current", on);
    if (on && focus) row.focus();
  });
  detail(each);
}

function detail(each) {
  $("case-name").textContent = title(each);
  const { image, overlay } = each.pictures || {};
  $("stack").hidden = !image;
  if (image) {
    $("image").src = png(image);
    $("overlay").src = png(overlay);
    $("image").alt = `${title(each)} as judged`;
    const [height, width] = each.size, [row, column] = each.spacing || [1, 1];
    $("image").style.aspectRatio = `${width * column} / ${height * row}`;
  }
  const normals = state.session.normals, scores = normals.map(one => one.score).filter(score => score !== null);
  const above = scores.filter(score => score < each.score).length;
  const facts = [["Score", number(each.score)]];
  if (scores.length) facts.push(["Higher than", `${above} of ${scores.length} normal images`]);
  if (each.p_value !== null) facts.push(["p-value", number(each.p_value)]);
  $("facts").replaceChildren(...facts.map(([term, value]) =>
    make("div", {}, make("dt", { textContent: term }), make("dd", { textContent: value }))));
  $("case-note").textContent = each.note || "";
  const weights = each.support_weights || [];
  $("mattered-head").hidden = !weights.length;
  const order = weights.map((weight, at) => [weight, at]).sort((a, b) => b[0] - a[0]).slice(0, 8);
  $("mattered").replaceChildren(...order.map(([weight, at]) => {
    const fill = make("i");
    fill.style.width = `${100 * weight}%`;
    return make("li", {}, make("img", { src: png(normals[at].picture), alt: "" }), make("div", { className: "bar" }, fill),
      make("span", { textContent: `${Math.round(100 * weight)} % ${normals[at].name}` }));
  }));
}

function strength() {
  $("overlay").style.opacity = $("strength").value / 100;
}

function take(field, files) {
  const list = [...files];
  if (!list.length) return;
  if (field === "normals") {
    state.normals.push(...list);
    start();
  } else {
    state.cases.push(...list);
    if (!state.session) tell();
    else state.queue = Promise.resolve(state.queue).then(() => judge(state.run, list));
  }
}

for (const field of ["normals", "cases"]) {
  const drop = $(`${field}-drop`);
  $(field).addEventListener("change", event => {
    take(field, event.target.files);
    event.target.value = "";
  });
  drop.addEventListener("dragover", event => {
    event.preventDefault();
    drop.classList.add("over");
  });
  drop.addEventListener("dragleave", () => drop.classList.remove("over"));
  drop.addEventListener("drop", event => {
    event.preventDefault();
    drop.classList.remove("over");
    take(field, event.dataTransfer.files);
  });
}
for (const kind of ["dragover", "drop"]) window.addEventListener(kind, event => event.preventDefault()); // beside a field

$("list").addEventListener("keydown", event => {
  const steps = { ArrowDown: 1, ArrowUp: -1, Home: -Infinity, End: Infinity };
  if (!(event.key in steps)) return;
  event.preventDefault();
  const at = state.results.indexOf(state.chosen) + steps[event.key];
  choose(state.results[Math.max(0, Math.min(state.results.length - 1, at))], true);
});
$("strength").addEventListener("input", strength);
$("rule").addEventListener("change", () => {
  const rules = { window: ["Centre", 40, "Width", 80], range: ["Lowest", 0, "Highest", 255], percentile: ["Lower", 1, "Upper", 99] };
  const words = rules[$("rule").value];
  $("numbers").hidden = !words;
  if (words) [$("low-name").textContent, $("low").value, $("high-name").textContent, $("high").value] = words;
});
$("again").addEventListener("click", start);
$("forget").addEventListener("click", async () => {
  state.run++;
  const session = state.session;
  Object.assign(state, { normals: [], cases: [], session: null, results: [], chosen: null });
  for (const id of ["gallery", "errors"]) $(id).replaceChildren();
  for (const id of ["normals-told", "cases-told"]) $(id).textContent = "";
  show();
  if (session) await ask(`sessions/${session.id}`, { method: "DELETE" }).catch(() => null);
});
$("ask").addEventListener("submit", event => {
  event.preventDefault();
  state.token = $("token").value;
  $("ask").hidden = true;
  about();
  start();
});

async function about() {
  try {
    const facts = await ask("about");
    if (!facts.needs_normals && state.needs) {
      state.needs = false;
      $("normals-head").parentElement.hidden = true;
      start();
    }
    $("model").textContent = `Model: ${facts.method} on ${facts.teachers.join(" and ")}. ${facts.needs_normals ? "Each case is compared with the normal images." : "It needs no normal images."}`;
  } catch (problem) {
    $("model").textContent = problem.message;
  }
}

state.token = new URLSearchParams(location.hash.slice(1)).get("token") || "";
if (state.token) history.replaceState(null, "", location.pathname); // no token in the address bar
strength();
about();
