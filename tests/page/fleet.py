"""Scripted fleets for the tests of the page: what a dispatcher would say, without one.

Deterministic for a scenario and a number of ticks. Nothing here is measured or real; the same checks run against a real
dispatcher, which is what shows that the page and the API agree.
"""

import random
import threading
import time

WORDS = (
    "so the first thing we should look at is the queue because it grew last night and nobody saw it until the morning "
    "I think the second worker was slow to come back and then everything behind it waited yes that fits what I heard "
    "can you send me the numbers for the north site please of course they are in the usual place under operations "
    "good then let us go on with the schedule for next week there are three deliveries and one of them is early"
).split()

HOSTILE = [
    "<img src=x onerror=\"window.pwned=1\">",
    "\"><script>window.pwned=1</script>",
    "javascript:window.pwned=1",
    "</title></style></textarea><svg onload=window.pwned=1>",
    "\u202eright to left override\u202c &amp; &lt;b&gt;",
    "'; DROP TABLE sessions; -- ${7*7} {{7*7}}",
    "z\u0300\u0301\u0302\u0303\u0304\u0305\u0306\u0307\u0308" * 8 + " zalgo",
    "averylongwordwithoutanyspace" * 40,
    "line\none\r\ntwo\ttab \u0000nul \u2028 separator",
    "__proto__", "constructor", "../../etc/passwd?x=1#y",
]

TIERS = [("NVIDIA RTX 4090", 24564, "large-v3-turbo", 3100), ("NVIDIA RTX 3090", 24576, "large-v3-turbo", 3100),
         ("NVIDIA A10", 23028, "medium", 2700), ("NVIDIA H100 80GB HBM3", 81559, "large-v3-turbo", 3100),
         ("NVIDIA RTX A4000", 16376, "small", 1100)]


def now_ms():
    return int(time.time() * 1000)


class Fleet:
    """Tiles, sessions, jobs, dead letters and events. `changed` is notified at each tick and at each thing that happens."""

    SIZES = {"calm": (8, 14, 6, 0), "dead": (8, 20, 6, 3), "load": (400, 5000, 60, 2), "hostile": (12, 12, 12, 12),
             "drops": (8, 14, 4, 1), "empty": (0, 0, 0, 0), "full": (4, 16, 2, 0), "login": (8, 14, 4, 2)}

    def __init__(self, scenario, seed=7):
        self.scenario = scenario
        self.random = random.Random(seed)
        self.changed = threading.Condition()
        self.version = 0
        self.active, self.nats, self.verdicts_wait = True, {"connected": True, "rtt_ms": 0.42}, None
        self.events, self.event_count, self.gone = [], 0, []
        gpus, sessions, jobs, dead = self.SIZES[scenario]
        self.slots = 16 if scenario == "load" else 4
        self.tiles = [self.make_tile(n) for n in range(gpus)]
        self.sessions = [self.make_session(n) for n in range(sessions)]
        self.jobs = [self.make_job(n) for n in range(jobs)]
        self.dead = [self.make_dead(n) for n in range(dead)]
        if scenario in ("calm", "load") and gpus:
            self.tiles[-1].update(state="draining", drain={"why": "asked", "until_ms": now_ms() + 90000})
        if scenario == "load":
            self.tiles[37]["state"], self.tiles[205]["state"], self.tiles[206]["state"] = "joining", "suspect", "unhealthy"
        self.count()
        for n in range(min(gpus, 12)):
            self.say("fleet", self.tiles[n]["gpu_id"], "joined", f"{self.tiles[n]['device']} on {self.tiles[n]['host']}")

    def strange(self, n, calm):
        return HOSTILE[n % len(HOSTILE)] if self.scenario == "hostile" else calm

    def make_tile(self, n):
        pick = self.random
        device, total, model, resident = TIERS[(n // 4) % len(TIERS)]
        cpu = self.scenario in ("calm", "dead") and n == 7
        if cpu:
            device, total, model, resident = "CPU, 16 threads", 0, "base", 0
        others = pick.choice([0, 0, 0, 2100, 6400]) if total else 0
        ours = resident + 900 if total else 0
        host = f"vast-{1180 + n // 4}"
        return {
            "gpu_id": self.strange(n, f"cpu-{host}-0" if cpu else f"gpu-{pick.randrange(16**8):08x}"),
            "incarnation": f"{pick.randrange(16**6):06x}", "state": "alive", "heartbeat_age_ms": pick.randrange(900),
            "host": self.strange(n + 1, host), "provider": "vast_ai" if n % 3 else "runpod", "device": self.strange(n + 2, device),
            "device_index": None if cpu else n % 4, "cpu": cpu, "total_mb": total, "free_mb": total - ours - others, "used_mb": ours,
            "others_mb": others, "temperature_c": None if cpu else 48 + pick.randrange(30), "utilization_percent": pick.randrange(20, 95),
            "power_w": 120 + pick.randrange(200), "slots": self.slots, "slots_used": 0, "job_slots": 2, "job_slots_used": n % 2,
            "models": [{"name": self.strange(n + 3, model), "state": "loaded", "resident_mb": resident},
                       {"name": "tiny", "state": "available", "resident_mb": 0}],
            "engine": {"state": "ready", "kind": "whisper", "effective_device": "cpu" if cpu else "cuda", "silence_ms": 200,
                       "restarts": 0, "decode_rate": 18.4, "last_end": None},
            "standbys": [], "services": [{"service": "live", "role": "serves"}], "drain": None,
            "price_per_hour": None if cpu else 0.31, "version": "0.1.0",
        }

    def make_session(self, n):
        pick = self.random
        usable = [t for t in self.tiles if t["state"] == "alive" and t["slots_used"] < t["slots"]]
        tile = usable[n % len(usable)] if usable and self.scenario != "load" else None
        if self.scenario == "load" and n < len(self.tiles) * 12 + 120:
            tile = self.tiles[n % len(self.tiles)]
        if tile:
            tile["slots_used"] += 1
        sid = self.strange(n, f"call-{2024 + n}-{['north', 'south', 'desk', 'line'][n % 4]}")
        return {"id": sid, "state": "assigned" if tile else "waiting", "gpu_id": tile["gpu_id"] if tile else None,
                "epoch": 2 if n % 9 == 4 else 1, "model": self.strange(n + 4, tile["models"][0]["name"]) if tile else None,
                "language": pick.choice(["en", "en", "de", "cs", "es"]), "lag_ms": pick.choice([180, 240, 310, 420, 650]),
                "started_ms": now_ms() - pick.randrange(4000, 3600000), "final_index": pick.randrange(1, 80),
                "text": self.strange(n + 5, self.words(n * 7, 24)), "waiting_why": None if tile else "no_capacity", "at": n * 7 + 24}

    def make_job(self, n):
        state = ["assigned", "assigned", "queued", "done", "queued", "failed"][n % 6]
        return {"id": self.strange(n, f"rec-{5100 + n}"), "state": state, "priority": ["normal", "high", "low"][n % 3], "ahead": n if state == "queued" else None,
                "gpu_id": self.tiles[n % len(self.tiles)]["gpu_id"] if state == "assigned" else None,
                "percent": float(n * 13 % 90) if state == "assigned" else None, "submitted_ms": now_ms() - n * 61000,
                "duration_s": 620.5 + n * 97, "attempts": 1 + (n % 6 == 5), "failure": "unsupported_format" if state == "failed" else None,
                "label": self.strange(n + 6, f"board meeting {n + 1}")}

    def make_dead(self, n):
        return {"seq": 40 + n, "kind": "job" if n % 2 else "session", "id": self.strange(n, f"rec-{4400 + n}"),
                "class": ["engine_crash", "bad_audio", "timeout"][n % 3],
                "message": self.strange(n + 7, "the engine ended with signal 6 while this recording was decoded alone, three times"),
                "at_ms": now_ms() - n * 500000, "bytes": 18433 * (n + 1), "retriable": n % 3 != 1}

    @staticmethod
    def words(start, n):
        return " ".join(WORDS[(start + k) % len(WORDS)] for k in range(n))

    # ---- what happens

    def say(self, kind, name, what, text=""):
        self.event_count += 1
        self.events.insert(0, {"n": self.event_count, "at_ms": now_ms(), "kind": kind, "id": name, "what": what, "text": text})
        del self.events[400:]

    def happened(self):
        self.count()
        self.version += 1
        self.changed.notify_all()

    def touch(self, tile):
        tile["_version"] = self.version + 1

    def kill(self, index=1, state="suspect"):
        """Suspect now; dead when told again, as a dispatcher would after its wait."""
        with self.changed:
            tile = self.tiles[index]
            tile["state"] = state
            self.touch(tile)
            self.say("fleet", tile["gpu_id"], state, "no heartbeat" if state == "suspect" else "3 s without a heartbeat")
            if state == "dead":
                heirs = [t for t in self.tiles if t["state"] == "alive" and t["slots_used"] < t["slots"]]
                for n, session in enumerate(s for s in self.sessions if s["gpu_id"] == tile["gpu_id"]):
                    heir = heirs[n % len(heirs)]
                    heir["slots_used"] += 1
                    self.touch(heir)
                    session.update(gpu_id=heir["gpu_id"], epoch=session["epoch"] + 1)
                    self.say("session", session["id"], "moved", f"from {tile['gpu_id']} to {heir['gpu_id']}")
                tile.update(slots_used=0, job_slots_used=0)
            self.happened()
            return tile["gpu_id"]

    def drain(self, gpu_id):
        with self.changed:
            for tile in self.tiles:
                if tile["gpu_id"] == gpu_id:
                    tile.update(state="draining", drain={"why": "asked", "until_ms": now_ms() + 60000})
                    self.touch(tile)
                    self.say("fleet", gpu_id, "draining", "asked by an operator")
                    self.happened()
                    return {"workers": [f"{gpu_id}.{tile['incarnation']}"], "sessions": tile["slots_used"], "jobs": tile["job_slots_used"]}
        return None

    def retry(self, seq):
        with self.changed:
            for letter in self.dead:
                if letter["seq"] == seq and letter["retriable"]:
                    self.dead.remove(letter)
                    self.say("job", letter["id"], "submitted", "sent again")
                    self.happened()
                    return {"retried": letter["id"]}
        return None

    def tick(self):
        pick = self.random
        with self.changed:
            for tile in pick.sample(self.tiles, max(1, len(self.tiles) // 5)) if self.tiles else []:
                if tile["state"] not in ("alive", "draining") or tile["cpu"]:
                    continue
                tile["temperature_c"] = max(40, min(84, tile["temperature_c"] + pick.choice([-1, 0, 1])))
                wobble = pick.choice([-60, 0, 60])
                if tile["others_mb"] + wobble >= 0 and tile["others_mb"]:
                    tile["others_mb"] += wobble
                    tile["free_mb"] -= wobble
                self.touch(tile)
            for session in self.sessions:
                if session["state"] == "assigned" and (len(self.sessions) < 100 or pick.random() < 0.4):
                    more = pick.randrange(1, 4)
                    if self.scenario != "hostile":
                        session["text"] = f"{session['text']} {self.words(session['at'], more)}"[-160:]
                    session["at"] += more
                    if not session.get("still"):
                        session["lag_ms"] = max(90, min(6000, session["lag_ms"] + pick.choice([-60, -20, 0, 20, 60])))
            for job in self.jobs:
                if job["state"] == "assigned":
                    job["percent"] = min(99.0, job["percent"] + 0.7)
            if self.sessions and pick.random() < (1.0 if self.scenario == "load" else 0.3):
                session = pick.choice(self.sessions)
                self.say("session", session["id"], pick.choice(["opened", "assigned", "ended"]), self.strange(pick.randrange(12), ""))
            self.happened()

    def count(self):
        states = [t["state"] for t in self.tiles]
        usable = [t for t in self.tiles if t["state"] != "dead"]
        total = lambda name: sum(t[name] or 0 for t in usable)
        self.totals = {
            "gpus": len(states), **{s: states.count(s) for s in ("alive", "suspect", "dead", "draining", "unhealthy", "joining")},
            "slots": total("slots"), "slots_used": total("slots_used"), "job_slots": total("job_slots"), "job_slots_used": total("job_slots_used"),
            "sessions_waiting": sum(s["state"] == "waiting" for s in self.sessions),
            "sessions_assigned": sum(s["state"] == "assigned" for s in self.sessions),
            "jobs_queued": sum(j["state"] == "queued" for j in self.jobs), "jobs_assigned": sum(j["state"] == "assigned" for j in self.jobs),
            "dead_letters": len(self.dead), "memory_total_mb": total("total_mb"), "memory_used_mb": total("total_mb") - total("free_mb"),
            "price_per_hour": round(total("price_per_hour"), 2),
        }

    # ---- what is answered

    def view(self, since=None):
        """Everything, or what changed after a version."""
        full = since is None
        tiles = self.tiles if full else [t for t in self.tiles if t.get("_version", 0) > since]
        view = {"full": full, "at_ms": now_ms(), "dispatcher": "dispatcher-1f", "active": self.active, "nats": self.nats, "totals": self.totals,
                "gpus": [{k: v for k, v in t.items() if k[0] != "_" and v is not None} for t in tiles]}
        if self.verdicts_wait:
            view["verdicts_wait"] = self.verdicts_wait
        if full:
            view["streams"] = [{"stream": "ASR_AUDIO", "bytes": 3_100_000_000, "max_bytes": 8_589_934_592, "messages": 812_331},
                               {"stream": "ASR_TRANSCRIPT", "bytes": 91_000_000, "max_bytes": 1_073_741_824, "messages": 120_044}]
        else:
            view["gone"] = self.gone
        return view

    def session_page(self, query):
        text, state = query.get("q", "").lower(), query.get("state", "all")
        rows = [s for s in self.sessions if (state == "all" or s["state"] == state) and
                (not text or any(text in str(s[k] or "").lower() for k in ("id", "gpu_id", "text")))]
        keys = {"lag": lambda s: s["lag_ms"] // 250 if s["state"] == "assigned" else -1, "id": lambda s: s["id"], "gpu": lambda s: s["gpu_id"] or "",
                "age": lambda s: s["started_ms"], "words": lambda s: len(s["text"])}
        # Lag in steps, so that rows do not dance.
        rows.sort(key=lambda s: s["id"])
        rows.sort(key=keys.get(query.get("sort", "lag"), keys["lag"]), reverse=query.get("order") == "desc")
        offset, limit = int(query.get("offset", 0)), min(500, int(query.get("limit", 100)))
        return {"total": len(self.sessions), "matched": len(rows),
                "rows": [{k: v for k, v in s.items() if k not in ("at", "still") and v is not None} for s in rows[offset:offset + limit]]}


class Talk:
    """One transcript as it grows: two speakers, a move to another GPU, a revision, an end."""

    def __init__(self, fleet, sid):
        self.fleet, self.sid = fleet, sid
        self.session = next((s for s in fleet.sessions if s["id"] == sid), None)
        self.index, self.at_ms, self.epoch, self.word = 0, 0, 1, 3

    def final(self, end=False, epoch=None):
        if epoch:
            self.epoch = epoch
        segments = []
        for speaker in ("S1", "S2") if self.index % 2 else ("S1",):
            text = self.fleet.strange(self.index + 1, Fleet.words(self.word, 14))
            segments.append({"start_ms": self.at_ms, "end_ms": self.at_ms + 3800, "text": text,
                             "speaker": self.fleet.strange(self.index, speaker), "language": "en"})
            self.at_ms += 4000
            self.word += 14
        final = {"index": self.index, "from_ms": segments[0]["start_ms"], "to_ms": self.at_ms, "epoch": self.epoch,
                 "gpu_id": (self.session or {}).get("gpu_id") or "gpu-none", "model": "large-v3-turbo", "device": "cuda", "end": end,
                 "segments": [] if end else segments}
        self.index += 1
        return final

    def partial(self, heard):
        committed, tentative = Fleet.words(self.word, max(0, heard - 3)), Fleet.words(self.word + max(0, heard - 3), min(3, heard))
        if self.fleet.scenario == "hostile":
            committed, tentative = HOSTILE[0], HOSTILE[1]
        return {"after_index": self.index - 1, "committed": committed, "tentative": tentative, "lag_ms": 240, "epoch": self.epoch}

    def row(self):
        row = {k: v for k, v in (self.session or {"id": self.sid, "state": "unknown"}).items() if k not in ("at", "still") and v is not None}
        return row
