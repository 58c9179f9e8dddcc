#!/bin/sh
# From a fresh clone to a running system, in one command:
#
#   sh deploy/bootstrap.sh demo     stream a call through two workers and watch it being transcribed
#   sh deploy/bootstrap.sh test     build and run every test
#   sh deploy/bootstrap.sh test-ct2 the tests of the batched engine, which a plain build does not have
#
# Fetches what cargo cannot (nats-server, the nats CLI, cmake, ONNX Runtime, the Silero VAD model; for the tests also the
# Python client nats-py, an S3 server, libfaketime and Chromium with axe-core) into a user cache, never system-wide, then builds and runs. Safe to repeat and to run twice at once. POSIX sh; see `help` below.
#
# Invariants: a file appears in the cache only when it is whole and checked (staged beside it, then renamed); what differs from
# its checksum is refused, and so is what has none unless VOXFLEET_UNPINNED=1 allows it; every fall-back says what it does. Steps
# go to standard error, so that `demo --json` keeps standard output to itself.
set -eu

# Pinned versions. nats-server and the CLI must agree with deploy/tools/go.mod (checked below).
NATS_SERVER_VERSION=2.15.2
NATS_SERVER_MIN=2.12.0      # oldest server that has every stream feature we use
NATS_CLI_VERSION=0.4.0
GO_MIN=1.26                 # what deploy/tools/go.mod asks for
CMAKE_VERSION=3.31.10       # the last 3.x: builds old CMakeLists that 4.x refuses
CMAKE_MIN=3.20
ORT_VERSION=1.31.1
ORT_MIN=1.20                # the API level that the `ort` crate is built for (Cargo.toml: api-20)
SILERO_VERSION=6.2.3
SILERO_SHA256=1a153a22f4509e292a94e67d6f9b85e8deb25b4988682b7e174c65279d8788e3
SILERO_WHEEL_SHA256=7b7f5436cfcb02fae583a05b512ea96467fd449fe54cb49a5e4f06c51a1e43b8
NATS_PY_VERSION=2.16.0      # for the test of examples/producer.py; pure Python, any 3.7 or newer
NATS_PY_SHA256=aeb1ff123966c05833d26c7df7e1d54c1c6d32b612428b21677a2e921f1fecae
AXE_VERSION=4.12.1          # what AXE_WHEEL_VERSION of axe-playwright-python brings; nothing else of that wheel is used
AXE_WHEEL_VERSION=0.1.8
AXE_WHEEL_SHA256=fdd263c998388f1a8e67cad02677e612d946248bd44d163be5e8650ea31f95f8

# The batched engine, for `cargo --workspace`, and its library: the version whose headers come with the crate ct2rs 0.10.3.
CT2_FEATURES=voxfleet-worker/ct2,voxfleet/ct2
CT2_VERSION=4.8.4
NUMPY_VERSION=2.2.6         # what it needs in Python

ROOT=$(cd -- "$(dirname -- "$0")/.." && pwd -P)

usage() {
    cat <<'USAGE'
usage: sh deploy/bootstrap.sh <verb> [arguments]

  demo [args]    build, then transcribe a test call live with two workers   (voxfleet demo --help)
  test [args]    build and run every test; arguments go to `cargo test`
  test-ct2       build voxfleet with the batched engine (cargo feature ct2) as voxfleet-ct2, and run what that adds to the
                 tests
  bench [args]   release build, then `voxfleet bench [args]`
  lint           cargo fmt --check and cargo clippy with warnings as errors, without the feature ct2 and with it
  deps           only fetch what cargo cannot: nats-server, nats, cmake, ONNX Runtime, Silero VAD, CTranslate2
                 (its library, and for Python), nats-py, an S3 server, libfaketime, Chromium and axe-core for tests
  env            print `export` lines for a shell: eval "$(sh deploy/bootstrap.sh env)"
  help           this text

Needed beforehand: Linux, a C/C++ compiler (C++17 for test-ct2 and lint) with make, cargo, POSIX tools, and Python 3 (with pip), Go or curl.

environment:
  XDG_CACHE_HOME      the cache is $XDG_CACHE_HOME/voxfleet, else ~/.cache/voxfleet
  VOXFLEET_CACHE      the cache folder itself; wins over XDG_CACHE_HOME
  VOXFLEET_OFFLINE=1  fetch nothing: use what is here and say what is missing
  VOXFLEET_UNPINNED=1 where a part cannot be had by its checksum, take its release archive, for which none is pinned here
  ORT_DYLIB_PATH      an ONNX Runtime library to use instead (1.20 or newer)
  VOXFLEET_CHROMIUM   a Chromium to use instead, for the tests of the page
  CARGO_TARGET_DIR    as cargo knows it
USAGE
}

# ---------------------------------------------------------------------------------------------- telling

# Hundredths of a second since some fixed point.
now_cs() {
    if read -r up_ _ 2>/dev/null </proc/uptime; then
        frac_=${up_#*.}
        echo "${up_%.*}${frac_%"${frac_#??}"}" | sed 's/^0*\(.\)/\1/'
    else
        echo "$(date +%s)00"
    fi
}

step_begin() { STEP_START=$(now_cs); }

# One line per step: the seconds since step_begin, then what happened.
step() {
    cs_=$(( $(now_cs) - STEP_START ))
    printf '[%4d.%d s] %s\n' $(( cs_ / 100 )) $(( cs_ % 100 / 10 )) "$*" >&2
    STEP_START=$(now_cs)
}

# What belongs to the step that is still going on: fall-backs and waits.
note() { printf '           %s\n' "$*" >&2; }

die() {
    printf 'bootstrap: %s\n' "$*" >&2
    exit 1
}

# Runs a command into the log.
logged() {
    printf '\n$ %s\n' "$*" >>"$LOG"
    LOG_MARK=$(wc -c <"$LOG")
    "$@" >>"$LOG" 2>&1
}

# The end of what the last logged command said.
show_log() {
    tail -c "+$(( LOG_MARK + 1 ))" "$LOG" | tail -n "$1" | sed 's/^/           | /' >&2
}

have() { command -v "$1" >/dev/null 2>&1; }

# version_ge A B: A >= B, as dotted numbers.
version_ge() {
    awk -v a="$1" -v b="$2" 'BEGIN {
        n = split(a, x, /[^0-9]+/); m = split(b, y, /[^0-9]+/)
        for (i = 1; i <= (n > m ? n : m); i++) { if (x[i]+0 > y[i]+0) exit 0; if (x[i]+0 < y[i]+0) exit 1 }
        exit 0 }'
}

# First dotted number in the input.
first_version() { sed -n '/[0-9]\.[0-9]/{ s/^[^0-9]*\([0-9][0-9]*\(\.[0-9][0-9]*\)\{1,3\}\).*/\1/p; q; }'; }

offline() { [ "${VOXFLEET_OFFLINE:-0}" = 1 ]; }

# ---------------------------------------------------------------------------------------------- cache, lock, clean-up

STAGE=
LOCKED=

open_cache() {
    if [ -z "${HOME:-}" ]; then
        HOME=$( (getent passwd "$(id -u)" || awk -F: -v u="$(id -u)" '$3 == u' /etc/passwd) 2>/dev/null | cut -d: -f6 | head -n 1)
        [ -d "${HOME:-/nonexistent}" ] || die "HOME is not set and no home folder is known; set HOME"
        export HOME
        note "HOME is not set; using $HOME"
    fi
    case ${XDG_CACHE_HOME:-} in
        /*) base_=$XDG_CACHE_HOME ;;
        *) base_=$HOME/.cache ;;
    esac
    VOXFLEET_CACHE=${VOXFLEET_CACHE:-$base_/voxfleet}
    case $VOXFLEET_CACHE in
        /*) ;;
        *) VOXFLEET_CACHE=$PWD/$VOXFLEET_CACHE ;;
    esac
    CACHE=$VOXFLEET_CACHE
    export VOXFLEET_CACHE
    err_=$(mkdir -p "$CACHE" 2>&1 && mkdir -p "$CACHE/bin" "$CACHE/lib" "$CACHE/models" "$CACHE/log" 2>&1) ||
        die "the cache cannot be made: $err_ (set XDG_CACHE_HOME to a folder you can write to)"
    for dir_ in "$CACHE" "$CACHE/bin" "$CACHE/lib" "$CACHE/models" "$CACHE/log"; do
        [ -w "$dir_" ] || die "the cache is not writable: $dir_ (set XDG_CACHE_HOME to a folder you can write to)"
    done
    find "$CACHE/log" -name 'bootstrap-*.log' -mtime +7 -exec rm -f {} + 2>/dev/null || :
    LOG=$CACHE/log/bootstrap-$VERB-$$.log
    : >"$LOG" || die "cannot write $LOG"
    LOG_MARK=0
}

clean_up() {
    [ -z "$STAGE" ] || rm -rf "$STAGE"
    STAGE=
    unlock
}

trap clean_up EXIT
trap 'exit 129' HUP
trap 'exit 130' INT
trap 'exit 143' TERM

# Who a process is: its number and, where /proc tells, its start time, so that a reused number is not mistaken for it.
process_id() { echo "$1 $(sed 's/.*) //' "/proc/$1/stat" 2>/dev/null | cut -d' ' -f20)"; }

# Serialises installs. It only saves double work: installs are atomic, so a lock that is broken by mistake breaks nothing.
lock() {
    [ -z "$LOCKED" ] || return 0
    waited_=0
    until mkdir "$CACHE/.lock" 2>/dev/null; do
        [ -d "$CACHE/.lock" ] || [ -w "$CACHE" ] || die "the cache is not writable: $CACHE"
        owner_=$(cat "$CACHE/.lock/owner" 2>/dev/null || :)
        pid_=${owner_%% *}
        if [ -n "$owner_" ]; then
            if ! kill -0 "$pid_" 2>/dev/null || [ "$(process_id "$pid_")" != "$owner_" ]; then
                note "removing the lock of bootstrap $pid_, which is gone"
                break_lock
                continue
            fi
        elif [ "$waited_" -ge 5 ]; then
            break_lock # its maker died between making and signing it
            continue
        fi
        [ "$waited_" -ne 1 ] || note "waiting for another bootstrap (process ${pid_:-unknown}) to finish installing"
        waited_=$(( waited_ + 1 ))
        sleep 1
    done
    LOCKED=1
    process_id $$ >"$CACHE/.lock/owner"
    # Left by a bootstrap that was killed; a young one may belong to someone whose lock was broken by mistake.
    find "$CACHE"/.stage.* -prune -mtime +0 -exec rm -rf {} + 2>/dev/null || :
}

break_lock() {
    if mv "$CACHE/.lock" "$CACHE/.stage.lock.$$" 2>/dev/null; then
        rm -rf "$CACHE/.stage.lock.$$"
    fi
}

unlock() {
    [ -z "$LOCKED" ] || rm -rf "$CACHE/.lock"
    LOCKED=
}

# An empty folder on the cache's file system, so that moving out of it is a rename.
new_stage() {
    [ -z "$STAGE" ] || rm -rf "$STAGE"
    STAGE=$(mktemp -d "$CACHE/.stage.XXXXXX")
}

# install_file FROM TO [MODE]
install_file() {
    chmod "${3:-644}" "$1"
    mv -f "$1" "$2"
}

# ---------------------------------------------------------------------------------------------- fetching

sha256_of() {
    if have sha256sum; then sha256sum "$1" | cut -d' ' -f1
    elif have shasum; then shasum -a 256 "$1" | cut -d' ' -f1
    elif have openssl; then openssl dgst -sha256 "$1" | sed 's/.*= *//'
    else python3 -c 'import hashlib, sys; print(hashlib.sha256(open(sys.argv[1], "rb").read()).hexdigest())' "$1"
    fi
}

# unpinned NAME URL: whether something may be used that no checksum vouches for.
unpinned() {
    if [ "${VOXFLEET_UNPINNED:-0}" = 1 ]; then
        note "$1: trying $2, which no checksum vouches for (VOXFLEET_UNPINNED=1)"
        return 0
    fi
    note "$1: $2 may have it, but no checksum of it is pinned here: VOXFLEET_UNPINNED=1 takes it all the same"
    return 1
}

# download URL FILE
download() {
    if have curl; then
        logged curl -fsSL --retry 2 --connect-timeout 15 --max-time 600 -o "$2" "$1"
    elif have python3; then
        logged python3 -c '
import shutil, sys, urllib.request
with urllib.request.urlopen(sys.argv[1], timeout=30) as r, open(sys.argv[2], "wb") as f:
    shutil.copyfileobj(r, f)' "$1" "$2"
    elif have wget; then
        logged wget -q -T 30 -O "$2" "$1"
    else
        echo "no curl, python3 or wget" >>"$LOG"
        return 1
    fi
}

# unpack ARCHIVE FOLDER [PATTERN...]: zip files and wheels (keeps the executable bit), or tar.gz.
unpack() {
    archive_=$1 folder_=$2
    shift 2
    case $archive_ in
        *.tar.gz | *.tgz) logged tar -xzf "$archive_" -C "$folder_" ;;
        *)
            if have python3; then
                logged python3 -c '
import fnmatch, os, sys, zipfile
archive, folder, patterns = sys.argv[1], sys.argv[2], sys.argv[3:] or ["*"]
with zipfile.ZipFile(archive) as z:
    for i in z.infolist():
        if any(fnmatch.fnmatchcase(i.filename, p) for p in patterns):
            path = z.extract(i, folder)
            if not i.is_dir() and i.external_attr >> 16 & 0o111:
                os.chmod(path, 0o755)' "$archive_" "$folder_" "$@"
            else
                logged unzip -q -o "$archive_" "$@" -d "$folder_"
            fi
            ;;
    esac
}

# A pip that can download: found, or in a throw-away virtual environment. Sets PIP.
find_pip() {
    [ -z "${PIP:-}" ] || return 0
    if have python3 && python3 -m pip --version >>"$LOG" 2>&1; then PIP='python3 -m pip'
    elif have pip3 && pip3 --version >>"$LOG" 2>&1; then PIP=pip3
    elif have python3 && logged python3 -m venv "$STAGE/venv" && "$STAGE/venv/bin/pip" --version >>"$LOG" 2>&1; then
        PIP=venv
    else
        return 1
    fi
}

# wheel NAME VERSION SHA256-or-empty: downloads one wheel for CPython 3.12 on this machine's kind of Linux, whatever
# Python runs here (nothing of it is run). Sets WHEEL.
wheel() {
    if ! find_pip; then
        PIP_WHY="no Python 3 with pip here ($install_ $py_)"
        return 1
    fi
    PIP_WHY="pip could not get $1 $2 for $ARCH"
    [ -n "$3" ] || unpinned "$1" "the wheel $1 $2 for $ARCH" || return 1
    printf '%s==%s%s\n' "$1" "$2" "${3:+ --hash=sha256:$3}" >"$STAGE/wheel.txt"
    wheels "$STAGE/wheel.txt" "$STAGE/wheel" || return 1
    WHEEL=$(ls "$STAGE"/wheel/*.whl)
    PINNED=${3:+"checksum verified"}
    PINNED=${PINNED:-"checksum not pinned"}
}

# Makes pip ready. Sets pip_; empty: the one in the stage.
pip_asks_nothing() {
    pip_=$PIP
    if [ "$PIP" = venv ]; then
        pip_=
        [ -x "$STAGE/venv/bin/pip" ] || logged python3 -m venv "$STAGE/venv" || return 1
    fi
    PIP_REQUIRE_VIRTUALENV=0 PIP_NO_INPUT=1 PIP_DISABLE_PIP_VERSION_CHECK=1
    export PIP_REQUIRE_VIRTUALENV PIP_NO_INPUT PIP_DISABLE_PIP_VERSION_CHECK
}

# wheels REQUIREMENTS FOLDER: the same for a list. find_pip comes first.
wheels() {
    pip_asks_nothing || return 1
    mkdir -p "$2"
    # shellcheck disable=SC2086 # PIP is a command with its arguments
    logged ${pip_:-"$STAGE/venv/bin/pip"} download --no-deps --only-binary=:all: --retries 2 \
        --python-version 3.12 --implementation cp --abi cp312 --abi abi3 --abi none \
        --platform "manylinux_2_28_$ARCH" --platform "manylinux_2_27_$ARCH" --platform "manylinux_2_17_$ARCH" \
        --platform "manylinux2014_$ARCH" --platform any \
        -d "$2" -r "$1"
}

# ---------------------------------------------------------------------------------------------- what must be there

# Lists everything that is missing at once, with the way to get it.
check_machine() {
    lacks_=
    lack() { lacks_="$lacks_
  - $*"; }
    if have apt-get; then install_='apt-get install'; cxx_=build-essential; py_='python3 python3-pip'
    elif have dnf; then install_='dnf install'; cxx_='gcc-c++ make'; py_='python3 python3-pip'
    elif have apk; then install_='apk add'; cxx_=build-base; py_='python3 py3-pip'
    elif have pacman; then install_='pacman -S'; cxx_=base-devel; py_='python python-pip'
    elif have zypper; then install_='zypper install'; cxx_='gcc-c++ make'; py_='python3 python3-pip'
    else install_='your package manager:'; cxx_='gcc g++ make'; py_='python3 with pip'
    fi
    [ "$(uname -s)" = Linux ] || lack "Linux: workers are bound to their supervisor with prctl; this is $(uname -s)"
    for tool_ in awk sed grep cut tail head find mktemp tr wc tar gzip; do
        have "$tool_" || lack "$tool_ (a POSIX tool): $install_ coreutils findutils gawk sed grep tar gzip"
    done
    if [ "$1" = build ]; then
        have "${CC:-cc}" || lack "a C compiler (${CC:-cc}): $install_ $cxx_"
        have "${CXX:-c++}" || lack "a C++ compiler (${CXX:-c++}): $install_ $cxx_"
        have make || have ninja || lack "make: $install_ $cxx_"
        rust_min_=$(sed -n 's/^rust-version *= *"\(.*\)"/\1/p' "$ROOT/Cargo.toml")
        if ! have cargo; then
            lack "cargo ${rust_min_:-} or newer: https://rustup.rs"
        elif rust_=$(cd "$ROOT" && cargo --version 2>/dev/null | first_version) && [ -n "$rust_" ]; then
            ! have awk || version_ge "$rust_" "${rust_min_:-0}" ||
                lack "cargo $rust_min_ or newer (this is $rust_): rustup update, or https://rustup.rs"
        else
            lack "a cargo that runs (cargo --version fails): rustup default stable, or https://rustup.rs"
        fi
    fi
    have python3 || have go || have curl ||
        lack "Python 3 with pip (best), Go or curl, to fetch the parts that cargo cannot: $install_ $py_"
    [ -z "$lacks_" ] || die "this machine lacks:$lacks_"
}

# ---------------------------------------------------------------------------------------------- NATS, cmake

nats_server_version() { "$1" --version 2>/dev/null | first_version; }
cmake_version() { "$1" --version 2>/dev/null | first_version; }
nats_version() {
    version_=$("$1" --version 2>/dev/null | first_version)
    echo "${version_:-of unknown version}"
}

# good TOOL PATH: new enough; what we installed ourselves must be what is pinned today.
good() {
    case $1 in
        nats-server) found_=$(nats_server_version "$2") min_=$NATS_SERVER_MIN pin_=$NATS_SERVER_VERSION ;;
        nats) found_=$(nats_version "$2") min_=0 pin_=$NATS_CLI_VERSION ;;
        cmake) found_=$(cmake_version "$2") min_=$CMAKE_MIN pin_=$CMAKE_VERSION ;;
    esac
    [ -n "$found_" ] || return 1
    if [ "$2" = "$CACHE/bin/$1" ]; then
        [ "$found_" = "$pin_" ]
    elif [ "$1" = nats ]; then
        # Asked for by what it can do: raw audio from standard input into JetStream, unchanged.
        help_=$("$2" pub --help 2>&1) || return 1
        for flag_ in --force-stdin --jetstream 'no-]*templates'; do
            echo "$help_" | grep -q -e "$flag_" || return 1
        done
    else
        version_ge "$found_" "$min_"
    fi
}

usable() { where_=$(command -v "$1" 2>/dev/null) && [ -n "$where_" ] && good "$1" "$where_"; }

# The cache goes first on PATH, but only when something from it is needed.
settle_path() {
    rest_=$(printf '%s' "$PATH" | awk -v RS=: -v skip="$CACHE/bin" '{ sub(/\n$/, "") } $0 != skip { printf "%s%s", s, $0; s = ":" }')
    PATH=$rest_
    if ! { usable nats-server && usable nats && usable cmake; }; then
        PATH=$CACHE/bin:$rest_
    fi
    export PATH
}

# tool NAME: says where it comes from, or installs it with install_NAME.
tool() {
    step_begin
    if usable "$1"; then
        report_tool "$1"
        return
    fi
    if [ -n "${where_:-}" ]; then
        note "$1: $where_ is ${found_:-of unknown version}, not what is needed${min_:+ ($min_ or newer)}"
    fi
    lock
    hash -r
    if usable "$1"; then # another bootstrap was here
        report_tool "$1"
        return
    fi
    new_stage
    if "$2" "$1" && hash -r && usable "$1"; then
        step "$1 $found_: $SOURCE"
    else
        ABSENT="$ABSENT
  - $1: $WHY"
        step "$1: not to be had here"
    fi
}

report_tool() {
    case $where_ in
        "$CACHE"/*) step "$1 $found_: in the cache" ;;
        *) step "$1 $found_: $where_" ;;
    esac
}

install_nats() {
    case $1 in
        nats-server) module_=github.com/nats-io/nats-server/v2; version_=$NATS_SERVER_VERSION ;;
        nats) module_=github.com/nats-io/natscli/nats; version_=$NATS_CLI_VERSION ;;
    esac
    WHY="install Go $GO_MIN or newer (https://go.dev/dl), or put $1 itself on PATH, and run this again"
    install_nats_with_go "$@" && return 0
    if offline; then
        note "$1: VOXFLEET_OFFLINE=1, so no download"
        return 1
    fi
    case $1 in
        nats-server)
            name_=nats-server-v$version_-linux-$GOARCH_NAME.tar.gz
            url_=https://github.com/nats-io/nats-server/releases/download/v$version_/$name_
            ;;
        nats)
            name_=nats-$version_-linux-$GOARCH_NAME.zip
            url_=https://github.com/nats-io/natscli/releases/download/v$version_/$name_
            ;;
    esac
    unpinned "$1" "$url_" || return 1
    if ! download "$url_" "$STAGE/$name_" || ! unpack "$STAGE/$name_" "$STAGE"; then
        show_log 4
        return 1
    fi
    binary_=$(find "$STAGE" -type f -name "$1" | head -n 1)
    [ -n "$binary_" ] || return 1
    install_file "$binary_" "$CACHE/bin/$1" 755
    SOURCE="from its release archive (checksum not pinned)"
}

install_nats_with_go() {
    if ! have go; then
        note "$1: no go here"
        return 1
    fi
    go_=$(cd / && GOTOOLCHAIN=local go version 2>/dev/null | first_version)
    if ! version_ge "${go_:-0}" 1.21; then
        note "$1: go ${go_:-of unknown version} is too old ($GO_MIN is needed)"
        return 1
    fi
    if ! version_ge "$go_" "$GO_MIN"; then
        note "$1: go $go_ is older than $GO_MIN; it fetches the newer toolchain itself unless GOTOOLCHAIN=local"
    fi
    grep -q "${module_%/nats} v$version_" "$ROOT/deploy/tools/go.mod" ||
        die "deploy/tools/go.mod and deploy/bootstrap.sh pin different versions of $1"
    note "$1: building it with go $go_ (about a minute)"
    # GOBIN refuses foreign targets and -mod=readonly keeps go.mod and go.sum as they are.
    if ! (
        cd "$ROOT/deploy/tools"
        if offline; then export GOPROXY=off GOTOOLCHAIN=local; fi
        export GOBIN="$STAGE/bin" GOFLAGS=-mod=readonly GOWORK=off GOOS='' GOARCH='' CGO_ENABLED=0
        logged go install -trimpath -ldflags '-s -w' "$module_"
    ); then
        note "$1: go could not build it:"
        show_log 6
        return 1
    fi
    install_file "$STAGE/bin/$1" "$CACHE/bin/$1" 755
    SOURCE="built from deploy/tools/go.mod"
}

install_cmake() {
    WHY="install cmake $CMAKE_MIN or newer (${install_:-your package manager:} cmake) and run this again"
    if offline; then
        note "cmake: VOXFLEET_OFFLINE=1, so no download"
        return 1
    fi
    case $ARCH in
        x86_64) sum_=2f766bb46367e5e0559fa33184653754bce044583a06014dcaebf8e6dff8a1f1 ;;
        aarch64) sum_=a4a5615f31f692c9b9aa8b365704e4b76172348af6fa40e16fea3f118bb01194 ;;
        *) sum_= ;;
    esac
    note "cmake: taking it from the PyPI wheel cmake $CMAKE_VERSION"
    if wheel cmake "$CMAKE_VERSION" "$sum_" &&
        unpack "$WHEEL" "$STAGE" 'cmake/data/bin/*' 'cmake/data/share/*' '*/licenses/*'; then
        tree_=$STAGE/cmake/data
        SOURCE="from the PyPI wheel cmake ($PINNED)"
    else
        note "cmake: $PIP_WHY:"
        show_log 4
        name_=cmake-$CMAKE_VERSION-linux-$ARCH
        url_=https://github.com/Kitware/CMake/releases/download/v$CMAKE_VERSION/$name_.tar.gz
        unpinned cmake "$url_" || return 1
        if ! download "$url_" "$STAGE/$name_.tar.gz" || ! unpack "$STAGE/$name_.tar.gz" "$STAGE"; then
            show_log 4
            return 1
        fi
        tree_=$STAGE/$name_
        SOURCE="from its release archive (checksum not pinned)"
    fi
    mkdir -p "$CACHE/opt"
    rm -rf "$CACHE/opt/cmake-$CMAKE_VERSION"
    mv "$tree_" "$CACHE/opt/cmake-$CMAKE_VERSION"
    ln -s "../opt/cmake-$CMAKE_VERSION/bin/cmake" "$STAGE/cmake.link"
    mv -f "$STAGE/cmake.link" "$CACHE/bin/cmake"
}

# ---------------------------------------------------------------------------------------------- ONNX Runtime, Silero

# The version of a library file: its real name carries it, else the text inside.
ort_version() {
    real_=$(readlink -f "$1" 2>/dev/null || echo "$1")
    case $real_ in
        *.so.[0-9]*.[0-9]*) echo "${real_##*.so.}" ;;
        *) LC_ALL=C tr -c '0-9A-Za-z.' '\n' <"$real_" 2>/dev/null | LC_ALL=C sed -n 's/^VERS_\(1\.[0-9]*\.[0-9]*\)$/\1/p' | head -n 1 ;;
    esac
}

system_ort() {
    {
        { ldconfig -p || /sbin/ldconfig -p; } 2>/dev/null | sed -n 's/.*libonnxruntime\.so.* => //p'
        for dir_ in /usr/local/lib /usr/lib /usr/lib64 "/usr/lib/$ARCH-linux-gnu" /opt/onnxruntime/lib; do
            for lib_ in "$dir_"/libonnxruntime.so*; do [ ! -f "$lib_" ] || echo "$lib_"; done
        done
    } | while IFS= read -r lib_; do
        found_=$(ort_version "$lib_")
        if [ -n "$found_" ] && version_ge "$found_" "$ORT_MIN"; then
            echo "$lib_"
            break
        fi
        note "ONNX Runtime: $lib_ is ${found_:-of unknown version}; $ORT_MIN or newer is needed"
    done
}

onnxruntime() {
    step_begin
    if [ -n "${ORT_DYLIB_PATH:-}" ]; then
        if [ -f "$ORT_DYLIB_PATH" ]; then
            found_=$(ort_version "$ORT_DYLIB_PATH")
            version_ge "${found_:-0}" "$ORT_MIN" ||
                note "ONNX Runtime: this one is ${found_:-of unknown version}; $ORT_MIN or newer is needed"
            step "ONNX Runtime ${found_:-of unknown version}: ORT_DYLIB_PATH=$ORT_DYLIB_PATH"
            return
        fi
        note "ONNX Runtime: ORT_DYLIB_PATH=$ORT_DYLIB_PATH is no file; looking elsewhere"
        unset ORT_DYLIB_PATH
    fi
    found_=$(system_ort)
    if [ -n "$found_" ]; then
        ORT_DYLIB_PATH=$found_
        step "ONNX Runtime $(ort_version "$found_"): $found_"
    else
        library_=$CACHE/lib/libonnxruntime.so
        if [ -f "$library_" ] && [ "$(ort_version "$library_")" = "$ORT_VERSION" ]; then
            step "ONNX Runtime $ORT_VERSION: in the cache"
        else
            lock
            new_stage
            if install_onnxruntime; then
                step "ONNX Runtime $ORT_VERSION: $SOURCE"
            else
                step "ONNX Runtime: not to be had here; Silero VAD needs it, so the built-in energy VAD serves and every final says so"
                return
            fi
        fi
        ORT_DYLIB_PATH=$library_
    fi
    export ORT_DYLIB_PATH
}

install_onnxruntime() {
    if [ -f "$CACHE/lib/libonnxruntime.so" ] && [ "$(ort_version "$CACHE/lib/libonnxruntime.so")" = "$ORT_VERSION" ]; then
        SOURCE="in the cache" # another bootstrap was here
        return 0
    fi
    glibc_=$(getconf GNU_LIBC_VERSION 2>/dev/null | first_version)
    if ! version_ge "${glibc_:-0}" 2.28; then
        note "ONNX Runtime: its library needs glibc 2.28 or newer, this system has ${glibc_:-none}"
        return 1
    fi
    if offline; then
        note "ONNX Runtime: VOXFLEET_OFFLINE=1, so no download"
        return 1
    fi
    case $ARCH in
        x86_64) sum_=1f3dea47f2f0e5117c2404cea7d21fd253ae7836a3bf167a501cdfbb2600d536; release_=linux-x64 ;;
        aarch64) sum_=dcaedc50333876f3829ab966b242147f0e548229e29c36fe44622ecf748c25ee; release_=linux-aarch64 ;;
        *) sum_=; release_=linux-$ARCH ;;
    esac
    note "ONNX Runtime: taking its library from the PyPI wheel onnxruntime $ORT_VERSION"
    if wheel onnxruntime "$ORT_VERSION" "$sum_" &&
        unpack "$WHEEL" "$STAGE" 'onnxruntime/capi/libonnxruntime.so*' onnxruntime/LICENSE onnxruntime/ThirdPartyNotices.txt; then
        tree_=$STAGE/onnxruntime
        SOURCE="from the PyPI wheel onnxruntime ($PINNED)"
    else
        note "ONNX Runtime: $PIP_WHY:"
        show_log 4
        name_=onnxruntime-$release_-$ORT_VERSION
        url_=https://github.com/microsoft/onnxruntime/releases/download/v$ORT_VERSION/$name_.tgz
        unpinned "ONNX Runtime" "$url_" || return 1
        if ! download "$url_" "$STAGE/$name_.tgz" || ! unpack "$STAGE/$name_.tgz" "$STAGE"; then
            show_log 4
            return 1
        fi
        tree_=$STAGE/$name_
        SOURCE="from its release archive (checksum not pinned)"
    fi
    file_=libonnxruntime.so.$ORT_VERSION
    path_=$(find "$tree_" -type f -name "$file_" | head -n 1)
    [ -n "$path_" ] || return 1
    for notice_ in LICENSE ThirdPartyNotices.txt; do
        [ ! -f "$tree_/$notice_" ] || install_file "$tree_/$notice_" "$CACHE/lib/onnxruntime-$notice_"
    done
    install_file "$path_" "$CACHE/lib/$file_" 755
    ln -s "$file_" "$STAGE/link"
    mv -f "$STAGE/link" "$CACHE/lib/libonnxruntime.so"
}

silero_ok() { [ -f "$1" ] && [ "$(sha256_of "$1")" = "$SILERO_SHA256" ]; }

# CTranslate2's library, for the cargo feature ct2. The crate also asks for static libraries by names that the shared one
# holds already: empty archives answer for them.
ctranslate2() {
    step_begin
    CT2_LIB=$CACHE/lib/ctranslate2-$CT2_VERSION
    if [ -f "$CT2_LIB/libctranslate2.so" ]; then
        step "CTranslate2 $CT2_VERSION: in the cache"
    else
        lock
        new_stage
        if install_ctranslate2; then
            step "CTranslate2 $CT2_VERSION: $SOURCE"
        else
            step "CTranslate2: not to be had here; the batched engine (cargo feature ct2) cannot be built"
            CT2_LIB=
            return 0
        fi
    fi
    use_ctranslate2
}

# For the linker, and for test programs when they start; voxfleet itself is told where it is when it is linked.
use_ctranslate2() {
    case :${LIBRARY_PATH:-}: in *":$CT2_LIB:"*) ;; *) LIBRARY_PATH=$CT2_LIB${LIBRARY_PATH:+:$LIBRARY_PATH} ;; esac
    case :${LD_LIBRARY_PATH:-}: in *":$CT2_LIB:"*) ;; *) LD_LIBRARY_PATH=$CT2_LIB${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH} ;; esac
    export LIBRARY_PATH LD_LIBRARY_PATH
}

install_ctranslate2() {
    if [ -f "$CT2_LIB/libctranslate2.so" ]; then
        SOURCE="in the cache" # another bootstrap was here
        return 0
    fi
    if offline; then
        note "CTranslate2: VOXFLEET_OFFLINE=1, so no download"
        return 1
    fi
    case $ARCH in
        x86_64) sum_=0d1830d12c84b2240bf51893ee6bfe24a671dccfd232b05a74ef197d27fb164a ;;
        aarch64) sum_=a102683e7dc5d0cd0c31de5771ce4c27fffa837721470e7aae64ebffa64f3206 ;;
        *) sum_= ;;
    esac
    note "CTranslate2: taking its library from the PyPI wheel ctranslate2 $CT2_VERSION"
    if ! wheel ctranslate2 "$CT2_VERSION" "$sum_" || ! unpack "$WHEEL" "$STAGE" 'ctranslate2.libs/*'; then
        note "CTranslate2: $PIP_WHY:"
        show_log 4
        return 1
    fi
    tree_=$STAGE/ctranslate2.libs
    library_=$(find "$tree_" -name 'libctranslate2-*.so*' | head -n 1)
    [ -n "$library_" ] || return 1
    chmod 755 "$tree_"/*
    ln -s "${library_##*/}" "$tree_/libctranslate2.so"
    for name_ in cpu_features cublas_static cublasLt_static culibos; do printf '!<arch>\n' >"$tree_/lib$name_.a"; done
    mkdir -p "$CACHE/lib"
    rm -rf "$CT2_LIB"
    mv "$tree_" "$CT2_LIB"
    SOURCE="from the PyPI wheel ctranslate2 ($PINNED)"
}

# CTranslate2 as a Python module, for the Python that runs here: a test asks it whether it takes what `models convert` writes.
ct2_python() {
    step_begin
    CT2_PYTHON=$CACHE/python-ct2-$CT2_VERSION
    if ! have python3; then
        step "CTranslate2 for Python: no Python here, so its own loader is not asked"
    elif ct2_python_ok "$CT2_PYTHON"; then
        step "CTranslate2 $CT2_VERSION for Python: in the cache"
    else
        lock
        new_stage
        if install_ct2_python; then
            step "CTranslate2 $CT2_VERSION for Python: from PyPI (checksum verified)"
        else
            step "CTranslate2 for Python: not to be had here, so its own loader is not asked"
        fi
    fi
}

ct2_python_ok() { PYTHONPATH=$1 python3 -c 'import ctranslate2, numpy' 2>/dev/null; }

# For CPython 3.10 to 3.13, x86_64 and aarch64.
install_ct2_python() {
    if ct2_python_ok "$CT2_PYTHON"; then return 0; fi # another bootstrap was here
    if offline; then
        note "CTranslate2 for Python: VOXFLEET_OFFLINE=1, so no download"
        return 1
    fi
    if ! find_pip; then
        note "CTranslate2 for Python: no Python 3 with pip here ($install_ $py_)"
        return 1
    fi
    {
        printf 'ctranslate2==%s' "$CT2_VERSION"
        for sum_ in c120b2207d97cb6bfedd694bc7e278c2f25f2fed83c9fa32071cf2e770a59902 \
            193edb3516df7fcd580ccd45e5f12d13fb7eb07f8ae2d27568461c2fedd14d95 \
            bd6ed9d10b46b9bc2ee801ea9624acf28bd53ffddfd5e92d23b2340dbc4d6474 \
            1037b3f51d18f1546120686670d71fcdaf85a0500fffccc56d8439ded5d284e5 \
            a102683e7dc5d0cd0c31de5771ce4c27fffa837721470e7aae64ebffa64f3206 \
            0d1830d12c84b2240bf51893ee6bfe24a671dccfd232b05a74ef197d27fb164a \
            f4ed771f82c4078113d811c5f9ad0a4597bb79f54784adb58fd50d69b04cb7a5 \
            271e77faf49ff9fa117b490b9008ac0b294744c19dabc93087e202299c1a8e27; do printf ' --hash=sha256:%s' "$sum_"; done
        printf '\nnumpy==%s' "$NUMPY_VERSION"
        for sum_ in efd28d4e9cd7d7a8d39074a4d44c63eda73401580c5c76acda2ce969e0a38e83 \
            fc7b73d02efb0e18c000e9ad8b83480dfcd5dfd11065997ed4c6747470ae8915 \
            b64d8d4d17135e00c8e346e0a738deb17e754230d7e0810ac5012750bbd85a5a \
            ba10f8411898fc418a521833e014a77d3ca01c15b0c6cdcce6a0d2897e6dbbdf \
            f2618db89be1b4e05f7a1a847a9c1c0abd63e63a1607d892dd54668dd92faf87 \
            fd83c01228a688733f1ded5201c678f0c53ecc1006ffbc404db9f7a899ac6249 \
            f92729c95468a2f4f15e9bb94c432a9229d0d50de67304399627a943201baa2f \
            1bc23a79bfabc5d056d106f9befb8d50c31ced2fbc70eedb8155aec74a45798f; do printf ' --hash=sha256:%s' "$sum_"; done
        printf '\n'
    } >"$STAGE/ct2-python.txt"
    pip_asks_nothing || return 1
    # shellcheck disable=SC2086 # PIP is a command with its arguments
    if ! logged ${pip_:-"$STAGE/venv/bin/pip"} install --no-deps --only-binary=:all: \
        --require-hashes --retries 2 --target "$STAGE/python-ct2" -r "$STAGE/ct2-python.txt" ||
        ! ct2_python_ok "$STAGE/python-ct2"; then
        note "CTranslate2 for Python: pip could not get it:"
        show_log 4
        return 1
    fi
    rm -rf "$CT2_PYTHON"
    mv "$STAGE/python-ct2" "$CT2_PYTHON"
}

silero() {
    step_begin
    model_=$CACHE/models/silero_vad.onnx
    if silero_ok "$model_"; then
        step "Silero VAD $SILERO_VERSION: in the cache (checksum verified)"
        return
    fi
    lock
    new_stage
    if install_silero; then
        step "Silero VAD $SILERO_VERSION: $SOURCE"
    else
        step "Silero VAD: not to be had here; the built-in energy VAD serves and every final says so"
    fi
}

install_silero() {
    if silero_ok "$model_"; then
        SOURCE="in the cache" # another bootstrap was here
        return 0
    fi
    if offline; then
        note "Silero VAD: VOXFLEET_OFFLINE=1, so no download"
        return 1
    fi
    note "Silero VAD: taking its model from the PyPI wheel silero-vad $SILERO_VERSION"
    file_=$STAGE/silero_vad/data/silero_vad.onnx
    if wheel silero-vad "$SILERO_VERSION" "$SILERO_WHEEL_SHA256" &&
        unpack "$WHEEL" "$STAGE" silero_vad/data/silero_vad.onnx '*/licenses/LICENSE' && silero_ok "$file_"; then
        licence_=$(find "$STAGE" -type f -name LICENSE -path '*silero*' | head -n 1)
        [ -z "$licence_" ] || install_file "$licence_" "$CACHE/models/silero_vad.LICENSE"
        SOURCE="from the PyPI wheel silero-vad (checksum verified)"
    else
        note "Silero VAD: ${PIP_WHY:-the wheel does not hold the expected file}:"
        show_log 4
        file_=$STAGE/silero_vad.onnx
        url_=https://github.com/snakers4/silero-vad/raw/v$SILERO_VERSION/src/silero_vad/data/silero_vad.onnx
        note "Silero VAD: trying $url_"
        if ! download "$url_" "$file_"; then
            show_log 4
            return 1
        fi
        if ! silero_ok "$file_"; then
            note "Silero VAD: that file has another checksum and is not used"
            return 1
        fi
        SOURCE="from its home on GitHub (checksum verified)"
    fi
    install_file "$file_" "$model_"
}

# ---------------------------------------------------------------------------------------------- nats-py

# The client that examples/producer.py imports; its test looks for it here.
nats_py() {
    step_begin
    python_=$CACHE/python
    if ! have python3; then
        step "nats-py: no Python here, so examples/producer.py is not tested"
    elif nats_py_ok; then
        step "nats-py $NATS_PY_VERSION: in the cache"
    else
        lock
        new_stage
        if install_nats_py; then
            step "nats-py $NATS_PY_VERSION: $SOURCE"
        else
            step "nats-py: not to be had here; the test of examples/producer.py needs it"
        fi
    fi
}

nats_py_ok() { [ -f "$python_/nats/__init__.py" ] && [ "$(cat "$python_/VERSION" 2>/dev/null)" = "$NATS_PY_VERSION" ]; }

install_nats_py() {
    if nats_py_ok; then
        SOURCE="in the cache" # another bootstrap was here
        return 0
    fi
    if offline; then
        note "nats-py: VOXFLEET_OFFLINE=1, so no download"
        return 1
    fi
    note "nats-py: taking it from the PyPI wheel nats-py $NATS_PY_VERSION"
    if wheel nats-py "$NATS_PY_VERSION" "$NATS_PY_SHA256" && unpack "$WHEEL" "$STAGE" 'nats/*' '*/licenses/LICENSE'; then
        package_=$STAGE/nats
        SOURCE="from the PyPI wheel nats-py ($PINNED)"
    else
        note "nats-py: $PIP_WHY:"
        show_log 4
        url_=https://github.com/nats-io/nats.py/archive/refs/tags/v$NATS_PY_VERSION.tar.gz
        unpinned nats-py "$url_" || return 1
        if ! download "$url_" "$STAGE/nats-py.tar.gz" || ! unpack "$STAGE/nats-py.tar.gz" "$STAGE"; then
            show_log 4
            return 1
        fi
        package_=$(find "$STAGE" -type f -path '*/nats/aio/client.py' | head -n 1)
        package_=${package_%/aio/client.py}
        [ -f "$package_/__init__.py" ] || return 1
        SOURCE="from its source archive (checksum not pinned)"
    fi
    mkdir "$STAGE/python"
    mv "$package_" "$STAGE/python/nats"
    licence_=$(find "$STAGE" -type f -name LICENSE | head -n 1)
    [ -z "$licence_" ] || install_file "$licence_" "$STAGE/python/LICENSE"
    echo "$NATS_PY_VERSION" >"$STAGE/python/VERSION"
    rm -rf "$python_"
    mv "$STAGE/python" "$python_"
}

# ---------------------------------------------------------------------------------------------- S3 server

# What the tests of s3:// URLs talk to: moto, run by whatever Python 3 is here.
s3_server() {
    step_begin
    s3_=$CACHE/s3-server
    s3_pins_=$ROOT/deploy/tools/s3-server.txt
    s3_sum_=$(sha256_of "$s3_pins_")
    if ! have python3; then
        step "S3 server: no Python here, so s3:// URLs are not tested"
    elif s3_server_ok; then
        step "S3 server: in the cache"
    else
        lock
        new_stage
        if install_s3_server; then
            step "S3 server: $SOURCE"
        else
            step "S3 server: not to be had here; the tests of s3:// URLs need it"
        fi
    fi
}

s3_server_ok() { [ -f "$s3_/moto/server.py" ] && [ "$(cat "$s3_/VERSION" 2>/dev/null)" = "$s3_sum_" ]; }

install_s3_server() {
    if s3_server_ok; then
        SOURCE="in the cache" # another bootstrap was here
        return 0
    fi
    if offline; then
        note "S3 server: VOXFLEET_OFFLINE=1, so no download"
        return 1
    fi
    if ! find_pip; then
        note "S3 server: no Python 3 with pip here ($install_ $py_)"
        return 1
    fi
    note "S3 server: taking moto and what it imports from PyPI wheels (25 MB)"
    if ! wheels "$s3_pins_" "$STAGE/wheels"; then
        show_log 4
        return 1
    fi
    mkdir "$STAGE/s3-server"
    for wheel_ in "$STAGE"/wheels/*.whl; do
        case ${wheel_##*/} in
            # Its descriptions of all other services are 100 MB.
            botocore-*) unpack "$wheel_" "$STAGE/s3-server" 'botocore/*.py' 'botocore/*.pem' 'botocore-*' \
                'botocore/data/*endpoints.json' 'botocore/data/*partitions.json' 'botocore/data/_retry.json' \
                'botocore/data/sdk-default-configuration.json' 'botocore/data/s3/*' || return 1 ;;
            *) unpack "$wheel_" "$STAGE/s3-server" || return 1 ;;
        esac
    done
    # Compiled for another Python; each has its pure form beside it.
    find "$STAGE/s3-server" -name '*.so' -exec rm -f {} +
    echo "$s3_sum_" >"$STAGE/s3-server/VERSION"
    rm -rf "$s3_"
    mv "$STAGE/s3-server" "$s3_"
    SOURCE="from PyPI wheels (checksums verified)"
}

# ---------------------------------------------------------------------------------------------- libfaketime

# Makes the clocks of a worker lie in one test. Debian's and Ubuntu's package unpacked into the cache, where there is one.
faketime() {
    step_begin
    library_=$CACHE/lib/libfaketime.so.1
    for dir_ in "/usr/lib/$ARCH-linux-gnu" /usr/lib64 /usr/lib; do
        if [ -f "$dir_/faketime/libfaketime.so.1" ]; then
            step "libfaketime: $dir_/faketime"
            return
        fi
    done
    if [ -f "$library_" ]; then
        step "libfaketime: in the cache"
        return
    fi
    lock
    new_stage
    if ! offline && have apt-get && have dpkg-deb && (cd "$STAGE" && logged apt-get download libfaketime) &&
        logged dpkg-deb -x "$STAGE"/libfaketime_*.deb "$STAGE/faketime"; then
        file_=$(find "$STAGE/faketime" -type f -name libfaketime.so.1 | head -n 1)
        if [ -n "$file_" ]; then
            install_file "$file_" "$library_" 755
            step "libfaketime: from the system's package archive (checked by apt)"
            return
        fi
    fi
    step "libfaketime: not to be had here (install the package libfaketime); the test of wrong clocks is skipped"
}

# ---------------------------------------------------------------------------------------------- Chromium, axe-core

# What tests/page/chromium.py drives; it looks in the same places.
find_chromium() {
    for path_ in "${VOXFLEET_CHROMIUM:-}" /usr/lib/chromium/chromium "$CACHE/chromium/chromium" \
        "$(command -v chromium)" "$(command -v chromium-browser)" "$(command -v google-chrome)"; do
        if [ -n "$path_" ] && [ -x "$path_" ] && "$path_" --version >>"$LOG" 2>&1; then
            echo "$path_"
            return
        fi
    done
}

browser() {
    step_begin
    path_=$(find_chromium)
    if [ -n "$path_" ]; then
        step "Chromium: $path_"
        return
    fi
    lock
    new_stage
    if install_chromium; then
        step "Chromium $("$CACHE/chromium/chromium" --version 2>/dev/null | first_version): $SOURCE"
    else
        step "Chromium: not to be had here (install the package chromium); the tests of the page are skipped"
    fi
}

# Debian's package and whatever else of it this machine lacks, unpacked into the cache; nothing is installed. The lists are
# fetched for this alone, so that it needs neither root nor an `apt-get update` before.
install_chromium() {
    if [ -x "$CACHE/chromium/chromium" ] && "$CACHE/chromium/chromium" --version >>"$LOG" 2>&1; then
        SOURCE="in the cache" # another bootstrap was here
        return 0
    fi
    if offline; then
        note "Chromium: VOXFLEET_OFFLINE=1, so no download"
        return 1
    fi
    have apt-get && have dpkg-deb || return 1
    mkdir -p "$STAGE/apt/lists/partial" "$STAGE/apt/archives/partial" "$STAGE/debs" "$STAGE/chromium/tree"
    apt_() {
        apt-get -q -o "Dir::State::Lists=$STAGE/apt/lists" -o "Dir::Cache=$STAGE/apt" -o Debug::NoLocking=1 \
            -o APT::Sandbox::User=root -o Acquire::Retries=2 "$@"
    }
    note "Chromium: taking it from the system's package archive (about 100 MB)"
    if ! logged apt_ update; then
        show_log 4
        return 1
    fi
    packages_=$(apt_ -s install --no-install-recommends chromium fonts-dejavu-core 2>>"$LOG" | awk '$1 == "Inst" { print $2 }')
    # shellcheck disable=SC2086 # a list of names
    if [ -z "$packages_" ] || ! (cd "$STAGE/debs" && logged apt_ download $packages_); then
        show_log 4
        return 1
    fi
    tree_=$STAGE/chromium/tree
    for deb_ in "$STAGE"/debs/*.deb; do
        logged dpkg-deb -x "$deb_" "$tree_" || return 1
    done
    [ -x "$tree_/usr/lib/chromium/chromium" ] || return 1 # Ubuntu's package only points to a snap
    cat >"$STAGE/chromium/chromium" <<'LAUNCHER'
#!/bin/sh
# Starts the Chromium beside this file with the libraries and fonts that came with it.
here=$(cd -- "$(dirname -- "$0")" && pwd -P)
for dir in "$here"/tree/usr/lib/*-linux-gnu "$here"/tree/lib/*-linux-gnu "$here"/tree/usr/lib/*-linux-gnu/*/; do
    [ ! -d "$dir" ] || LD_LIBRARY_PATH=${LD_LIBRARY_PATH:+$LD_LIBRARY_PATH:}$dir
done
export LD_LIBRARY_PATH FONTCONFIG_FILE="$here/fonts.conf"
exec "$here/tree/usr/lib/chromium/chromium" "$@"
LAUNCHER
    chmod 755 "$STAGE/chromium/chromium"
    cat >"$STAGE/chromium/fonts.conf" <<FONTS
<?xml version="1.0"?>
<!DOCTYPE fontconfig SYSTEM "fonts.dtd">
<fontconfig>
  <dir>/usr/share/fonts</dir>
  <dir>$CACHE/chromium/tree/usr/share/fonts</dir>
  <cachedir>$CACHE/chromium/fonts</cachedir>
</fontconfig>
FONTS
    if ! logged "$STAGE/chromium/chromium" --version; then
        show_log 4
        return 1
    fi
    rm -rf "$CACHE/chromium"
    mv "$STAGE/chromium" "$CACHE/chromium"
    SOURCE="from the system's package archive (checked by apt)"
}

# The rules by which tests/page looks for what people with disabilities could not use.
axe_core() {
    step_begin
    if axe_ok; then
        step "axe-core $AXE_VERSION: in the cache"
        return
    fi
    lock
    new_stage
    if install_axe; then
        step "axe-core $AXE_VERSION: $SOURCE"
    else
        step "axe-core: not to be had here; the page's accessibility is not tested"
    fi
}

axe_ok() { [ -f "$CACHE/axe/axe.min.js" ] && [ "$(cat "$CACHE/axe/VERSION" 2>/dev/null)" = "$AXE_VERSION" ]; }

install_axe() {
    if axe_ok; then
        SOURCE="in the cache" # another bootstrap was here
        return 0
    fi
    if offline; then
        note "axe-core: VOXFLEET_OFFLINE=1, so no download"
        return 1
    fi
    note "axe-core: taking it from the PyPI wheel axe-playwright-python $AXE_WHEEL_VERSION"
    if ! wheel axe-playwright-python "$AXE_WHEEL_VERSION" "$AXE_WHEEL_SHA256" ||
        ! unpack "$WHEEL" "$STAGE" axe_playwright_python/axe.min.js; then
        note "axe-core: $PIP_WHY:"
        show_log 4
        return 1
    fi
    file_=$STAGE/axe_playwright_python/axe.min.js
    grep -q "axe v$AXE_VERSION" "$file_" || return 1
    mkdir "$STAGE/axe"
    install_file "$file_" "$STAGE/axe/axe.min.js"
    echo "$AXE_VERSION" >"$STAGE/axe/VERSION"
    rm -rf "$CACHE/axe"
    mv "$STAGE/axe" "$CACHE/axe"
    SOURCE="from the PyPI wheel axe-playwright-python ($PINNED)"
}

# ---------------------------------------------------------------------------------------------- verbs

# CTranslate2 is written in C++17, a newer C++ than the rest asks for.
needs_cxx17() {
    echo '#include <filesystem>
int main() { if constexpr (sizeof(std::filesystem::path) > 0) return 0; }' |
        logged "${CXX:-c++}" -std=c++17 -fsyntax-only -x c++ - ||
        die "${CXX:-c++} does not take C++17, which the batched engine is written in: g++ 8 or clang 7, or newer"
}

# Everything that cargo cannot bring; leaves the environment ready for it.
prepare() {
    ARCH=$(uname -m)
    case $ARCH in
        x86_64 | amd64) ARCH=x86_64; GOARCH_NAME=amd64 ;;
        aarch64 | arm64) ARCH=aarch64; GOARCH_NAME=arm64 ;;
        *) GOARCH_NAME=$ARCH ;;
    esac
    PIP=
    PIP_WHY=
    ABSENT=
    settle_path
    tool nats-server install_nats
    tool nats install_nats
    tool cmake install_cmake
    onnxruntime
    silero
    case $VERB in
        test-ct2 | lint | deps) ctranslate2 ;;
        # It is not fetched for these, and used where it is.
        *) CT2_LIB=$CACHE/lib/ctranslate2-$CT2_VERSION; [ ! -f "$CT2_LIB/libctranslate2.so" ] || use_ctranslate2 ;;
    esac
    case $VERB in test-ct2 | deps) ct2_python ;; esac
    case $VERB in test | test-ct2 | deps) nats_py; s3_server; faketime; browser; axe_core ;; esac
    clean_up
    if [ -n "$ABSENT" ]; then
        die "these parts are needed and could not be had:$ABSENT
  the whole story: $LOG"
    fi
    # whisper.cpp's bindings come ready-made with its crate; without this it would want libclang.
    export WHISPER_DONT_GENERATE_BINDINGS=1
    if offline; then export CARGO_NET_OFFLINE=true; fi
}

# build WHAT COMMAND...: shows cargo's own progress on a terminal, else only its end when it fails.
build() {
    what_=$1
    shift
    step_begin
    if [ -t 2 ]; then
        "$@" || die "failed: $what_"
    else
        note "$what_ (minutes when it is the first time): $*"
        if ! logged "$@"; then
            show_log 40
            die "failed: $what_; whole log: $LOG"
        fi
    fi
    step "$what_"
}

# Where cargo puts its work; configuration files count too.
target_dir() {
    cargo metadata --no-deps --format-version 1 --offline 2>/dev/null |
        sed -n 's/.*"target_directory":"\([^"]*\)".*/\1/p'
}

binary() {
    dir_=$(target_dir)
    echo "${dir_:-${CARGO_TARGET_DIR:-$ROOT/target}}/$1/voxfleet"
}

print_env() {
    quote() { printf "export %s='%s'\n" "$1" "$(printf '%s' "$2" | sed "s/'/'\\\\''/g")"; }
    quote PATH "$PATH"
    quote VOXFLEET_CACHE "$VOXFLEET_CACHE"
    [ -z "${ORT_DYLIB_PATH:-}" ] || quote ORT_DYLIB_PATH "$ORT_DYLIB_PATH"
    [ -z "${CT2_LIB:-}" ] || [ ! -d "$CT2_LIB" ] || {
        quote LIBRARY_PATH "$LIBRARY_PATH"
        quote LD_LIBRARY_PATH "$LD_LIBRARY_PATH"
    }
    quote WHISPER_DONT_GENERATE_BINDINGS 1
    if offline; then quote CARGO_NET_OFFLINE true; fi
}

VERB=${1:-help}
[ $# -eq 0 ] || shift

case $VERB in
    demo | test | test-ct2 | bench | lint) check_machine build ;;
    deps | env) check_machine fetch ;;
    help | -h | --help)
        usage
        exit 0
        ;;
    *)
        printf 'bootstrap: no such verb: %s\n\n' "$VERB" >&2
        usage >&2
        exit 64
        ;;
esac

open_cache
prepare

case $VERB in
    deps) ;;
    env) print_env ;;
    demo)
        cd "$ROOT"
        build "building voxfleet" cargo build -p voxfleet
        program=$(binary debug)
        exec "$program" demo "$@"
        ;;
    bench)
        cd "$ROOT"
        build "building voxfleet (release)" cargo build --release -p voxfleet
        program=$(binary release)
        exec "$program" bench "$@" # without arguments it lists the benches
        ;;
    test)
        cd "$ROOT"
        build "building the tests" cargo test --workspace --no-run
        step_begin
        # Standard output is cargo's own, so that whoever runs this can read its closing lines.
        if cargo test --workspace --no-fail-fast "$@"; then
            step "the tests passed"
        else
            step "the tests failed"
            exit 1
        fi
        ;;
    test-ct2)
        cd "$ROOT"
        needs_cxx17
        [ -n "$CT2_LIB" ] || die "the batched engine needs CTranslate2's library, which could not be had"
        # Always the whole workspace: by package, cargo would choose other features of crates that all of it shares, and build
        # those again. The tests of the command line bring the program with them.
        build "building voxfleet and its tests with the batched engine" \
            cargo test --workspace --features "$CT2_FEATURES" --no-run --lib --bins --test engine --test usage
        # Under a name of its own: the next build without the feature takes the other one.
        program=$(binary debug)
        ln -f "$program" "$program-ct2" 2>/dev/null || cp -f "$program" "$program-ct2"
        step_begin
        failed_=
        cargo test --workspace --features "$CT2_FEATURES" --no-fail-fast --lib --bins ct2 || failed_=" unit"
        cargo test --workspace --features "$CT2_FEATURES" --no-fail-fast --test engine --test usage || failed_="$failed_ engine"
        PYTHONPATH=$CT2_PYTHON${PYTHONPATH:+:$PYTHONPATH} \
            cargo test --workspace --features "$CT2_FEATURES" --no-fail-fast --test convert ctranslate2 -- --nocapture ||
            failed_="$failed_ loader"
        # The same program of tests as `test` has; only what it starts is another.
        VOXFLEET_BIN=$program-ct2 cargo test --workspace --no-fail-fast --test all ct2 || failed_="$failed_ end-to-end"
        if [ -n "$failed_" ]; then
            step "the tests of the batched engine failed:$failed_"
            exit 1
        fi
        step "the tests of the batched engine passed; $program-ct2 has it"
        ;;
    lint)
        cd "$ROOT"
        needs_cxx17
        for part in fmt clippy; do
            cargo "$part" --version >/dev/null 2>&1 ||
                die "cargo $part is not installed: rustup component add rustfmt clippy"
        done
        step_begin
        cargo fmt --all --check || die "cargo fmt --check: run cargo fmt"
        step "cargo fmt --check"
        build "cargo clippy" cargo clippy --workspace --all-targets -- -D warnings
        build "cargo clippy, with the batched engine" \
            cargo clippy --workspace --all-targets --features "$CT2_FEATURES" -- -D warnings
        # What images and the CUDA build are made of.
        for features_ in '' worker dispatcher worker,dispatcher; do
            build "cargo clippy, slim: ${features_:-nothing}" \
                cargo clippy -p voxfleet --no-default-features --features "$features_" -- -D warnings
        done
        ;;
esac
