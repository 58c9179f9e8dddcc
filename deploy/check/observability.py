"""Checks deploy/observability and docs/metrics.md: names, rules, panels and files against each other, and by Prometheus itself.

Usage: observability.py ROOT WORK PROMETHEUS-FOLDER-or-"". WORK is an empty folder; the other holds the programs promtool and
prometheus, without which their part is skipped. Prints lines `ok WHAT`, `FAIL WHAT: WHY`, `skip WHAT: WHY`; run by deploy/check.sh.
Everything it starts listens on 127.0.0.1 and ends with it.
"""

import http.server
import itertools
import json
import pathlib
import re
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import time
import urllib.parse
import urllib.request

import yaml

ROOT, WORK = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2])
TOOLS = pathlib.Path(sys.argv[3]) if sys.argv[3] else None
HOME = ROOT / "deploy/observability"
DASHBOARD = HOME / "grafana/dashboards/voxfleet.json"
# What the scrape configuration adds, and what Prometheus makes itself.
SCRAPED = {"job", "instance", "fleet"}
OF_PROMETHEUS = {"up": set(), "ALERTS": {"alertname", "alertstate", "severity", "service", "gpu_id"}}
KEYWORDS = {"and", "or", "unless", "bool", "offset", "by", "on", "ignoring", "without", "group_left", "group_right"}
TOKEN = "a-token-of-this-check"


def report(what, problems):
    print(f"ok {what}" if not problems else "\n".join(f"FAIL {what}: {p}" for p in problems))


# ------------------------------------------------------------------------------------------------ docs/metrics.md


class Metric:
    def __init__(self, kind, labels):
        self.kind, self.labels = kind, labels  # label -> None (any value) or ([values], more may come)


def listed():
    """Metrics of the page by section: {"Dispatcher": {name: Metric}, "Worker": {...}}."""
    sections, section, problems = {}, None, []
    for line in (ROOT / "docs/metrics.md").read_text().splitlines():
        if line.startswith("## "):
            section = sections.setdefault(line[3:].strip(), {})
        cells = [c.strip() for c in line.strip("|").split("|")]
        if section is None or len(cells) != 5 or not (name := re.fullmatch(r"`(\w+)`", cells[0])):
            continue
        labels = {}
        for label, values in re.findall(r"`(\w+)`(?: \(([^)]*)\))?", cells[3]):
            values = [v.strip() for v in values.split(",")] if values else None
            labels[label] = values and ([v for v in values if v != "..."], "..." in values)
        if name[1] in section:
            problems.append(f"{name[1]} stands there twice")
        section[name[1]] = Metric(cells[1], labels)
    for section, metrics in sections.items():
        for name, metric in metrics.items():
            if metric.kind not in ("gauge", "counter"):
                problems.append(f"{name}: {metric.kind} is no type")
            if (metric.kind == "counter") != name.endswith("_total"):
                problems.append(f"{name}: a {metric.kind} by that name")
    if set(sections) != {"Dispatcher", "Worker"} or not all(sections.values()):
        problems.append("tables of Dispatcher and Worker are expected")
    report(f"docs/metrics.md: {', '.join(f'{len(m)} of the {s.lower()}' for s, m in sections.items())}", problems)
    return sections


def exposition(metrics):
    """What a process with all of these would answer: each label with each of its values."""
    lines = []
    for name, metric in metrics.items():
        lines += [f"# HELP {name} as docs/metrics.md says", f"# TYPE {name} {metric.kind}"]
        choices = [[(label, v) for v in (values[0] if values else [f"{label}-1"])] for label, values in metric.labels.items()]
        for labels in itertools.product(*choices):
            lines.append(name + ("{" + ",".join(f'{k}="{v}"' for k, v in labels) + "}" if labels else "") + " 1")
    return "\n".join(lines) + "\n"


# ------------------------------------------------------------------------------------------------ expressions


class Names:
    """Whether an expression uses only what there is."""

    def __init__(self, sections):
        self.known = {name: dict.fromkeys(labels) for name, labels in OF_PROMETHEUS.items()}
        for metrics in sections.values():
            for name, metric in metrics.items():
                self.known.setdefault(name, {}).update(metric.labels)
        self.labels = SCRAPED | {label for labels in self.known.values() for label in labels}

    def problems(self, expression):
        found = []
        for name, matchers in re.findall(r"([A-Za-z_:][\w:]*)\s*\{([^}]*)\}", expression):
            labels = self.known.get(name, {})
            for label, operator, value in re.findall(r'(\w+)\s*(=~|!~|!=|=)\s*"([^"]*)"', matchers):
                if label not in SCRAPED and label not in labels:
                    found.append(f"{name} has no label {label}")
                elif (values := labels.get(label)) and not values[1] and not value.startswith("$"):
                    asked = value.split("|") if "~" in operator else [value]
                    found += [f"{name}: {label} is never {v!r}" for v in asked if v and v not in values[0]]
        bare = re.sub(r'"[^"]*"', '""', expression)
        for group in re.findall(r"\b(?:by|on|ignoring|without|group_left|group_right)\s*\(([^)]*)\)", bare):
            found += [f"no metric has a label {label}" for label in re.findall(r"\w+", group) if label not in self.labels]
        bare = re.sub(r"\{[^}]*\}|\[[^]]*\]|\b(?:by|on|ignoring|without|group_left|group_right)\s*\([^)]*\)", " ", bare)
        for name, call in re.findall(r"(?<![\w$.])([A-Za-z_:][\w:]*)\s*(\()?", bare):
            if not call and name not in KEYWORDS and name not in self.known:
                found.append(f"{name} is not in docs/metrics.md")
        return found


# ------------------------------------------------------------------------------------------------ rules


def rules(names):
    groups = yaml.safe_load((HOME / "rules/voxfleet.yml").read_text())["groups"]
    tests = yaml.safe_load((HOME / "rules/voxfleet_test.yml").read_text())["tests"]
    runbook = ROOT / "docs/runbook.md"
    headings = None
    if runbook.is_file():
        section = re.search(r"^## Alerts$(.*?)(?=^## |\Z)", runbook.read_text(), re.M | re.S)
        headings = {h.strip() for h in re.findall(r"^### (.*)$", section[1] if section else "", re.M)}
        every = [h.strip().lower() for h in re.findall(r"^##+ (.*)$", runbook.read_text(), re.M)]
        report("docs/runbook.md: one section a heading", [f"{h} stands there twice" for h in sorted(set(every)) if every.count(h) > 1])
    fires, silent, worded = set(), 0, set()
    for test in tests:
        for moment in test.get("promql_expr_test", []):
            silent += not moment["exp_samples"]
            for sample in moment["exp_samples"]:
                labels = dict(re.findall(r'(\w+)="([^"]*)"', sample["labels"]))
                # A count of alerts names none.
                if "alertname" in labels:
                    fires.add((labels["alertname"], labels["severity"]))
        for moment in test.get("alert_rule_test", []):
            worded |= {moment["alertname"] for alert in moment["exp_alerts"]}
    problems, seen = [], set()
    for rule in (rule for group in groups for rule in group["rules"]):
        name, severity = rule["alert"], rule.get("labels", {}).get("severity")
        notes = rule.get("annotations", {})
        if (name, severity) in seen or severity not in ("critical", "warning") or rule["labels"].get("service") != "voxfleet":
            problems.append(f"{name}: twice with one severity, or none, or not of the service voxfleet")
        seen.add((name, severity))
        if notes.get("runbook") != f"docs/runbook.md#{name.lower()}" or set(notes) != {"summary", "description", "runbook"}:
            problems.append(f"{name}: summary, description, and runbook with docs/runbook.md#{name.lower()} are wanted")
        problems += [f"{name}: {p}" for p in names.problems(rule["expr"])]
        if (name, severity) not in fires:
            problems.append(f"{name} ({severity}): no test sees it fire")
        if name not in worded:
            problems.append(f"{name}: no test reads its words")
        if headings is not None and name not in headings:
            problems.append(f"{name}: no section in docs/runbook.md")
    if headings is not None:
        problems += [f"docs/runbook.md: {h} is no alert" for h in sorted(headings - {name for name, _ in seen})]
    else:
        print("skip alerts in docs/runbook.md: there is no such page")
    if silent < len(seen):
        problems.append("more tests of silence are wanted than there are alerts")
    report(f"alerts: {len(seen)} rules with names, words and tests", problems)


# ------------------------------------------------------------------------------------------------ Grafana


def expressions(dashboard):
    """(where, expression) of every query, variables filled in as Grafana would with everything chosen."""

    def filled(text):
        text = re.sub(r"\$__(rate_)?interval\b", "1m", text)
        return re.sub(r"\$(fleet|gpu)\b", ".*", text)

    for panel in dashboard["panels"]:
        for target in panel.get("targets", []):
            yield f"{panel['title']}, {target['refId']}", filled(target["expr"])
    for note in dashboard["annotations"]["list"]:
        yield f"annotation {note['name']}", filled(note["expr"])
    for variable in dashboard["templating"]["list"]:
        if variable["type"] == "query":
            inner = re.fullmatch(r"label_values\((.*), (\w+)\)", variable["definition"])
            yield f"variable {variable['name']}", filled(inner[1])


def dashboard(names):
    board, problems = json.loads(DASHBOARD.read_text()), []
    panels = board["panels"]
    ids = [p["id"] for p in panels]
    if len(ids) != len(set(ids)):
        problems.append("two panels have one id")
    taken = {}
    for panel in panels:
        at = panel["gridPos"]
        if at["x"] + at["w"] > 24:
            problems.append(f"{panel['title']}: wider than the page")
        for cell in itertools.product(range(at["x"], at["x"] + at["w"]), range(at["y"], at["y"] + at["h"])):
            if taken.setdefault(cell, panel["title"]) != panel["title"]:
                problems.append(f"{panel['title']} lies over {taken[cell]}")
                break
        for thing in [panel, *panel.get("targets", [])]:
            if panel["type"] != "row" and thing["datasource"] != {"type": "prometheus", "uid": "${datasource}"}:
                problems.append(f"{panel['title']}: its source is not the one that is chosen")
    found = list(expressions(board))
    for where, expression in found:
        problems += [f"{where}: {p}" for p in names.problems(expression)]
        if "$" in expression:
            problems.append(f"{where}: an unknown variable in {expression}")
    used = {name for _, e in found for name in re.findall(r"\b(?:voxfleet|process)_\w+", e)}
    provider = yaml.safe_load((HOME / "grafana/provisioning/dashboards/voxfleet.yml").read_text())["providers"][0]
    source = yaml.safe_load((HOME / "grafana/provisioning/datasources/voxfleet.yml").read_text())["datasources"][0]
    services = yaml.safe_load((HOME / "compose.yml").read_text())["services"]
    if f"./grafana/dashboards:{provider['options']['path']}:ro" not in services["grafana"]["volumes"]:
        problems.append("compose.yml mounts the dashboards elsewhere than where the provider looks")
    if f"--web.listen-address={source['url'].removeprefix('http://')}" not in services["prometheus"]["command"]:
        problems.append("compose.yml has Prometheus listen elsewhere than where the data source asks")
    # A token that is replaced is another file, which a mount of the old one never sees.
    settings = yaml.safe_load((HOME / "prometheus.yml").read_text())
    for job in settings["scrape_configs"]:
        if token := job.get("authorization", {}).get("credentials_file"):
            folder = f":/etc/prometheus/{pathlib.PurePosixPath(token).parent}:ro"
            if not any(mount.endswith(folder) for mount in services["prometheus"]["volumes"]):
                problems.append(f"compose.yml mounts no folder where {job['job_name']} has {token}")
    scrape = settings["global"]["scrape_interval"]
    if source["jsonData"]["timeInterval"] != scrape:
        problems.append("the data source believes in another scrape interval")
    report(f"dashboard: {len(found)} expressions over {len(used)} metrics, {len(panels)} panels side by side", problems)
    return found


# ------------------------------------------------------------------------------------------------ Prometheus itself


def promtool(sections, found):
    # A quantile over what is there now: a summary would have counted since a start.
    meant = 'non-summary metrics should not have "quantile" label'

    def run(what, *arguments, given=None):
        done = subprocess.run([TOOLS / "promtool", *arguments], input=given, capture_output=True, text=True, cwd=WORK / "etc")
        said = [line.strip() for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        wrong = [line for line in said if "SUCCESS" not in line and not line.startswith(("Checking", "Unit Testing"))]
        left = [line for line in wrong if not line.endswith(meant)]
        fine = done.returncode == 0 or (given and wrong and not left)
        report(what, [] if fine else [" ".join(left)[:2000] or f"exit code {done.returncode}"])

    extracted = {"groups": [{"name": "panels", "rules": [{"record": f"panel:{n}", "expr": e} for n, (_, e) in enumerate(found)]}]}
    (WORK / "etc/panels.yml").write_text(yaml.safe_dump(extracted))
    run("promtool check config prometheus.yml", "check", "config", "prometheus.yml")
    run("promtool check rules voxfleet.yml, and every expression of the dashboard", "check", "rules", "rules/voxfleet.yml", "panels.yml")
    run("promtool test rules: each alert fires when it must, and is silent when it must not", "test", "rules", "rules/voxfleet_test.yml")
    for section, metrics in sections.items():
        run(f"promtool check metrics: names of the {section.lower()}", "check", "metrics", given=exposition(metrics))


def serve(text, secured):
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            allowed = not secured or self.headers.get("Authorization") == f"Bearer {TOKEN}"
            self.send_response(200 if allowed and self.path == "/metrics" else 401)
            self.send_header("Content-Type", "text/plain; version=0.0.4")
            self.end_headers()
            self.wfile.write(text.encode() if allowed else b"")

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    if secured:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(WORK / "server.pem", WORK / "server-key.pem")
        server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server.server_address[1]


def certificate():
    key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2", "-subj", "/CN=check"]
    subprocess.run(
        ["openssl", "req", "-x509", *key, "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", "server-key.pem", "-out", "server.pem"],
        cwd=WORK, check=True, capture_output=True,
    )


def live(sections, found):
    """The real configuration in a real Prometheus, which scrapes what the page promises, without and with TLS and a token."""
    certificate()
    etc = WORK / "etc"
    dispatcher, worker = exposition(sections["Dispatcher"]), exposition(sections["Worker"])
    targets = {"here": [serve(dispatcher, False)], "dispatchers": [serve(dispatcher, True)], "workers": [serve(worker, True)]}
    for name, ports in targets.items():
        chosen = [{"targets": [f"127.0.0.1:{p}" for p in ports], "labels": {"fleet": "main"}}]
        (etc / f"targets/{name}.yml").write_text(yaml.safe_dump(chosen))
    text = (etc / "prometheus.yml").read_text()
    text = re.sub(r"(scrape_interval|evaluation_interval|scrape_timeout): \d+s", r"\1: 1s", text)
    text = re.sub(r"# (tls_config:.*)voxfleet-ca.pem", rf"\1{WORK}/server.pem", text)
    (etc / "prometheus.yml").write_text(text)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    arguments = [f"--config.file={etc}/prometheus.yml", f"--storage.tsdb.path={WORK}/data", f"--web.listen-address=127.0.0.1:{port}"]
    with open(WORK / "prometheus.log", "w") as log:
        process = subprocess.Popen([TOOLS / "prometheus", *arguments], stdout=log, stderr=log, stdin=subprocess.DEVNULL)

    def ask(path, **query):
        url = f"http://127.0.0.1:{port}/api/v1/{path}?{urllib.parse.urlencode(query)}"
        with urllib.request.urlopen(url, timeout=10) as answer:
            return json.load(answer)["data"]

    def eventually(wanted):
        """Tries until it holds; the last look at it is what is returned."""
        deadline, last = time.monotonic() + 40, None
        while time.monotonic() < deadline and process.poll() is None:
            try:
                if (last := wanted()) == []:
                    return last
            except OSError as error:
                last = [str(error)]
            time.sleep(0.3)
        return last or ["it ended: " + " ".join((WORK / "prometheus.log").read_text().splitlines()[-2:])]

    def not_up():
        seen = {r["metric"]["job"]: [] for r in ask("query", query="up")["result"]}
        for r in ask("query", query="up == 1")["result"]:
            seen.setdefault(r["metric"]["job"], []).append(r)
        counts = {job: len(seen.get(job, [])) for job in ("voxfleet-dispatcher", "voxfleet-worker")}
        return [] if counts == {"voxfleet-dispatcher": 2, "voxfleet-worker": 1} else [f"up: {counts}"]

    def ill():
        rules = [r for g in ask("rules")["groups"] for r in g["rules"]]
        return [f"{r['name']}: {r.get('lastError', r['health'])}" for r in rules if r["health"] != "ok"] or ([] if rules else ["no rules"])

    def empty():
        return [f"{where}: nothing for {e}" for where, e in found if not ask("query", query=e)["result"] and not where.startswith("annotation")]

    try:
        report("prometheus: scrapes with prometheus.yml, on loopback, and elsewhere by TLS and a token from a file", eventually(not_up))
        report("prometheus: evaluates every rule", eventually(ill))
        report(f"prometheus: each of {len(found)} expressions of the dashboard finds what docs/metrics.md promises", eventually(empty))
        (etc / "tokens/voxfleet.token").write_text("another-token\n")
        refused = eventually(lambda: [] if len(ask("query", query="up == 0")["result"]) == 2 else ["who has another token gets in"])
        report("prometheus: the token is read from its file each time, and another one gets nothing", refused)
    finally:
        process.terminate()
        process.wait(20)


sections = listed()
names = Names(sections)
rules(names)
found = dashboard(names)
if TOOLS is None:
    print("skip promtool, prometheus: not here (apt-get install prometheus)")
else:
    shutil.copytree(HOME, WORK / "etc")
    (WORK / "etc/tokens").mkdir(exist_ok=True)
    (WORK / "etc/tokens/voxfleet.token").write_text(TOKEN + "\n")
    promtool(sections, found)
    if shutil.which("openssl") and (TOOLS / "prometheus").exists():
        live(sections, found)
    else:
        print("skip prometheus with the real configuration: no openssl or no prometheus here")
