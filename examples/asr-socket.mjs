// A client of voxfleet's WebSocket /asr: sends raw s16le samples at their own pace and prints who said what.
//
//   node asr-socket.mjs ws://127.0.0.1:9480/asr call.raw [rate]
//
// Node.js 22 and browsers have WebSocket; Node.js 20 needs --experimental-websocket.
import { readFileSync } from "node:fs";

const [url, file, rate = "16000"] = process.argv.slice(2);
if (!file) {
  console.error("usage: node asr-socket.mjs ws://HOST:PORT/asr FILE.raw [RATE]");
  process.exit(64);
}
const samples = readFileSync(file);
const tenth = Math.floor(Number(rate) / 10) * 2;
const socket = new WebSocket(`${url}${url.includes("?") ? "&" : "?"}rate=${rate}`);
socket.binaryType = "arraybuffer";

let last = { lines: [] };
let ready = false;

async function speak() {
  for (let at = 0; at < samples.length; at += tenth) {
    if (socket.readyState !== WebSocket.OPEN) return;
    socket.send(samples.subarray(at, at + tenth));
    await new Promise((later) => setTimeout(later, 100));
  }
  // An empty message ends it; what is left to say comes, then ready_to_stop.
  socket.send(new Uint8Array(0));
}

socket.onmessage = ({ data }) => {
  const told = JSON.parse(data);
  if (told.type === "config") {
    console.error(`session ${told.connection_id} on ${told.gpu_id}`);
    speak();
  } else if (told.type === "ready_to_stop") {
    ready = true;
  } else if (told.type === "error") {
    console.error(`${told.class}: ${told.error}`);
  } else {
    // Each message is the whole state: lines that stand, and a buffer that may still change.
    last = told;
    if (told.buffer_transcription) console.error(`... ${told.buffer_transcription}`);
  }
};

socket.onclose = ({ code, reason }) => {
  for (const line of last.lines) {
    if (line.speaker !== -2) console.log(`[${line.start} speaker ${line.speaker}] ${line.text}`);
  }
  if (!ready) console.error(`closed with ${code} ${reason}`);
  process.exit(ready ? 0 : 1);
};
