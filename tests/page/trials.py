"""What must be true when something happens: a recording, a loss, a death, strangers' text, an operator's hand, a big fleet."""

import array
import json
import math
import pathlib
import sys
import tempfile
import time
import wave

from checks import axe, number, text, wait_until
from fleet import HOSTILE

DEATH_SHOWN_MS = 2000     # after the kill, as the first sign of it; each further one after the dispatcher said it
LONG_TASK_MS = 400        # the longest that a key press may wait, on a processor that does nothing else
BUSY_SHARE = 0.35         # of one core, at 400 GPUs and 5,000 sessions
TONE_HZ = 660


def tone():
    """Six seconds of a tone that comes and goes, as a WAV for the browser's made-up microphone."""
    samples = array.array("h", (int(9000 * math.sin(2 * math.pi * TONE_HZ * n / 48000)) for n in range(48000 * 6)))
    path = pathlib.Path(tempfile.gettempdir()) / f"voxfleet-tone-{TONE_HZ}.wav"
    with wave.open(str(path), "wb") as out:
        out.setparams((1, 2, 48000, 0, "NONE", ""))
        out.writeframes(samples.tobytes())
    return path


# ---- the microphone

def record(run):
    page = run.page
    page.click("#record-open")
    page.wait("document.querySelector('#record').open && !document.querySelector('#record-start').disabled", 5)
    page.eval("document.querySelector('#record-diarize').checked = true")
    page.click("#record-start")
    page.wait("document.querySelector('#record').dataset.state === 'recording'", 15)
    page.wait("document.querySelector('#record-buffer').textContent.trim() || document.querySelectorAll('#record-lines .turn').length", 30)
    growing = page.eval("document.querySelector('#record-buffer').textContent + document.querySelector('#record-lines').textContent")
    page.wait(f"document.querySelector('#record-buffer').textContent + document.querySelector('#record-lines').textContent !== {json.dumps(growing)}", 15)
    page.wait("document.querySelector('#record-time').textContent >= '0:05'", 20)
    run.screen("record")
    page.click("#record-stop")
    page.wait("document.querySelector('#record').dataset.state === 'idle'", 30)
    assert text(page, "#record-state") == "finished", f"ended as {text(page, '#record-state')!r}: {text(page, '#record-note')!r}"
    said = page.eval("[...document.querySelectorAll('#record-lines .words')].map((e) => e.textContent).join(' ')")
    assert said.strip() and not text(page, "#record-buffer").strip(), "not every word became a line"
    if run.mock:
        wait_until(lambda: run.ask("/mock/recorded"), 5)
        heard = run.ask("/mock/recorded")
        assert heard["samples"] / heard["rate"] >= 4, f"only {heard} arrived"
        assert heard["spectrum"] == TONE_HZ and heard["rms"] > 500, f"not what the microphone heard: {heard}"
        assert heard["query"].get("diarize") == "true", f"the options did not arrive: {heard}"
        run.notes.append(f"{heard['samples'] / heard['rate']:.1f} s at {heard['rate']} Hz, {heard['spectrum']} Hz tone")
    run.notes.append(f"{len(said.split())} words")
    if not run.mock:
        print(f"said: {said}")
    page.key("Escape")
    page.wait("!document.querySelector('#record').open", 3)


def refuses_recording(run):
    page = run.page
    page.click("#record-open")
    page.wait("document.querySelector('#record').open && !document.querySelector('#record-start').disabled", 5)
    page.click("#record-start")
    page.wait("document.querySelector('#record-note').textContent.includes('No GPU resources available')", 10)
    assert page.eval("document.querySelector('#record').dataset.state") == "idle"
    page.key("Escape")


# ---- losses

def stale(run):
    """A page that shows old figures says so, and says when they are fresh again."""
    page = run.page
    run.steer("pause", on=True)
    took = page.wait("!document.querySelector('#banner').hidden && document.querySelector('#banner-text').textContent.includes('old')", 10)
    assert page.eval("document.body.hasAttribute('data-stale')"), "old figures look fresh"
    run.screen("stale")
    for dark in (False, True) if run.axe.is_file() else ():
        page.media(dark=dark)
        axe(run, page, "stale dark" if dark else "stale light")
    page.media(dark=False)
    run.steer("pause", on=False)
    back = page.wait("document.querySelector('#banner').hidden && !document.body.hasAttribute('data-stale')", 20)
    for more, said in (({"nats": {"connected": False}}, "NATS"), ({"active": False}, "standby"), ({"verdicts_wait": "half of the fleet fell silent"}, "half of the fleet")):
        run.steer("set", **more)
        page.wait(f"document.querySelector('#banner-text').textContent.includes({json.dumps(said)})", 5)
        run.steer("set", nats={"connected": True, "rtt_ms": 0.4}, active=True, verdicts_wait=None)
        page.wait("document.querySelector('#banner').hidden", 5)
    run.notes.append(f"said after {took:.1f} s, taken back {back:.1f} s after the return")


def comes_back(run):
    page = run.page
    page.eval("window.kept = document.querySelector('.tile'); window.least = 99; new MutationObserver(() => { least = Math.min(least, document.querySelectorAll('.tile').length) }).observe(document.querySelector('#map'), {childList: true})")
    page.eval("document.querySelector('#events-kind').value = 'all'; document.querySelector('#events-kind').dispatchEvent(new Event('change'))")
    for _ in range(3):
        run.steer("drop")
        at = page.eval("document.querySelector('#sessions-rows').textContent")
        page.wait(f"document.querySelector('#sessions-rows').textContent !== {json.dumps(at)}", 6)
    assert page.eval("kept.isConnected"), "the map was drawn anew"
    assert page.eval("document.querySelector('#banner').hidden"), "a short break raised the banner"
    time.sleep(2.5)
    doubled = page.eval("(() => { const rows = [...document.querySelectorAll('#events-rows .event')].map((e) => e.textContent); return rows.length - new Set(rows).size })()")
    assert doubled == 0, f"{doubled} events stand there twice"
    run.notes.append("three breaks, no tile drawn anew")


def death(run):
    page = run.page
    page.eval("""window.falls = []; new MutationObserver((all) => { for (const m of all) { const s = m.target.dataset.state;
        if (s !== m.oldValue && (s === 'suspect' || s === 'dead')) falls.push({key: m.target.dataset.key, state: s, at: Date.now()}) } })
        .observe(document.querySelector('#map'), {subtree: true, attributes: true, attributeOldValue: true, attributeFilter: ['data-state']})""")
    if run.mock:
        name = run.steer("kill", index=1)["gpu_id"]
        page.wait("falls.length > 0", 5)
        time.sleep(1.2)
        run.steer("kill", index=1, state="dead")
        killed_ms = None
    else:
        print("kill a worker now", flush=True)
        # Whoever kills says when, and whom; at a terminal nobody can.
        said = "" if sys.stdin.isatty() else sys.stdin.readline()
        killed_ms, name = (json.loads(said)[key] for key in ("killed_ms", "gpu_id")) if said.strip() else (None, None)
    page.wait("falls.some((f) => f.state === 'dead')", 60)
    falls = page.eval("falls")
    dead = next(f for f in falls if f["state"] == "dead")
    gpu_id = dead["key"].rsplit("/", 1)[0]
    if name:
        assert gpu_id == name, f"{gpu_id} is shown dead instead of {name}"
    if killed_ms:
        took = min(f["at"] for f in falls if f["key"] == dead["key"]) - killed_ms
        assert 0 < took < DEATH_SHOWN_MS, f"the first sign of it was shown {took} ms after the kill"
        run.notes.append(f"shown {took} ms after the kill")
    wait_until(lambda: "dead" in (text(page, "#announce") or ""), 3)

    def event(fall):
        """What the dispatcher told of it: the event may come a little after the figures."""
        rows = run.ask("/api/events?limit=200&kind=fleet")["rows"]
        return [e["at_ms"] for e in rows if e["id"] == gpu_id and e["what"] == fall["state"] and e["at_ms"] <= fall["at"] + 1000]

    for fall in (f for f in falls if f["key"] == dead["key"]):
        try:
            wait_until(lambda: event(fall), 5)
        except AssertionError:
            raise AssertionError(f"{fall['state']} is shown, and no event says so") from None
        late = fall["at"] - event(fall)[0]
        assert late <= DEATH_SHOWN_MS, f"{fall['state']} was shown {late} ms after it was said"
        told = f"{late} ms after the dispatcher said it" if late >= 0 else f"{-late} ms before its event"
        run.notes.append(f"{fall['state']} shown {told}, at {fall['at']}")
    page.wait("document.querySelector('#t-gpus-more').textContent.includes('dead')", 3)
    page.wait("[...document.querySelectorAll('#events-rows .event-what')].some((e) => e.textContent === 'dead')", 3)
    assert "dead" in page.eval(f"[...document.querySelectorAll('.tile')].find((t) => t.dataset.key === {json.dumps(dead['key'])}).getAttribute('aria-label')")
    run.notes.append(f"gpu {gpu_id}")
    run.screen("light")
    page.media(dark=True)
    run.screen("dark")
    page.media(dark=False)


# ---- strangers' text

def inert(run):
    page = run.page
    page.eval("document.querySelector('#events-kind').value = 'all'; document.querySelector('#events-kind').dispatchEvent(new Event('change'))")
    for opener, dialog in (("#sessions-rows .s-id a", "reader"), (".tile", "gpu"), ("#jobs-rows a", "reader"), ("#record-open", "record")):
        page.eval(f"document.querySelector({json.dumps(opener)}).click()")
        page.wait(f"document.getElementById('{dialog}').open", 3)
        time.sleep(1.5)
        run.screen(f"{dialog}")
        page.key("Escape")
        page.wait(f"!document.getElementById('{dialog}').open", 3)
    for index in range(len(HOSTILE)):
        page.eval(f"document.querySelectorAll('#sessions-rows .s-id a')[{index}]?.click()")
        time.sleep(0.15)
        page.key("Escape")
    time.sleep(0.5)
    assert page.eval("window.pwned") is None, "a stranger's text was run"
    assert not page.dialogs, f"a stranger's text opened {page.dialogs}"
    strange = page.eval("[...document.querySelectorAll('main img, main svg, main script, main iframe, dialog img, dialog svg, dialog script, [onerror], [onload], [href^=\"javascript:\"]')].map((e) => e.outerHTML.slice(0, 80))")
    assert not strange, f"a stranger's text became markup: {strange}"
    literal = page.eval(f"document.querySelector('main').textContent.includes({json.dumps(HOSTILE[0])})")
    assert literal, "a stranger's text is not shown as it is"


def says_empty(run):
    page = run.page
    for name in ("fleet-empty", "sessions-empty", "jobs-empty", "dead-empty", "events-empty"):
        page.wait(f"document.getElementById('{name}').textContent.trim()", 5)


# ---- roles

def signs_in(run):
    page = run.page
    page.wait("document.querySelector('#login')?.open", 10)
    run.screen("light")
    for token, told in (("wrong", "not known"), ("view", None)):
        page.eval("document.querySelector('#login-token').value = ''; document.querySelector('#login-token').focus()")
        page.type(token)
        page.key("Enter")
        if told:
            page.wait(f"document.querySelector('#login-told').textContent.includes({json.dumps(told)})", 5)
    page.wait("!document.querySelector('#login').open && document.body.dataset.loaded === 'true'", 15)
    assert text(page, "#me") == "viewer", f"signed in as {text(page, '#me')!r}"
    page.wait("document.querySelectorAll('#dead-rows .row').length > 0", 5)
    assert page.eval("[...document.querySelectorAll('#dead-rows button')].every((b) => b.hidden)"), "a viewer is offered a retry"
    page.eval("document.querySelector('.tile').click()")
    page.wait("document.querySelector('#gpu').open", 3)
    assert page.eval("document.querySelector('#drain-ask').hidden"), "a viewer is offered a drain"
    page.key("Escape")
    page.click("#sign-in")
    page.wait("document.querySelector('#login').open", 3)
    page.eval("document.querySelector('#login-token').focus()")
    page.type("op")
    page.key("Enter")
    page.wait("document.querySelector('#me').textContent === 'operator'", 5)
    run.token = "op"


def drains(run):
    page = run.page
    page.eval("[...document.querySelectorAll('.tile[data-state=alive]')].at(-1).focus()")
    page.key("Enter")
    page.wait("document.querySelector('#gpu').open && !document.querySelector('#drain-ask').hidden", 5)
    page.eval("document.querySelector('#drain-ask').focus()")
    page.key("Enter")
    page.wait("document.activeElement.id === 'drain-no'", 3)
    run.screen("drain")
    page.key("Enter")
    page.wait("document.querySelector('#drain-confirm').hidden && document.activeElement.id === 'drain-ask'", 3)
    name = text(page, "#gpu-title")
    state = f"([...document.querySelectorAll('.tile')].find((t) => t.dataset.key.startsWith({json.dumps(name + '/')}))?.dataset.state ?? 'gone')"
    assert page.eval(state) == "alive", "keeping it drained it"
    page.key("Enter")
    page.eval("document.querySelector('#drain-yes').focus()")
    page.key("Enter")
    page.wait("document.querySelector('#drain-told').textContent.startsWith('Draining')", 10)
    # A worker that holds nothing is gone before it is seen draining.
    page.wait(f"['draining', 'gone'].includes({state})", 10)
    page.wait("document.querySelector('#announce').textContent.includes('Draining')", 3)
    run.notes.append(f"{name} is {page.eval(state)}")
    page.key("Escape")
    page.wait("!document.querySelector('#gpu').open", 3)


def retries(run):
    page = run.page
    before = number(page, "#dead-count")
    page.eval("document.querySelector('#dead-rows button:not([hidden])').focus()")
    page.key("Enter")
    page.wait(f"Number(document.querySelector('#dead-count').textContent) === {before - 1}", 5)
    page.wait("document.querySelector('#dead-told').textContent.includes('sent again')", 3)


def speaks(run):
    """What is announced at once is all there for a screen reader, and gone again later."""
    page = run.page
    lines = "[...document.querySelectorAll('#announce > *')].filter((e) => e.textContent.startsWith('said ')).length"
    page.eval("import('/dom.js').then(({ announce }) => ['said one', 'said two', 'said two'].forEach(announce))")
    assert page.eval(lines) == 3, f"{page.eval(lines)} of three are there"
    page.wait(f"{lines} === 0", 15)


# ---- many

def searches(run):
    page = run.page
    total = number(page, "#sessions-count")
    page.click("#sessions-after")
    page.wait("document.querySelector('#sessions-place').textContent.startsWith('51 ')", 5)
    wanted = page.eval("document.querySelector('#sessions-rows .s-id').textContent")
    page.eval("document.querySelector('#sessions-find').focus()")
    page.type(wanted)
    page.wait(f"document.querySelectorAll('#sessions-rows tr').length === 1 && document.querySelector('#sessions-rows .s-id').textContent === {json.dumps(wanted)}", 5)
    page.eval("document.querySelector('#sessions-find').value = 'no such session'; document.querySelector('#sessions-find').dispatchEvent(new Event('input'))")
    page.wait("document.querySelectorAll('#sessions-rows tr').length === 0 && document.querySelector('#sessions-empty').textContent.includes('No session fits')", 5)
    page.eval("document.querySelector('#sessions-find').value = ''; document.querySelector('#sessions-find').dispatchEvent(new Event('input'))")
    page.wait("document.querySelectorAll('#sessions-rows tr').length === 50", 5)
    page.click("th.s-id button")
    page.wait("document.querySelector('th.s-id').getAttribute('aria-sort') === 'ascending'", 3)
    page.wait("(() => { const ids = [...document.querySelectorAll('#sessions-rows .s-id')].map((e) => e.textContent); return ids.every((id, n) => n === 0 || ids[n - 1] <= id) })()", 5)
    page.click("th.s-age button")
    page.wait("document.querySelector('th.s-age').getAttribute('aria-sort') === 'descending'", 3)
    asked = "&order=asc"
    wait_until(lambda: any(asked in r["url"] and "sessions=age" in r["url"] for r in page.requests.values()), 3)
    if page.eval("document.querySelector('#jobs-pages').hidden"):
        assert number(page, "#jobs-count") <= 20, "jobs are missing without a word"
    else:
        page.click("#jobs-more")
        page.wait("document.querySelectorAll('#jobs-rows .row').length > 20", 5)
    page.eval("document.querySelector('#fleet-trouble').click()")
    bad = page.eval("[...document.querySelectorAll('.tile:not([hidden])')].map((t) => t.dataset.state)")
    assert all(state in ("dead", "suspect", "unhealthy") for state in bad), f"not trouble: {bad}"
    page.eval("document.querySelector('#fleet-trouble').click()")
    run.notes.append(f"found one of {total}")


def smooth(run):
    """What a viewer's machine pays for a big fleet, over ten seconds of updates."""
    page = run.page
    page.eval("window.kept = document.querySelector('.tile'); window.many = document.querySelectorAll('.tile').length")
    figures = lambda: sum(r["bytes"] for r in page.requests.values() if "/api/stream" in r["url"])
    page.trace()
    before, bytes_before = page.metrics(), figures()
    time.sleep(10)
    after, got = page.metrics(), figures() - bytes_before
    share = {name: (after[name] - before[name]) / 10 for name in ("TaskDuration", "ScriptDuration", "LayoutDuration", "RecalcStyleDuration")}
    longest = page.longest_task_ms()
    run.notes.append(f"busy {100 * share['TaskDuration']:.1f} % (script {100 * share['ScriptDuration']:.1f}, style {100 * share['RecalcStyleDuration']:.1f}, layout {100 * share['LayoutDuration']:.1f}), "
                     f"longest task {longest:.0f} ms, {got / 10000:.0f} kB/s, {after['Nodes']:.0f} nodes, {after['JSHeapUsedSize'] / 1e6:.1f} MB")
    assert page.eval("kept?.isConnected !== false && document.querySelectorAll('.tile').length === many"), "tiles are made anew"
    assert share["TaskDuration"] < BUSY_SHARE, "too much work"
    assert longest < LONG_TASK_MS, "a key press would wait"
    assert got > 0, "nothing arrived"
