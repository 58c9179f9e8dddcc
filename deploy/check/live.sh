#!/bin/sh
# What can be said of the deploy files by running them: NATS from its server files with TLS, nkeys, three servers and a leaf
# node; then dispatcher, worker and on-start scripts in a clean root, against that server, with nothing but the environment
# that a rented machine gives. Everything listens on 127.0.0.1 and ends with this script.
#
# Called by deploy/check.sh with CHECK_ROOT, CHECK_WORK (an empty folder), CHECK_BINARY (or empty), CHECK_PRIVATE (not empty in
# a mount namespace of its own: only then anything is mounted). Prints lines `ok WHAT`, `FAIL WHAT: WHY`, `skip WHAT: WHY`.
set -eu

ROOT=$CHECK_ROOT WORK=$CHECK_WORK BINARY=${CHECK_BINARY:-}
PIDS=
MOUNTED=

ok() { echo "ok $*"; }
fail() { echo "FAIL $*"; }
skip() { echo "skip $*"; }
have() { command -v "$1" >/dev/null 2>&1; }

tidy() {
    for pid_ in $PIDS; do kill "$pid_" 2>/dev/null || :; done
    for pid_ in $PIDS; do
        n_=0
        while runs "$pid_" && [ $n_ -lt 40 ]; do sleep 0.1; n_=$((n_ + 1)); done
        kill -9 "$pid_" 2>/dev/null || :
    done
    [ -z "$MOUNTED" ] || umount -l "$MOUNTED" 2>/dev/null || :
}
trap tidy EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

# start LOG COMMAND...: in the background; sets PID.
start() {
    log_=$1
    shift
    "$@" >"$log_" 2>&1 </dev/null &
    PID=$!
    PIDS="$PID $PIDS"
}

# until SECONDS COMMAND...: polls until it succeeds.
until_ok() {
    tries_=$(($1 * 5))
    shift
    while ! "$@" >/dev/null 2>&1; do
        tries_=$((tries_ - 1))
        [ $tries_ -gt 0 ] || return 1
        sleep 0.2
    done
}

# Not gone, and not a dead child that only waits to be counted.
runs() { [ -d "/proc/$1" ] && ! grep -q '^State:[[:space:]]*Z' "/proc/$1/status" 2>/dev/null; }

# ended PID SECONDS: sets CODE to its exit code, or `runs`.
ended() {
    tries_=$(($2 * 10))
    while runs "$1"; do
        tries_=$((tries_ - 1))
        if [ $tries_ -le 0 ]; then
            CODE=runs
            return
        fi
        sleep 0.1
    done
    CODE=0
    wait "$1" 2>/dev/null || CODE=$?
}

# expect WHAT GOT WANTED WHY-NOT
expect() { if [ "$2" = "$3" ]; then ok "$1"; else fail "$1: $2 instead of $3${4:+, $4}"; fi; }

free_ports() {
    python3 -c '
import socket, sys
open_ = [socket.socket() for _ in range(int(sys.argv[1]))]
for s in open_: s.bind(("127.0.0.1", 0))
print(*[s.getsockname()[1] for s in open_])' "$1"
}

# ---------------------------------------------------------------------------------------------- NATS

nats_files() {
    mkdir -p "$WORK/nats/tls" "$WORK/js"
    cp "$ROOT"/nats/conf/*.conf "$ROOT"/deploy/nats/*.conf "$WORK/nats/"
    # shellcheck disable=SC2046 # a list of numbers
    set -- $(free_ports 14)
    P_HUB=$1 P_MONITOR=$2 P_LEAFS=$3 P_WS=$4 P_SITE=$5
    P_THREE="$6 $7 $8"
    P_A=$6
    shift 8
    R_THREE="$1 $2 $3"
    P_DISPATCHER=$5 P_WORKER=$6
    sed -i -e "s#/etc/nats/#$WORK/nats/#" "$WORK"/nats/*.conf
    sed -i -e "s#\"0.0.0.0:4222\"#\"127.0.0.1:$P_HUB\"#" -e "s#\"/var/lib/nats\"#\"$WORK/js/hub\"#" \
        -e "s#127.0.0.1:8222#127.0.0.1:$P_MONITOR#" "$WORK/nats/single.conf"
    sed -i "s#0.0.0.0:7422#127.0.0.1:$P_LEAFS#" "$WORK/nats/leafnodes.conf"
    sed -i "s#0.0.0.0:443#127.0.0.1:$P_WS#" "$WORK/nats/websocket.conf"
    sed -i "s#127.0.0.1:4222#127.0.0.1:$P_SITE#" "$WORK/nats/leaf.conf"
    sed -i 's/^# include/include/' "$WORK/nats/hub-single.conf"
    (
        cd "$WORK/nats/tls"
        key='-newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes'
        # shellcheck disable=SC2086 # a list of options
        openssl req -x509 $key -days 2 -subj /CN=check-ca -keyout ca-key.pem -out ca.pem
        # shellcheck disable=SC2086
        openssl req $key -subj /CN=localhost -keyout server-key.pem -out server.csr
        printf 'subjectAltName=DNS:localhost,IP:127.0.0.1\nextendedKeyUsage=serverAuth,clientAuth\n' >ext
        openssl x509 -req -in server.csr -CA ca.pem -CAkey ca-key.pem -CAcreateserial -days 2 -extfile ext -out server.pem
    ) >"$WORK/openssl.log" 2>&1 || return 1
    # A leaf node carries all of its site, so its user has no list of permissions (docs/nats.md).
    # shellcheck disable=SC2016 # the server reads that name
    sed -i 's#^    users: \[#&\n      { nkey: $VOXFLEET_NKEY_SITE }#' "$WORK/nats/accounts.conf"
    for role_ in DISPATCHER WORKER OPERATOR PRODUCER VIEWER SITE ADMIN; do
        nats auth nkey gen user >"$WORK/nats/$role_.seed"
        export "VOXFLEET_NKEY_$role_=$(nats auth nkey show "$WORK/nats/$role_.seed")"
    done
    export VOXFLEET_NATS_NAME=n1 VOXFLEET_NATS_STORE="$WORK/js/n1"
    export VOXFLEET_NATS_ROUTES="[nats://127.0.0.1:$1,nats://127.0.0.1:$2,nats://127.0.0.1:$3]"
    export VOXFLEET_LEAF_NAME=site VOXFLEET_HUB_URL="tls://localhost:$P_LEAFS"
    VOXFLEET_LEAF_SEED=$(cat "$WORK/nats/SITE.seed")
    export VOXFLEET_LEAF_SEED
}

nats_syntax() {
    for file_ in single cluster hub-single hub-three leaf; do
        if why_=$(nats-server -t -c "$WORK/nats/$file_.conf" 2>&1); then
            ok "nats-server -t $file_.conf"
        else
            fail "nats-server -t $file_.conf: $why_"
        fi
    done
    # No login at its default: a key that is not given must be a server that does not start.
    if (unset VOXFLEET_NKEY_WORKER; nats-server -t -c "$WORK/nats/hub-single.conf" >/dev/null 2>&1); then
        fail "accounts.conf: a server starts without the worker's key"
    else
        ok "accounts.conf: without a key no server"
    fi
}

as() {
    role_=$1
    shift
    nats -s "tls://localhost:$P_HUB" --tlsca "$WORK/nats/tls/ca.pem" --nkey "$WORK/nats/$role_.seed" \
        --inbox-prefix "_INBOX_$(echo "$role_" | tr '[:upper:]' '[:lower:]')" "$@"
}

nats_hub() {
    start "$WORK/hub.log" nats-server -c "$WORK/nats/hub-single.conf"
    HUB=$PID
    if ! until_ok 10 as OPERATOR stream ls; then
        fail "hub-single.conf: nobody comes in by TLS and nkey: $(tail -n 3 "$WORK/hub.log")"
        return 1
    fi
    ok "hub-single.conf: TLS and nkey let in"
    nats auth nkey gen user >"$WORK/nats/STRANGER.seed"
    if as STRANGER stream ls >/dev/null 2>&1 || nats -s "nats://127.0.0.1:$P_HUB" stream ls >/dev/null 2>&1; then
        fail "hub-single.conf: a stranger gets in, or somebody without TLS"
    else
        ok "hub-single.conf: no stranger and nobody without TLS"
    fi
    start "$WORK/leaf.log" nats-server -c "$WORK/nats/leaf.conf"
    LEAF=$PID
    site='nats -s nats://127.0.0.1:'$P_SITE
    # shellcheck disable=SC2086 # a command
    if until_ok 10 $site stream ls; then ok "leaf.conf: JetStream of the hub through TLS"; else fail "leaf.conf over TLS: $(tail -n 3 "$WORK/leaf.log")"; fi
    kill "$LEAF" 2>/dev/null || :
    ended "$LEAF" 5
    VOXFLEET_HUB_URL="wss://localhost:$P_WS" start "$WORK/leaf.log" nats-server -c "$WORK/nats/leaf.conf"
    # shellcheck disable=SC2086
    if until_ok 10 $site stream ls; then ok "leaf.conf: the same through a websocket"; else fail "leaf.conf over wss: $(tail -n 3 "$WORK/leaf.log")"; fi
}

nats_three() {
    for n_ in 1 2 3; do
        port_=$(echo "$P_THREE" | cut -d' ' -f$n_) route_=$(echo "$R_THREE" | cut -d' ' -f$n_)
        sed -e "s#\"0.0.0.0:4222\"#\"127.0.0.1:$port_\"#" -e '/^http:/d' "$WORK/nats/cluster.conf" >"$WORK/nats/cluster-$n_.conf"
        sed -e "s#include \"cluster.conf\"#include \"cluster-$n_.conf\"#" -e "s#0.0.0.0:6222#127.0.0.1:$route_#" \
            "$WORK/nats/hub-three.conf" >"$WORK/nats/hub-$n_.conf"
        VOXFLEET_NATS_NAME=n$n_ VOXFLEET_NATS_STORE="$WORK/js/n$n_" start "$WORK/n$n_.log" nats-server -c "$WORK/nats/hub-$n_.conf"
    done
}

# Elections take seconds: begun first, asked last.
nats_three_agree() {
    P_HUB_=$P_HUB
    P_HUB=$P_A
    if until_ok 20 as OPERATOR stream add CHECK --subjects check --storage file --replicas 3 --defaults; then
        ok "hub-three.conf: a stream of three replicas, routes by mutual TLS"
    else
        fail "hub-three.conf: no stream of three replicas: $(tail -n 3 "$WORK/n1.log")"
    fi
    P_HUB=$P_HUB_
}

# ---------------------------------------------------------------------------------------------- a clean root

# The layout of the images over this machine's libraries: /usr read-only, a few accounts, and nothing else of it.
clean_root() {
    R=$WORK/root
    mkdir -p "$R"
    mount -t tmpfs -o mode=755 tmpfs "$R" 2>"$WORK/mount.log" || return 1
    MOUNTED=$R
    mkdir -p "$R/usr" "$R/dev" "$R/proc" "$R/tmp" "$R/etc" "$R/run" "$R/var/log" "$R/var/lib/voxfleet" "$R/opt/voxfleet" "$R/workspace" \
        "$R/var/cache/voxfleet/models"
    mount --bind /usr "$R/usr" && mount -o remount,bind,ro "$R/usr" || return 1
    mount -t proc proc "$R/proc" || return 1
    for link_ in bin sbin lib lib64; do
        if [ -L "/$link_" ]; then cp -P "/$link_" "$R/"; else mkdir "$R/$link_" && mount --bind "/$link_" "$R/$link_"; fi
    done
    for node_ in null zero random urandom; do touch "$R/dev/$node_" && mount --bind "/dev/$node_" "$R/dev/$node_"; done
    printf 'root:x:0:0::/root:/bin/sh\nvoxfleet:x:10001:10001::/var/lib/voxfleet:/usr/sbin/nologin\n' >"$R/etc/passwd"
    printf 'root:x:0:\nvoxfleet:x:10001:\n' >"$R/etc/group"
    printf '127.0.0.1 localhost\n' >"$R/etc/hosts"
    chmod 1777 "$R/tmp"
    chown 10001:10001 "$R/var/cache/voxfleet" "$R/var/cache/voxfleet/models" "$R/var/lib/voxfleet"
    # A folder of its own on PATH: /usr is this machine's.
    mkdir -p "$R/app"
    cp "$BINARY" "$R/app/voxfleet"
    cp "$ROOT/deploy/entrypoint.sh" "$R/app/voxfleet-entry"
    cp "$ROOT/deploy/vast/onstart.sh" "$ROOT/deploy/runpod/start.sh" "$R/opt/voxfleet/"
    cp "$ROOT"/tests/models/micro.en-q8_0.bin "$R/var/cache/voxfleet/models/"
    chown -R 10001:10001 "$R/var/cache/voxfleet"
    chmod 755 "$R"/app/* "$R"/opt/voxfleet/*.sh
    ended "$PARTS_PID" 60
    if [ "$CODE" = 0 ]; then
        cp -R "$WORK/parts/." "$R/opt/voxfleet/"
        ok "runtime-parts.sh: detector and ONNX Runtime, by checksum"
        PARTS="ORT_DYLIB_PATH=/opt/voxfleet/lib/libonnxruntime.so VOXFLEET__WORKER__SILERO_MODEL=/opt/voxfleet/silero_vad.onnx"
    else
        skip "runtime-parts.sh: the wheels could not be had: $(tail -n 1 "$WORK/parts.log")"
        PARTS=
    fi
}

# in_root VARIABLES... -- COMMAND...: as root, with these variables and no others.
in_root() {
    # shellcheck disable=SC2086 # a list of variables
    exec chroot "$R" env -i PATH=/app:/usr/bin:/usr/sbin:/bin HOME=/root VOXFLEET_CACHE=/var/cache/voxfleet \
        "VOXFLEET__NATS__URLS=tls://localhost:$P_HUB" "VOXFLEET_TLS_CA_BASE64=$CA" \
        VOXFLEET__NATS__INBOX_PREFIX=_INBOX_worker $PARTS "$@"
}

uid_of() { sed -n 's/^Uid:[[:space:]]*\([0-9]*\).*/\1/p' "/proc/$1/status" 2>/dev/null; }

# seen NAME: the worker of that name, in the fleet's own words.
seen() {
    VOXFLEET__NATS__URLS="tls://localhost:$P_HUB" VOXFLEET__NATS__TLS_CA="$WORK/nats/tls/ca.pem" \
        VOXFLEET__NATS__NKEY_SEED_FILE="$WORK/nats/OPERATOR.seed" VOXFLEET__NATS__INBOX_PREFIX=_INBOX_operator \
        "$BINARY" status 2>/dev/null | grep -q "^$1 *alive"
}

# is_missing WORKER MODEL: what the worker says of it.
is_missing() {
    operator status --json | python3 -c '
import json, sys
beats = (w["heartbeat"] for w in json.load(sys.stdin)["workers"])
states = [m["state"] for b in beats if b["gpu_id"] == sys.argv[1] for m in b["models"] if m["name"] == sys.argv[2]]
sys.exit(states != ["missing"])' "$1" "$2"
}

operator() { person OPERATOR _INBOX_operator "$@"; }
producer() { person PRODUCER _INBOX_producer "$@"; }

# person KEY INBOXES WORDS...: a command with that role's login.
person() {
    seed_file_=$WORK/nats/$1.seed inboxes_=$2
    shift 2
    VOXFLEET__NATS__URLS="tls://localhost:$P_HUB" VOXFLEET__NATS__TLS_CA="$WORK/nats/tls/ca.pem" \
        VOXFLEET__NATS__NKEY_SEED_FILE="$seed_file_" VOXFLEET__NATS__INBOX_PREFIX="$inboxes_" timeout 60 "$BINARY" "$@"
}

run_entry() {
    CA=$(base64 <"$WORK/nats/tls/ca.pem" | tr -d '\n')
    at_dispatcher=VOXFLEET__DISPATCHER__HTTP__LISTEN=127.0.0.1:$P_DISPATCHER at_worker=VOXFLEET__WORKER__HTTP__LISTEN=127.0.0.1:$P_WORKER
    # Its seed has a folder of its own: here both share one root, and the worker's would be written over it.
    start "$WORK/dispatcher.log" in_root "VOXFLEET_NKEY_SEED=$(cat "$WORK/nats/DISPATCHER.seed")" "$at_dispatcher" \
        XDG_RUNTIME_DIR=/tmp/dispatcher VOXFLEET__NATS__INBOX_PREFIX=_INBOX_dispatcher voxfleet-entry dispatcher --name check
    DISPATCHER=$PID
    seed_="VOXFLEET_NKEY_SEED=$(cat "$WORK/nats/WORKER.seed")"
    start "$WORK/worker.log" in_root "$seed_" "$at_worker" VOXFLEET_MODELS=micro.en-q8_0 voxfleet-entry worker --gpu none --gpu-id entry-0
    WORKER=$PID
    if ! until_ok 15 seen entry-0; then
        fail "entrypoint.sh worker: $(tail -n 3 "$WORK/worker.log")"
        return
    fi
    ok "entrypoint.sh: dispatcher and worker, secrets from the environment"
    expect "entrypoint.sh: a dispatcher has one heap" "$(tr '\0' '\n' <"/proc/$DISPATCHER/environ" | grep '^MALLOC_ARENA_MAX=')" MALLOC_ARENA_MAX=1
    expect "entrypoint.sh: root is dropped, by user id" "$(uid_of "$WORKER")" 10001
    if tr '\0' '\n' <"/proc/$WORKER/environ" | grep -q '^VOXFLEET_NKEY_SEED\|^VOXFLEET_TLS_CA_BASE64'; then
        fail "entrypoint.sh: a secret is left in the environment"
    else
        ok "entrypoint.sh: no secret is left in the environment"
    fi
    # Each is asked for with the other's address closed; then nobody is there.
    nobody_=VOXFLEET__WORKER__HTTP__LISTEN=127.0.0.1:1
    for here_ in "worker $at_worker VOXFLEET__DISPATCHER__HTTP__LISTEN=127.0.0.1:1" "dispatcher $nobody_ $at_dispatcher"; do
        # shellcheck disable=SC2086 # two settings
        if (in_root ${here_#* } voxfleet-entry health) >/dev/null 2>"$WORK/health.log"; then
            ok "entrypoint.sh health: a ${here_%% *} is well"
        else
            fail "entrypoint.sh health: a ${here_%% *} is not: $(tail -n 2 "$WORK/health.log")"
        fi
    done
    if (in_root "$nobody_" VOXFLEET__DISPATCHER__HTTP__LISTEN=127.0.0.1:1 voxfleet-entry health) >/dev/null 2>&1; then
        fail "entrypoint.sh health: well where nobody is"
    else
        ok "entrypoint.sh health: not well where nobody is"
    fi
    if producer stream "$ROOT/tests/audio/call-01.flac" --speed 8 --wait --session check >"$WORK/stream.log" 2>&1; then
        ok "a call through it: $(tail -n 1 "$WORK/stream.log")"
    else
        fail "a call through it: $(tail -n 2 "$WORK/stream.log")"
    fi
    kill -TERM "$WORKER"
    ended "$WORKER" 12
    expect "entrypoint.sh: SIGTERM arrives, and the worker leaves in good order" "$CODE" 0

    # A model that nobody has; one that cannot be had now.
    start "$WORK/unknown.log" in_root "$seed_" VOXFLEET_MODELS=no-such-model voxfleet-entry worker --gpu none
    ended "$PID" 10
    expect "entrypoint.sh: an unknown model is a mistake" "$CODE" 64
    start "$WORK/missing.log" in_root "$seed_" VOXFLEET_MODELS='micro.en-q8_0 base.en' VOXFLEET__MODELS__OFFLINE=true \
        voxfleet-entry worker --gpu none --gpu-id entry-1
    WORKER=$PID
    if until_ok 15 is_missing entry-1 base.en && producer stream "$ROOT/tests/audio/call-01.flac" --speed 8 --wait --session beside \
        >"$WORK/beside.log" 2>&1; then
        ok "entrypoint.sh: a worker serves without a model that cannot be had, and says so"
    else
        fail "entrypoint.sh: without a model: $(tail -n 2 "$WORK/missing.log" "$WORK/beside.log" 2>/dev/null | tr '\n' ' ')"
    fi
    kill -TERM "$WORKER"
    ended "$WORKER" 12
    expect "entrypoint.sh: and stops when told" "$CODE" 0
}

# What the units' timers start, with a systemctl and a voxfleet that only say what they were asked.
run_health() {
    mkdir -p "$WORK/health/real"
    cat >"$WORK/health/real/systemctl" <<'STANDIN'
#!/bin/sh
echo "systemctl $*" >>"$ASKED"
[ "$1" != is-active ] || exit "$UNIT_IS"
STANDIN
    # Its exit codes one after the other.
    cat >"$WORK/health/voxfleet" <<'STANDIN'
#!/bin/sh
echo "voxfleet $*" >>"$ASKED"
exit "$(echo "$CODES" | cut -d' ' -f"$(grep -c ^voxfleet "$ASKED")")"
STANDIN
    cp "$WORK/health/real/systemctl" "$WORK/health/"
    chmod 755 "$WORK/health/systemctl" "$WORK/health/voxfleet" "$WORK/health/real/systemctl"
    health_case() { # WHAT CODES UNIT_IS WANTED
        : >"$WORK/health/asked"
        PATH=$WORK/health:$PATH ASKED=$WORK/health/asked CODES=$2 UNIT_IS=$3 VOXFLEET_HEALTH_PAUSE_S=0 \
            VOXFLEET_HEALTH_URL=http://127.0.0.1:9480 \
            sh "$ROOT/deploy/systemd/voxfleet-health.sh" u.service >/dev/null 2>&1 || :
        expect "voxfleet-health.sh: $1" "$(sed 's/^systemctl \([a-z-]*\).*/\1/; s/^voxfleet health --at http:..127.0.0.1:9480 --timeout 10$/asked/' \
            "$WORK/health/asked" | tr '\n' ' ')" "$4"
    }
    health_case "a unit that answers is left alone" 0 0 'is-active asked '
    health_case "one that answers at the third try too" '75 75 0' 0 'is-active asked asked asked '
    health_case "one that takes three questions and answers none is started again" '75 75 75' 0 'is-active asked asked asked try-restart '
    health_case "one where nobody listens is not" 1 0 'is-active asked '
    health_case "one that is gone at the second try is not either" '75 1' 0 'is-active asked asked '
    health_case "one that was stopped is not asked" '75 75 75' 3 'is-active '
}

# The same with real ones: a dispatcher that serves HTTPS, and the NATS server.
run_health_real() {
    mkdir -p "$WORK/health/cache"
    P_HTTPS=$(free_ports 1)
    ln -sf "$BINARY" "$WORK/health/real/voxfleet"
    start "$WORK/https.log" env VOXFLEET__NATS__URLS="tls://localhost:$P_HUB" VOXFLEET__NATS__TLS_CA="$WORK/nats/tls/ca.pem" \
        VOXFLEET__NATS__NKEY_SEED_FILE="$WORK/nats/DISPATCHER.seed" VOXFLEET__NATS__INBOX_PREFIX=_INBOX_dispatcher \
        VOXFLEET__DISPATCHER__HTTP__LISTEN="127.0.0.1:$P_HTTPS" VOXFLEET__DISPATCHER__HTTP__TLS_CERT="$WORK/nats/tls/server.pem" \
        VOXFLEET__DISPATCHER__HTTP__TLS_KEY="$WORK/nats/tls/server-key.pem" VOXFLEET_CACHE="$WORK/health/cache" \
        "$BINARY" dispatcher --name https
    HTTPS=$PID
    real_case() { # WHAT WANTED [URL] [CA]: what the unit's check does now
        : >"$WORK/health/asked"
        PATH=$WORK/health/real:$PATH ASKED=$WORK/health/asked UNIT_IS=0 VOXFLEET_HEALTH_PAUSE_S=0 VOXFLEET_HEALTH_WAIT_S=1 \
            VOXFLEET_HEALTH_URL="${3:-https://localhost:$P_HTTPS}" VOXFLEET_HEALTH_CA="${4-$WORK/nats/tls/ca.pem}" \
            sh "$ROOT/deploy/systemd/voxfleet-health.sh" u.service >"$WORK/health/said" 2>&1 && CODE=0 || CODE=$?
        expect "voxfleet-health.sh, $1" "$CODE $(sed 's/^systemctl \([a-z-]*\).*/\1/' "$WORK/health/asked" | tr '\n' ' ')" "$2" \
            "$(tail -n 2 "$WORK/health/said" | tr '\n' ' ') $(tail -n 1 "$WORK/https.log")"
    }
    until_ok 15 "$BINARY" health --at "https://localhost:$P_HTTPS" --ca "$WORK/nats/tls/ca.pem" || :
    real_case "over TLS: a dispatcher that answers" '0 is-active '
    real_case "over TLS: a certificate that nobody vouches for is told, and nothing is started again" '1 is-active ' '' ''
    real_case "http where https is spoken is told too" '1 is-active ' "http://127.0.0.1:$P_HTTPS"
    kill -STOP "$HTTPS"
    real_case "over TLS: a dispatcher that hangs is started again" '0 is-active try-restart '
    kill -CONT "$HTTPS"
    kill -TERM "$HTTPS"
    ended "$HTTPS" 12
    real_case "over TLS: where nobody listens nothing is started again" '1 is-active '
    monitor_="http://127.0.0.1:$P_MONITOR/healthz?js-enabled-only=true"
    real_case "nats-server: one that answers" '0 is-active ' "$monitor_"
    kill -STOP "$HUB"
    real_case "nats-server: one that hangs is started again" '0 is-active try-restart ' "$monitor_"
    kill -CONT "$HUB"
}

# The workers of the laptop on two cores, by what the worker itself makes of its settings there.
run_cores() {
    seed_="VOXFLEET_NKEY_SEED=$(cat "$WORK/nats/WORKER.seed")"
    # shellcheck disable=SC2046 # settings without spaces
    set -- $(sed -n 's/^  \(VOXFLEET__WORKER__[A-Z_]*\): "\(.*\)"$/\1=\2/p' "$ROOT/deploy/compose/laptop.yml")
    workers_=$(grep -c '^  worker-[0-9]*:$' "$ROOT/deploy/compose/laptop.yml")
    cores_=$(python3 -c 'import os; print(*sorted(os.sched_getaffinity(0))[:2], sep=",")')
    # Each has a cache of its own there, so it does not see the others. The cores are counted when its engine starts.
    start "$WORK/cores.log" in_root "$seed_" VOXFLEET_MODELS=micro.en-q8_0 VOXFLEET__LOG__FORMAT=json "$@" \
        VOXFLEET__WORKER__PRELOAD=micro.en-q8_0 \
        taskset -c "$cores_" voxfleet-entry worker --gpu none --gpu-id laptop-0
    worker=$PID
    until_ok 15 grep -q '"cores shared out"' "$WORK/cores.log" || :
    if told_=$(python3 - "$WORK/cores.log" "$workers_" 2>&1 <<'PY'
import json, sys

lines = [json.loads(line) for line in open(sys.argv[1]) if line.startswith("{")]
told = next(line for line in lines if "cores shared out" in json.dumps(line))
told = told.get("fields", told)
count, cores = int(sys.argv[2]), int(told["cores"])
each = int(told["decode_states"]) * int(told["decode_threads"])
print(f"{count} workers with {each} decode threads each on {cores} cores")
sys.exit(count < 2 or count * each > max(cores, count))
PY
    ); then
        ok "compose/laptop.yml: $told_"
    else
        fail "compose/laptop.yml: $(echo "$told_" | tail -n 1)"
    fi
    kill -TERM "$worker"
    ended "$worker" 12
}

# onstart LOG: one start of the instance. Its log is cut at 50 kB here.
onstart() {
    start "$1" in_root "VOXFLEET_NKEY_SEED=$(cat "$WORK/nats/WORKER.seed")" VOXFLEET_MODELS=micro.en-q8_0 \
        VOXFLEET_STATE=/run/onstart VOXFLEET_LOG_MAX=50000 "VOXFLEET_WORKER_ARGS=--gpu none --gpu-id vast-0" \
        sh /opt/voxfleet/onstart.sh
}

# keepers: who keeps a worker in the clean root.
keepers() {
    for dir_ in /proc/[0-9]*; do
        case $(tr '\0' ' ' <"$dir_/cmdline" 2>/dev/null) in
            *"onstart.sh --keep "*) if runs "${dir_#/proc/}"; then echo "${dir_#/proc/}"; fi ;;
        esac
    done
}

# workers KEEPER: those that it has started; has_worker KEEPER: whether there is one.
workers() {
    kids_=
    read -r kids_ 2>/dev/null <"/proc/$1/task/$1/children" || : # no end of line
    for kid_ in $kids_; do
        if [ "$(cat "/proc/$kid_/comm" 2>/dev/null)" = voxfleet ]; then echo "$kid_"; fi
    done
}
has_worker() { [ -n "$(workers "$1")" ]; }
unseen() { ! seen "$1"; }
onstart_told() { tail -n 2 "$WORK"/vast*.log "$LOG" 2>/dev/null | tr '\n' ' '; }

# Sets KEEPER, and has it ended with this script.
the_keeper() {
    KEEPER=$(keepers)
    PIDS="$KEEPER $PIDS"
}

run_onstart() {
    LOG=$R/var/log/voxfleet.log
    # Left by an earlier life of the instance; now the number of a process that has nothing to do with us.
    start "$WORK/foreign.log" sleep 600
    FOREIGN=$PID
    echo "$FOREIGN" >"$R/run/onstart"
    onstart "$WORK/vast.log"
    first=$PID
    onstart "$WORK/vast-too.log"
    ended "$PID" 10
    ended "$first" 10
    if [ "$CODE" = 0 ] && until_ok 15 seen vast-0; then
        ok "vast/onstart.sh: comes back at once and leaves a worker, whoever has the number of an earlier one"
    else
        fail "vast/onstart.sh ($CODE): $(onstart_told)"
        return
    fi
    the_keeper
    expect "vast/onstart.sh: started twice at once, one keeps the worker and the other says so" \
        "$(echo "$KEEPER" | wc -w) $(cat "$WORK"/vast.log "$WORK"/vast-too.log | grep -c 'running already')" "1 1" "$(onstart_told)"
    until_ok 10 has_worker "$KEEPER" || :
    kill -9 "$(workers "$KEEPER")"
    if until_ok 10 grep -q 'ended with 137' "$LOG" && until_ok 20 has_worker "$KEEPER" && until_ok 10 seen vast-0; then
        ok "vast/onstart.sh: a worker that was killed is started again"
    else
        fail "vast/onstart.sh: not started again: $(onstart_told)"
        return
    fi

    # The keeper alone is killed: whoever comes next waits for the worker that is left, and then starts one.
    worker=$(workers "$KEEPER")
    PIDS="$worker $PIDS"
    kill -9 "$KEEPER"
    ended "$KEEPER" 5
    onstart "$WORK/vast.log"
    ended "$PID" 10
    until_ok 10 grep -q 'waiting for the end of a worker' "$LOG" || :
    the_keeper
    if runs "$worker" && [ -n "$KEEPER" ] && ! has_worker "$KEEPER" && kill -9 "$worker" && until_ok 10 has_worker "$KEEPER"; then
        ok "vast/onstart.sh: the worker of a keeper that was killed is waited for, then there is a new one"
    else
        fail "vast/onstart.sh: after its keeper was killed: $(onstart_told)"
        return
    fi

    # An outbid instance: everything at once, and the number is somebody else's when it comes back.
    worker=$(workers "$KEEPER")
    kill -9 "$KEEPER" "$worker"
    ended "$KEEPER" 5
    ended "$worker" 5
    until_ok 15 unseen vast-0 || :
    echo "$FOREIGN" >"$R/run/onstart"
    onstart "$WORK/vast.log"
    ended "$PID" 10
    the_keeper
    if [ "$CODE" = 0 ] && [ -n "$KEEPER" ] && until_ok 15 seen vast-0; then
        ok "vast/onstart.sh: killed in the middle, the next start leaves a worker again"
    else
        fail "vast/onstart.sh: killed in the middle ($CODE): $(onstart_told)"
        return
    fi

    head -c 120000 /dev/zero | tr '\0' '\n' >>"$LOG"
    until_ok 10 test -s "$LOG.1" || :
    operator drain vast-0 --deadline 10s --wait >"$WORK/drain.log" 2>&1 || :
    until_ok 15 grep -q 'was drained' "$LOG" || :
    ended "$KEEPER" 5
    if [ "$CODE" != runs ] && unseen vast-0; then
        ok "vast/onstart.sh: a drained worker is left alone"
    else
        fail "vast/onstart.sh: after a drain: $(onstart_told)"
    fi
    # The worker's last words come after the cut: a writer that did not append would have left a hole of the old size.
    kept=$(wc -c <"$LOG.1" 2>/dev/null || echo none) now=$(wc -c <"$LOG")
    if [ "$kept" = 50000 ] && [ "$now" -le 50000 ] && [ "$(tr -d '\0' <"$LOG" | wc -c)" = "$now" ] && grep -q 'was drained' "$LOG"; then
        ok "vast/onstart.sh: the log has a bound, and goes on behind it"
    else
        fail "vast/onstart.sh: the log has $now bytes and $kept in its old part"
    fi
    rm -f "$LOG" "$LOG.1"

    onstart "$WORK/vast.log"
    ended "$PID" 10
    until_ok 15 seen vast-0 || :
    the_keeper
    worker=$(workers "$KEEPER")
    kill -TERM "$KEEPER"
    ended "$KEEPER" 15
    if [ "$CODE" != runs ] && [ -n "$worker" ] && ! runs "$worker" && grep -q 'onstart: stopped' "$LOG"; then
        ok "vast/onstart.sh: stops with its worker when told"
    else
        fail "vast/onstart.sh: told to stop ($CODE): $(onstart_told)"
    fi
}

run_runpod() {
    seed_="VOXFLEET_NKEY_SEED=$(cat "$WORK/nats/WORKER.seed")"
    mkdir -p "$R/workspace/voxfleet/models"
    cp "$R/var/cache/voxfleet/models/micro.en-q8_0.bin" "$R/workspace/voxfleet/models/"
    start "$WORK/runpod.log" in_root "$seed_" RUNPOD_POD_ID=check VOXFLEET_MODELS=micro.en-q8_0 \
        voxfleet-entry /opt/voxfleet/start.sh worker --gpu none --gpu-id runpod-0
    worker=$PID
    if until_ok 15 seen runpod-0 && [ "$(stat -c %u "$R/workspace/voxfleet/models/micro.en-q8_0.bin")" = 10001 ]; then
        ok "runpod/start.sh: models on the volume, which becomes ours"
    else
        fail "runpod/start.sh: $(tail -n 2 "$WORK/runpod.log")"
    fi
    kill -TERM "$worker" 2>/dev/null || :
    ended "$worker" 5
    expect "runpod/start.sh: gone within the 5 s that a spot pod has" "$CODE" 0
}

# ---------------------------------------------------------------------------------------------- order

for tool in nats-server nats openssl python3; do
    have "$tool" || { skip "NATS files and clean root: no $tool here (sh deploy/bootstrap.sh deps)"; exit 0; }
done
if ! nats_files; then
    fail "keys and certificates for the check: $(tail -n 2 "$WORK/openssl.log")"
    exit 0
fi
nats_three
run_health
start "$WORK/parts.log" sh "$ROOT/deploy/docker/runtime-parts.sh" "$WORK/parts"
PARTS_PID=$PID
nats_syntax
nats_hub || exit 0
[ -z "$BINARY" ] || run_health_real
if [ -z "$BINARY" ]; then
    skip "clean root: no voxfleet was built here (cargo build -p voxfleet, or VOXFLEET_BIN)"
elif [ -z "${CHECK_PRIVATE:-}" ] || ! have setpriv || ! clean_root; then
    skip "clean root: mounts and chroot need root and a mount namespace"
else
    run_entry
    run_cores
    run_onstart
    run_runpod
fi
nats_three_agree
