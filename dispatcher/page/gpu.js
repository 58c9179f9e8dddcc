// One GPU in full, and the only place from which it can be drained.

import { $, announce, el, onPress, put, say, style } from "./dom.js";
import { ask } from "./api.js";
import { keyOf, leave, may, openFor, shared } from "./state.js";
import { clock, count, lag, megabytes, plural, shareOf, span, words } from "./format.js";
import { hot, memory, modelText } from "./fleet.js";
import { search } from "./sessions.js";

let open_id = null;

// The newest worker on that GPU: one that is not dead before one that is.
function tileOf(gpu_id) {
  const tiles = [...shared.tiles.values()].filter((tile) => tile.gpu_id === gpu_id);
  tiles.sort((a, b) => (a.state === "dead") - (b.state === "dead") || (a.heartbeat_age_ms ?? 0) - (b.heartbeat_age_ms ?? 0));
  return tiles[0] ?? null;
}

const number = (value, unit) => (typeof value === "number" ? `${Math.round(value)} ${unit}` : null);

function engineEnd(end) {
  if (!end) return null;
  if (typeof end !== "object") return String(end);
  return [end.why ?? end.class ?? end.kind, end.message, end.at_ms ? clock(end.at_ms) : null].filter(Boolean).join(", ");
}

function facts(tile) {
  const engine = tile.engine ?? {};
  const shares = memory(tile);
  return [
    ["Worker", `${tile.incarnation}${tile.version ? `, version ${tile.version}` : ""}`],
    ["Host", [tile.host, tile.provider && tile.provider !== "local" ? words(tile.provider) : null].filter(Boolean).join(", ")],
    ["Device", `${tile.device ?? ""}${typeof tile.device_index === "number" ? `, index ${tile.device_index}` : ""}`],
    ["Heartbeat", typeof tile.heartbeat_age_ms === "number" ? `${lag(tile.heartbeat_age_ms)} ago` : null],
    ["Sessions", `${count(tile.slots_used)} of ${count(tile.slots)}`],
    ["Jobs", `${count(tile.job_slots_used)} of ${count(tile.job_slots)}`],
    ["Models", (tile.models ?? []).map((m) => modelText(m) + (m.resident_mb ? ` (${megabytes(m.resident_mb)})` : "")).join("; ") || "none"],
    ["Memory", shares.total
      ? `ours ${megabytes(shares.ours)}, others ${megabytes(shares.others)}, free ${megabytes(shares.free)}, of ${megabytes(shares.total)}` : null],
    ["Temperature", number(tile.temperature_c, "°C")],
    ["Utilization", number(tile.utilization_percent, "%")],
    ["Power", number(tile.power_w, "W")],
    ["Engine", [words(engine.state), engine.kind, engine.effective_device ? `on ${engine.effective_device}` : null].filter(Boolean).join(", ")],
    ["Progress", typeof engine.silence_ms === "number" ? `${lag(engine.silence_ms)} ago` : null],
    ["Restarts", engine.restarts ? count(engine.restarts) : null],
    ["Decode rate", typeof engine.decode_rate === "number" ? `${engine.decode_rate.toFixed(1)} s of audio per second` : null],
    ["Last end", engineEnd(engine.last_end)],
    ["Stands in", (tile.standbys ?? []).map((s) => `${s.model} on ${s.device} for ${s.asked}${s.why ? ` (${words(s.why)})` : ""}`).join("; ")],
    ["Services", (tile.services ?? []).map((s) => `${s.service}${s.role ? ` (${words(s.role)})` : ""}`).join("; ")],
    ["Draining", tile.drain ? [words(tile.drain.why), tile.drain.until_ms ? `until ${clock(tile.drain.until_ms)}` : null].filter(Boolean).join(", ") : null],
    ["Price", typeof tile.price_per_hour === "number" ? `${tile.price_per_hour.toFixed(2)} per hour` : null],
  ].filter(([, value]) => value);
}

// Called for each change of the fleet; touches only an open dialog.
export function refresh(changed) {
  if (!open_id) return;
  const tile = tileOf(open_id);
  if (tile && changed && !changed.has(keyOf(tile))) return;
  render(tile);
}

const known = new Map(); // name of a fact -> {dt, dd}

function render(tile) {
  say($("gpu-title"), open_id);
  put($("gpu-body"), "hidden", !tile);
  say($("gpu-missing"), tile ? "" : "No worker of this name is known now.");
  if (!tile) return;
  put($("gpu"), "data-state", tile.state);
  say($("gpu-state"), words(tile.state));
  put($("gpu"), "data-heat", hot(tile));
  const shares = memory(tile);
  put($("gpu-memory"), "hidden", !shares.total);
  for (const [id, mb] of [["gpu-ours", shares.ours], ["gpu-others", shares.others]]) {
    style($(id), "inline-size", `${shares.total ? (100 * mb) / shares.total : 0}%`);
  }
  say($("gpu-used"), `${shareOf(shares.total - shares.free, shares.total)} used`);
  const list = $("gpu-facts");
  const now = facts(tile);
  const names = new Set(now.map(([name]) => name));
  for (const [name, row] of known) {
    if (!names.has(name)) {
      row.remove();
      known.delete(name);
    }
  }
  now.forEach(([name, value], index) => {
    let row = known.get(name);
    if (!row) {
      row = el("div", {}, el("dt", {}, name), el("dd", { class: "stranger" }));
      known.set(name, row);
    }
    if (list.children[index] !== row) list.insertBefore(row, list.children[index] ?? null);
    say(row.lastElementChild, value);
  });
  const can = may("operator");
  const leaving = tile.state === "draining" || tile.state === "dead";
  put($("drain-ask"), "hidden", !can || leaving);
  say($("drain-note"), can ? "" : shared.me.login ? "Sign in as operator to drain this GPU." : "Only an operator can drain a GPU.");
  say($("drain-what"), `${plural(tile.slots_used ?? 0, "session")} and ${plural(tile.job_slots_used ?? 0, "job")} go on elsewhere from their last final; `
    + "the worker finishes what it has begun, takes nothing new and ends.");
}

function asking(on) {
  put($("drain-confirm"), "hidden", !on);
  put($("drain-ask"), "aria-expanded", String(on));
}

export function open(gpu_id) {
  open_id = gpu_id;
  asking(false);
  say($("drain-told"), "");
  render(tileOf(gpu_id));
  openFor($("gpu"));
}

export function start() {
  const dialog = $("gpu");
  dialog.addEventListener("close", () => {
    if (dialog.open || !open_id) return; // opened again before this was told
    leave("gpu", open_id);
    open_id = null;
  });
  $("gpu-sessions").addEventListener("click", () => {
    const gpu_id = open_id;
    dialog.close();
    search(gpu_id);
    $("sessions").scrollIntoView({ block: "start" });
    $("sessions-find").focus();
  });
  $("drain-ask").addEventListener("click", () => {
    asking(true);
    $("drain-no").focus();
  });
  $("drain-no").addEventListener("click", () => {
    asking(false);
    $("drain-ask").focus();
  });
  onPress($("drain-yes"), async () => {
    const gpu_id = open_id;
    const seconds = Number($("drain-deadline").value);
    const body = seconds > 0 ? { deadline_ms: Math.round(seconds * 1000) } : {};
    let told;
    try {
      const done = await ask(`/api/gpus/${encodeURIComponent(gpu_id)}/drain`, body);
      const workers = Array.isArray(done?.workers) ? done.workers.length : done?.workers ?? 1;
      told = `Draining ${gpu_id}: ${plural(workers, "worker")}, ${plural(done?.sessions ?? 0, "session")} and ${plural(done?.jobs ?? 0, "job")} move.`;
    } catch (error) {
      told = `Could not drain ${gpu_id}: ${error.message}`;
    }
    announce(told);
    if (open_id !== gpu_id) return;
    say($("drain-told"), told);
    asking(false);
    $("gpu-close").focus();
  });
}
