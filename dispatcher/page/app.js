// The operator's page: one stream of events from the dispatcher feeds the fleet map, the totals, the sessions and the
// events. Nothing here decides anything; every figure is the dispatcher's, and an old figure says that it is old.

import { $, announce, onPress, put, say, style } from "./dom.js";
import { ask, Stream } from "./api.js";
import { keyOf, may, openFor, shared, target } from "./state.js";
import { bytes, clock, count, megabytes, percent, plural, span } from "./format.js";
import * as fleet from "./fleet.js";
import * as gpu from "./gpu.js";
import * as lists from "./lists.js";
import * as reader from "./reader.js";
import * as record from "./record.js";
import * as sessions from "./sessions.js";

// Figures come each second; after this long without any, the page says that they are old.
const STALE_MS = 3500;
const SILENCE_MS = 12000;

const view = { heard_at: null, at_ms: null, active: true, nats: { connected: true }, dispatcher: "", verdicts_wait: "", streams: [] };
let stream = null;
let was_fresh = null;

// ---- totals

function totals(t) {
  shared.totals = t;
  const trouble = [["dead", t.dead], ["suspect", t.suspect], ["unhealthy", t.unhealthy]].filter(([, n]) => n > 0);
  const moving = [["draining", t.draining], ["joining", t.joining]].filter(([, n]) => n > 0);
  const told = [...trouble, ...moving].map(([name, n]) => `${count(n)} ${name}`).join(", ");
  say($("t-gpus"), count(t.alive));
  say($("t-gpus-more"), told ? `of ${count(t.gpus)} alive; ${told}` : t.gpus ? "alive, all of them" : "no workers");
  put($("t-gpus-cell"), "data-kind", trouble.length ? (t.dead || t.unhealthy ? "bad" : "warn") : null);
  say($("t-sessions"), count(t.sessions_assigned));
  say($("t-sessions-more"), `of ${plural(t.slots ?? 0, "slot")}${t.sessions_waiting ? `; ${count(t.sessions_waiting)} waiting` : ""}`);
  put($("t-sessions-cell"), "data-kind", t.sessions_waiting ? "warn" : null);
  share("t-sessions-bar", t.slots_used ?? t.sessions_assigned, t.slots);
  say($("t-jobs"), count(t.jobs_assigned));
  say($("t-jobs-more"), `running of ${plural(t.job_slots ?? 0, "slot")}; ${count(t.jobs_queued)} queued`);
  share("t-jobs-bar", t.job_slots_used ?? t.jobs_assigned, t.job_slots);
  const memory = fleet.memoryOfAll();
  put($("t-memory-cell"), "hidden", !memory.total);
  say($("t-memory"), percent(memory.total - memory.free, memory.total));
  say($("t-memory-more"), `ours ${megabytes(memory.ours)}, others ${megabytes(memory.others)} of ${megabytes(memory.total)}`);
  share("t-memory-bar", memory.ours, memory.total);
  share("t-memory-others", memory.others, memory.total);
  say($("t-dead"), count(t.dead_letters));
  say($("t-dead-more"), t.dead_letters ? "given up" : "nothing given up");
  put($("t-dead-cell"), "data-kind", t.dead_letters ? "bad" : null);
  put($("t-price-cell"), "hidden", typeof t.price_per_hour !== "number");
  if (typeof t.price_per_hour === "number") say($("t-price"), t.price_per_hour.toFixed(2));
  const bad = (t.dead ?? 0) + (t.unhealthy ?? 0);
  document.title = bad ? `(${bad}) voxfleet` : "voxfleet";
}

function share(id, part, all) {
  style($(id), "inline-size", all > 0 ? `${Math.min(100, (100 * (part ?? 0)) / all).toFixed(1)}%` : "0%");
}

function logs(streams) {
  const limited = streams.filter((log) => log.max_bytes > 0);
  limited.sort((a, b) => b.bytes / b.max_bytes - a.bytes / a.max_bytes);
  const fullest = limited[0];
  put($("t-log-cell"), "hidden", !fullest);
  if (!fullest) return;
  const full = fullest.bytes / fullest.max_bytes;
  say($("t-log"), percent(fullest.bytes, fullest.max_bytes));
  say($("t-log-more"), `${fullest.stream}, ${bytes(fullest.bytes)}`);
  put($("t-log-cell"), "data-kind", full >= 0.8 ? "bad" : null);
  share("t-log-bar", fullest.bytes, fullest.max_bytes);
}

// ---- what is heard

function heard(value) {
  view.heard_at = performance.now();
  if (typeof value?.at_ms === "number") view.at_ms = value.at_ms;
}

function onFleet(value) {
  heard(value);
  for (const name of ["active", "nats", "dispatcher", "streams"]) if (value[name] !== undefined) view[name] = value[name];
  view.verdicts_wait = value.verdicts_wait ?? "";
  const before = new Map([...shared.tiles].map(([key, tile]) => [key, tile.state]));
  const changed = fleet.show(value);
  if (value.totals) totals(value.totals);
  if (value.streams) logs(value.streams);
  gpu.refresh(value.full ? null : changed);
  tellLosses(value.gpus ?? [], before, value.full);
  put(document.body, "data-loaded", "true");
  freshness();
}

// Deaths are spoken; figures are not.
function tellLosses(tiles, before, full) {
  if (full && before.size === 0) return;
  const lost = tiles.filter((tile) => ["dead", "unhealthy"].includes(tile.state) && before.get(keyOf(tile)) !== tile.state);
  if (!lost.length) return;
  const names = lost.slice(0, 3).map((tile) => `${tile.gpu_id} is ${tile.state}`).join(", ");
  announce(lost.length > 3 ? `${names} and ${lost.length - 3} more` : names);
}

// ---- whether the figures are fresh

// A producer's token sends audio and reads nothing.
const signedOut = () => shared.me.login && !shared.me.roles?.includes("viewer");

// What stands above everything: [text, kind], the worst first.
function bannerOf(age, fresh) {
  if (signedOut()) return [shared.me.roles?.length ? "This token may send audio and not read: sign in with a viewer's to see the fleet." : "Sign in to see the fleet.", "warn"];
  if (age === null) return [performance.now() > 4000 ? "The dispatcher has not answered yet; trying again." : "", "bad"];
  if (!fresh) {
    return [`Connection to the dispatcher lost. The figures are ${span(age)} old, from ${clock(view.at_ms)}; trying again.`, "bad"];
  }
  if (view.nats?.connected === false) return ["The dispatcher has lost NATS: these figures stand still until it is back.", "bad"];
  if (view.active === false) {
    return [`${view.dispatcher || "This dispatcher"} is a standby: another one holds the lease and decides.`, "warn"];
  }
  if (view.verdicts_wait) return [`No worker is declared dead for now: ${view.verdicts_wait}`, "warn"];
  return ["", "bad"];
}

function freshness() {
  const age = view.heard_at === null ? null : performance.now() - view.heard_at;
  const fresh = age !== null && age < STALE_MS;
  const [banner, kind] = bannerOf(age, fresh);
  say($("banner-text"), banner);
  put($("banner"), "hidden", !banner);
  put($("banner"), "data-kind", kind);
  put(document.body, "data-stale", age !== null && !fresh);
  put($("link"), "data-state", fresh ? "live" : age === null ? "opening" : "lost");
  say($("link-text"), fresh ? "live" : signedOut() ? "signed out" : age === null ? "connecting" : "lost");
  const rtt = view.nats?.rtt_ms;
  say($("link-more"), view.dispatcher ? `${view.dispatcher}${typeof rtt === "number" ? `, NATS ${rtt < 10 ? rtt.toFixed(1) : Math.round(rtt)} ms` : ""}` : "");
  if (was_fresh !== null && was_fresh !== fresh && age !== null) announce(fresh ? "Connection is back, figures are live" : "Connection lost, figures are old");
  if (age !== null) was_fresh = fresh;
}

// ---- who looks

// The cookie is out of this page's sight; what everybody may do needs no signing out.
const SIGNED_IN = "voxfleet-signed-in";
function remembered(now) {
  try {
    if (now === true) localStorage.setItem(SIGNED_IN, "1");
    if (now === false) localStorage.removeItem(SIGNED_IN);
    return localStorage.getItem(SIGNED_IN) === "1";
  } catch {
    return true; // no storage here: the button stays
  }
}

let questions = 0;
let offered = false;

async function whoAmI() {
  const mine = ++questions;
  let me;
  try {
    me = await ask("/api/me");
  } catch (error) {
    if (error.status !== 401 && error.status !== 403) return;
    me = { roles: [], login: true };
  }
  if (mine !== questions) return; // asked again meanwhile: after a sign-in, an older refusal must not count
  shared.me = me;
  // Offered once; whoever closes it has the button.
  if (signedOut() && !offered) {
    offered = true;
    openFor($("login"));
  }
  const roles = me.roles ?? [];
  const most = ["operator", "producer", "viewer"].find((role) => roles.includes(role)) ?? "";
  say($("me"), most);
  put($("sign-in"), "hidden", !me.login || roles.includes("operator"));
  put($("sign-out"), "hidden", !me.login || roles.length === 0 || !(roles.includes("operator") || remembered()));
  say($("version"), me.version ? `voxfleet ${me.version}` : "");
  say($("prefix"), me.prefix ? `prefix ${me.prefix}` : "");
  gpu.refresh(null);
}

function startLogin() {
  $("sign-in").addEventListener("click", () => openFor($("login")));
  $("login-form").addEventListener("submit", async (event) => {
    event.preventDefault();
    const field = $("login-token");
    say($("login-told"), "");
    try {
      await ask("/api/login", { token: field.value });
      field.value = "";
      $("login").close();
      remembered(true);
      await everything();
      announce(may("operator") ? "Signed in as operator" : "Signed in");
    } catch (error) {
      say($("login-told"), error.status === 401 || error.status === 403 ? "This token is not known." : error.message);
      put(field, "aria-invalid", "true");
      field.focus();
    }
  });
  $("login-token").addEventListener("input", () => put($("login-token"), "aria-invalid", null));
  onPress($("sign-out"), async () => {
    try {
      remembered(false);
      await ask("/api/logout", {});
    } finally {
      location.reload();
    }
  });
}

// ---- start

const streamUrl = () => `/api/stream?${sessions.parameters()}`;

function listen() {
  if (stream) return stream.now();
  stream = new Stream(streamUrl(), {
    fleet: onFleet,
    sessions: (value) => {
      heard(value);
      sessions.show(value);
    },
    event: lists.addEvent,
    dead: (value) => {
      if (value.total !== shared.dead_total) lists.dead();
      shared.dead_total = value.total;
    },
  }, {
    silence_ms: SILENCE_MS,
    told: (why) => {
      // What happened meanwhile is in no stream.
      if (why === "open" && view.heard_at !== null) asideLists();
      if (why === "refused") whoAmI();
      freshness();
    },
  });
}

const asideLists = () => Promise.all([lists.jobs(), lists.dead(), lists.recentEvents()]);

async function everything() {
  await whoAmI();
  if (signedOut()) return freshness();
  listen();
  asideLists();
}

function followAddress() {
  const where = target();
  for (const id of ["reader", "gpu"]) {
    const mine = where && (id === "gpu") === (where.kind === "gpu");
    if ($(id).open && !mine) $(id).close();
  }
  if (!where) return;
  if ($("record").open) $("record").close();
  if (where.kind === "gpu") gpu.open(where.id);
  else reader.open(where.kind, where.id);
}

function startDialogs() {
  for (const dialog of document.querySelectorAll("dialog")) {
    for (const button of dialog.querySelectorAll("[data-close]")) button.addEventListener("click", () => dialog.close());
    // A press beside the sheet closes it, a press that began inside does not.
    dialog.addEventListener("pointerdown", (event) => {
      if (event.target === dialog) dialog.close();
    });
  }
  $("record-open").addEventListener("click", record.open);
}

fleet.start();
sessions.start(() => stream?.move(streamUrl()));
lists.start();
gpu.start();
reader.start();
record.start();
startLogin();
startDialogs();
everything();
addEventListener("hashchange", followAddress);
followAddress();
setInterval(freshness, 500);
