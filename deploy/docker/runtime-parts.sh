#!/bin/sh
# Lays out what a worker needs beside its binary: sh runtime-parts.sh FOLDER [CUDA-WHEELS]
#
#   FOLDER/lib/libonnxruntime.so, FOLDER/silero_vad.onnx, FOLDER/licences/...
#   with CUDA-WHEELS (deploy/tools/cuda-wheels.txt) also FOLDER/lib/libcudart.so.13, libcublas.so.13, libcublasLt.so.13
#
# Runs in the build stage of the images, and by hand for a machine without Docker. Needs Python 3 with pip; every wheel is
# checked against its pinned checksum and nothing of it is run.
set -eu

[ $# -ge 1 ] || { echo "usage: runtime-parts.sh FOLDER [CUDA-WHEELS]" >&2; exit 64; }
OUT=$1
CUDA_WHEELS=${2:-}
TOOLS=$(cd -- "$(dirname -- "$0")/../tools" && pwd -P)
STAGE=$(mktemp -d)
trap 'rm -rf "$STAGE"' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

arch=$(uname -m)
case $arch in arm64) arch=aarch64 ;; amd64) arch=x86_64 ;; esac

# fetch REQUIREMENTS: into $STAGE, for CPython 3.12 whatever Python runs here.
fetch() {
    PIP_NO_INPUT=1 PIP_DISABLE_PIP_VERSION_CHECK=1 python3 -m pip download --quiet --no-deps --only-binary=:all: --require-hashes \
        --python-version 3.12 --implementation cp --abi cp312 --abi abi3 --abi none \
        --platform "manylinux_2_28_$arch" --platform "manylinux_2_27_$arch" --platform "manylinux_2_17_$arch" \
        --platform "manylinux2014_$arch" --platform any -d "$STAGE" -r "$1"
}

# take WHEEL TO PATTERN...: files whose path matches, without their folders.
take() {
    python3 -c '
import fnmatch, os, sys, zipfile
wheel, to, patterns = sys.argv[1], sys.argv[2], sys.argv[3:]
os.makedirs(to, exist_ok=True)
with zipfile.ZipFile(wheel) as z:
    found = [n for n in z.namelist() if any(fnmatch.fnmatchcase(n, p) for p in patterns)]
    if not found:
        sys.exit(f"{wheel}: nothing in it matches {patterns}")
    for name in found:
        with z.open(name) as source, open(os.path.join(to, os.path.basename(name)), "wb") as target:
            while block := source.read(1 << 20):
                target.write(block)' "$@"
}

mkdir -p "$OUT/lib" "$OUT/licences"
fetch "$TOOLS/runtime-wheels.txt"
take "$STAGE"/onnxruntime-*.whl "$OUT/lib" 'onnxruntime/capi/libonnxruntime.so.*'
take "$STAGE"/onnxruntime-*.whl "$OUT/licences/onnxruntime" onnxruntime/LICENSE onnxruntime/ThirdPartyNotices.txt
take "$STAGE"/silero_vad-*.whl "$OUT" silero_vad/data/silero_vad.onnx
take "$STAGE"/silero_vad-*.whl "$OUT/licences/silero-vad" '*/licenses/LICENSE'
library=$(ls "$OUT"/lib/libonnxruntime.so.*)
ln -sf "${library##*/}" "$OUT/lib/libonnxruntime.so"

if [ -n "$CUDA_WHEELS" ]; then
    # Of all of the toolkit only what the binary is linked to. The batched engine opens the same libcublas.so.13 by its name.
    grep -A 1 -e '^nvidia-cuda-runtime==' -e '^nvidia-cublas==' "$CUDA_WHEELS" | grep -v '^--$' >"$STAGE/cuda.txt"
    fetch "$STAGE/cuda.txt"
    take "$STAGE"/nvidia_cuda_runtime-*.whl "$OUT/lib" '*/lib/libcudart.so.13'
    take "$STAGE"/nvidia_cublas-*.whl "$OUT/lib" '*/lib/libcublas.so.13' '*/lib/libcublasLt.so.13'
    take "$STAGE"/nvidia_cublas-*.whl "$OUT/licences/nvidia-cuda" '*/licenses/License.txt'
fi
chmod 755 "$OUT"/lib/*.so*
