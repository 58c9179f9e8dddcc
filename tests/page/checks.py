"""What must be true of the page. Each check takes a `check.Run` and raises AssertionError; it leaves the page as it found it."""

import json
import time

FIRST_PICTURE_MS = 4000   # figures on the screen, where nobody else has the processor
PAGE_BYTES = 200_000      # everything but the figures


class Skip(Exception):
    pass


def text(page, selector):
    return page.eval(f"document.querySelector({json.dumps(selector)})?.textContent ?? null")


def number(page, selector):
    return int((text(page, selector) or "").replace(",", "") or -1)


# ---- what every page must do

def pictures(page):
    """When something stood on the screen, and when the figures did, in ms since the page was asked for."""
    page.wait("document.body?.dataset.loaded === 'true'", 30)
    return page.eval("[performance.getEntriesByName('first-contentful-paint')[0]?.startTime ?? -1, performance.now()]")


def held_up():
    """How many times as long as alone everything takes now, because others have the processor too."""
    at, worked = time.monotonic(), time.thread_time()
    while time.thread_time() - worked < 0.1:
        pass
    return max(1.0, (time.monotonic() - at) / (time.thread_time() - worked))


def loads(run):
    page = run.page
    first_ms, shown_ms = pictures(page)
    most_ms = FIRST_PICTURE_MS * held_up()
    for _ in range(2):
        # Somebody else's work may have held it up just then; a page that is slow is slow again.
        if max(first_ms, shown_ms) < most_ms:
            break
        again = run.fresh()
        first_ms, shown_ms = pictures(again)
        most_ms = FIRST_PICTURE_MS * held_up()
        again.close()
    time.sleep(1.5)
    files = [r for r in page.requests.values() if not any(p in r["url"] for p in ("/api/", "/asr"))]
    size = sum(r["bytes"] for r in files)
    figures = sum(r["bytes"] for r in page.requests.values()) - size
    run.notes.append(f"first paint {first_ms:.0f} ms, figures {shown_ms:.0f} ms, page {size / 1000:.0f} kB in {len(files)} files, figures {figures / 1000:.0f} kB so far")
    assert 0 < first_ms < most_ms and shown_ms < most_ms, f"too slow: {most_ms:.0f} ms are allowed"
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


def wait_until(true, timeout):
    start = time.monotonic()
    while not true():
        assert time.monotonic() - start < timeout, "did not come true"
        time.sleep(0.05)
