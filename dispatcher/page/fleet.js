// The fleet map: one tile for each worker, in a stable order, so that a place on the screen stays the same GPU.

import { $, el, put, say, style } from "./dom.js";
import { address, keyOf, shared } from "./state.js";
import { count, plural, shareOf, words } from "./format.js";

const TROUBLE = new Set(["suspect", "dead", "unhealthy"]);
const HOT_C = 83; // no new work goes to a device at this temperature
const WARM_C = 78;

const entries = new Map(); // key -> {element, parts, tile}
let order = []; // keys as they stand on the page
let filter = { trouble: false, text: "" };
let current = null; // the key that holds the map's place in the tab order
let inspected = null;

// Memory in shares that always add up to the whole: ours, everybody else's with what the driver keeps, and free.
export function memory(tile) {
  const total = Math.max(0, tile.total_mb || 0);
  const clamp = (mb, most) => Math.min(Math.max(0, mb || 0), most);
  const free = clamp(tile.free_mb, total);
  const ours = clamp(tile.used_mb ?? total - free - (tile.others_mb ?? 0), total - free);
  return { total, free, ours, others: total - free - ours };
}

// The same over all GPUs that are there.
export function memoryOfAll() {
  const sum = { total: 0, free: 0, ours: 0, others: 0 };
  for (const tile of shared.tiles.values()) {
    if (tile.cpu || tile.state === "dead") continue;
    const shares = memory(tile);
    for (const name of Object.keys(sum)) sum[name] += shares[name];
  }
  return sum;
}

// The model that tells most: one being loaded, else the biggest on the device, else the first it could load.
export function mainModel(tile) {
  const models = tile.models ?? [];
  const busy = models.find((model) => model.state === "loading" || model.state === "fetching");
  if (busy) return busy;
  const loaded = models.filter((model) => model.state === "loaded");
  loaded.sort((a, b) => (b.resident_mb ?? 0) - (a.resident_mb ?? 0));
  return loaded[0] ?? null;
}

export function modelText(model) {
  if (!model) return "no model";
  if (model.state === "loaded") return model.name;
  const percent = typeof model.load_percent === "number" ? ` ${model.load_percent} %` : "";
  return `${model.name}, ${words(model.state)}${percent}`;
}

export const hot = (tile) => (tile.temperature_c >= HOT_C ? "hot" : tile.temperature_c >= WARM_C ? "warm" : null);

const place = (tile) => `${tile.host ?? ""}\u0000${String(tile.device_index ?? 999).padStart(4, "0")}\u0000${keyOf(tile)}`;

function make(key) {
  const parts = {
    glyph: el("span", { class: "glyph", "aria-hidden": "true" }),
    name: el("span", { class: "tile-name stranger" }),
    heat: el("span", { class: "tile-heat" }),
    state: el("span", { class: "tile-state" }),
    device: el("span", { class: "tile-device stranger" }),
    model: el("span", { class: "tile-model stranger" }),
    used: el("span", { class: "tile-used" }),
    slots: el("span", { class: "tile-of" }),
    unit: el("span", { class: "tile-unit" }),
    mb: el("span", { class: "tile-mb" }),
    ours: el("span", { class: "bar-ours" }),
    others: el("span", { class: "bar-others" }),
  };
  const bar = el("span", { class: "bar", "aria-hidden": "true" }, parts.ours, parts.others);
  const element = el(
    "button",
    { class: "tile", type: "button", tabindex: "-1" },
    el("span", { class: "tile-top" }, parts.glyph, parts.name, parts.state, parts.heat),
    el("span", { class: "tile-middle" }, parts.device, parts.model),
    bar,
    el("span", { class: "tile-bottom" }, el("span", { class: "tile-slots" }, el("span", {}, parts.used, parts.slots), parts.unit), parts.mb),
  );
  element.dataset.key = key;
  return { element, parts, bar, tile: null };
}

function update(entry, tile) {
  const { element, parts, bar } = entry;
  entry.tile = tile;
  const shares = memory(tile);
  const state = String(tile.state ?? "unknown");
  put(element, "data-state", state);
  put(element, "data-heat", hot(tile));
  say(parts.name, tile.gpu_id);
  say(parts.state, state === "alive" ? "" : words(state));
  say(parts.heat, typeof tile.temperature_c === "number" ? `${Math.round(tile.temperature_c)}°` : "");
  say(parts.device, String(tile.device ?? (tile.cpu ? "CPU" : "")).replace(/^(NVIDIA |Tesla |GeForce )+/, ""));
  say(parts.model, modelText(mainModel(tile)));
  say(parts.used, count(tile.slots_used));
  say(parts.slots, `/${count(tile.slots)}`);
  say(parts.unit, tile.slots === 1 ? "session" : "sessions");
  say(parts.mb, shares.total ? shareOf(shares.total - shares.free, shares.total) : "");
  put(bar, "data-none", !shares.total);
  const part = (mb) => `${shares.total ? ((100 * mb) / shares.total).toFixed(1) : 0}%`;
  style(parts.ours, "inline-size", part(shares.ours));
  style(parts.others, "inline-size", part(shares.others));
  style(element, "--load", tile.slots > 0 ? `${Math.round((100 * (tile.slots_used ?? 0)) / tile.slots)}%` : "0%");
  put(element, "aria-label", describe(tile, shares));
  if (inspected === element.dataset.key) inspect(entry);
}

// What a tile says to a screen reader, and to everybody in the line under a dense map.
export function describe(tile, shares = memory(tile)) {
  const said = [
    tile.gpu_id,
    words(tile.state),
    tile.device,
    modelText(mainModel(tile)),
    `${count(tile.slots_used)} of ${plural(tile.slots ?? 0, "session")}`,
  ];
  if (tile.job_slots) said.push(`${count(tile.job_slots_used)} of ${plural(tile.job_slots, "job")}`);
  if (shares.total) {
    said.push(`${shareOf(shares.total - shares.free, shares.total)} used`);
    if (shares.others) said.push(`${Math.round((100 * shares.others) / shares.total)} % by others`);
  }
  if (typeof tile.temperature_c === "number") said.push(`${Math.round(tile.temperature_c)} °C`);
  return said.filter(Boolean).join(", ");
}

function inspect(entry) {
  inspected = entry?.element.dataset.key ?? null;
  say($("inspect"), entry ? `${describe(entry.tile)}, on ${entry.tile.host}` : "");
}

// {full: true, gpus} replaces the map; {full: false, gpus, gone} changes it.
export function show(view) {
  const map = $("map");
  const changed = new Set();
  if (view.full) {
    const kept = new Set((view.gpus ?? []).map(keyOf));
    for (const key of [...shared.tiles.keys()]) if (!kept.has(key)) forget(key);
  }
  for (const key of view.gone ?? []) forget(key);
  let grown = false;
  for (const tile of view.gpus ?? []) {
    const key = keyOf(tile);
    shared.tiles.set(key, tile);
    changed.add(key);
    let entry = entries.get(key);
    if (!entry) {
      entry = make(key);
      entries.set(key, entry);
      grown = true;
    }
    update(entry, tile);
  }
  if (grown) {
    const places = new Map([...entries].map(([key, entry]) => [key, place(entry.tile)]));
    order = [...entries.keys()].sort((a, b) => (places.get(a) < places.get(b) ? -1 : 1));
    let at = map.firstElementChild;
    for (const key of order) {
      const { element } = entries.get(key);
      if (element === at) at = at.nextElementSibling;
      else map.insertBefore(element, at);
    }
  }
  resize();
  sift();
  return changed;
}

function forget(key) {
  shared.tiles.delete(key);
  const entry = entries.get(key);
  if (!entry) return;
  // Whoever stands on a tile that goes away keeps a place on the map.
  const focused = entry.element === document.activeElement;
  const next = entry.element.nextElementSibling ?? entry.element.previousElementSibling;
  entry.element.remove();
  entries.delete(key);
  order = order.filter((other) => other !== key);
  if (current === key) current = null;
  if (inspected === key) inspect(null);
  if (focused) next?.focus();
}

function resize() {
  const chosen = $("tile-size").value;
  const n = entries.size;
  const size = chosen !== "auto" ? chosen : n <= 48 ? "large" : n <= 140 ? "medium" : "small";
  put($("fleet"), "data-size", size);
}

const visible = () => order.filter((key) => !entries.get(key).element.hidden);

function sift() {
  let shown = 0;
  let trouble = 0;
  const text = filter.text.toLowerCase();
  for (const { element, tile } of entries.values()) {
    const troubled = TROUBLE.has(tile.state);
    if (troubled) trouble++;
    const fits =
      (!filter.trouble || troubled) &&
      (!text || [tile.gpu_id, tile.host, tile.device, tile.state, tile.provider, ...(tile.models ?? []).map((m) => m.name)]
        .some((value) => String(value ?? "").toLowerCase().includes(text)));
    if (element.hidden === fits) element.hidden = !fits;
    if (fits) shown++;
  }
  say($("fleet-trouble-count"), count(trouble));
  put($("fleet-trouble"), "data-some", trouble > 0);
  say(
    $("fleet-empty"),
    entries.size === 0 ? "No workers have reported yet. Start one with: voxfleet worker"
      : shown === 0 ? (filter.trouble && !text ? "Nothing is wrong with any GPU." : "No GPU fits this filter.") : "",
  );
  settle();
}

// Exactly one visible tile is in the tab order.
function settle() {
  const before = current;
  if (!current || !entries.has(current) || entries.get(current).element.hidden) current = visible()[0] ?? null;
  if (before !== current || (current && entries.get(current).element.tabIndex !== 0)) {
    if (before && entries.has(before)) entries.get(before).element.tabIndex = -1;
    if (current) entries.get(current).element.tabIndex = 0;
  }
}

function stand(key) {
  if (current && entries.has(current)) entries.get(current).element.tabIndex = -1;
  current = key;
  entries.get(key).element.tabIndex = 0;
}

// The tile one line up or down that lies nearest.
function across(from, direction) {
  const keys = visible();
  const start = entries.get(from).element;
  const [top, left] = [start.offsetTop, start.offsetLeft];
  let line = null;
  let best = null;
  const run = direction > 0 ? keys.slice(keys.indexOf(from) + 1) : keys.slice(0, keys.indexOf(from)).reverse();
  for (const key of run) {
    const { element } = entries.get(key);
    if (element.offsetTop === top) continue;
    if (line === null) line = element.offsetTop;
    if (element.offsetTop !== line) break;
    const distance = Math.abs(element.offsetLeft - left);
    if (best === null || distance < best.distance) best = { key, distance };
  }
  return best?.key ?? null;
}

function onKey(event) {
  const key = event.target.closest(".tile")?.dataset.key;
  if (!key || event.altKey || event.ctrlKey || event.metaKey) return;
  const keys = visible();
  const at = keys.indexOf(key);
  const next = {
    ArrowRight: () => keys[at + 1],
    ArrowLeft: () => keys[at - 1],
    ArrowDown: () => across(key, 1),
    ArrowUp: () => across(key, -1),
    Home: () => keys[0],
    End: () => keys[keys.length - 1],
  }[event.key]?.();
  if (next === undefined) return;
  event.preventDefault();
  if (!next) return;
  stand(next);
  entries.get(next).element.focus();
}

export function start() {
  const map = $("map");
  const entryOf = (event) => entries.get(event.target.closest?.(".tile")?.dataset.key);
  map.addEventListener("keydown", onKey);
  map.addEventListener("click", (event) => {
    const entry = entryOf(event);
    if (!entry) return;
    stand(entry.element.dataset.key);
    location.hash = address("gpu", entry.tile.gpu_id);
  });
  map.addEventListener("focusin", (event) => {
    const entry = entryOf(event);
    if (!entry) return;
    stand(entry.element.dataset.key);
    inspect(entry);
  });
  map.addEventListener("pointerover", (event) => {
    const entry = entryOf(event);
    if (entry) inspect(entry);
  });
  $("fleet-trouble").addEventListener("click", () => {
    filter.trouble = !filter.trouble;
    put($("fleet-trouble"), "aria-pressed", String(filter.trouble));
    sift();
  });
  $("fleet-find").addEventListener("input", (event) => {
    filter.text = event.target.value.trim();
    sift();
  });
  $("tile-size").addEventListener("change", resize);
}
