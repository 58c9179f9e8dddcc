// The table of live sessions. The dispatcher sorts, searches and pages; the page asks through its one stream.

import { $, debounce, el, Keyed, put, say } from "./dom.js";
import { address } from "./state.js";
import { count, DASH, lag, span, words } from "./format.js";

const PAGE = 50;
const question = { sort: "lag", order: "desc", q: "", state: "all", offset: 0 };
let matched = 0;
let ask = () => {};

export function parameters() {
  // The dispatcher orders by when a session began; people by how old it is.
  const turned = question.sort === "age" ? { asc: "desc", desc: "asc" }[question.order] : question.order;
  const query = new URLSearchParams({ sessions: question.sort, order: turned, limit: PAGE, offset: question.offset });
  if (question.q) query.set("q", question.q);
  if (question.state !== "all") query.set("state", question.state);
  return query;
}

const cell = (name, label, ...inside) =>
  el("td", { class: `s-${name}`, role: "cell", "data-label": label }, ...inside);

function make() {
  const parts = {
    link: el("a", { class: "id stranger" }),
    gpu: el("a", { class: "id stranger" }),
    why: el("span", { class: "stranger" }),
    model: el("span", { class: "stranger" }),
    lag: el("span", { class: "lag" }),
    age: el("span"),
    text: el("span", { class: "tail-text stranger" }),
  };
  const element = el(
    "tr",
    { role: "row" },
    cell("id", "Session", parts.link),
    cell("gpu", "GPU", parts.gpu, parts.why),
    cell("model", "Model", parts.model),
    cell("lag", "Lag", parts.lag),
    cell("age", "Age", parts.age),
    cell("text", "Said", el("span", { class: "tail" }, parts.text)),
  );
  return { element, parts };
}

// Under a second nobody notices; from three seconds on the audio piles up.
export const late = (ms) => (ms >= 3000 ? "late" : ms >= 1000 ? "slow" : null);

function update({ element, parts }, row) {
  put(element, "data-state", row.state);
  say(parts.link, row.id);
  put(parts.link, "href", address("session", row.id));
  const placed = row.state !== "waiting" && row.gpu_id;
  say(parts.gpu, placed ? row.gpu_id : "");
  put(parts.gpu, "href", placed ? address("gpu", row.gpu_id) : null);
  say(parts.why, placed ? "" : `waiting${row.waiting_why ? `: ${words(row.waiting_why)}` : ""}`);
  say(parts.model, [row.model, row.language].filter(Boolean).join(" · ") || DASH);
  say(parts.lag, lag(row.lag_ms));
  put(parts.lag, "data-late", late(row.lag_ms));
  say(parts.age, row.started_ms ? span(Date.now() - row.started_ms) : DASH);
  say(parts.text, row.text ?? "");
}

let rows;

export function show(answer) {
  matched = answer.matched ?? answer.total ?? 0;
  if (question.offset > 0 && question.offset >= matched) {
    question.offset = Math.max(0, Math.floor((matched - 1) / PAGE) * PAGE);
    ask();
  }
  rows.show(answer.rows ?? [], (row) => row.id);
  say($("sessions-count"), matched === answer.total ? count(answer.total) : `${count(matched)} of ${count(answer.total)}`);
  const first = matched ? question.offset + 1 : 0;
  say($("sessions-place"), matched ? `${count(first)} to ${count(Math.min(question.offset + PAGE, matched))} of ${count(matched)}` : "");
  put($("sessions-before"), "aria-disabled", question.offset === 0 ? "true" : null);
  put($("sessions-after"), "aria-disabled", question.offset + PAGE >= matched ? "true" : null);
  put($("sessions-pages"), "hidden", matched <= PAGE);
  say(
    $("sessions-empty"),
    matched ? "" : question.q || question.state !== "all" ? "No session fits this search." : "No sessions. Audio published to NATS, or a recording made here, opens one.",
  );
}

function sorted() {
  for (const button of document.querySelectorAll("[data-sort]")) {
    const mine = button.dataset.sort === question.sort;
    put(button.closest("th"), "aria-sort", mine ? (question.order === "asc" ? "ascending" : "descending") : null);
  }
  const choice = `${question.sort} ${question.order}`;
  if ([...$("sessions-sort").options].some((option) => option.value === choice)) $("sessions-sort").value = choice;
}

// Shows the sessions that this text finds (an id, a GPU, a word).
export function search(text) {
  $("sessions-find").value = text;
  question.q = text;
  question.offset = 0;
  ask();
}

// `changed` asks again after the question changed.
export function start(changed) {
  ask = changed;
  rows = new Keyed($("sessions-rows"), make, update);
  const again = () => {
    question.offset = 0;
    sorted();
    ask();
  };
  for (const button of document.querySelectorAll("[data-sort]")) {
    button.addEventListener("click", () => {
      const { sort } = button.dataset;
      const other = question.order === "asc" ? "desc" : "asc";
      question.order = question.sort === sort ? other : button.dataset.first ?? "asc";
      question.sort = sort;
      again();
    });
  }
  $("sessions-sort").addEventListener("change", (event) => {
    [question.sort, question.order] = event.target.value.split(" ");
    again();
  });
  $("sessions-state").addEventListener("change", (event) => {
    question.state = event.target.value;
    again();
  });
  $("sessions-find").addEventListener(
    "input",
    debounce(250, () => {
      question.q = $("sessions-find").value.trim();
      again();
    }),
  );
  const turn = (step) => () => {
    const offset = question.offset + step;
    if (offset < 0 || offset >= matched) return;
    question.offset = offset;
    ask();
    $("sessions-top").scrollIntoView({ block: "nearest" });
  };
  $("sessions-before").addEventListener("click", turn(-PAGE));
  $("sessions-after").addEventListener("click", turn(PAGE));
  sorted();
}
