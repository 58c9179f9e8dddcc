#!/bin/sh
# Builds the final stage of the CPU image from the real Dockerfile without Docker and without a registry, and starts a fleet of
# containers from it: sh deploy/check.sh --image
#
# Needs root, buildah and debootstrap (apt-get install --no-install-recommends buildah debootstrap) and a built binary. Debian's
# slim image is stood in for by a debootstrap of the same release, a little larger; the compiler's stage by the binary at hand,
# stripped. Minutes, and 2 GB of disk, given back at the end.
#
# Called with CHECK_ROOT, CHECK_WORK, CHECK_BINARY; prints lines as live.sh does.
set -eu

ROOT=$CHECK_ROOT WORK=$CHECK_WORK
export BUILDAH_ISOLATION=chroot
STORE="--storage-driver vfs --root $WORK/store --runroot $WORK/runroot"
PIDS=

ok() { echo "ok $*"; }
fail() { echo "FAIL $*"; }
# shellcheck disable=SC2086 # a list of options
b() { buildah $STORE "$@"; }
# inside PID: the container's own process below it; buildah passes no signal on.
inside() {
    case $(cat "/proc/$1/comm" 2>/dev/null) in
        voxfleet | nats-server) echo "$1" ;;
        *) for kid_ in $(cat "/proc/$1"/task/*/children 2>/dev/null || :); do inside "$kid_"; done ;;
    esac
}
tidy() {
    for pid_ in $PIDS; do
        # shellcheck disable=SC2046 # a list of numbers
        kill $(inside "$pid_") 2>/dev/null || :
    done
    for pid_ in $PIDS; do wait "$pid_" 2>/dev/null || :; done
    b umount -a >/dev/null 2>&1 || :
    b rm -a >/dev/null 2>&1 || :
}
trap tidy EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

image() { # NAME FOLDER: an image of one layer
    from_=$(b from scratch)
    b add -q "$from_" "$2" / >/dev/null
    b commit -q "$from_" "$1" >/dev/null
    b rm "$from_" >/dev/null
}

debootstrap --variant=minbase bookworm "$WORK/bookworm" >"$WORK/debootstrap.log" 2>&1 || {
    echo "skip image: debootstrap failed: $(tail -n 1 "$WORK/debootstrap.log")"
    exit 0
}
rm -rf "$WORK"/bookworm/var/cache/apt/archives/*.deb "$WORK"/bookworm/var/lib/apt/lists/*
image docker.io/library/debian:bookworm-slim "$WORK/bookworm"
base_mb=$(du -sm "$WORK/bookworm" | cut -f1)
rm -rf "$WORK/bookworm"
mkdir -p "$WORK/built/out/bin"
strip -o "$WORK/built/out/bin/voxfleet" "$CHECK_BINARY"
sh "$ROOT/deploy/docker/runtime-parts.sh" "$WORK/built/out/parts"
image localhost/voxfleet-built:check "$WORK/built"

# The first stage compiles; it is what was built already.
awk '/^FROM \$\{RUST_IMAGE\}/ { print "FROM localhost/voxfleet-built:check AS build"; skip = 1; next }
    /^FROM \$\{RUNTIME_IMAGE\}/ { skip = 0 } !skip' "$ROOT/deploy/docker/Dockerfile.cpu" >"$WORK/Dockerfile"
if ! b bud --format docker --pull-never -f "$WORK/Dockerfile" -t voxfleet:cpu "$ROOT" >"$WORK/bud.log" 2>&1; then
    fail "Dockerfile.cpu: $(tail -n 2 "$WORK/bud.log")"
    exit 0
fi
container=$(b from --pull-never localhost/voxfleet:cpu)
mounted=$(b mount "$container")
ok "Dockerfile.cpu, final stage: $(du -sm "$mounted" | cut -f1) MB, of them $base_mb the base and $(
    wc -c <"$WORK/built/out/bin/voxfleet" | awk '{ printf "%d", $1 / 1000000 }') the binary (of the profile at hand)"

found=
for tool in cc gcc g++ make cmake cargo rustc python3 pip; do
    for dir in bin usr/bin usr/local/bin; do [ ! -e "$mounted/$dir/$tool" ] || found="$found $tool"; done
done
if [ -z "$found" ]; then ok "no compiler in the image"; else fail "in the image:$found"; fi
missing=$(chroot "$mounted" ldd /usr/local/bin/voxfleet | grep 'not found' || :)
if [ -z "$missing" ]; then ok "every library of the binary is in the image"; else fail "libraries: $missing"; fi

# The host's network, so 127.0.0.1 is the server's; a folder in the place of the volume.
port=$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
nats-server -a 127.0.0.1 -p "$port" -js -sd "$WORK/js" -c "$ROOT/nats/conf/dev.conf" >"$WORK/nats.log" 2>&1 &
PIDS="$! $PIDS"
mkdir -p "$WORK/cache/models"
cp "$ROOT"/tests/models/*.bin "$WORK/cache/models/"
chown -R 10001:10001 "$WORK/cache"
run() {
    log_=$1
    shift
    b run --volume "$WORK/cache:/var/cache/voxfleet" --env "VOXFLEET__NATS__URLS=nats://127.0.0.1:$port" \
        --env VOXFLEET_MODELS=micro.en-q8_0 "$container" -- voxfleet-entry "$@" >"$log_" 2>&1
}
run "$WORK/dispatcher.log" dispatcher &
PIDS="$! $PIDS"
run "$WORK/worker.log" worker --gpu none --gpu-id image-0 &
PIDS="$! $PIDS"
tries=100
until run "$WORK/status.log" status && grep -q '^image-0 *alive' "$WORK/status.log"; do
    tries=$((tries - 1))
    if [ $tries -le 0 ]; then
        fail "containers: no worker: $(tail -n 2 "$WORK/worker.log")"
        exit 0
    fi
    sleep 0.3
done
ok "containers: dispatcher and worker, as user $(b run "$container" -- id -u)"
if run "$WORK/health.log" health; then ok "containers: the health check is well"; else fail "health check: $(cat "$WORK/health.log")"; fi
if VOXFLEET__NATS__URLS=nats://127.0.0.1:$port "$CHECK_BINARY" stream "$ROOT/tests/audio/call-01.flac" --speed 8 --wait \
    >"$WORK/stream.log" 2>&1 && grep -q image-0 "$WORK/stream.log"; then
    ok "containers: a call was transcribed"
else
    fail "containers: a call: $(tail -n 2 "$WORK/stream.log")"
fi
