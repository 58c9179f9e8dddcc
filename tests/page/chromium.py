"""Drives a headless Chromium through its own debugging pipe: nothing to install but the browser.

The wire is the Chrome DevTools Protocol: JSON messages ended by a zero byte on file descriptors 3 (in) and 4 (out).
"""

import base64
import itertools
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import threading
import time

CACHE = pathlib.Path(os.environ.get("VOXFLEET_CACHE") or pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "voxfleet")
LAUNCH = """
import fcntl, os, sys
r, w = (fcntl.fcntl(int(fd), fcntl.F_DUPFD, 100) for fd in sys.argv[1:3])
os.dup2(r, 3), os.dup2(w, 4)
os.execv(sys.argv[3], sys.argv[3:])
"""
KEYS = {"Tab": (9, ""), "Enter": (13, "\r"), "Escape": (27, ""), " ": (32, " "), "End": (35, ""), "Home": (36, ""),
        "ArrowLeft": (37, ""), "ArrowUp": (38, ""), "ArrowRight": (39, ""), "ArrowDown": (40, "")}


def find():
    """The browser's program, or None. Debian's starter script is passed by: it adds flags of its own."""
    names = [os.environ.get("VOXFLEET_CHROMIUM"), "/usr/lib/chromium/chromium", CACHE / "chromium" / "chromium", "chromium",
             "chromium-browser", "google-chrome"]
    for name in filter(None, names):
        path = shutil.which(str(name))
        if path:
            return path
    return None


class ProtocolError(Exception):
    pass


class Browser:
    def __init__(self, program, *flags):
        self.folder = tempfile.TemporaryDirectory(prefix="voxfleet-page-")
        arguments = [program, "--headless=new", "--remote-debugging-pipe", f"--user-data-dir={self.folder.name}", "--no-first-run",
                     "--disable-gpu", "--disable-extensions", "--disable-background-networking", "--disable-component-update", "--disable-sync",
                     "--disable-default-apps", "--mute-audio", "--hide-scrollbars", "--force-color-profile=srgb", "--disable-dev-shm-usage",
                     "--autoplay-policy=no-user-gesture-required", *(["--no-sandbox"] if os.geteuid() == 0 else []), *flags, "about:blank"]
        to_read, self.out = os.pipe()
        self.into, to_write = os.pipe()
        self.process = subprocess.Popen([sys.executable, "-c", LAUNCH, str(to_read), str(to_write), *arguments],
                                        pass_fds=(to_read, to_write), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        os.close(to_read)
        os.close(to_write)
        self.numbers, self.answers, self.pages = itertools.count(1), {}, {}
        self.news = threading.Condition()
        self.gone = False
        threading.Thread(target=self.read, daemon=True).start()
        self.version = self.call("Browser.getVersion", timeout=120)["product"]

    def read(self):
        rest = b""
        while True:
            try:
                data = os.read(self.into, 1 << 20)
            except OSError:
                data = b""
            if not data:
                break
            *whole, rest = (rest + data).split(b"\0")
            with self.news:
                for message in map(json.loads, whole):
                    if "id" in message:
                        self.answers[message["id"]] = message
                    elif message.get("sessionId") in self.pages:
                        self.pages[message["sessionId"]].event(message["method"], message["params"])
                self.news.notify_all()
        with self.news:
            self.gone = True
            self.news.notify_all()

    def call(self, method, params=None, session=None, timeout=30):
        number = next(self.numbers)
        message = {"id": number, "method": method, "params": params or {}, **({"sessionId": session} if session else {})}
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self.out, data):]
        with self.news:
            if not self.news.wait_for(lambda: number in self.answers or self.gone, timeout):
                raise ProtocolError(f"{method}: no answer in {timeout} s")
            if number not in self.answers:
                raise ProtocolError(f"{method}: the browser ended")
            answer = self.answers.pop(number)
        if "error" in answer:
            raise ProtocolError(f"{method}: {answer['error']['message']}")
        return answer["result"]

    def page(self, **more):
        return Page(self, **more)

    def close(self):
        try:
            self.call("Browser.close", timeout=5)
        except (ProtocolError, OSError):
            pass
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        for fd in (self.out, self.into):
            os.close(fd)
        self.folder.cleanup()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


class Page:
    """One tab with cookies of its own. Keeps every console message, exception, violation and request."""

    def __init__(self, browser, width=1440, height=900, mobile=False, dark=False, calm_motion=True):
        self.browser = browser
        self.console, self.exceptions, self.requests, self.dialogs = [], [], {}, []
        self.violations, self.closed = [], False
        self.traced, self.trace_ended = [], threading.Event()
        self.context = browser.call("Target.createBrowserContext")["browserContextId"]
        target = browser.call("Target.createTarget", {"url": "about:blank", "browserContextId": self.context})["targetId"]
        self.session = browser.call("Target.attachToTarget", {"targetId": target, "flatten": True})["sessionId"]
        browser.pages[self.session] = self
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        # Its own work, and not what others do meanwhile.
        self.call("Performance.enable", {"timeDomain": "threadTicks"})
        self.call("Page.addScriptToEvaluateOnNewDocument", {"source": """
            window.violations = [];
            document.addEventListener("securitypolicyviolation", (e) => violations.push(`${e.violatedDirective} ${e.blockedURI} ${e.sourceFile}:${e.lineNumber}`));
        """})
        self.size(width, height, mobile)
        self.media(dark, calm_motion)

    def call(self, method, params=None, timeout=30):
        return self.browser.call(method, params, self.session, timeout)

    def event(self, method, params):
        if method == "Runtime.consoleAPICalled":
            self.console.append((params["type"], " ".join(str(a.get("value", a.get("description", ""))) for a in params["args"])))
        elif method == "Runtime.exceptionThrown":
            details = params["exceptionDetails"]
            self.exceptions.append(details.get("exception", {}).get("description") or details["text"])
        elif method == "Log.entryAdded":
            entry = params["entry"]
            self.console.append((f"{entry['source']} {entry['level']}", f"{entry['text']} {entry.get('url', '')}"))
        elif method == "Network.requestWillBeSent":
            self.requests[params["requestId"]] = {"url": params["request"]["url"], "bytes": 0}
        elif method == "Network.webSocketCreated":
            self.requests[params["requestId"]] = {"url": params["url"], "bytes": 0}
        elif method == "Network.dataReceived" and params["requestId"] in self.requests:
            self.requests[params["requestId"]]["bytes"] += params["dataLength"]
        elif method == "Tracing.dataCollected":
            self.traced += params["value"]
        elif method == "Tracing.tracingComplete":
            self.trace_ended.set()
        elif method == "Page.javascriptDialogOpening":
            self.dialogs.append(params["message"])

    def size(self, width, height, mobile=False):
        self.call("Emulation.setDeviceMetricsOverride", {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": mobile})

    def media(self, dark=False, calm_motion=True):
        self.call("Emulation.setEmulatedMedia", {"features": [
            {"name": "prefers-color-scheme", "value": "dark" if dark else "light"},
            {"name": "prefers-reduced-motion", "value": "reduce" if calm_motion else "no-preference"}]})

    def goto(self, url):
        answer = self.call("Page.navigate", {"url": url})
        if "errorText" in answer:
            raise ProtocolError(f"{url}: {answer['errorText']}")

    def eval(self, script, timeout=30):
        answer = self.call("Runtime.evaluate", {"expression": script, "awaitPromise": True, "returnByValue": True, "userGesture": True}, timeout)
        if "exceptionDetails" in answer:
            details = answer["exceptionDetails"]
            raise ProtocolError(details.get("exception", {}).get("description") or details["text"])
        return answer["result"].get("value")

    def wait(self, script, timeout=10, every=0.05):
        """Polls until the script is true; returns the seconds it took."""
        start = time.monotonic()
        while True:
            value = self.eval(f"!!({script})")
            if value:
                return time.monotonic() - start
            if time.monotonic() - start > timeout:
                raise ProtocolError(f"not true in {timeout} s: {script}")
            time.sleep(every)

    def key(self, name, shift=False):
        code, text = KEYS[name]
        common = {"key": name, "code": name, "windowsVirtualKeyCode": code, "modifiers": 8 if shift else 0}
        self.call("Input.dispatchKeyEvent", {"type": "keyDown" if text else "rawKeyDown", "text": text, **common})
        self.call("Input.dispatchKeyEvent", {"type": "keyUp", **common})

    def type(self, text):
        self.call("Input.insertText", {"text": text})

    def click(self, selector):
        box = self.eval(f"(() => {{ const e = document.querySelector({json.dumps(selector)}); e.scrollIntoView({{block: 'center'}}); "
                        "const r = e.getBoundingClientRect(); return [r.x + r.width / 2, r.y + r.height / 2] })()")
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", {"type": kind, "x": box[0], "y": box[1], "button": "left", "clickCount": 1})

    def screenshot(self, path):
        data = self.call("Page.captureScreenshot", {"format": "png"}, timeout=60)["data"]
        pathlib.Path(path).write_bytes(base64.b64decode(data))

    def trace(self):
        """From now on each task of the browser is written down."""
        self.traced.clear()
        self.trace_ended.clear()
        self.call("Tracing.start", {"transferMode": "ReportEvents", "traceConfig": {"includedCategories": ["disabled-by-default-devtools.timeline"], "excludedCategories": ["*"]}})

    def longest_task_ms(self):
        """Since `trace`, on a page's main thread: the processor's time, whoever else had the processor meanwhile."""
        self.call("Tracing.end")
        if not self.trace_ended.wait(60):
            raise ProtocolError("the trace has no end")
        main = {(e["pid"], e["tid"]) for e in self.traced if e["name"] == "thread_name" and e["args"]["name"] == "CrRendererMain"}
        tasks = [e["tdur"] for e in self.traced if e["name"] == "RunTask" and "tdur" in e and (e["pid"], e["tid"]) in main]
        if not tasks:
            raise ProtocolError("the trace has no tasks")
        return max(tasks) / 1000

    def metrics(self):
        return {m["name"]: m["value"] for m in self.call("Performance.getMetrics")["metrics"]}

    def close(self):
        self.violations, self.closed = self.eval("window.violations"), True
        self.browser.pages.pop(self.session, None)
        self.browser.call("Target.disposeBrowserContext", {"browserContextId": self.context})
