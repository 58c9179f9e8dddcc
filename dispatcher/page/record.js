// The record button: microphone -> s16 frames -> WebSocket /asr, and what comes back, as it comes.
//
// The wire is the one that live-transcription pages know: a config message first, then full updates
// {status, lines, buffer_transcription, remaining_time_transcription}; an empty frame ends the audio and
// {"type": "ready_to_stop"} says that every word has come.

import { $, announce, el, Keyed, put, say, style } from "./dom.js";
import { ask } from "./api.js";
import { address, may, openFor, shared } from "./state.js";
import { lag, place } from "./format.js";
import { mainModel } from "./fleet.js";

const RATE_HZ = 16000;
// A socket that is so far behind loses nothing, but somebody should know.
const BEHIND_BYTES = 320000;

let run = null; // {socket, context, node, media, frames, seconds, stopping}
let lines;

function state(name, text) {
  put($("record"), "data-state", name);
  say($("record-state"), text);
  put($("record-start"), "hidden", name === "recording" || name === "finishing" || name === "opening");
  put($("record-stop"), "hidden", name !== "recording");
  put($("record-options"), "disabled", name === "recording" || name === "finishing" || name === "opening");
  put($("record-open"), "data-recording", name === "recording");
}

function makeLine() {
  const parts = { time: el("time"), who: el("span", { class: "who" }), text: el("span", { class: "stranger words" }) };
  return { element: el("p", { class: "turn" }, parts.time, parts.who, parts.text), parts };
}

function show(update) {
  const spoken = (update.lines ?? []).filter((line) => line.speaker !== -2 && line.text);
  const rows = spoken.map((line, index) => ({ ...line, index, before: spoken[index - 1]?.speaker }));
  lines.show(rows, (row) => row.index);
  say($("record-buffer"), [update.buffer_diarization, update.buffer_transcription].filter(Boolean).join(" "));
  const remaining = update.remaining_time_transcription;
  say($("record-lag"), typeof remaining === "number" ? `lag ${lag(remaining * 1000)}` : "");
  say($("record-empty"), rows.length || update.buffer_transcription ? "" : update.status === "no_audio_detected" ? "No speech heard yet." : "Listening…");
  if (update.error) say($("record-note"), String(update.error));
  const box = $("record-scroll");
  box.scrollTop = box.scrollHeight;
}

function updateLine({ element, parts }, line) {
  const speaker = Number.isInteger(line.speaker) && line.speaker > 0 ? line.speaker : null;
  put(element, "data-speaker", speaker === null ? "" : (speaker - 1) % 6);
  const same = line.before === line.speaker;
  put(element, "data-same", same);
  say(parts.time, typeof line.start === "number" ? place(line.start * 1000) : String(line.start ?? "").replace(/^0:0?/, ""));
  say(parts.who, speaker === null || same ? "" : `Speaker ${speaker}`);
  put(parts.who, "hidden", speaker === null || same);
  say(parts.text, line.text);
}

function socketUrl(rate_hz) {
  const url = new URL("/asr", location.href);
  url.protocol = location.protocol === "https:" ? "wss:" : "ws:";
  if (rate_hz !== RATE_HZ) url.searchParams.set("rate", rate_hz);
  const language = $("record-language").value.trim();
  if (language) url.searchParams.set("language", language);
  if ($("record-model").value) url.searchParams.set("model", $("record-model").value);
  if ($("record-diarize").checked) url.searchParams.set("diarize", "true");
  return url;
}

// The microphone at 16 kHz where the browser resamples it for us, else at its own rate, which the query then says.
async function microphone() {
  const media = await navigator.mediaDevices.getUserMedia({ audio: { channelCount: 1 } });
  let context;
  try {
    context = new AudioContext({ sampleRate: RATE_HZ });
    return { media, context, source: context.createMediaStreamSource(media) };
  } catch {
    await context?.close();
    context = new AudioContext();
    return { media, context, source: context.createMediaStreamSource(media) };
  }
}

function why(error) {
  if (error.name === "NotAllowedError") return "The browser was not allowed to use the microphone.";
  if (error.name === "NotFoundError") return "There is no microphone.";
  return `The recording could not begin: ${error.message}`;
}

async function begin() {
  if (run) return;
  if (!navigator.mediaDevices?.getUserMedia) {
    say($("record-note"), "Browsers record only over https or on localhost.");
    return;
  }
  const mine = { bytes: 0, stopping: false };
  run = mine;
  say($("record-note"), "");
  say($("record-buffer"), "");
  put($("record-session"), "hidden", true);
  lines.show([], () => 0);
  state("opening", "opening");
  try {
    const { media, context, source } = await microphone();
    Object.assign(mine, { media, context });
    await context.audioWorklet.addModule("/record-worklet.js");
    if (mine.stopping) return release(mine);
    mine.node = new AudioWorkletNode(context, "voxfleet-recorder", {
      numberOfInputs: 1, numberOfOutputs: 1, channelCount: 1, channelCountMode: "explicit",
    });
    mine.socket = new WebSocket(socketUrl(context.sampleRate));
    mine.socket.binaryType = "arraybuffer";
    mine.socket.onmessage = (message) => hear(mine, message);
    mine.socket.onclose = (event) => closed(mine, event);
    mine.node.port.onmessage = ({ data }) => (data.last ? lastFrame(mine) : frame(mine, data));
    await new Promise((resolve, reject) => {
      mine.opened = resolve;
      mine.refused = reject;
    });
    source.connect(mine.node);
    mine.node.connect(context.destination); // silent; keeps browsers that skip unheard nodes working
    await context.resume();
    state("recording", "recording");
    say($("record-empty"), "Listening…");
    announce("Recording");
    $("record-stop").focus();
  } catch (error) {
    if (run !== mine) return;
    release(mine);
    run = null;
    state("idle", "");
    say($("record-note"), error.told ?? why(error));
    announce(error.told ?? why(error));
  }
}

function hear(mine, message) {
  if (typeof message.data !== "string") return;
  let update;
  try {
    update = JSON.parse(message.data);
  } catch {
    return;
  }
  if (update.type === "config") {
    const session = update.session ?? update.session_id ?? update.connection_id;
    if (session) {
      put($("record-session"), "href", address("session", session));
      say($("record-session"), `Read along: ${session}`);
      put($("record-session"), "hidden", null);
    }
    say($("record-where"), update.gpu_id ? `on ${update.gpu_id}` : "");
    mine.opened();
  } else if (update.type === "ready_to_stop") {
    mine.whole = true;
    mine.socket.close(1000);
  } else if (update.type === "error" || update.error) {
    say($("record-note"), String(update.message ?? update.error?.message ?? update.error));
  } else if (update.lines) {
    show(update);
  }
}

function frame(mine, { pcm, loudest }) {
  if (mine.socket.readyState !== WebSocket.OPEN) return;
  mine.socket.send(pcm);
  mine.bytes += pcm.byteLength;
  say($("record-time"), place((1000 * mine.bytes) / 2 / mine.context.sampleRate));
  style($("record-level"), "inline-size", `${Math.round(100 * Math.min(1, Math.sqrt(loudest)))}%`);
  if (mine.socket.bufferedAmount > BEHIND_BYTES) say($("record-note"), "The connection is slower than the speech; the text comes late.");
}

function stop() {
  if (!run || run.stopping) return;
  const mine = run;
  mine.stopping = true;
  if (mine.socket?.readyState === WebSocket.OPEN) {
    state("finishing", "finishing the last words");
    mine.node.port.postMessage("stop");
    return;
  }
  // Closed before it had begun.
  release(mine);
  mine.socket?.close();
  run = null;
  state("idle", "");
}

function lastFrame(mine) {
  if (mine.socket.readyState === WebSocket.OPEN) mine.socket.send(new ArrayBuffer(0));
  release(mine);
}

// Lets go of the microphone; the socket stays for the last words.
function release(mine) {
  mine.media?.getTracks().forEach((track) => track.stop());
  mine.node?.disconnect();
  if (mine.context && mine.context.state !== "closed") mine.context.close();
  style($("record-level"), "inline-size", "0%");
}

function closed(mine, event) {
  release(mine);
  if (run !== mine) return;
  let told = "";
  if (!mine.whole) {
    told = event.code === 1008 ? event.reason || "The dispatcher refused the recording."
      : event.code === 1000 ? "" : `The connection ended${event.reason ? `: ${event.reason}` : ""} (${event.code}).`;
  }
  mine.refused?.(Object.assign(new Error(told), { told: told || "The dispatcher closed the connection." }));
  run = null;
  state("idle", mine.whole ? "finished" : told ? "ended early" : "ended");
  say($("record-note"), told);
  say($("record-lag"), "");
  if (mine.whole) {
    const rest = $("record-buffer").textContent;
    if (!rest && !lines.entries.size) say($("record-empty"), "Nothing was said.");
    announce("Recording finished");
    $("record-start").focus();
  }
}

// Models that some GPU could serve, for the choice; typing one is not needed.
function models() {
  const names = new Set();
  for (const tile of shared.tiles.values()) {
    for (const model of tile.models ?? []) if (model.state !== "missing" && model.state !== "failed") names.add(model.name);
    const main = mainModel(tile);
    if (main) names.add(main.name);
  }
  const select = $("record-model");
  const chosen = select.value;
  select.replaceChildren(el("option", { value: "" }, "the fleet's choice"), ...[...names].sort().map((name) => el("option", { value: name }, name)));
  select.value = names.has(chosen) ? chosen : "";
}

export async function open() {
  models();
  openFor($("record"));
  if (!may("producer")) {
    try {
      shared.me = await ask("/api/me");
    } catch {
      // The banner tells that the dispatcher does not answer.
    }
  }
  put($("record-start"), "disabled", !may("producer"));
  if (!may("producer")) say($("record-note"), "Recording needs the role of a producer: sign in with its token.");
}

export function start() {
  lines = new Keyed($("record-lines"), makeLine, updateLine);
  state("idle", "");
  $("record-start").addEventListener("click", begin);
  $("record-stop").addEventListener("click", stop);
  $("record").addEventListener("close", stop);
}
