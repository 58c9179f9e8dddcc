#!/bin/sh
# Everything that has to be measured on a GPU, in one go, on a machine that may have no network and no build tools:
#
#   sh deploy/gpu-measure.sh target/cuda/release/voxfleet
#   sh deploy/gpu-measure.sh --smoke target/debug/voxfleet     what a machine without a GPU can do, in minutes
#
# Needs: a binary (built with the features cuda and ct2-source; without ct2 the phases of the batched engine say so), the CUDA libraries it asks for on LD_LIBRARY_PATH, the source tree for test
# audio and the micro model, nats-server in the cache or on PATH (`sh deploy/bootstrap.sh deps`), python3, nvidia-smi.
#
# Each phase runs in a process group of its own, with a limit; a phase that fails or takes too long is written down as such,
# and the next one begins. Results are put into one JSON file after each phase, so that an end half way loses one phase.
# Nothing is reset on the card, no setting of it is changed, and only processes started here are ended.
#
# Phases are called by their names.
# shellcheck disable=SC2317,SC2329
set -u

HERE=$(cd -- "$(dirname -- "$0")" && pwd -P)
: "${VOXFLEET_ROOT:=$(dirname -- "$HERE")}"
export VOXFLEET_ROOT

usage() {
    cat <<'USAGE'
usage: sh deploy/gpu-measure.sh [--smoke] [--out DIR] [--gpu INDEX] [--shapes LIST] [--only PHASES] BINARY

  --smoke         no GPU: tiny random models on the CPU, phases that need a card are skipped and say so
  --out DIR       folder of the JSON file      [default: $OUT, else docs/measurements]
  --gpu INDEX     card, as nvidia-smi counts   [default: 0]
  --shapes LIST   shapes of random models      [default: base,small,medium,large-v3-turbo]
  --only PHASES   some of them: machine,stubs,readings,release,oom,memory,streams,engine,batched,density,kernels,coldstart,plan

environment:
  VOXFLEET_ROOT   source tree                  [default: where this script is]
  VOXFLEET_CACHE  nats-server, ONNX Runtime, Silero [default: ~/.cache/voxfleet]
  COMMIT          of the source tree, where git cannot tell [default: what git says, else unknown]
  STUBS           folder for the random models [default: a temporary one]
  LIMIT_SCALE     all limits of time are multiplied by it [default: 1]
USAGE
}

smoke=0 gpu=0 shapes='' only='' out=${OUT:-$VOXFLEET_ROOT/docs/measurements} phase='' work=''
while [ $# -gt 0 ]; do
    case $1 in
    --smoke) smoke=1 ;;
    --out) out=$2; shift ;;
    --gpu) gpu=$2; shift ;;
    --shapes) shapes=$2; shift ;;
    --only) only=$2; shift ;;
    --phase) phase=$2; work=$3; shift 2 ;; # what this script starts itself with
    -h | --help) usage; exit 0 ;;
    -*) usage >&2; exit 64 ;;
    *) break ;;
    esac
    shift
done
[ $# -eq 1 ] || { usage >&2; exit 64; }
VOXFLEET_BIN=$(cd -- "$(dirname -- "$1")" && pwd -P)/$(basename -- "$1")
export VOXFLEET_BIN
[ -x "$VOXFLEET_BIN" ] || { echo "gpu-measure: $VOXFLEET_BIN is no executable" >&2; exit 66; }
if [ "$smoke" = 1 ]; then
    shapes=${shapes:-tiny}
    format=q8_0 device=none use_gpu='' sessions=1,2 streams=2 states=1 rounds=1
    batches=1,2 numbers=int8_float32 density='--first 1 --most 2 --seconds 5'
else
    shapes=${shapes:-base,small,medium,large-v3-turbo}
    format=f16 device=$gpu use_gpu=--use-gpu sessions=1,2,4,8,16 streams=16,32,64,128 states=1,2,4,8 rounds=5
    batches=1,4,16,64 numbers=float16,int8_float16 density=''
fi
list() { printf '%s' "$1" | tr , ' '; }
COMMIT=${COMMIT:-$(git -C "$VOXFLEET_ROOT" describe --always --dirty --abbrev=7 --exclude '*' 2>/dev/null || echo unknown)}
smallest=${shapes%%,*}
largest=${shapes##*,}

# ------------------------------------------------------------------------------------------------ a small fleet

cache=${VOXFLEET_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/voxfleet}
nats_server=$cache/bin/nats-server
[ -x "$nats_server" ] || nats_server=nats-server
pids=''

end_fleet() {
    for pid in $pids; do
        kill "$pid" 2>/dev/null
    done
    for pid in $pids; do
        wait "$pid" 2>/dev/null
    done
    pids=''
}

# fleet DIR [NAME=VALUE ...]: server, dispatcher and one worker of the random models; settings as VOXFLEET__... variables.
fleet() {
    dir=$1
    shift
    mkdir -p "$dir"
    trap end_fleet EXIT
    trap 'exit 143' TERM INT
    "$nats_server" -a 127.0.0.1 -p -1 -js -sd "$dir/store" --ports_file_dir "$dir" >"$dir/nats.log" 2>&1 &
    pids="$! $pids"
    url=''
    tries=0
    while [ -z "$url" ] && [ "$tries" -lt 100 ]; do
        sleep 0.1
        tries=$((tries + 1))
        url=$(cat "$dir"/nats-server_*.ports 2>/dev/null | grep -o 'nats://[0-9.:]*' | head -n 1)
    done
    [ -n "$url" ] || { echo "nats-server does not start: $(tail -n 3 "$dir/nats.log")" >&2; return 1; }
    export VOXFLEET__NATS__URLS="$url"
    "$VOXFLEET_BIN" dispatcher >"$dir/dispatcher.log" 2>&1 &
    pids="$! $pids"
    env VOXFLEET__WORKER__GPU="$device" VOXFLEET__WORKER__GPU_ID=gpu-1 VOXFLEET__WORKER__MODELS_DIR="$stubs/$format" \
        VOXFLEET__WORKER__DEFAULT_MODEL="$smallest" VOXFLEET__WORKER__SLOTS=16 "$@" \
        "$VOXFLEET_BIN" worker >"$dir/worker.log" 2>&1 &
    worker=$!
    pids="$worker $pids"
    wait_for 60 "heartbeat device"
}

# field PATH...: one figure of the worker's heartbeat, as the dispatcher has it; empty where there is none.
field() {
    "$VOXFLEET_BIN" status --json 2>/dev/null | python3 -c '
import json, sys
try:
    value = json.load(sys.stdin)["workers"][0]
    for name in sys.argv[1:]:
        value = value[name]
    print(json.dumps(value))
except (ValueError, KeyError, IndexError, TypeError):
    pass' "$@"
}

# wait_for SECONDS "PATH" [VALUE]: until the field is there, or has this JSON value.
wait_for() {
    deadline=$(($(date +%s) + $1))
    while [ "$(date +%s)" -lt "$deadline" ]; do
        # The path is several words.
        # shellcheck disable=SC2086
        found=$(field $2)
        if [ -n "$found" ] && { [ $# -lt 3 ] || [ "$found" = "$3" ]; }; then
            return 0
        fi
        sleep 0.5
    done
    echo "not within $1 s: $2 ${3:-}" >&2
    return 1
}

speak() { # speak SESSION CALL [ARGUMENTS...]
    session=$1 call=$2
    shift 2
    "$VOXFLEET_BIN" stream "$VOXFLEET_ROOT/tests/audio/call-$call.flac" --session "$session" --language en --wait --json "$@"
}

# ------------------------------------------------------------------------------------------------ looking at the card

# look NAME: the card by nvidia-smi and by our worker within one second, as one line of JSON.
look() {
    nvidia-smi --id="$gpu" --query-gpu=memory.total,memory.used,memory.free,temperature.gpu,power.draw,utilization.gpu \
        --format=csv,noheader,nounits >"$dir/smi" 2>/dev/null
    nvidia-smi --id="$gpu" --query-compute-apps=pid,used_memory --format=csv,noheader,nounits >"$dir/apps" 2>/dev/null
    # Two heartbeats later, so that the worker has looked as well.
    sleep 2
    field heartbeat device >"$dir/device"
    engine=$(pgrep -P "$worker" 2>/dev/null | tr '\n' ' ')
    python3 - "$1" "$dir" "$engine" <<'PY'
import json, sys

name, folder, engine = sys.argv[1:4]
read = lambda part: open(f"{folder}/{part}").read().strip()
def number(text):
    try:
        return float(text)
    except ValueError:
        return None
device = json.loads(read("device") or "{}")
names = ["total_mb", "used_mb", "free_mb", "temperature_c", "power_w", "utilization_percent"]
smi = dict(zip(names, map(number, read("smi").split(",")))) if read("smi") else None
apps = [line.split(",") for line in read("apps").splitlines() if "," in line]
children = engine.split()
resident = 0
for pid in children:
    for line in open(f"/proc/{pid}/status"):
        if line.startswith("VmRSS:"):
            resident += int(line.split()[1]) // 1024
look = {
    "at": name,
    "nvidia_smi": smi,
    "worker": device,
    "engine_processes": len(children),
    "engine_resident_mb": resident,
    "engine_mb_by_nvidia_smi": sum(number(mb) or 0 for pid, mb in apps if pid.strip() in children) if smi else None,
}
if smi and device.get("total_mb"):
    look["used_mb_difference"] = device["total_mb"] - device["free_mb"] - smi["used_mb"]
print(json.dumps(look))
PY
}

# fill LEAVE_MB GREEDY: a second process that takes the card's memory by plain allocations until so much is left; with
# GREEDY=1 it goes on taking what becomes free. It ends with its input.
fill() {
    CUDA_VISIBLE_DEVICES=$gpu python3 -c '
import ctypes, ctypes.util, os, select, sys

leave, greedy = int(sys.argv[1]) << 20, sys.argv[2] == "1"
for name in ("libcudart.so.13", "libcudart.so.12", "libcudart.so", ctypes.util.find_library("cudart")):
    try:
        cuda = ctypes.CDLL(name)
        break
    except (OSError, TypeError):
        cuda = None
if cuda is None:
    sys.exit("no libcudart")
free, total, held = ctypes.c_size_t(), ctypes.c_size_t(), 0
while True:
    cuda.cudaMemGetInfo(ctypes.byref(free), ctypes.byref(total))
    step, block = min(free.value - leave, 1 << 30), ctypes.c_void_p()
    if step >= 1 << 20 and cuda.cudaMalloc(ctypes.byref(block), ctypes.c_size_t(step)) == 0:
        held += step
        continue
    cuda.cudaGetLastError()
    print(held >> 20, flush=True)
    while True:
        ready, _, _ = select.select([sys.stdin], [], [], 0.05 if greedy else None)
        if ready and not os.read(0, 1):
            sys.exit(0)
        if greedy:
            break
' "$1" "$2"
}

# ------------------------------------------------------------------------------------------------ phases

needs_card() {
    if [ "$smoke" = 1 ]; then
        echo '{"skipped": "there is no GPU"}'
        exit 0
    fi
}

phase_machine() {
    smi=$(nvidia-smi --id="$gpu" --query-gpu=name,driver_version,memory.total,vbios_version,mig.mode.current \
        --format=csv,noheader 2>/dev/null | head -n 1)
    missing=$(ldd "$VOXFLEET_BIN" 2>/dev/null | grep 'not found' | tr -s '[:space:]' ' ')
    python3 - "$smi" "$missing" "$("$VOXFLEET_BIN" --version)" "$(nproc)" <<'PY'
import json, sys

print(json.dumps({"nvidia_smi": sys.argv[1] or None, "missing_libraries": sys.argv[2].strip() or None,
                  "version": sys.argv[3], "cores": int(sys.argv[4])}))
PY
    [ -z "$missing" ]
}

phase_stubs() {
    "$VOXFLEET_BIN" bench stubs --shapes "$shapes" --format "$format" --stubs-dir "$stubs" --json
}

# What our worker says of the card beside what nvidia-smi says: empty, with a model, and beside a tenant that is none of ours.
phase_readings() {
    fleet "$work/readings" || return 1
    look "nothing loaded"
    speak readings-1 01 --speed 4 >"$dir/speak.log" 2>&1 || echo "the session failed" >&2
    look "$smallest loaded, one session has ended"
    if [ "$smoke" = 0 ]; then
        mkfifo "$dir/hold"
        fill 4096 0 <"$dir/hold" >"$dir/filled" 2>"$dir/fill.log" &
        filler=$!
        exec 3>"$dir/hold"
        sleep 5
        look "a tenant took all but 4096 MB"
        exec 3>&-
        wait "$filler"
        look "the tenant has gone"
    fi
}

# Memory with a model, and after the idle time: no engine process, 0 MB.
phase_release() {
    fleet "$work/release" VOXFLEET__WORKER__IDLE_RELEASE_MS=5000 || return 1
    look "before"
    speak release-1 01 --speed 4 >"$dir/speak.log" 2>&1 || echo "the session failed" >&2
    look "loaded"
    wait_for 60 "heartbeat engine state" '"down"' || return 1
    look "released"
    speak release-2 02 --speed 4 >"$dir/speak.log" 2>&1 || echo "the session after the release failed" >&2
    look "loaded again"
}

# A live session while a second process takes everything that is free, and goes on taking it: a second session wants the
# largest model, for which there is no room. Both must end; their finals say on which model and device.
phase_oom() {
    needs_card
    fleet "$work/oom" VOXFLEET__WORKER__RESTORE_AFTER_MS=10000 || return 1
    speak oom-1 01 --speed 1 --model "$largest" --policy allow_cpu >"$dir/one.log" 2>&1 &
    one=$!
    sleep 12
    look "a session on $largest"
    mkfifo "$dir/hold"
    fill 0 1 <"$dir/hold" >"$dir/filled" 2>"$dir/fill.log" &
    filler=$!
    exec 3>"$dir/hold"
    sleep 3
    speak oom-2 02 --speed 1 --policy allow_cpu >"$dir/two.log" 2>&1 &
    two=$!
    sleep 5
    look "the card is full, a second session on $smallest"
    wait "$two"
    two_rc=$?
    wait "$one"
    one_rc=$?
    field heartbeat engine >"$dir/engine"
    exec 3>&-
    wait "$filler"
    look "the tenant has gone"
    speak oom-3 04 --speed 1 --model "$largest" >"$dir/three.log" 2>&1
    three_rc=$?
    python3 - "$dir" "$one_rc" "$two_rc" "$three_rc" <<'PY'
import json, sys

folder, *codes = sys.argv[1:]
def lines(name):
    found = []
    for line in open(f"{folder}/{name}.log", errors="replace"):
        try:
            found.append(json.loads(line))
        except ValueError:
            pass
    return found
def told(name, code):
    finals = [line for line in lines(name) if isinstance(line, dict) and line.get("model")]
    return {"exit_code": int(code), "lines": len(lines(name)),
            "models_and_devices": sorted({f"{f['model']} on {f.get('device')}" for f in finals})}
engine = open(f"{folder}/engine").read().strip()
log = open(f"{folder}/worker.log", errors="replace").read().splitlines()
words = ("WARN", "ERROR", "degraded", "restored", "out_of_memory", "released")
print(json.dumps({
    "session_during": told("one", codes[0]), "session_on_a_full_card": told("two", codes[1]),
    "session_afterwards": told("three", codes[2]),
    "engine_when_full": json.loads(engine) if engine else None,
    "survived": codes[0] == "0" and codes[1] == "0",
    "worker_log": [line for line in log if any(word in line for word in words)][-60:],
}))
PY
}

# One model each: what it takes, alone and with sessions.
phase_memory() {
    for shape in $(list "$shapes"); do
        "$VOXFLEET_BIN" bench memory --model "$shape" --format "$format" --stubs-dir "$stubs" --gpu "$device" \
            --sessions "$sessions" --json
    done
}

# How many live sessions keep up, by shape and decode states: the lag of finals says it.
phase_streams() {
    for shape in $(list "$shapes"); do
        for count in $(list "$states"); do
            "$VOXFLEET_BIN" bench memory --model "$shape" --format "$format" --stubs-dir "$stubs" --gpu "$device" \
                --sessions "$streams" --states "$count" --seconds 20 --json
        done
    done
}

# takes BENCH OPTION: whether this binary's bench has it; it may be an earlier one.
takes() { "$VOXFLEET_BIN" bench "$1" --help 2>/dev/null | grep -q -e "$2"; }

# needs_ct2 BENCH OPTION: ends the phase where the binary cannot compare engines.
needs_ct2() {
    if ! "$VOXFLEET_BIN" --version 2>/dev/null | grep -q '^engines:.*ct2'; then
        echo '{"skipped": "this binary was built without the feature ct2"}'
    elif ! takes "$1" "$2"; then
        echo "{\"skipped\": \"this binary has no bench $1 with $2\"}"
    else
        return 0
    fi
    exit 0
}

phase_engine() {
    one=''
    ! takes engine --engines || one='--engines whisper_cpp'
    # shellcheck disable=SC2086 # empty without a GPU; an option with its value
    "$VOXFLEET_BIN" bench engine $one --models "micro,$shapes" --format "$format" --stubs-dir "$stubs" $use_gpu --threads 1 \
        --states "$states" --rounds "$rounds" --json
}

# The batched engine, by batch, beside whisper.cpp alone.
phase_batched() {
    needs_ct2 engine --batches
    # shellcheck disable=SC2086 # empty without a GPU
    "$VOXFLEET_BIN" bench engine --engines whisper_cpp,ct2 --batches "$batches" --compute-types "$numbers" \
        --models "micro,$shapes" --format "$format" --stubs-dir "$stubs" $use_gpu --threads 1 --states 1 --rounds "$rounds" \
        --speed-only --json
}

# How many live sessions the CPU of this machine holds, by engine.
phase_density() {
    needs_ct2 density --engines
    # shellcheck disable=SC2086 # options with their values
    "$VOXFLEET_BIN" bench density --engines whisper_cpp,ct2 $density --json
}

# The share of time in which a kernel ran, as the driver samples it, while one state decodes without pause.
phase_kernels() {
    needs_card
    for shape in $(list "$shapes"); do
        nvidia-smi --id="$gpu" --query-gpu=utilization.gpu,utilization.memory,power.draw,memory.used \
            --format=csv,noheader,nounits -lms 100 >"$work/kernels.csv" 2>/dev/null &
        sampler=$!
        "$VOXFLEET_BIN" bench engine --models "$shape" --format "$format" --stubs-dir "$stubs" --use-gpu --threads 1 \
            --states 1 --rounds 40 --json >"$work/kernels.json"
        kill "$sampler"
        wait "$sampler" 2>/dev/null
        python3 - "$shape" "$work" <<'PY'
import json, statistics, sys

shape, work = sys.argv[1:]
rows = []
for line in open(f"{work}/kernels.csv"):
    try:
        rows.append([float(cell) for cell in line.split(",")])
    except ValueError:
        pass
# Loading is not decoding: only samples with the model on the card and something running count.
busy = [row for row in rows if row[0] > 0]
mean = lambda n: round(statistics.fmean(row[n] for row in busy), 1) if busy else None
print(json.dumps({"model": shape, "samples": len(rows), "busy_samples": len(busy), "kernel_time_percent": mean(0),
                  "memory_time_percent": mean(1), "power_w": mean(2), "engine": json.load(open(f"{work}/kernels.json"))}))
PY
    done
}

phase_coldstart() {
    for shape in "$smallest" "$largest"; do
        "$VOXFLEET_BIN" bench coldstart --model "$shape" --format "$format" --stubs-dir "$stubs" --gpu "$device" \
            --rounds "$rounds" --json
        [ "$smallest" != "$largest" ] || break
    done
}

# What the plan says of this card; `memory` above has what is true.
phase_plan() {
    VOXFLEET__WORKER__GPU=$device "$VOXFLEET_BIN" plan --json
}

# ------------------------------------------------------------------------------------------------ running them

if [ -n "$phase" ]; then
    stubs=$STUBS
    "phase_$phase"
    exit $?
fi

own_stubs=0
work=$(mktemp -d "${TMPDIR:-/tmp}/gpu-measure-XXXXXX") || exit 74
if [ -z "${STUBS:-}" ]; then
    STUBS=$work/stubs own_stubs=1
fi
export STUBS
mkdir -p "$out" "$STUBS"
running=''
cleanup() {
    # Its process group: what it started ends with it.
    [ -z "$running" ] || kill -- "-$running" 2>/dev/null
    [ "$own_stubs" = 0 ] || rm -rf "$STUBS"
}
trap cleanup EXIT
trap 'exit 143' TERM INT
echo "gpu-measure: logs are in $work" >&2

limit() {
    case $1 in
    machine) echo 30 ;;
    stubs | readings | release | plan) echo 180 ;;
    oom | coldstart | kernels) echo 420 ;;
    *) echo 900 ;;
    esac
}

# One file with what there is so far. Plan against truth: the plan's figures beside the measured ones.
put_together() {
    python3 - "$work" "$out" "$smoke" "$COMMIT" <<'PY'
import datetime, glob, json, os, re, sys

work, out, smoke, commit = sys.argv[1], sys.argv[2], sys.argv[3] == "1", sys.argv[4]
def values(path):
    decoder, text, found = json.JSONDecoder(), open(path, errors="replace").read(), []
    at = 0
    while True:
        begin = re.compile(r"[\[{]").search(text, at)
        if not begin:
            return found
        try:
            value, at = decoder.raw_decode(text, begin.start())
            found.append(value)
        except ValueError:
            at = begin.start() + 1
phases = {}
for path in sorted(glob.glob(f"{work}/*.end"), key=os.path.getmtime):
    name = os.path.basename(path)[:-4]
    code, seconds = open(path).read().split()
    phase = {"ok": code == "0", "seconds": int(seconds), "results": values(f"{work}/{name}.json")}
    if code != "0":
        phase["exit_code"] = int(code)
        phase["timed_out"] = code in ("124", "137")
        phase["log"] = open(f"{work}/{name}.log", errors="replace").read().splitlines()[-15:]
    phases[name] = phase
machine = (phases.get("machine", {}).get("results") or [{}])[0]
device = (machine.get("nvidia_smi") or "cpu").split(",")[0].strip()
options = [option for result in phases.get("plan", {}).get("results", []) for option in result.get("options", [])]
truth = []
for measured in phases.get("memory", {}).get("results", []):
    for row in measured.get("rows", []):
        planned = [o for o in options if str(o.get("model", "")).startswith(str(measured.get("model")))]
        truth.append({"model": measured.get("model"), "sessions": row.get("sessions"), "measured_mb": row.get("total_mb"),
                      "planned": [{key: o.get(key) for key in ("model", "sessions", "used_mb", "risk")} for o in planned][:4]})
now = datetime.datetime.now(datetime.timezone.utc)
result = {"device": device, "driver": machine.get("nvidia_smi"), "date": now.strftime("%Y-%m-%d"),
          "commit": commit, "at": now.isoformat(timespec="seconds"), "smoke": smoke, "phases": phases, "plan_against_truth": truth}
slug = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
path = f"{out}/{'smoke' if smoke else 'gpu'}-{slug}-{result['date']}-{commit}.json"
with open(path + ".part", "w") as file:
    json.dump(result, file, indent=1)
    file.write("\n")
os.replace(path + ".part", path)
print(path)
PY
}

failed=0 result=''
for name in $(list "${only:-machine,stubs,readings,release,oom,memory,streams,engine,batched,density,kernels,coldstart,plan}"); do
    seconds=$(($(limit "$name") * ${LIMIT_SCALE:-1}))
    echo "gpu-measure: $name, at most $seconds s" >&2
    begin=$(date +%s)
    set -- --gpu "$gpu" --shapes "$shapes"
    [ "$smoke" = 0 ] || set -- "$@" --smoke
    # timeout makes a process group of its own, which ends as a whole whatever its end was.
    timeout -k 10 "$seconds" sh "$HERE/gpu-measure.sh" --phase "$name" "$work" "$@" "$VOXFLEET_BIN" \
        >"$work/$name.json" 2>"$work/$name.log" &
    running=$!
    wait "$running"
    code=$?
    kill -- "-$running" 2>/dev/null
    running=''
    echo "$code $(($(date +%s) - begin))" >"$work/$name.end"
    [ "$code" = 0 ] || { failed=1; echo "gpu-measure: $name failed ($code): $(tail -n 1 "$work/$name.log")" >&2; }
    result=$(put_together)
done
echo "$result"
exit "$failed"
