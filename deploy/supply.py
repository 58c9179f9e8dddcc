"""What voxfleet is made of: licences and sources of its crates, a CycloneDX bill of materials, and the licence texts.

  python3 deploy/supply.py check                licences, bans and sources of Cargo.lock against deny.toml
  python3 deploy/supply.py sbom FILE            CycloneDX 1.6 JSON: the program, its crates and what is in them, wheels, tools
  python3 deploy/supply.py licences FILE        the licence texts of everything that is linked into the program
  python3 deploy/supply.py validate FILE DIR    FILE against CycloneDX's schemas, which lie in DIR (needs fastjsonschema)

Needs cargo and Python 3.11, or 3.10 with pip. The same tree gives the same bytes: nothing of the machine, of the time or
of the order in which files are found is in what it writes (SOURCE_DATE_EPOCH is the one time). FEATURES in the environment names
the cargo features that count (default: worker,dispatcher,ct2-source, as images and releases have).

`check` is what stands in where cargo-deny cannot be had; both read deny.toml, and a licence must pass both.
"""

import hashlib
import json
import os
import pathlib
import re
import subprocess
import sys
import time
import typing
import uuid

try:
    import tomllib
except ImportError:
    from pip._vendor import tomli as tomllib

ROOT = pathlib.Path(__file__).resolve().parent.parent
FEATURES = os.environ.get("FEATURES", "worker,dispatcher,ct2-source")
TARGETS = ("x86_64-unknown-linux-gnu", "aarch64-unknown-linux-gnu")
REGISTRY = "registry+https://github.com/rust-lang/crates.io-index"


class Carried(typing.NamedTuple):
    """C or C++ sources that a crate brings and compiles."""

    name: str
    licence: str
    # Files with the terms. Of source code only its first comment counts. "FILE + TERMS" is for one that names a licence without
    # its text: the text is that of TERMS, from where the licence begins, without the copyright of others.
    texts: tuple
    # Where its version stands.
    file: str = ""
    pattern: str = ""
    # The crate's feature without which it is not compiled.
    feature: str = ""


# Of CTranslate2's third_party the rest is not compiled: googletest and cxxopts are for its tests and its own program, cutlass for
# flash attention, which is not turned on.
CT2 = "CTranslate2"
PARTY = f"{CT2}/third_party"
CARRIED = {
    "whisper-rs-sys": [
        Carried("whisper.cpp", "MIT", ("whisper.cpp/LICENSE",), "whisper.cpp/CMakeLists.txt", r'project\("whisper.cpp" VERSION ([\d.]+)\)'),
    ],
    "opusic-sys": [Carried("opus", "BSD-3-Clause", ("opus/COPYING",))],
    "ct2rs": [
        Carried("CTranslate2", "MIT", (f"{CT2}/LICENSE",), f"{CT2}/python/ctranslate2/version.py", r'__version__ = "([\d.]+)"'),
        Carried("spdlog", "MIT", (f"{PARTY}/spdlog/LICENSE",)),
        Carried("fmt", "MIT", (f"{PARTY}/spdlog/include/spdlog/fmt/bundled/fmt.license.rst",)),
        Carried("ruy", "Apache-2.0", (f"{PARTY}/ruy/LICENSE",)),
        Carried(
            "cpuinfo",
            "BSD-2-Clause",
            (f"{PARTY}/ruy/third_party/cpuinfo/LICENSE", f"{PARTY}/ruy/third_party/cpuinfo/deps/clog/LICENSE"),
        ),
        Carried("cpu_features", "Apache-2.0", (f"{PARTY}/cpu_features/LICENSE",), f"{PARTY}/cpu_features/CMakeLists.txt", r"VERSION ([\d.]+) L"),
        Carried("BS::thread_pool", "MIT", (f"{PARTY}/BS_thread_pool.hpp + {CT2}/LICENSE",), f"{PARTY}/BS_thread_pool.hpp", r"@version ([\d.]+)"),
        Carried(
            "JSON for Modern C++",
            "MIT",
            (f"{CT2}/include/nlohmann/json.hpp + {CT2}/LICENSE",),
            f"{CT2}/include/nlohmann/json.hpp",
            r"version ([\d.]+)",
        ),
        Carried("half", "MIT", (f"{CT2}/include/half_float/half.hpp",), f"{CT2}/include/half_float/half.hpp", r"// Version ([\d.]+)"),
        Carried("avx_mathfun", "MIT AND Zlib", (f"{PARTY}/avx_mathfun.h",)),
        Carried("avx512_mathfun", "BSD-2-Clause", (f"{PARTY}/avx512_mathfun.h + {PARTY}/ruy/third_party/cpuinfo/LICENSE",)),
        Carried("neon_mathfun", "Zlib", (f"{PARTY}/neon_mathfun.h",)),
        Carried(
            "CCCL (Thrust, CUB, libcu++)",
            "Apache-2.0 AND Apache-2.0 WITH LLVM-exception AND BSD-3-Clause AND BSL-1.0",
            (f"{PARTY}/thrust/LICENSE", f"{PARTY}/thrust/thrust/LICENSE", f"{PARTY}/thrust/cub/LICENSE.TXT"),
            feature="cuda",
        ),
    ],
}
# Crates without a file of their terms, which their sources name.
UNFILED = {"ct2rs": f"build.rs + {CT2}/LICENSE"}
# Wheels: what ships, and what only builds or tests. Their licences, which no pin names.
WHEELS = {"runtime-wheels.txt": "required", "cuda-wheels.txt": "optional", "s3-server.txt": "excluded", "linters.txt": "excluded"}
WHEEL_LICENCES = {"onnxruntime": "MIT", "silero-vad": "MIT"}


def stop(problems):
    for problem in problems:
        print(f"supply: {problem}", file=sys.stderr)
    if problems:
        sys.exit(1)


def metadata(*options):
    targets = [word for target in TARGETS for word in ("--filter-platform", target)]
    command = [os.environ.get("CARGO", "cargo"), "metadata", "--locked", "--format-version", "1", *targets, *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        stop([f"cargo metadata --locked: {done.stderr.strip()}"])
    return json.loads(done.stdout)


def locked():
    """(name, version) -> the package's entry in Cargo.lock."""
    lock = tomllib.loads((ROOT / "Cargo.lock").read_text())
    return {(p["name"], p["version"]): p for p in lock["package"]}


def linked():
    """Packages of the program, id -> (package, kind), where kind is `normal` (in the program) or `build` (made it); the edges too."""
    data = metadata("--manifest-path", "cli/Cargo.toml", "--no-default-features", "--features", FEATURES)
    packages = {p["id"]: p for p in data["packages"]}
    nodes = {n["id"]: n for n in data["resolve"]["nodes"]}
    [root] = [i for i in data["workspace_members"] if packages[i]["name"] == "voxfleet"]
    kinds, waiting = {}, [(root, "normal")]
    while waiting:
        found, kind = waiting.pop()
        if kinds.get(found) in ("normal", kind):
            continue
        kinds[found] = kind
        # What a procedural macro needs runs in the compiler.
        macro = any("proc-macro" in t["kind"] for t in packages[found]["targets"])
        for dep in nodes[found]["deps"]:
            of = {k["kind"] for k in dep["dep_kinds"]}
            if None in of:
                waiting.append((dep["pkg"], "build" if macro else kind))
            elif "build" in of:
                waiting.append((dep["pkg"], "build"))
    for found in kinds:
        if any("proc-macro" in t["kind"] for t in packages[found]["targets"]):
            kinds[found] = "build"
        packages[found]["enabled"] = nodes[found]["features"]
    edges = {i: sorted({d["pkg"] for d in nodes[i]["deps"] if d["pkg"] in kinds and {k["kind"] for k in d["dep_kinds"]} - {"dev"}}) for i in kinds}
    return root, {i: (packages[i], kind) for i, kind in kinds.items()}, edges


# ------------------------------------------------------------------------------------------------ check


def spdx(expression):
    """As SPDX writes it: old crates use a slash for OR."""
    return re.sub(r"\s*/\s*", " OR ", expression)


def allowed(expression, allow):
    """Whether an SPDX expression can be fulfilled with the licences of `allow`."""
    words = re.findall(r"[()]|[^\s()]+", spdx(expression))

    def either():
        value = both()
        while words and words[0] == "OR":
            words.pop(0)
            value = both() or value
        return value

    def both():
        value = one()
        while words and words[0] == "AND":
            words.pop(0)
            value = one() and value
        return value

    def one():
        word = words.pop(0)
        if word == "(":
            value = either()
            words.pop(0)
            return value
        if words and words[0] == "WITH":
            words.pop(0)
            word = f"{word} WITH {words.pop(0)}"
        return word in allow

    return either()


def check():
    rules, packages = tomllib.loads((ROOT / "deny.toml").read_text()), metadata("--all-features")["packages"]
    allow, banned = set(rules["licenses"]["allow"]), {d["crate"]: d["reason"] for d in rules["bans"]["deny"]}
    problems, ours, entries = [], 0, locked()
    for package in packages:
        name = f"{package['name']} {package['version']}"
        if package["source"] is None:
            ours += 1
            if not pathlib.Path(package["manifest_path"]).is_relative_to(ROOT):
                problems.append(f"{name}: comes from a folder outside the repository")
            for dep in package["dependencies"]:
                if dep["req"] == "*" and not dep.get("path"):
                    problems.append(f"{name}: takes any version of {dep['name']}")
            continue
        if not package["license"]:
            problems.append(f"{name}: names no licence")
        elif not allowed(package["license"], allow):
            problems.append(f"{name}: {package['license']} is not allowed by deny.toml")
        for inner in CARRIED.get(package["name"], ()):
            if not allowed(inner.licence, allow):
                problems.append(f"{inner.name} in {name}: {inner.licence} is not allowed by deny.toml")
    for (name, version), entry in entries.items():
        source = entry.get("source")
        if name in banned:
            problems.append(f"{name} {version}: banned, {banned[name]}")
        if source not in (None, REGISTRY):
            problems.append(f"{name} {version}: comes from {source}")
        if source == REGISTRY and not re.fullmatch(r"[0-9a-f]{64}", entry.get("checksum", "")):
            problems.append(f"{name} {version}: Cargo.lock has no checksum")
    stop(problems)
    print(f"{len(packages) - ours} crates of others with allowed licences, {len(entries)} in Cargo.lock from one registry with checksums")


# ------------------------------------------------------------------------------------------------ bill of materials


def pins(name):
    """(package, version, [sha256]) of a requirements file; each must have a checksum."""
    text = (ROOT / "deploy/tools" / name).read_text().replace("\\\n", " ")
    for line in text.splitlines():
        if found := re.match(r"([\w.-]+)==(\S+)(.*)", line):
            hashes = re.findall(r"--hash=sha256:([0-9a-f]{64})", found[3])
            # The next line joins a last one that was cut off.
            if not hashes or re.search(r"\w==\w", found[3]):
                stop([f"deploy/tools/{name}: {found[1]} has no checksum"])
            yield found[1], found[2], hashes


def go_modules():
    """(module, version, checksum as go.sum has it)."""
    sums = dict(re.findall(r"^(\S+ v\S+) (h1:\S+)$", (ROOT / "deploy/tools/go.sum").read_text(), re.M))
    text = (ROOT / "deploy/tools/go.mod").read_text()
    for module, version in re.findall(r"^\t(\S+) (v\S+)", text, re.M):
        if f"{module} {version}" not in sums:
            stop([f"deploy/tools/go.mod: {module} {version} has no checksum in go.sum"])
        yield module, version, sums[f"{module} {version}"]


def carried(package):
    """What a crate of the program brings in C or C++ and compiles: [(Carried, version or "")]."""
    found = []
    for inner in CARRIED.get(package["name"], ()):
        if inner.feature and inner.feature not in package["enabled"]:
            continue
        version = ""
        if inner.file:
            text = (pathlib.Path(package["manifest_path"]).parent / inner.file).read_text()
            if not (match := re.search(inner.pattern, text)):
                stop([f"{package['name']}: no version of {inner.name} in {inner.file}"])
            version = match[1]
        found.append((inner, version))
    return found


def carried_components(package):
    for inner, version in carried(package):
        reference = f"carried:{package['name']}:{inner.name}"
        component = {"type": "library", "bom-ref": reference, "name": inner.name, "licenses": [{"expression": inner.licence}]}
        yield {**component, "version": version} if version else component


def sbom():
    root, packages, edges = linked()
    entries = locked()

    def reference(package):
        return f"pkg:cargo/{package['name']}@{package['version']}"

    components, depends = [], {}
    for found, (package, kind) in packages.items():
        component = {
            "type": "application" if found == root else "library",
            "bom-ref": reference(package),
            "name": package["name"],
            "version": package["version"],
            "scope": "required" if kind == "normal" else "excluded",
            "licenses": [{"expression": spdx(package["license"])}],
            "purl": reference(package),
        }
        if package["description"]:
            component["description"] = " ".join(package["description"].split())
        if package["repository"]:
            component["externalReferences"] = [{"type": "vcs", "url": package["repository"]}]
        if package["source"]:
            component["hashes"] = [{"alg": "SHA-256", "content": entries[package["name"], package["version"]]["checksum"]}]
        depends[component["bom-ref"]] = {reference(packages[d][0]) for d in edges[found]}
        if inner := list(carried_components(package)):
            component["components"] = inner
        if found == root:
            del component["scope"]
            program = component
        else:
            components.append(component)
    for name, scope in WHEELS.items():
        for package, version, hashes in pins(name):
            component = {
                "type": "library",
                "bom-ref": f"pkg:pypi/{package}@{version}#{name}",
                "name": package,
                "version": version,
                "scope": scope,
                "purl": f"pkg:pypi/{package}@{version}",
                # One a platform: any of them is the right one.
                "properties": [{"name": "voxfleet:wheel-sha256", "value": h} for h in sorted(hashes)]
                + [{"name": "voxfleet:pinned-in", "value": f"deploy/tools/{name}"}],
            }
            if package in WHEEL_LICENCES:
                component["licenses"] = [{"expression": WHEEL_LICENCES[package]}]
            components.append(component)
            if scope == "required":
                depends[program["bom-ref"]].add(component["bom-ref"])
    for module, version, checksum in go_modules():
        components.append(
            {
                "type": "library",
                "bom-ref": f"pkg:golang/{module}@{version}",
                "name": module,
                "version": version,
                "scope": "excluded",
                "purl": f"pkg:golang/{module}@{version}",
                "properties": [{"name": "voxfleet:go.sum", "value": checksum}, {"name": "voxfleet:pinned-in", "value": "deploy/tools/go.mod"}],
            }
        )
    components.sort(key=lambda c: c["bom-ref"])
    whole = {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {
            "timestamp": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(int(os.environ.get("SOURCE_DATE_EPOCH", "0")))),
            "tools": {"components": [{"type": "application", "name": "voxfleet deploy/supply.py"}]},
            "component": program,
            "properties": [{"name": "voxfleet:cargo-features", "value": FEATURES}],
        },
        "components": components,
        "dependencies": [{"ref": r, **({"dependsOn": sorted(d)} if d else {})} for r, d in sorted(depends.items())],
    }
    # Of its own content: the same materials, the same number.
    digest = hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()
    return {**whole, "serialNumber": f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_URL, digest)}"}


def validate(file, folder):
    import fastjsonschema

    folder = pathlib.Path(folder)

    def schema(name):
        return json.loads((folder / pathlib.PurePosixPath(name).name.replace(".SNAPSHOT", "")).read_text())

    problems, whole = [], json.loads(pathlib.Path(file).read_text())
    try:
        fastjsonschema.compile(schema("bom-1.6.schema.json"), handlers={"http": schema, "https": schema})(whole)
    except fastjsonschema.JsonSchemaException as error:
        problems.append(f"{file}: {error.message[:500]}")
    components = [whole["metadata"]["component"], *whole["components"]]
    references = [c["bom-ref"] for c in components]
    problems += [f"{file}: {r} is there twice" for r in sorted({r for r in references if references.count(r) > 1})]
    for entry in whole["dependencies"]:
        problems += [f"{file}: {r} is nowhere described" for r in [entry["ref"], *entry.get("dependsOn", [])] if r not in references]
    for c in components:
        if c.get("purl", "").startswith("pkg:cargo/") and not c.get("licenses"):
            problems.append(f"{file}: {c['name']} has no licence")
        if c.get("purl", "").startswith("pkg:cargo/") and not c["name"].startswith("voxfleet") and not c.get("hashes"):
            problems.append(f"{file}: {c['name']} has no checksum")
    stop(problems)
    shipped = sum(c.get("scope") == "required" for c in components)
    print(f"{len(components)} components, {shipped} of them in the program or beside it")


# ------------------------------------------------------------------------------------------------ licence texts


def terms(folder, source):
    """The terms that a file states, or that it names and another has; see Carried.texts."""
    path, _, other = source.partition(" + ")
    text = (folder / path).read_text(errors="replace")
    if pathlib.PurePosixPath(path).suffix in (".h", ".hpp", ".rs"):
        text = re.match(r"(\s*(/\*.*?\*/|//[^\n]*\n))+", text, re.S)[0]
    if other:
        whole = (folder / other).read_text()
        text = f"{text.strip()}\n\n{whole[re.search('Permission is hereby|Redistribution and use', whole).start() :]}"
    return text


def texts(package):
    """Licence texts of a crate, and of what it carries: [(whose, text)]."""
    folder, name = pathlib.Path(package["manifest_path"]).parent, f"{package['name']} {package['version']}"
    names = [f.name for f in folder.iterdir() if f.is_file() and re.match(r"(?i)(licen[cs]e|copying|unlicense|notice)", f.name)]
    if package["license_file"] and package["license_file"] not in names:
        names.append(package["license_file"])
    if package["name"] in UNFILED:
        names.append(UNFILED[package["name"]])
    found = [(name, source) for source in sorted(names)]
    found += [(f"{inner.name} in {name}", source) for inner, _ in carried(package) for source in inner.texts]
    return [(whose, terms(folder, source).strip().replace("\r\n", "\n")) for whose, source in found]


def licences():
    """One page: who is in it under what, then each text once, with those that it belongs to."""
    _, packages, _ = linked()
    chosen = [p for p, kind in packages.values() if kind == "normal" and p["source"]]
    chosen.sort(key=lambda p: (p["name"], p["version"]))
    apache = (ROOT / "LICENSE").read_text().strip()
    shared, problems, lines = {}, [], []
    for package in chosen:
        name = f"{package['name']} {package['version']}"
        lines.append(f"{name}: {spdx(package['license'])}" + (f" ({package['repository']})" if package["repository"] else ""))
        lines += [f"  with {inner.name}{version and ' '}{version}: {inner.licence}" for inner, version in carried(package)]
        found = texts(package)
        # Some crates leave their text out. Those that may be had under Apache-2.0 are; its text is in LICENSE.
        if not found and allowed(package["license"], {"Apache-2.0"}):
            found = [(name, apache)]
        # These ask for no text to go with them.
        if not any(whose == name for whose, _ in found) and not allowed(package["license"], {"Unlicense", "CC0-1.0", "0BSD", "MIT-0"}):
            problems.append(f"{name}: {package['license']}, and no text is with it")
        for whose, text in found:
            shared.setdefault(text, []).append(whose)
    stop(problems)
    parts = ["Licences of what is linked into voxfleet. Crates, each with the expression that it names:", "", *lines]
    for text, owners in sorted(shared.items(), key=lambda item: item[1]):
        parts += ["", "=" * 100, ", ".join(dict.fromkeys(owners)), "=" * 100, "", text]
    return "\n".join(parts) + "\n"


match sys.argv[1:]:
    case ["check"]:
        check()
    case ["sbom", file]:
        pathlib.Path(file).write_text(json.dumps(sbom(), indent=1, ensure_ascii=False) + "\n")
    case ["licences", file]:
        pathlib.Path(file).write_text(licences())
    case ["validate", file, folder]:
        validate(file, folder)
    case _:
        print(__doc__, file=sys.stderr)
        sys.exit(64)
