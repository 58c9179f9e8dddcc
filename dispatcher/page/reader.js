// Reading along: one session's or job's transcript as it grows. Finals stand, the partial after them is replaced by each
// newer one, and a revision replaces the segments of its final.

import { $, el, put, say } from "./dom.js";
import { ApiError, ask, Stream } from "./api.js";
import { address, leave, openFor } from "./state.js";
import { lag, place, plural, words } from "./format.js";

let stream = null;
let opened = null; // {kind, id}
let finals = new Map(); // index -> {final, block, revision}
let speakers = new Map(); // name -> number, in the order they first spoke
let last_epoch = 0;
let partial = null;
let ended = false;
let pinned = true; // the reader stands at the end and wants to stay there

function speakerMark(segment) {
  const name = segment.speaker ?? (typeof segment.channel === "number" ? `channel ${segment.channel + 1}` : null);
  if (name === null) return { name: "", number: "" };
  if (!speakers.has(name)) speakers.set(name, speakers.size % 6);
  return { name: String(name), number: speakers.get(name) };
}

function segmentLine(segment, before) {
  const { name, number } = speakerMark(segment);
  const same = before && speakerMark(before).name === name;
  const line = el("p", { class: "turn", "data-speaker": number, "data-same": same && name !== "" });
  line.append(el("time", {}, place(segment.start_ms)));
  if (name && !same) line.append(el("span", { class: "who stranger" }, name));
  line.append(el("span", { class: "stranger words" }, segment.text ?? ""));
  return line;
}

function blockOf(final, segments, revision) {
  const block = el("div", { class: "final", "data-revised": revision > 0 });
  const earlier = finals.get(final.index - 1);
  let before = earlier?.segments.at(-1) ?? null;
  const epoch_before = earlier?.final.epoch;
  if (epoch_before !== undefined && final.epoch > epoch_before) {
    block.append(el("p", { class: "moved" }, `goes on at ${final.gpu_id}, ${final.model} on ${final.device}`));
    before = null;
  }
  for (const segment of segments) {
    block.append(segmentLine(segment, before));
    before = segment;
  }
  if (final.lost) block.append(el("p", { class: "moved" }, "some of the audio before this was lost"));
  if (final.error) block.append(el("p", { class: "moved" }, `not transcribed: ${words(final.error.class ?? final.error)}`));
  return block;
}

function addFinal(final, segments = final.segments ?? [], revision = 0) {
  const old = finals.get(final.index);
  if (old && old.revision > revision) return;
  const entry = { final, segments, revision };
  entry.block = blockOf(final, segments, revision);
  finals.set(final.index, entry);
  if (old) {
    old.block.replaceWith(entry.block);
  } else {
    const later = [...finals.keys()].filter((index) => index > final.index);
    const next = later.length ? finals.get(Math.min(...later)).block : null;
    $("reader-text").insertBefore(entry.block, next);
  }
  last_epoch = Math.max(last_epoch, final.epoch ?? 0);
  if (partial && (partial.after_index ?? -1) < final.index) setPartial(null);
  if (final.end) setEnded();
}

// A partial of an older epoch, or one that a final has overtaken, is no longer what the engine thinks.
function setPartial(value) {
  if (value) {
    const last = finals.size ? Math.max(...finals.keys()) : -1;
    if ((value.epoch ?? 0) < last_epoch || (typeof value.after_index === "number" && value.after_index < last)) return;
    last_epoch = Math.max(last_epoch, value.epoch ?? 0);
  }
  partial = value;
  say($("partial-committed"), value?.committed ?? "");
  say($("partial-tentative"), value?.tentative ? `${value.committed ? " " : ""}${value.tentative}` : "");
  put($("reader-partial"), "hidden", !value?.committed && !value?.tentative);
  if (value && typeof value.lag_ms === "number") say($("reader-lag"), `lag ${lag(value.lag_ms)}`);
}

function setEnded() {
  ended = true;
  setPartial(null);
  say($("reader-lag"), "");
  if (opened?.kind !== "session") return;
  say($("reader-state"), "ended");
  put($("reader"), "data-state", "ended");
}

function setState(kind, answer) {
  if (!answer) return;
  const row = kind === "job" ? jobLine(answer) : answer;
  // A state that has grown old on its way does not undo the end that was read.
  if (row.state === "ended" || (kind === "job" && JOB_ENDS.has(row.state))) ended = true;
  const state = ended && kind === "session" ? "ended" : row.state;
  say($("reader-state"), words(state));
  put($("reader"), "data-state", state);
  const facts = [
    [row.model, row.language].filter(Boolean).join(", "),
    row.epoch > 1 ? `moved ${plural(row.epoch - 1, "time")}` : "",
    row.state === "waiting" && row.waiting_why ? words(row.waiting_why) : "",
    typeof row.percent === "number" && !ended ? `${Math.round(row.percent)} %` : "",
    row.failure ? words(row.failure.class ?? row.failure) : "",
  ];
  say($("reader-facts"), facts.filter(Boolean).join(" · "));
  say($("reader-gpu"), row.gpu_id ?? "");
  put($("reader-gpu"), "href", row.gpu_id ? address("gpu", row.gpu_id) : null);
  if (typeof row.lag_ms === "number" && !ended) say($("reader-lag"), `lag ${lag(row.lag_ms)}`);
}

// A job's line of the list, or its whole record.
const JOB_ENDS = new Set(["done", "failed", "cancelled"]);
function jobLine(answer) {
  const record = answer.record ?? answer;
  const { total_ms, done_ms } = answer.progress ?? {};
  return {
    state: record.state,
    epoch: record.epoch,
    model: record.model ?? record.options?.model,
    language: record.language ?? record.options?.language,
    gpu_id: record.gpu_id ?? record.worker?.gpu_id,
    percent: answer.percent ?? (total_ms > 0 ? (100 * Math.min(done_ms, total_ms)) / total_ms : undefined),
    failure: record.failure ?? record.error,
  };
}

function begin(kind, value) {
  finals = new Map();
  speakers = new Map();
  last_epoch = 0;
  ended = false;
  partial = null;
  $("reader-text").replaceChildren();
  const all = (value.finals ?? []).slice().sort((a, b) => a.index - b.index);
  for (const final of all) addFinal(final, final.segments ?? [], final.revision ?? 0);
  setState(kind, value[kind] ?? value.session ?? value.job);
  setPartial(ended ? null : value.partial ?? null);
  say($("reader-note"), "");
  empty();
  follow();
}

function empty() {
  const words_there = [...finals.values()].some((entry) => entry.segments.length) || partial;
  say($("reader-empty"), words_there ? "" : ended ? "Nothing was said." : "Nothing has been said yet.");
}

function follow() {
  const box = $("reader-scroll");
  if (pinned) box.scrollTop = box.scrollHeight;
  put($("reader-follow"), "hidden", pinned);
}

export function open(kind, id) {
  close();
  opened = { kind, id };
  pinned = true;
  say($("reader-title"), id);
  say($("reader-kind"), kind === "job" ? "Job" : "Session");
  for (const name of ["state", "facts", "gpu", "lag", "empty"]) say($(`reader-${name}`), "");
  put($("reader-gpu"), "href", null);
  $("reader-text").replaceChildren();
  setPartial(null);
  say($("reader-note"), "Opening…");
  const path = `/api/${kind}s/${encodeURIComponent(id)}`;
  const then = (work) => (value) => {
    work(value);
    empty();
    follow();
  };
  const mine = new Stream(`${path}/stream`, {
    begin: (value) => begin(kind, value),
    final: then(addFinal),
    partial: then(setPartial),
    revision: then((value) => {
      const old = finals.get(value.index);
      if (old && value.revision > old.revision) addFinal(old.final, value.segments ?? [], value.revision);
    }),
    state: then((value) => setState(kind, value)),
    end: then(() => {
      setEnded();
      mine.close();
    }),
  }, {
    told: async (why) => {
      if (stream !== mine || ended) return;
      if (why === "open") return say($("reader-note"), "");
      say($("reader-note"), "Connection lost; trying again. The text may be old.");
      // A stream cannot tell why it was refused; a plain question can.
      if (why === "refused") {
        try {
          await ask(path);
        } catch (error) {
          if (stream !== mine || !(error instanceof ApiError) || error.status !== 404) return;
          mine.close();
          say($("reader-note"), `No ${kind} of this name is known.`);
        }
      }
    },
  });
  stream = mine;
  openFor($("reader"));
}

function close() {
  stream?.close();
  stream = null;
}

function plainText() {
  const lines = [];
  for (const index of [...finals.keys()].sort((a, b) => a - b)) {
    for (const segment of finals.get(index).segments) {
      const { name } = speakerMark(segment);
      lines.push(`[${place(segment.start_ms)}] ${name ? `${name}: ` : ""}${String(segment.text ?? "").trim()}`);
    }
  }
  return lines.join("\n");
}

export function start() {
  $("reader").addEventListener("close", () => {
    if ($("reader").open || !opened) return; // opened again before this was told
    close();
    leave(opened.kind, opened.id);
    opened = null;
  });
  const box = $("reader-scroll");
  box.addEventListener("scroll", () => {
    pinned = box.scrollHeight - box.scrollTop - box.clientHeight < 40;
    put($("reader-follow"), "hidden", pinned);
  });
  $("reader-follow").addEventListener("click", () => {
    pinned = true;
    follow();
    box.focus();
  });
  $("reader-copy").addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText(plainText());
      say($("reader-note"), "Copied.");
    } catch {
      say($("reader-note"), "This browser allows copying only over https or on localhost.");
    }
  });
}
