#!/usr/bin/env python3
"""Looks at the page with a headless Chromium, as an operator would, and says what is wrong.

    python3 tests/page/check.py [--scenario NAME,NAME] [--screens DIR]              against mock.py, started here
    python3 tests/page/check.py --base URL --scenario calm|load|dead|record|operator ...   against a dispatcher that runs

One line for each check: `ok`, `FAILED` or `skipped`; exit status 1 when one failed. Without --scenario, all of the mock's.
With --base, `dead` prints `kill a worker now` once it looks, and then waits for the first GPU that falls silent. Where standard input is no
terminal it reads {"killed_ms": unix time, "gpu_id": ...} from there first, and holds the page to that. `operator` needs --token, and drains a GPU.
Chromium and axe-core come from `sh deploy/bootstrap.sh deps`; without a Chromium everything is skipped, with the reason.
"""

import argparse
import json
import os
import pathlib
import sys
import time
import traceback
import urllib.request

import chromium
import checks
import trials
from mock import Server

SCENARIOS = {
    "calm": ["loads", "agrees", "grows", "keeps_focus", "speaks", "reads_along", "keyboard", "narrow", "accessible", "record", "stale", "clean"],
    "load": ["loads", "agrees", "smooth", "searches", "keyboard_map", "narrow", "accessible_main", "clean"],
    "dead": ["loads", "death", "accessible_main", "clean"],
    "hostile": ["loads", "inert", "narrow", "accessible", "clean"],
    "drops": ["loads", "comes_back"],
    "empty": ["loads", "says_empty", "narrow", "accessible_main", "clean"],
    "full": ["loads", "refuses_recording"],
    "login": ["signs_in", "drains", "retries", "accessible"],
    "record": ["loads", "record", "clean"],
    "operator": ["loads", "drains", "retries", "clean"],
}
REAL = {
    "calm": ["loads", "agrees", "reads_along", "keyboard", "narrow", "accessible", "clean"],
    "load": ["loads", "agrees", "smooth", "searches", "keyboard_map", "narrow", "accessible_main", "clean"],
    "dead": ["loads", "death", "accessible_main", "clean"],
    "record": ["loads", "record", "clean"],
    "empty": ["loads", "says_empty", "clean"],
    "operator": ["loads", "drains", "clean"],
}


class Run:
    """One scenario in one browser: where it looks, and what the checks need to know."""

    def __init__(self, scenario, base, browser, arguments, server):
        self.scenario, self.base, self.browser, self.server = scenario, base, browser, server
        self.screens, self.token, self.wav = arguments.screens, arguments.token, arguments.wav
        self.mock = server is not None
        if self.mock and scenario == "operator":
            self.token = "op"
        self.axe = chromium.CACHE / "axe" / "axe.min.js"
        self.notes, self.pages = [], []
        self.page = self.fresh()

    def fresh(self, path="/", **more):
        page = self.browser.page(**more)
        self.pages.append(page)
        if self.token:
            name, value = self.cookie().split(";")[0].split("=", 1)
            page.call("Network.setCookie", {"name": name, "value": value, "url": self.base, "httpOnly": True, "sameSite": "Strict"})
        page.goto(self.base + path)
        return page

    def cookie(self):
        """What a login sets."""
        body = json.dumps({"token": self.token}).encode()
        request = urllib.request.Request(self.base + "/api/login", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.headers["Set-Cookie"]

    def ask(self, path, body=None):
        request = urllib.request.Request(self.base + path, None if body is None else json.dumps(body).encode())
        if self.token:
            request.add_header("Authorization", f"Bearer {self.token}")
        with urllib.request.urlopen(request, timeout=10) as answer:
            return json.loads(answer.read() or b"null")

    def steer(self, what, **body):
        return self.ask(f"/mock/{what}", body)

    def screen(self, name, page=None):
        if self.screens:
            (page or self.page).screenshot(pathlib.Path(self.screens) / f"{self.scenario}-{name}.png")


def play(scenario, arguments, program):
    failed = 0
    server = None if arguments.base else Server(0, {"record": "calm", "operator": "dead"}.get(scenario, scenario)).start()
    base = (arguments.base or server.base).rstrip("/")
    wav = arguments.wav or trials.tone()
    flags = ["--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream", f"--use-file-for-fake-audio-capture={wav}"]
    with chromium.Browser(program, *flags) as browser:
        run = Run(scenario, base, browser, arguments, server)
        names = (SCENARIOS if run.mock else REAL)[scenario]
        for name in [n for n in names if not arguments.only or n in ("loads", "signs_in") or n in arguments.only.split(",")]:
            start = time.monotonic()
            run.notes = []
            try:
                check = getattr(checks, name, None) or getattr(trials, name)
                check(run)
                told = "ok"
            except checks.Skip as why:
                told, run.notes = "skipped", [str(why)]
            except (AssertionError, chromium.ProtocolError, OSError) as wrong:
                told, failed = "FAILED", failed + 1
                where = traceback.extract_tb(wrong.__traceback__)[1:]
                run.notes = [f"{wrong} ({', '.join(f'{pathlib.Path(f.filename).name}:{f.lineno}' for f in where if 'page' in f.filename)})"]
                run.screen(f"failed-{name}")
            detail = "; ".join(run.notes)
            print(f"{told} {scenario} {name} [{time.monotonic() - start:.1f} s]{': ' if detail else ''}{detail}", flush=True)
            if told == "FAILED" and name in ("loads", "signs_in"):
                break
    return failed


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", help="the address of a dispatcher; without it the mock is played")
    parser.add_argument("--scenario", type=lambda names: names.split(","), help="what to look at, with commas (default: everything the mock plays)")
    parser.add_argument("--only", help="these checks of the scenario, with commas")
    parser.add_argument("--screens", help="a folder for screenshots")
    parser.add_argument("--token", default=os.environ.get("VOXFLEET_TOKEN"), help="signs in first (or VOXFLEET_TOKEN)")
    parser.add_argument("--wav", help="what the microphone hears, instead of a tone")
    arguments = parser.parse_args()
    program = chromium.find()
    if not program:
        print("skipped: no Chromium here; install the package chromium, or run: sh deploy/bootstrap.sh deps")
        return 0
    if arguments.scenario and not set(arguments.scenario) <= set(SCENARIOS):
        parser.error(f"--scenario is one of: {', '.join(SCENARIOS)}")
    if arguments.base and not set(arguments.scenario or ["calm"]) <= set(REAL):
        parser.error(f"--base goes with one of: {', '.join(REAL)}")
    if arguments.screens:
        pathlib.Path(arguments.screens).mkdir(parents=True, exist_ok=True)
    names = arguments.scenario or ["calm"] if arguments.scenario or arguments.base else [s for s in SCENARIOS if s not in ("record", "operator")]
    failed = sum(play(name, arguments, program) for name in names)
    print(f"{failed} failed" if failed else "all passed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
