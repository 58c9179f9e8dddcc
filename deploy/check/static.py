"""What can be said of the deploy files by reading them: Dockerfiles, compose files, units, pins that must agree, measurements.

Usage: static.py ROOT COMPOSE_SCHEMA-or-"". Prints one line a finding, `ok WHAT` or `FAIL WHAT: WHY`; run by deploy/check.sh.
"""

import fnmatch
import json
import pathlib
import re
import sys

ROOT = pathlib.Path(sys.argv[1])
SCHEMA = sys.argv[2]
COMPILERS = {"g++", "gcc", "make", "cmake", "clang", "build-essential", "cargo", "rustc", "python3-pip", "git"}


def report(what, problems):
    print(f"ok {what}" if not problems else "\n".join(f"FAIL {what}: {p}" for p in problems))


def read(path):
    return (ROOT / path).read_text()


# ------------------------------------------------------------------------------------------------ Dockerfiles


def instructions(text):
    """Instructions with their arguments, continuation lines joined, comments dropped."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n", " ", "\n".join(lines))
    return [tuple(line.split(None, 1)) for line in joined.splitlines() if line.strip()]


def ignored(path):
    """Whether .dockerignore keeps a path out of the build; the last rule that matches it, or a folder of its, counts."""
    out = False
    for rule in read(".dockerignore").splitlines():
        if not rule or rule.startswith("#"):
            continue
        keep, pattern = rule.startswith("!"), rule.removeprefix("!")
        parts = pathlib.PurePosixPath(path).parts
        above = ["/".join(parts[: n + 1]) for n in range(len(parts))]
        if pattern == "**" or any(fnmatch.fnmatch(a, pattern) or fnmatch.fnmatch("/" + a, "/" + pattern) for a in above):
            out = not keep
    return out


def dockerfile(name):
    found, problems = instructions(read(name)), []
    froms = [n for n, i in enumerate(found) if i[0] == "FROM"]
    if len(froms) < 2:
        problems.append("one stage: the compiler would be in the image")
    last = found[froms[-1] :]
    arguments = dict(a.split("=", 1) for k, a in found if k == "ARG" and "=" in a)

    def filled(text):
        return re.sub(r"\$\{(\w+)\}", lambda m: arguments.get(m[1], m[0]), text)

    for _, image in (found[n] for n in froms):
        image = filled(image).split()[0]
        if ":" not in image or image.endswith(":latest"):
            problems.append(f"base image {image} has no version")
    users = [filled(a) for k, a in last if k == "USER"]
    if not users or users[-1] in ("0", "root"):
        problems.append("runs as root")
    health = " ".join(a for k, a in last if k == "HEALTHCHECK")
    if not all(o in health for o in ("--interval=30s", "--timeout=10s", "--retries=3")):
        problems.append("no HEALTHCHECK every 30 s, of 10 s at most, with 3 tries")
    for kind in ("ENTRYPOINT", "CMD"):
        if not any(k == kind and a.startswith("[") for k, a in last):
            problems.append(f"no {kind} in list form: a shell in between would keep signals to itself")
    for kind, text in last:
        words = set(re.split(r"[\s;&|]+", text))
        if kind == "RUN" and "install" in words and (bad := words & COMPILERS):
            problems.append(f"{', '.join(sorted(bad))} in the final image")
    for kind, text in found:
        if kind == "RUN" and "apt-get install" in text:
            if "--no-install-recommends" not in text or "rm -rf /var/lib/apt/lists" not in text:
                problems.append("apt-get install without --no-install-recommends, or its lists are left")
        if kind == "ADD":
            problems.append("ADD: COPY does it, and fetches nothing")
        if kind == "COPY" and "--from" not in text:
            for source in [w for w in text.split() if not w.startswith("--")][:-1]:
                if source == ".":
                    continue
                if not (ROOT / source).exists():
                    problems.append(f"COPY {source}: not there")
                elif ignored(source):
                    problems.append(f"COPY {source}: .dockerignore keeps it out")
    report(name, problems)


def build_context():
    """Every crate of the workspace must reach the build stage, and nothing big beside them."""
    members = re.search(r"members = \[(.*?)\]", read("Cargo.toml"), re.S)[1]
    needed = ["Cargo.toml", "Cargo.lock", "deploy/cuda-build.sh", "deploy/tools/cuda-wheels.txt", "deploy/tools/runtime-wheels.txt"]
    needed += [f"{m}/Cargo.toml" for m in re.findall(r'"(.*?)"', members)]
    needed += ["nats/conf/dev.conf", "store/models.toml", "examples/producer.rs"]  # compiled in, or named by a Cargo.toml
    problems = [f"{p} is kept out" for p in needed if ignored(p)]
    problems += [f"{p} would be sent" for p in ("target/debug", ".git/config", "tests/models/x.bin", "worker/target/x") if not ignored(p)]
    report(".dockerignore", problems)


# ------------------------------------------------------------------------------------------------ compose


def how_often(service):
    check = service.get("healthcheck", {})
    if [check.get(k) for k in ("interval", "timeout", "retries")] != ["30s", "10s", 3]:
        yield "no health check every 30 s, of 10 s at most, with 3 tries"


def health_problems(service):
    """Of one of our services: whether it is asked where it listens."""
    check, settings = service.get("healthcheck", {}), service.get("environment", {})
    listens = settings.get(f"VOXFLEET__{str(service['command'][0]).upper()}__HTTP__LISTEN")
    if check.get("test") != ["CMD", "voxfleet", "health", "--at", f"http://{listens}"]:
        yield f"is asked for its health by {check.get('test')}, and listens on {listens}"


def compose(name):
    import yaml

    whole, problems = yaml.safe_load(read(name)), []
    base = (ROOT / name).parent
    if SCHEMA:
        import fastjsonschema

        schema = json.loads(pathlib.Path(SCHEMA).read_text())
        schema.pop("$schema", None)
        known = {k: v for k, v in whole.items() if k != "name"}  # younger than the schema
        try:
            fastjsonschema.compile(schema, formats={"duration": r"^(\d+(us|ms|s|m|h))+$"})(known)
        except fastjsonschema.JsonSchemaException as error:
            problems.append(f"schema: {error.message}")
    services, volumes = whole["services"], whole.get("volumes", {})
    for key, service in services.items():
        build = service.get("build")
        if build and not (base / build["context"] / build["dockerfile"]).is_file():
            problems.append(f"{key}: no {build['dockerfile']} in {build['context']}")
        for mount in service.get("volumes", []):
            source = re.sub(r"\$\{\w+:-(.*?)\}", r"\1", mount).split(":")[0]
            if source.startswith((".", "/")):
                if not (base / source).exists():
                    problems.append(f"{key}: {source} is not there")
            elif source not in volumes:
                problems.append(f"{key}: volume {source} is not declared")
        image = str(service.get("image", ""))
        if not re.search(r":[^:]*\d|^voxfleet:", image):
            problems.append(f"{key}: image {image} has no version")
        problems += [f"{key}: needs {d}, which is no service" for d in service.get("depends_on", {}) if d not in services]
        problems += [f"{key}: publishes {p} to everybody" for p in service.get("ports", []) if not str(p).startswith("127.0.0.1:")]
        problems += [f"{key}: network {n} is not declared" for n in service.get("networks", []) if n not in whole.get("networks", {})]
        if str(service.get("image", "")).startswith("voxfleet") and "profiles" not in service:
            if service.get("cap_drop") != ["ALL"] or not service.get("read_only") or "stop_grace_period" not in service:
                problems.append(f"{key}: not hardened, or no stop_grace_period")
            problems += [f"{key}: {p}" for p in health_problems(service)]
        # Whoever plays a neighbour is nobody's to watch.
        problems += [f"{key}: {p}" for p in ([] if "profiles" in service else how_often(service))]
        # For the check with the real binary: one line a setting.
        for setting, value in service.get("environment", {}).items():
            if setting.startswith("VOXFLEET__"):
                value = re.sub(r"\$\{\w+:-(.*?)\}", r"\1", str(value))
                print(f"setting {setting}={value}")
    report(name, problems)


# ------------------------------------------------------------------------------------------------ units, pins


def milliseconds(text):
    number, unit = re.fullmatch(r"(\d+)(ms|s|min)?", text).groups()
    return int(number) * {"ms": 1, "s": 1000, None: 1000, "min": 60_000}[unit]


def health_unit(name):
    """A check that starts its unit again, and its timer."""
    text, timer, problems = read(name), read(name.replace(".service", ".timer")), []
    watched = re.search(r"^ExecStart=/usr/local/bin/voxfleet-health (\S+)$", text, re.M)
    if not watched or watched[1].replace("%i", "") != pathlib.Path(name).name.replace("-health", ""):
        problems.append("watches another unit than its name says")
    # Its own variables: a setting of the unit's would be an address without a scheme, and stand above the unit's own file.
    if "VOXFLEET_HEALTH_URL=http" not in text or re.search(r"^(Environment|ExecStart)=.*VOXFLEET__", text, re.M):
        problems.append("does not say by VOXFLEET_HEALTH_URL where it asks")
    if "IPAddress" in text:
        problems.append("IPAddressDeny= or IPAddressAllow=: what it watches may listen on any address of this machine")
    values = dict(line.split("=", 1) for line in text.splitlines() if "=" in line and not line.startswith(("#", "Environment=")))
    # A try that hangs itself is given twice its time.
    if milliseconds(values["TimeoutStartSec"]) < 3 * 20_000 + 2 * 30_000:
        problems.append("TimeoutStartSec leaves no time for three tries")
    for must in ("OnActiveSec=30s", "OnUnitInactiveSec=30s", "WantedBy=timers.target"):
        if must not in timer:
            problems.append(f"its timer has no {must}")
    report(f"{name}, and its timer", problems)


def unit(name):
    text, problems = read(name), []
    values = dict(line.split("=", 1) for line in text.splitlines() if "=" in line and not line.startswith(("#", "Environment=")))
    budget = re.search(r"VOXFLEET__WORKER__SHUTDOWN_MS=(\d+)", text)
    if "worker" in name and (not budget or milliseconds(values["TimeoutStopSec"]) < int(budget[1]) + 5_000):
        problems.append("TimeoutStopSec leaves less than 5 s beyond worker.shutdown_ms")
    if "worker" in name and values.get("KillMode") != "mixed":
        problems.append("SIGTERM would reach the engine too")
    # A card, a driver or a server may be away for longer than any count of quick tries lasts.
    if values.get("StartLimitIntervalSec") != "0":
        problems.append("gives up after a number of starts (StartLimitIntervalSec is not 0)")
    if milliseconds(values.get("RestartSec", "100ms")) < 5_000:
        problems.append("tries again without end, and more often than every 5 s")
    if "voxfleet" in name and values.get("RestartPreventExitStatus") != "64":
        problems.append("only bad configuration (exit code 64) is not tried again")
    for must in ("User", "NoNewPrivileges", "ProtectSystem", "CapabilityBoundingSet"):
        if must not in values:
            problems.append(f"no {must}")
    # The environment stands above voxfleet.toml: whoever sets the same there would wonder. worker.shutdown_ms goes with TimeoutStopSec.
    for setting in re.findall(r"^Environment=(VOXFLEET__\w+)", text, re.M):
        if setting != "VOXFLEET__WORKER__SHUTDOWN_MS":
            problems.append(f"{setting} beats what voxfleet.toml says")
    if not (ROOT / re.sub(r"(@?\.service)$", r"-health\1", name)).is_file():
        problems.append("nobody asks whether it is alive")
    report(name, problems)


def pins():
    bootstrap, problems = read("deploy/bootstrap.sh"), []
    pin = dict(re.findall(r"^(\w+)=([\w.]+)", bootstrap, re.M))
    runtime = read("deploy/tools/runtime-wheels.txt")
    for package, version in (("onnxruntime", pin["ORT_VERSION"]), ("silero-vad", pin["SILERO_VERSION"])):
        if f"{package}=={version} " not in runtime:
            problems.append(f"deploy/tools/runtime-wheels.txt: {package} is not {version} as in bootstrap.sh")
    for digest in re.findall(r"sha256:(\w+)", runtime):
        if digest not in bootstrap:
            problems.append(f"checksum {digest[:12]}... of runtime-wheels.txt is not in bootstrap.sh")
    for name in ROOT.glob("deploy/compose/*.yml"):
        for version in re.findall(r"image: nats:([\d.]+)", name.read_text()):
            if version != pin["NATS_SERVER_VERSION"]:
                problems.append(f"{name.name}: nats {version}, bootstrap.sh has {pin['NATS_SERVER_VERSION']}")
    least = re.search(r'rust-version = "([\d.]+)"', read("Cargo.toml"))[1]
    for name in ("cpu", "cuda"):
        image = re.search(r"RUST_IMAGE=rust:([\d.]+)", read(f"deploy/docker/Dockerfile.{name}"))[1]
        if [int(n) for n in image.split(".")] < [int(n) for n in least.split(".")]:
            problems.append(f"Dockerfile.{name}: rust {image}, the workspace needs {least}")
    report("pins agree", problems)


def measurements():
    """Names as docs/measurements/README.md has them, and nothing there that is not JSON."""
    form, problems = re.compile(r"[a-z0-9-]+-\d{4}-\d\d-\d\d-([0-9a-f]{7,}|unknown)(-dirty)?\.json"), []
    folder = ROOT / "docs/measurements"
    if not (folder / "README.md").is_file():
        problems.append("no README.md")
    for path in sorted(folder.glob("*")):
        if path.name == "README.md":
            continue
        if not form.fullmatch(path.name):
            problems.append(f"{path.name}: not WHAT-DEVICE-DATE-COMMIT.json")
        try:
            json.loads(path.read_text())
        except ValueError as error:
            problems.append(f"{path.name}: {error}")
    report("docs/measurements", problems)


for path in ("deploy/docker/Dockerfile.cpu", "deploy/docker/Dockerfile.cuda"):
    dockerfile(path)
build_context()
for path in [*sorted(ROOT.glob("deploy/compose/*.yml")), ROOT / "deploy/observability/compose.yml"]:
    compose(str(path.relative_to(ROOT)))
for path in sorted(ROOT.glob("deploy/systemd/*.service")):
    (health_unit if "-health" in path.name else unit)(str(path.relative_to(ROOT)))
pins()
measurements()
