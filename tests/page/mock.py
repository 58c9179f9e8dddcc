#!/usr/bin/env python3
"""Serves the dispatcher's page with its content security policy, and plays a scripted fleet behind it.

    python3 tests/page/mock.py --scenario calm|load|dead|hostile|drops|empty|full|login [--port 9480]

For working on the page and for its tests (check.py). The tests steer it by POST /mock/<what>; a dispatcher has no such path.
Tokens of the scenario `login`: "view" (viewer), "op" (operator). Elsewhere "op" makes an operator of whoever sends it.
"""

import argparse
import array
import base64
import hashlib
import json
import math
import pathlib
import struct
import sys
import threading
import time
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from fleet import Fleet, Talk

PAGE = pathlib.Path(__file__).resolve().parents[2] / "dispatcher" / "page"
TYPES = {".html": "text/html; charset=utf-8", ".css": "text/css; charset=utf-8", ".js": "text/javascript; charset=utf-8", ".svg": "image/svg+xml"}
TICK_S = 1.0


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_version = "mock"

    def log_message(self, *_):
        pass

    @property
    def fleet(self):
        return self.server.fleet

    def roles(self):
        token = dict(p.strip().split("=", 1) for p in self.headers.get("Cookie", "").split(";") if "=" in p).get("token", "")
        everybody = [] if self.fleet.scenario == "login" else ["viewer", "producer"]
        return {"op": ["viewer", "producer", "operator"], "view": ["viewer"]}.get(token, everybody)

    def send(self, status, body=b"", kind="application/json", headers=()):
        if not isinstance(body, bytes):
            body = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("Content-Security-Policy", "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
                         "manifest-src 'self'; worker-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Referrer-Policy", "no-referrer")
        for name, value in headers:
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def fail(self, status, name, message):
        self.send(status, {"error": {"class": name, "message": message}})

    def do_GET(self):
        url = urllib.parse.urlsplit(self.path)
        query = dict(urllib.parse.parse_qsl(url.query))
        parts = [urllib.parse.unquote(p) for p in url.path.split("/") if p]
        if not parts or parts[0] != "api" and parts[0] not in ("asr", "mock"):
            return self.static(parts)
        if parts == ["asr"]:
            return Ear(self, query).listen()
        if parts == ["mock", "recorded"]:
            return self.send(200, self.server.recorded)
        if parts == ["api", "me"]:
            return self.send(200, {"roles": self.roles(), "login": self.fleet.scenario in ("login", "calm"), "dispatcher": "dispatcher-1f", "version": "0.1.0", "prefix": "asr.v1"})
        if not self.roles():
            return self.fail(401, "unauthorized", "a token is needed")
        with self.fleet.changed:
            answer = self.answer(parts[1:], query)
        if answer is not None:
            return self.send(200, answer)
        if parts[1:2] == ["stream"]:
            if "sort" in query:
                return self.fail(400, "bad_request", "of a stream it is called sessions")
            return self.stream(query)
        if len(parts) == 4 and parts[3] == "stream" and parts[1] in ("sessions", "jobs"):
            return self.talk(parts[1][:-1], parts[2])
        self.fail(404, "not_found", "there is no such thing")

    def answer(self, parts, query):
        fleet = self.fleet
        page = lambda rows: {"total": len(rows), "rows": rows[:int(query.get("limit", 100))]}
        if parts == ["fleet"]:
            return fleet.view()
        if parts == ["sessions"]:
            return fleet.session_page(query)
        if parts == ["jobs"]:
            return page([j for j in fleet.jobs if not query.get("state") or j["state"] == query["state"]])
        if parts == ["dead"]:
            return page(fleet.dead)
        if parts == ["events"]:
            return {"rows": [e for e in fleet.events if query.get("kind") in (None, e["kind"])][:int(query.get("limit", 200))]}
        if len(parts) == 2 and parts[0] == "sessions" and any(s["id"] == parts[1] for s in fleet.sessions):
            return {"session": Talk(fleet, parts[1]).row(), "finals": []}
        return None

    def do_POST(self):
        length = int(self.headers.get("Content-Length") or 0)
        body = json.loads(self.rfile.read(length) or b"{}")
        parts = [urllib.parse.unquote(p) for p in self.path.split("/") if p]
        fleet = self.fleet
        if parts[:1] == ["mock"]:
            return self.steer(parts[1], body)
        if self.headers.get("Origin") not in (None, f"http://{self.headers.get('Host')}"):
            return self.fail(403, "forbidden", "another origin")
        if parts == ["api", "login"]:
            if body.get("token") not in ("op", "view"):
                return self.fail(401, "unauthorized", "this token is not known")
            return self.send(204, headers=[("Set-Cookie", f"token={body['token']}; HttpOnly; SameSite=Strict; Path=/")])
        if parts == ["api", "logout"]:
            return self.send(204, headers=[("Set-Cookie", "token=; Max-Age=0; Path=/")])
        if "operator" not in self.roles():
            return self.fail(403, "forbidden", "this needs the role of an operator")
        if len(parts) == 4 and parts[1] == "gpus" and parts[3] == "drain":
            done = fleet.drain(parts[2])
        elif len(parts) == 4 and parts[1] == "dead" and parts[3] == "retry":
            done = fleet.retry(int(parts[2]))
        else:
            done = None
        return self.send(200, done) if done else self.fail(404, "not_found", "there is no such thing")

    def steer(self, what, body):
        fleet = self.fleet
        if what == "kill":
            return self.send(200, {"gpu_id": fleet.kill(body.get("index", 1), body.get("state", "suspect"))})
        if what == "lag":
            with fleet.changed:
                for session in fleet.sessions:
                    session["lag_ms"], session["still"] = (body["lag_ms"] if session["id"] == body["id"] else session["lag_ms"]), True
        elif what == "pause":
            self.server.paused = body["on"]
        elif what == "drop":
            self.server.dropped += 1
        else:
            for name in ("active", "nats", "verdicts_wait"):
                if name in body:
                    setattr(fleet, name, body[name])
        with fleet.changed:
            fleet.happened()
        self.send(200, {})

    def static(self, parts):
        name = "/".join(parts) or "index.html"
        path = PAGE / name
        if len(parts) > 1 or path.suffix not in TYPES or not path.is_file():
            return self.fail(404, "not_found", "there is no such file")
        self.send(200, path.read_bytes(), TYPES[path.suffix])

    # ---- streams

    def begin_stream(self):
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Cache-Control", "no-store")
        self.send_header("Connection", "close")
        self.end_headers()
        self.close_connection = True

    def event(self, name, value):
        self.wfile.write(f"event: {name}\ndata: {json.dumps(value)}\n\n".encode())

    def stream(self, query):
        fleet, server = self.fleet, self.server
        if server.paused:
            return self.fail(503, "unavailable", "paused")
        self.begin_stream()
        query = {**query, "sort": query.get("sessions", "lag")}
        since, rows, dropped, events, dead, born = None, None, server.dropped, max(0, fleet.event_count - 20), None, time.monotonic()
        try:
            while server.dropped == dropped and not (fleet.scenario == "drops" and time.monotonic() - born > 6):
                if server.paused:
                    time.sleep(0.1)  # connected and silent
                    continue
                with fleet.changed:
                    view, since = fleet.view(since), fleet.version
                    page = fleet.session_page(query) if query.get("limit") != "0" else None
                    fresh = [e for e in fleet.events if e["n"] > events]
                    events = fleet.event_count
                    total = len(fleet.dead)
                self.event("fleet", view)
                if page is not None and page != rows:
                    self.event("sessions", page)
                    rows = page
                for row in reversed(fresh):
                    self.event("event", row)
                if total != dead:
                    self.event("dead", {"total": total})
                    dead = total
                self.wfile.flush()
                with fleet.changed:
                    fleet.changed.wait_for(lambda: fleet.version > since, timeout=10)
        except OSError:
            pass

    def talk(self, kind, name):
        fleet = self.fleet
        known = [j["id"] for j in fleet.jobs] if kind == "job" else [s["id"] for s in fleet.sessions]
        if name not in known:
            return self.fail(404, "not_found", "no such " + kind)
        self.begin_stream()
        talk = Talk(fleet, name)
        try:
            finals = [talk.final() for _ in range(5)]
            row = talk.row() if kind == "session" else next(j for j in fleet.jobs if j["id"] == name)
            self.event("begin", {kind: row, "finals": finals, "partial": talk.partial(2)})
            for turn in range(40):
                for heard in range(2, 12, 2):
                    self.event("partial", talk.partial(heard))
                    self.wfile.flush()
                    time.sleep(0.3)
                final = talk.final(epoch=2 if turn == 1 else None)
                self.event("final", final)
                if turn == 0:
                    changed = [{**s, "text": f"{s['text']} (corrected)", "speaker": "S3"} for s in final["segments"]]
                    self.event("revision", {"index": final["index"], "revision": 1, "segments": changed})
                if kind == "session":
                    self.event("state", talk.row())
            self.event("final", talk.final(end=True))
            self.event("end", {})
        except OSError:
            pass


class Ear:
    """The WebSocket /asr: says one word for each 300 ms it hears, a line for each twelve words."""

    def __init__(self, handler, query):
        self.handler, self.query = handler, query
        self.audio = array.array("h")

    def send(self, kind, body):
        head = bytes([0x80 | kind])
        head += bytes([len(body)]) if len(body) < 126 else bytes([126]) + struct.pack(">H", len(body))
        self.handler.wfile.write(head + body)
        self.handler.wfile.flush()

    def say(self, value):
        self.send(1, json.dumps(value).encode())

    def read(self, n):
        data = self.handler.rfile.read(n)
        if len(data) < n:
            raise ConnectionError
        return data

    def frame(self):
        first, second = self.read(2)
        length = second & 0x7F
        if length == 126:
            length, = struct.unpack(">H", self.read(2))
        elif length == 127:
            length, = struct.unpack(">Q", self.read(8))
        mask = self.read(4)
        body = self.read(length)
        key = (mask * (length // 4 + 1))[:length]
        return first & 0x0F, (int.from_bytes(body, "big") ^ int.from_bytes(key, "big")).to_bytes(length, "big")

    def update(self, rate, over=False):
        heard = len(self.audio) / rate
        words = int(heard / 0.3)
        lines, two = [], self.query.get("diarize") == "true"
        whole = words if over else words // 12 * 12
        stamp = lambda w: f"0:{int(w * 0.3) // 60:02}:{int(w * 0.3) % 60:02}"
        for start in range(0, whole, 12):
            end = min(start + 12, whole)
            lines.append({"speaker": 1 + (start // 12) % 2 if two else 1, "text": Fleet.words(start, end - start), "start": stamp(start), "end": stamp(end)})
        self.say({"status": "active_transcription" if words else "no_audio_detected", "lines": lines, "buffer_transcription": "" if over else Fleet.words(whole, words - whole),
                  "buffer_diarization": "", "remaining_time_transcription": 0.4, "remaining_time_diarization": 0})

    def listen(self):
        handler = self.handler
        key = handler.headers.get("Sec-WebSocket-Key", "")
        accept = base64.b64encode(hashlib.sha1((key + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11").encode()).digest()).decode()
        handler.send_response(101)
        for name, value in (("Upgrade", "websocket"), ("Connection", "Upgrade"), ("Sec-WebSocket-Accept", accept)):
            handler.send_header(name, value)
        handler.end_headers()
        handler.close_connection = True
        if handler.fleet.scenario == "full":
            return self.send(8, struct.pack(">H", 1008) + b"No GPU resources available")
        self.say({"type": "config", "gpu_id": "gpu-1f00aa01", "connection_id": "ws-1", "session": handler.fleet.sessions[0]["id"], "useAudioWorklet": True, "mode": "full"})
        rate, told = int(self.query.get("rate", 16000)), 0
        try:
            while True:
                kind, body = self.frame()
                if kind == 8:
                    return
                if kind == 2 and not body:
                    self.update(rate, over=True)
                    self.say({"type": "ready_to_stop"})
                elif kind == 2:
                    self.audio.frombytes(body)
                    if (len(self.audio) - told) / rate >= 0.3:
                        told = len(self.audio)
                        self.update(rate)
        except OSError:
            pass
        finally:
            n = max(1, len(self.audio))
            handler.server.recorded = {"rate": rate, "samples": len(self.audio), "rms": math.sqrt(sum(s * s for s in self.audio) / n),
                                       "query": self.query, "spectrum": peak_hz(self.audio, rate)}


def peak_hz(samples, rate):
    """The loudest of a few tones, by Goertzel's sums: which tone the microphone played."""
    tail = samples[-rate:]
    def power(hz):
        coefficient, a, b = 2 * math.cos(2 * math.pi * hz / rate), 0.0, 0.0
        for s in tail:
            a, b = s + coefficient * a - b, a
        return a * a + b * b - coefficient * a * b
    return max((220, 330, 440, 660, 990, 1320, 1980), key=power) if tail else 0


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, port, scenario):
        super().__init__(("127.0.0.1", port), Handler)
        self.fleet = Fleet(scenario)
        self.paused, self.dropped, self.recorded = False, 0, {}
        self.base = f"http://127.0.0.1:{self.server_address[1]}"

    def start(self):
        threading.Thread(target=self.serve_forever, daemon=True).start()
        threading.Thread(target=self.beat, daemon=True).start()
        return self

    def beat(self):
        while True:
            time.sleep(TICK_S)
            self.fleet.tick()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenario", choices=Fleet.SIZES, default="calm")
    parser.add_argument("--port", type=int, default=9480)
    arguments = parser.parse_args()
    server = Server(arguments.port, arguments.scenario).start()
    print(f"{server.base} plays {arguments.scenario}", flush=True)
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        sys.exit(0)
