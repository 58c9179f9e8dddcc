"""What must be true of the page. Each check takes a `check.Run` and raises AssertionError; it leaves the page as it found it."""

import array
import json
import math
import pathlib
import tempfile
import time
import wave

from fleet import HOSTILE

DEATH_SHOWN_MS = 2000     # after the dispatcher said it
FIRST_PICTURE_MS = 4000   # figures on the screen, on a machine that also does other work
PAGE_BYTES = 200_000      # everything but the figures
LONG_TASK_MS = 400        # the longest time that a key press may wait
BUSY_SHARE = 0.35         # of one core, at 400 GPUs and 5,000 sessions
TONE_HZ = 660


class Skip(Exception):
    pass


def tone():
    """Six seconds of a tone that comes and goes, as a WAV for the browser's made-up microphone."""
    samples = array.array("h", (int(9000 * math.sin(2 * math.pi * TONE_HZ * n / 48000)) for n in range(48000 * 6)))
    path = pathlib.Path(tempfile.gettempdir()) / f"voxfleet-tone-{TONE_HZ}.wav"
    with wave.open(str(path), "wb") as out:
        out.setparams((1, 2, 48000, 0, "NONE", ""))
        out.writeframes(samples.tobytes())
    return path


def text(page, selector):
    return page.eval(f"document.querySelector({json.dumps(selector)})?.textContent ?? null")


def number(page, selector):
    return int((text(page, selector) or "").replace(",", "") or -1)


# ---- what every page must do

def loads(run):
    page = run.page
    page.wait("document.body?.dataset.loaded === 'true'", 15)
    shown_ms = page.eval("performance.now()")
    first_ms = page.eval("performance.getEntriesByName('first-contentful-paint')[0]?.startTime ?? -1")
    time.sleep(1.5)
    files = [r for r in page.requests.values() if not any(p in r["url"] for p in ("/api/", "/asr"))]
    size = sum(r["bytes"] for r in files)
    figures = sum(r["bytes"] for r in page.requests.values()) - size
    run.notes.append(f"first paint {first_ms:.0f} ms, figures {shown_ms:.0f} ms, page {size / 1000:.0f} kB in {len(files)} files, figures {figures / 1000:.0f} kB so far")
    assert 0 < first_ms < FIRST_PICTURE_MS and shown_ms < FIRST_PICTURE_MS, "too slow"
    assert 10_000 < size < PAGE_BYTES, "too many bytes"
    run.screen("light")
    page.media(dark=True)
    run.screen("dark")
    page.media(dark=False)


def clean(run):
    """Last: nothing that happened on the way, in any tab, may have left a trace."""
    host = run.base.split("//")[1]
    for page in run.pages:
        bad = [m for m in page.console if "error" in m[0] or "warning" in m[0]]
        assert not bad, f"console: {bad[:3]}"
        assert not page.exceptions, f"exceptions: {page.exceptions[:3]}"
        assert not page.dialogs, f"dialogs: {page.dialogs[:3]}"
        violations = page.violations if page.closed else page.eval("violations")
        assert not violations, f"content security policy: {violations[:3]}"
        elsewhere = [r["url"] for r in page.requests.values() if host not in r["url"] and not r["url"].startswith(("data:", "about:", "blob:"))]
        assert not elsewhere, f"loaded from elsewhere: {elsewhere[:3]}"
    run.notes.append(f"{len(run.pages)} tabs, {sum(len(p.requests) for p in run.pages)} requests, all to {host}")


def agrees(run):
    """What stands on the page is what the dispatcher says."""
    page = run.page
    fleet, sessions = run.ask("/api/fleet"), run.ask("/api/sessions?limit=1")
    gpus = len(fleet["gpus"])
    page.wait(f"document.querySelectorAll('.tile').length === {gpus}", 5)
    assert number(page, "#t-gpus") == fleet["totals"]["alive"], "alive"
    shown = page.eval("[...document.querySelectorAll('.tile')].map((t) => t.dataset.key).sort()")
    assert shown == sorted(f"{t['gpu_id']}/{t['incarnation']}" for t in fleet["gpus"]), "other tiles"
    widths = page.eval("""[...document.querySelectorAll('.tile')].map((t) => {
        const bar = t.querySelector('.bar'); if (bar.hasAttribute('data-none')) return 0;
        return (t.querySelector('.bar-ours').offsetWidth + t.querySelector('.bar-others').offsetWidth) / bar.offsetWidth })""")
    assert all(0 <= w <= 1.05 for w in widths), "a memory bar is fuller than its GPU"
    if sessions["total"]:
        page.wait("document.querySelectorAll('#sessions-rows tr').length > 0", 5)
    rows = page.eval("document.querySelectorAll('#sessions-rows tr').length")
    assert rows <= 50 and (rows == 50 or abs(rows - sessions["total"]) <= 2), f"{rows} rows of {sessions['total']}"
    run.notes.append(f"{gpus} tiles, {rows} rows of {sessions['total']} sessions")


def grows(run):
    page = run.page
    before = page.eval("Object.fromEntries([...document.querySelectorAll('#sessions-rows tr')].map((r) => [r.querySelector('.s-id').textContent, r.querySelector('.s-text').textContent]))")
    page.eval("window.kept = document.querySelector('#sessions-rows tr')")
    took = page.wait(f"(() => {{ const old = {json.dumps(before)}; return [...document.querySelectorAll('#sessions-rows tr')].filter((r) => old[r.querySelector('.s-id').textContent] !== r.querySelector('.s-text').textContent).length > 3 }})()", 6)
    assert page.eval("kept.isConnected"), "rows are made anew instead of being updated"
    run.notes.append(f"transcripts grew after {took:.1f} s, in the same rows")


def keeps_focus(run):
    """Rows move around the one that somebody stands on; moving that one would take the focus away."""
    page = run.page
    order = "[...document.querySelectorAll('#sessions-rows .s-id')].map((e) => e.textContent)"
    page.wait(f"{order}.length === 14", 5)
    for n, stand in enumerate((9, 13, 5)):
        mine = page.eval(f"(document.querySelectorAll('#sessions-rows .s-id a')[{stand}].focus(), document.activeElement.textContent)")
        run.steer("lag", id=mine, lag_ms=5000 + 300 * n)
        page.wait(f"{order}[0] === {json.dumps(mine)}", 5)
        assert page.eval("document.activeElement.textContent") == mine, f"the focus left {mine} when it rose to the top"
    asked = [s["id"] for s in run.ask("/api/sessions?sort=lag&order=desc")["rows"]]
    page.wait(f"JSON.stringify({order}) === {json.dumps(json.dumps(asked, separators=(',', ':')))}", 3)
    page.eval("document.activeElement.blur()")


# ---- reading along

def reads_along(run):
    page = run.page
    if not page.eval("document.querySelectorAll('#sessions-rows a.id').length"):
        raise Skip("no sessions to open")
    page.eval("document.querySelector('#sessions-rows tr[data-state=assigned] .s-id a').focus()")
    page.key("Enter")
    page.wait("document.querySelector('#reader').open", 3)
    page.wait("document.querySelectorAll('#reader-text .turn, #reader-partial:not([hidden])').length > 0", 20)
    if run.mock:
        page.wait("document.querySelectorAll('#reader-text .who').length >= 4", 5)
        page.wait("document.querySelector('#partial-tentative').textContent.trim() && document.querySelector('#partial-committed').textContent.trim()", 5)
        page.wait("[...document.querySelectorAll('.final[data-revised]')].some((f) => f.textContent.includes('(corrected)'))", 10)
        page.wait("document.querySelector('#reader-text .moved')", 10)
        doubled = page.eval("(() => { const t = [...document.querySelectorAll('#reader-text time')].map((e) => e.textContent); return t.length - new Set(t).size })()")
        assert doubled == 0, f"{doubled} segments stand there twice"
        assert page.eval("(() => { const b = document.querySelector('#reader-scroll'); return b.scrollHeight - b.scrollTop - b.clientHeight < 40 })()"), "does not follow the end"
    run.screen("reader")
    assert "#session=" in page.eval("location.hash"), "no address to share"
    page.key("Escape")
    page.wait("!document.querySelector('#reader').open", 3)
    page.wait("location.hash === ''", 3)
    assert page.eval("document.activeElement.closest('.s-id') !== null"), "focus does not come back to the session"


# ---- keyboard

def focus(page):
    return page.eval("""(() => { const e = document.activeElement; const s = getComputedStyle(e); const r = e.getBoundingClientRect();
        return {tag: e.tagName, id: e.id, name: (e.getAttribute('aria-label') || e.textContent || e.placeholder || '').trim().slice(0, 40), tile: e.classList.contains('tile'),
                ring: s.outlineStyle !== 'none' && parseFloat(s.outlineWidth) >= 2 && e.matches(':focus-visible'),
                seen: r.width > 1 && r.height > 1 && r.bottom > 0 && r.top < innerHeight} })()""")


def keyboard(run):
    page = run.fresh()
    page.wait("document.body?.dataset.loaded === 'true' && document.querySelectorAll('#jobs-rows li, #jobs-empty:not(:empty)').length", 15)
    stops = []
    for _ in range(60):
        page.key("Tab")
        at = focus(page)
        if at["tag"] == "BODY":
            break
        assert at["ring"], f"no visible focus on {at}"
        assert at["seen"], f"focus out of sight on {at}"
        stops.append(at)
        if at["id"] == "events-rows":
            break
    assert stops[0]["name"].startswith("Skip"), f"the first stop is {stops[0]}"
    assert sum(s["tile"] for s in stops) == (1 if page.eval("document.querySelectorAll('.tile').length") else 0), "the map is not one stop"
    order = [s["id"] for s in stops if s["id"] in ("record-open", "fleet-find", "sessions-find", "jobs-state", "events-kind")]
    assert order == ["record-open", "fleet-find", "sessions-find", "jobs-state", "events-kind"], f"order of focus: {order}"
    run.notes.append(f"{len(stops)} stops")
    page.close()
    keyboard_map(run)


def keyboard_map(run):
    page = run.page
    if page.eval("document.querySelectorAll('.tile').length") < 2:
        raise Skip("fewer than two GPUs")
    page.eval("document.querySelector('.tile[tabindex=\"0\"]').focus()")
    page.key("Home")
    first = focus(page)["name"]
    page.key("ArrowRight")
    second = focus(page)["name"]
    assert second != first, "the arrow does not move"
    page.key("ArrowLeft")
    assert focus(page)["name"] == first, "the arrow does not come back"
    page.key("ArrowDown")
    lower = page.eval("document.activeElement.offsetTop > document.querySelector('.tile').offsetTop || document.querySelectorAll('.tile').length < 7")
    assert lower, "arrow down stays on its line"
    page.key("Enter")
    page.wait("document.querySelector('#gpu').open && document.querySelectorAll('#gpu-facts dt').length > 5", 3)
    assert page.eval("document.querySelector('#gpu').contains(document.activeElement)"), "focus is not in the sheet"
    run.screen("gpu")
    page.key("Escape")
    page.wait("!document.querySelector('#gpu').open", 3)
    assert focus(page)["tile"], "focus does not come back to its tile"
    assert page.eval("document.querySelectorAll('.tile[tabindex=\"0\"]').length") == 1, "more than one tile is a stop"


# ---- narrow, accessible

def narrow(run):
    for width in (320, 390):
        page = run.fresh(width=width, height=640, mobile=True)
        page.wait("document.body?.dataset.loaded === 'true'", 15)
        time.sleep(0.4)
        wide = lambda: page.eval(f"Math.max(document.documentElement.scrollWidth, document.body.scrollWidth) - {width}")
        assert wide() <= 0, f"{wide()} px too wide at {width} px: {widest(page, width)}"
        if width == 320:
            run.screen("phone", page)
            for opener, dialog in (("#sessions-rows .s-id a", "reader"), (".tile", "gpu"), ("#record-open", "record")):
                if not page.eval(f"document.querySelector({json.dumps(opener)}) !== null"):
                    continue
                page.eval(f"document.querySelector({json.dumps(opener)}).click()")
                page.wait(f"document.getElementById('{dialog}').open", 3)
                time.sleep(0.5)
                over = page.eval(f"(() => {{ const d = document.getElementById('{dialog}'); return Math.max(d.scrollWidth, ...[...d.querySelectorAll('.sheet-body')].map((b) => b.scrollWidth)) - innerWidth }})()")
                assert over <= 0 and wide() <= 0, f"{dialog} is {over} px too wide: {widest(page, width)}"
                run.screen(f"phone-{dialog}", page)
                page.key("Escape")
                page.wait(f"!document.getElementById('{dialog}').open", 3)
        page.close()


def widest(page, width):
    return page.eval(f"[...document.querySelectorAll('body *')].filter((e) => e.getBoundingClientRect().right > {width} + 1).slice(0, 4).map((e) => e.tagName + '.' + e.className + '#' + e.id)")


def axe(run, page, where):
    if not run.axe.is_file():
        raise Skip(f"axe-core is not in {run.axe.parent}; get it with: sh deploy/bootstrap.sh deps")
    if not page.eval("typeof axe === 'object'"):
        page.eval(run.axe.read_text() + ";0")
    found = page.eval("""axe.run(document, {resultTypes: ['violations'], runOnly: ['wcag2a', 'wcag2aa', 'wcag21a', 'wcag21aa', 'wcag22aa', 'best-practice']})
        .then((r) => ({rules: r.passes.length, bad: r.violations.map((v) => `${v.id}: ${v.nodes.slice(0, 3).map((n) => n.target + ' ' + (n.any[0]?.message ?? n.all[0]?.message ?? n.none[0]?.message ?? '')).join(' | ')}`)}))""", timeout=120)
    assert not found["bad"], f"{where}: {found['bad'][:4]}"
    assert found["rules"] > 15, f"{where}: axe looked at almost nothing"
    run.notes.append(f"{where} {found['rules']} rules")


def accessible_main(run):
    page = run.fresh()
    page.wait("document.body?.dataset.loaded === 'true'", 15)
    for dark in (False, True):
        page.media(dark=dark)
        axe(run, page, "dark" if dark else "light")
    page.close()


def accessible(run):
    accessible_main(run)
    page = run.fresh()
    page.wait("document.body?.dataset.loaded === 'true'", 15)
    opened = [("#sessions-rows .s-id a", "reader", "#reader-text .turn, #reader-partial:not([hidden])"), (".tile", "gpu", "#gpu-facts dt"), ("#record-open", "record", "#record-start")]
    if page.eval("!document.querySelector('#sign-in').hidden"):
        opened.append(("#sign-in", "login", "#login-token"))
    for opener, dialog, ready in opened:
        if not page.eval(f"document.querySelector({json.dumps(opener)}) !== null"):
            continue
        page.eval(f"document.querySelector({json.dumps(opener)}).click()")
        page.wait(f"document.getElementById('{dialog}').open && document.querySelector({json.dumps(ready)})", 20)
        for dark in (False, True):
            page.media(dark=dark)
            axe(run, page, f"{dialog} {'dark' if dark else 'light'}")
        page.key("Escape")
        page.wait(f"!document.getElementById('{dialog}').open", 3)
    page.close()


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
    for _ in range(3):
        run.steer("drop")
        at = page.eval("document.querySelector('#sessions-rows').textContent")
        page.wait(f"document.querySelector('#sessions-rows').textContent !== {json.dumps(at)}", 6)
    assert page.eval("kept.isConnected"), "the map was drawn anew"
    assert page.eval("document.querySelector('#banner').hidden"), "a short break raised the banner"
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
    else:
        print("kill a worker now", flush=True)
    page.wait("falls.some((f) => f.state === 'dead')", 60)
    falls = page.eval("falls")
    dead = next(f for f in falls if f["state"] == "dead")
    gpu_id = dead["key"].rsplit("/", 1)[0]
    if run.mock:
        assert gpu_id == name, f"{gpu_id} is shown dead instead of {name}"
    wait_until(lambda: "dead" in (text(page, "#announce") or ""), 3)
    events = [e for e in run.ask("/api/events?limit=200&kind=fleet")["rows"] if e["id"] == gpu_id]
    for fall in falls:
        said = [e for e in events if e["what"] == fall["state"] and e["at_ms"] <= fall["at"] + 1000]
        if said:
            late = fall["at"] - said[0]["at_ms"]
            assert late <= DEATH_SHOWN_MS, f"{fall['state']} was shown {late} ms after it was said"
            run.notes.append(f"{fall['state']} shown {late} ms after the dispatcher said it, at {fall['at']}")
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
    page.eval("document.querySelectorAll('.tile')[2].focus()")
    page.key("Enter")
    page.wait("document.querySelector('#gpu').open && !document.querySelector('#drain-ask').hidden", 3)
    page.eval("document.querySelector('#drain-ask').focus()")
    page.key("Enter")
    page.wait("document.activeElement.id === 'drain-no'", 3)
    run.screen("drain")
    page.key("Enter")
    page.wait("document.querySelector('#drain-confirm').hidden && document.activeElement.id === 'drain-ask'", 3)
    name = text(page, "#gpu-title")
    state = f"[...document.querySelectorAll('.tile')].find((t) => t.dataset.key.startsWith({json.dumps(name + '/')})).dataset.state"
    assert page.eval(state) == "alive", "keeping it drained it"
    page.key("Enter")
    page.eval("document.querySelector('#drain-yes').focus()")
    page.key("Enter")
    page.wait("document.querySelector('#drain-told').textContent.startsWith('Draining')", 5)
    page.wait(f"{state} === 'draining'", 5)
    assert "Draining" in text(page, "#announce"), "nobody is told"
    page.key("Escape")


def retries(run):
    page = run.page
    before = number(page, "#dead-count")
    page.eval("document.querySelector('#dead-rows button:not([hidden])').focus()")
    page.key("Enter")
    page.wait(f"Number(document.querySelector('#dead-count').textContent) === {before - 1}", 5)
    assert "sent again" in text(page, "#dead-told")


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
    page.eval("window.longest = 0; new PerformanceObserver((l) => { for (const e of l.getEntries()) longest = Math.max(longest, e.duration) }).observe({type: 'longtask'}); window.kept = document.querySelectorAll('.tile')[100]")
    figures = lambda: sum(r["bytes"] for r in page.requests.values() if "/api/stream" in r["url"])
    before, bytes_before = page.metrics(), figures()
    time.sleep(10)
    after, got = page.metrics(), figures() - bytes_before
    share = {name: (after[name] - before[name]) / 10 for name in ("TaskDuration", "ScriptDuration", "LayoutDuration", "RecalcStyleDuration")}
    longest = page.eval("longest")
    run.notes.append(f"busy {100 * share['TaskDuration']:.1f} % (script {100 * share['ScriptDuration']:.1f}, style {100 * share['RecalcStyleDuration']:.1f}, layout {100 * share['LayoutDuration']:.1f}), "
                     f"longest task {longest:.0f} ms, {got / 10000:.0f} kB/s, {after['Nodes']:.0f} nodes, {after['JSHeapUsedSize'] / 1e6:.1f} MB")
    assert page.eval("kept === undefined || kept.isConnected"), "tiles are made anew"
    assert share["TaskDuration"] < BUSY_SHARE, "too much work"
    assert longest < LONG_TASK_MS, "a key press would wait"
    assert got > 0, "nothing arrived"


def wait_until(true, timeout):
    start = time.monotonic()
    while not true():
        assert time.monotonic() - start < timeout, "did not come true"
        time.sleep(0.05)
