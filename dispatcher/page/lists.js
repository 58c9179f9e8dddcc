// Jobs, dead letters and events: three short lists beside the sessions.

import { $, announce, el, Keyed, onPress, put, say } from "./dom.js";
import { ask } from "./api.js";
import { address, may } from "./state.js";
import { bytes, clock, count, span, words } from "./format.js";

const PAGE = 20;
const MOST = 500;
const EVENTS_KEPT = 200;

// ---- jobs

function makeJob() {
  const parts = {
    id: el("a", { class: "id stranger" }),
    state: el("span", { class: "badge" }),
    facts: el("span", { class: "quiet stranger" }),
    bar: el("span", { class: "bar-ours" }),
  };
  const bar = el("span", { class: "bar", "aria-hidden": "true" }, parts.bar);
  const element = el(
    "li", { class: "row" },
    el("span", { class: "row-top" }, parts.id, parts.state),
    bar,
    parts.facts,
  );
  return { element, parts, bar };
}

function updateJob({ parts, bar }, job) {
  say(parts.id, job.id);
  put(parts.id, "href", address("job", job.id));
  const running = typeof job.percent === "number" && !["done", "failed", "cancelled"].includes(job.state);
  say(parts.state, running ? `${Math.round(job.percent)} %` : words(job.state));
  put(parts.state, "data-kind", job.state);
  put(bar, "hidden", !running);
  parts.bar.style.setProperty("inline-size", `${Math.min(100, Math.max(0, job.percent ?? 0))}%`);
  const facts = [
    job.label,
    job.priority && job.priority !== "normal" ? `${job.priority} priority` : null,
    job.duration_s ? `${span(job.duration_s * 1000)} of audio` : null,
    job.gpu_id ? `on ${job.gpu_id}` : null,
    job.attempts > 1 ? `attempt ${job.attempts}` : null,
    job.failure ? words(job.failure.class ?? job.failure) : null,
    job.ahead ? `${count(job.ahead)} before it` : null,
    job.submitted_ms ? clock(job.submitted_ms) : null,
  ];
  say(parts.facts, facts.filter(Boolean).join(" · "));
}

// ---- dead letters

function makeDead() {
  const parts = {
    id: el("span", { class: "id stranger" }),
    failure: el("span", { class: "badge" }),
    message: el("span", { class: "stranger dead-message" }),
    facts: el("span", { class: "quiet stranger" }),
    retry: el("button", { type: "button", class: "small" }, "Retry"),
  };
  const entry = { parts, letter: null };
  entry.element = el(
    "li", { class: "row" },
    el("span", { class: "row-top" }, parts.id, parts.failure),
    parts.message,
    el("span", { class: "row-top" }, parts.facts, parts.retry),
  );
  onPress(parts.retry, async () => {
    try {
      const answer = await ask(`/api/dead/${encodeURIComponent(entry.letter.seq)}/retry`, {});
      announce(`Sent again: ${answer?.retried ?? entry.letter.id}`);
      say($("dead-told"), `${answer?.retried ?? entry.letter.id} was sent again.`);
      await dead();
    } catch (error) {
      announce(`Retry failed: ${error.message}`);
      say($("dead-told"), `Could not retry ${entry.letter.id}: ${error.message}`);
    }
  });
  return entry;
}

function updateDead(entry, letter) {
  const { parts } = entry;
  entry.letter = letter;
  say(parts.id, letter.id);
  say(parts.failure, words(letter.class));
  say(parts.message, letter.message);
  say(parts.facts, `${letter.kind} · ${bytes(letter.bytes)} · ${clock(letter.at_ms)}`);
  put(parts.retry, "hidden", !letter.retriable || !may("operator"));
  put(parts.retry, "aria-label", `Retry ${letter.kind} ${letter.id}`);
}

// ---- events

// Newest first, each kind for itself: a flood of one must not wash away the others.
const kept = { all: [], fleet: [], job: [], session: [] };
let shown_kind = "fleet";

const nameOf = (row) => JSON.stringify([row.at_ms, row.kind, row.id, row.what, row.text]);

function keep(rows) {
  for (const [kind, list] of Object.entries(kept)) {
    list.unshift(...(kind === "all" ? rows : rows.filter((row) => row.kind === kind)));
    list.length = Math.min(list.length, EVENTS_KEPT);
  }
}

function eventRow(row) {
  const linked = row.kind === "session" || row.kind === "job";
  const about = linked
    ? el("a", { class: "id stranger", href: address(row.kind, row.id) }, String(row.id ?? ""))
    : el("span", { class: "id stranger" }, String(row.id ?? ""));
  return el(
    "li", { class: "event", "data-what": String(row.what ?? "") },
    el("time", {}, clock(row.at_ms)),
    el("span", { class: "event-body" }, el("span", { class: "event-what" }, words(row.what)), " ", about,
      row.text ? el("span", { class: "quiet stranger" }, ` ${row.text}`) : null),
  );
}

function renderEvents() {
  $("events-rows").replaceChildren(...kept[shown_kind].map(eventRow));
  emptyEvents();
}

function emptyEvents() {
  say($("events-empty"), $("events-rows").firstElementChild ? "" : "Nothing has happened yet.");
}

// Under load hundreds arrive in a second; they reach the page together, once in a frame. A page that nobody sees has no frames:
// what waits there is bounded, for each kind by itself, so that a noisy one pushes no other out.
let arrived = [];
let waiting_frame = false;
export function addEvent(row) {
  if (!waiting_frame) requestAnimationFrame(flushEvents);
  waiting_frame = true;
  arrived.push(row);
  if (arrived.length >= 8 * EVENTS_KEPT) arrived = newestOfEach(arrived);
  if (row.kind === "job") soonJobs();
}

function newestOfEach(rows) {
  const left = {};
  const stays = (row) => (left[row.kind] = (left[row.kind] ?? EVENTS_KEPT) - 1) >= 0;
  return rows.reverse().filter(stays).reverse();
}

function flushEvents() {
  // The list that was asked for and the stream overlap.
  const known = new Set(Object.values(kept).flat().map(nameOf));
  const rows = newestOfEach(arrived).reverse().filter((row) => !known.has(nameOf(row)));
  arrived = [];
  waiting_frame = false;
  keep(rows);
  const list = $("events-rows");
  list.prepend(...rows.filter((row) => shown_kind === "all" || row.kind === shown_kind).map(eventRow));
  while (list.childElementCount > EVENTS_KEPT) list.lastElementChild.remove();
  emptyEvents();
}

// ---- asking

let job_rows, dead_rows;
const limits = { jobs: PAGE, dead: PAGE };

async function list(name, extra, render) {
  try {
    const answer = await ask(`/api/${name}?limit=${limits[name]}${extra}`);
    render(answer);
    const shown = Math.min(answer.total ?? 0, answer.rows?.length ?? 0);
    put($(`${name}-pages`), "hidden", shown >= answer.total);
    put($(`${name}-more`), "hidden", limits[name] >= MOST);
    say($(`${name}-place`), `${count(shown)} of ${count(answer.total)}`);
  } catch (error) {
    // The banner tells a lost dispatcher; an old list stays until it answers again.
    if (error.status) say($(`${name}-empty`), `Could not be read: ${error.message}`);
  }
}

let jobs_state = "";
export const jobs = () =>
  list("jobs", jobs_state ? `&state=${jobs_state}` : "", (answer) => {
    job_rows.show(answer.rows ?? [], (job) => job.id);
    say($("jobs-count"), count(answer.total));
    say($("jobs-empty"), answer.total ? "" : jobs_state ? `No jobs are ${jobs_state}.` : "No jobs.");
  });

export const dead = () =>
  list("dead", "", (answer) => {
    dead_rows.show(answer.rows ?? [], (letter) => letter.seq);
    say($("dead-count"), count(answer.total));
    put($("dead-count"), "data-some", answer.total > 0);
    say($("dead-empty"), answer.total ? "" : "None: nothing has been given up.");
  });

export async function recentEvents() {
  try {
    const kind = shown_kind;
    const answer = await ask(`/api/events?limit=${EVENTS_KEPT}${kind === "all" ? "" : `&kind=${kind}`}`);
    for (const list of Object.values(kept)) list.length = 0;
    keep(answer.rows ?? []);
    renderEvents();
  } catch (error) {
    if (error.status) say($("events-empty"), `Could not be read: ${error.message}`);
  }
}

// At once would ask for each of a hundred jobs that end together.
let soon = 0;
function soonJobs() {
  soon ||= setTimeout(() => {
    soon = 0;
    jobs();
  }, 400);
}

export function start() {
  job_rows = new Keyed($("jobs-rows"), makeJob, updateJob);
  dead_rows = new Keyed($("dead-rows"), makeDead, updateDead);
  for (const [name, read] of [["jobs", jobs], ["dead", dead]]) {
    $(`${name}-more`).addEventListener("click", () => {
      limits[name] = Math.min(MOST, limits[name] * 2);
      read();
    });
  }
  $("jobs-state").addEventListener("change", (event) => {
    jobs_state = event.target.value;
    limits.jobs = PAGE;
    jobs();
  });
  $("events-kind").addEventListener("change", (event) => {
    shown_kind = event.target.value;
    recentEvents();
  });
  // Progress of running jobs is in no event.
  setInterval(() => {
    if (!document.hidden && job_rows.entries.size) jobs();
  }, 4000);
}
