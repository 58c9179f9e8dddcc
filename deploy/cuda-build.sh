#!/bin/sh
# Builds voxfleet for NVIDIA GPUs, on a machine with or without a GPU, with or without a CUDA toolkit.
#
#   sh deploy/cuda-build.sh                  toolkit from pinned Python wheels, then a release build into dist/cuda
#   sh deploy/cuda-build.sh --toolkit [DIR]  with a toolkit that is installed (default: $CUDA_HOME, else /usr/local/cuda)
#   sh deploy/cuda-build.sh --check          everything but the build: fetch, lay out, compile and link a probe for every
#                                            architecture, and say what would run
#   sh deploy/cuda-build.sh help
#
# What comes out: dist/cuda/voxfleet and, unless --binary-only, dist/cuda/lib with the three libraries it is linked to (it
# looks there first). Only the driver (libcuda.so.1) must be on the machine that runs it.
#
# Architectures: machine code for compute capability 7.5 (T4, RTX 20), 8.0 (A100), 8.6 (A10, RTX 30), 8.9 (L4, RTX 40) and
# 9.0 (H100), and PTX of 9.0 that the driver of any later card compiles at its first start. Both engines, whisper.cpp and
# CTranslate2 (feature ct2-source), are compiled for all of them.
#
# Reproducible in its inputs: wheels by checksum, crates by Cargo.lock, no tuning to this machine, no paths of this machine in
# the binary. nvcc names temporary files at random, so two builds need not be equal byte for byte.
#
# POSIX sh. Nothing is installed system-wide: the toolkit lies in the user's cache and is kept for the next build.
set -eu

ARCHITECTURES=${CUDA_ARCHITECTURES:-}
[ -n "$ARCHITECTURES" ] || ARCHITECTURES='75-real;80-real;86-real;89-real;90-real;90-virtual'
ROOT=$(cd -- "$(dirname -- "$0")/.." && pwd -P)
WHEELS=$ROOT/deploy/tools/cuda-wheels.txt
# What ggml calls of the driver; the stub gives the linker these names and is never run.
DRIVER_SYMBOLS='cuDeviceGet cuDeviceGetAttribute cuGetErrorString cuMemAddressFree cuMemAddressReserve cuMemCreate
    cuMemGetAllocationGranularity cuMemMap cuMemRelease cuMemSetAccess cuMemUnmap'

usage() {
    sed -n '2,/^set -eu/{ /^set -eu/d; s/^# \{0,1\}//; p; }' "$0"
    cat <<'USAGE'
options:
  --toolkit [DIR]   use an installed CUDA toolkit instead of the wheels
  --check           stop before cargo
  --features LIST   cargo features besides none (default: cuda,ct2-source,dispatcher)
  --out DIR         where the result goes (default: dist/cuda)
  --binary-only     without the libraries, for images that have them already

environment:
  CUDA_ARCHITECTURES  other architectures, in CMake's words: '86-real;90-virtual'
  VOXFLEET_CACHE      the cache folder (default: ${XDG_CACHE_HOME:-~/.cache}/voxfleet)
  CARGO_TARGET_DIR    default: target/cuda, so that a build without CUDA is not thrown away
  CARGO               the cargo to call
USAGE
}

note() { printf 'cuda-build: %s\n' "$*" >&2; }
die() {
    note "$*"
    exit 1
}
have() { command -v "$1" >/dev/null 2>&1; }

TOOLKIT=
CHECK=
FEATURES=cuda,ct2-source,dispatcher
OUT=$ROOT/dist/cuda
LIBRARIES=1
while [ $# -gt 0 ]; do
    case $1 in
        --toolkit)
            TOOLKIT=${CUDA_HOME:-/usr/local/cuda}
            case ${2:-} in '' | -*) ;; *) TOOLKIT=$2; shift ;; esac
            ;;
        --check) CHECK=1 ;;
        --features) FEATURES=${2:?--features needs a list}; shift ;;
        --out) OUT=${2:?--out needs a folder}; shift ;;
        --binary-only) LIBRARIES= ;;
        help | -h | --help)
            usage
            exit 0
            ;;
        *)
            note "no such option: $1"
            usage >&2
            exit 64
            ;;
    esac
    shift
done
case $OUT in /*) ;; *) OUT=$PWD/$OUT ;; esac

STAGE=
trap '[ -z "$STAGE" ] || rm -rf "$STAGE"' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

for tool in python3 c++ cc cmake; do
    have "$tool" || case $tool in
        cmake) die "cmake is missing: eval \"\$(sh deploy/bootstrap.sh env)\" brings one" ;;
        *) die "$tool is missing: apt-get install build-essential python3 python3-pip" ;;
    esac
done

# ---------------------------------------------------------------------------------------------- the toolkit

CACHE=${VOXFLEET_CACHE:-${XDG_CACHE_HOME:-${HOME:?HOME is not set}/.cache}/voxfleet}

# From wheels: one folder, laid out as a toolkit is, under a name that changes with the pins.
fetch_toolkit() {
    [ "$(uname -sm)" = 'Linux x86_64' ] || die "the wheels are pinned for x86_64 Linux only; use --toolkit here"
    pins_=$(sha256sum "$WHEELS" | cut -c1-12)
    TOOLKIT=$CACHE/cuda/$pins_
    if [ -f "$TOOLKIT/.whole" ]; then
        note "toolkit: in the cache, $TOOLKIT"
        return
    fi
    mkdir -p "$CACHE/cuda"
    STAGE=$(mktemp -d "$CACHE/cuda/.stage.XXXXXX")
    note "toolkit: fetching the wheels of deploy/tools/cuda-wheels.txt (590 MB, unpacked 850 MB)"
    PIP_NO_INPUT=1 PIP_DISABLE_PIP_VERSION_CHECK=1 python3 -m pip download --quiet --no-deps --only-binary=:all: --require-hashes \
        --python-version 3.12 --implementation cp --abi cp312 --abi none \
        --platform manylinux_2_28_x86_64 --platform manylinux_2_27_x86_64 --platform manylinux_2_17_x86_64 \
        --platform manylinux2014_x86_64 --platform manylinux2010_x86_64 --platform any \
        -d "$STAGE/wheels" -r "$WHEELS" || die "the wheels could not be had"
    for wheel_ in "$STAGE"/wheels/*.whl; do
        python3 -c '
import os, sys, zipfile
with zipfile.ZipFile(sys.argv[1]) as z:
    for i in z.infolist():
        path = z.extract(i, sys.argv[2])
        if not i.is_dir() and i.external_attr >> 16 & 0o111:
            os.chmod(path, 0o755)' "$wheel_" "$STAGE/tree"
        rm -f "$wheel_"
    done
    lay_out "$STAGE/tree/nvidia/cu13"
    mkdir -p "$STAGE/tree/nvidia/cu13/licences"
    find "$STAGE/tree" -path '*.dist-info/licenses/*' -type f -exec cp -f {} "$STAGE/tree/nvidia/cu13/licences/" \;
    : >"$STAGE/tree/nvidia/cu13/.whole"
    rm -rf "$TOOLKIT"
    mv "$STAGE/tree/nvidia/cu13" "$TOOLKIT"
    rm -rf "$STAGE"
    STAGE=
    note "toolkit: $TOOLKIT"
}

# The names that linkers and CMake look for, and a driver to link to.
lay_out() {
    [ -x "$1/bin/nvcc" ] || die "the wheels hold no nvcc where it is expected"
    ln -s lib "$1/lib64"
    # Of cuRAND headers are all that is needed.
    rm -f "$1"/lib/libcurand.so*
    for name_ in cublas cublasLt cudart; do
        for real_ in "$1/lib/lib$name_".so.*; do ln -s "${real_##*/}" "$1/lib/lib$name_.so"; done
    done
    mkdir -p "$1/lib/stubs"
    for symbol_ in $DRIVER_SYMBOLS; do printf 'int %s(void) { return 1; }\n' "$symbol_"; done |
        cc -x c -shared -fPIC -Wl,-soname,libcuda.so.1 -o "$1/lib/stubs/libcuda.so" -
}

if [ -n "$TOOLKIT" ]; then
    [ -x "$TOOLKIT/bin/nvcc" ] || die "no toolkit in $TOOLKIT: bin/nvcc is missing"
    note "toolkit: $TOOLKIT"
else
    fetch_toolkit
fi
LIB=$TOOLKIT/lib64
[ -d "$LIB" ] || LIB=$TOOLKIT/lib
NVCC=$TOOLKIT/bin/nvcc
note "$("$NVCC" --version | sed -n 's/^Cuda compilation tools, //p'); architectures $ARCHITECTURES"

known=$("$NVCC" --list-gpu-arch)
for arch in $(printf '%s' "$ARCHITECTURES" | tr ';' ' '); do
    number=${arch%%-*}
    printf '%s\n' "$known" | grep -qx "compute_$number" || die "this nvcc knows no compute_$number; it knows $(printf '%s' "$known" | tr '\n' ' ')"
done

# Where crates and sources lie, and what is built of them, must not show in the binary.
CARGO_HOME_=${CARGO_HOME:-${HOME:-/root}/.cargo}
export CARGO_TARGET_DIR="${CARGO_TARGET_DIR:-$ROOT/target/cuda}"
MAP="-ffile-prefix-map=$CARGO_TARGET_DIR=target -ffile-prefix-map=$ROOT=. -ffile-prefix-map=$CARGO_HOME_=cargo -ffile-prefix-map=$TOOLKIT=cuda"
export CUDACXX="$NVCC" CUDAToolkit_ROOT="$TOOLKIT" CMAKE_CUDA_ARCHITECTURES="$ARCHITECTURES"
export CFLAGS="${CFLAGS:-} $MAP" CXXFLAGS="${CXXFLAGS:-} $MAP"
CMAKE_CUDA_FLAGS="-Xcompiler=-fPIC"
for flag in $MAP; do CMAKE_CUDA_FLAGS="$CMAKE_CUDA_FLAGS -Xcompiler=$flag"; done
export CMAKE_CUDA_FLAGS

# CTranslate2 compiles through an older CMake module, which takes architectures in words of its own: 9.0 is machine code. PTX
# cannot be said in them (the crate cuts "9.0+PTX" down to 9.0), so nvcc adds it itself, from its environment. Without one below
# 10.0 the crate would ask for "Common", of which CUDA 13 has dropped half.
for_ctranslate2() {
    machine_='' ptx_='' old_=''
    for arch in $(printf '%s' "$ARCHITECTURES" | tr ';' ' '); do
        number=${arch%%-*}
        case $arch in *-real) ;; *) ptx_="$ptx_ -gencode=arch=compute_$number,code=compute_$number" ;; esac
        number=${number%[a-z]}
        case $arch in *-virtual) continue ;; esac
        machine_="$machine_,${number%?}.${number#"${number%?}"}"
        [ "$number" -ge 100 ] || old_=1
    done
    [ -n "$old_" ] || machine_="$machine_,8.0"
    export CUDA_TOOLKIT_ROOT_DIR="$TOOLKIT" CUDA_PATH="$TOOLKIT" CUDA_ARCH_LIST="${machine_#,}"
    export NVCC_APPEND_FLAGS="${NVCC_APPEND_FLAGS:-}$ptx_"
}
CT2=
case ,$FEATURES, in *,ct2-source,*) CT2=1 ;; esac
[ -z "$CT2" ] || for_ctranslate2
# For machines that are not this one; every rented x86 host has AVX2.
export GGML_NATIVE=OFF GGML_SSE42=ON GGML_AVX=ON GGML_AVX2=ON GGML_FMA=ON GGML_F16C=ON GGML_BMI2=ON
export WHISPER_DONT_GENERATE_BINDINGS=1 CARGO_PROFILE_RELEASE_STRIP=symbols
# $ORIGIN is the loader's word for the folder of the binary.
# shellcheck disable=SC2016
RUSTFLAGS="${RUSTFLAGS:-} -L native=$LIB -L native=$LIB/stubs -C link-arg=-Wl,-rpath,\$ORIGIN/lib"
export RUSTFLAGS="$RUSTFLAGS --remap-path-prefix=$ROOT=. --remap-path-prefix=$CARGO_HOME_=cargo"
CARGO=${CARGO:-cargo}

# ---------------------------------------------------------------------------------------------- the probe

# A kernel, cuBLAS and the driver, compiled for every architecture through the same CMake modules that ggml uses. Seconds, and
# it finds what would fail after twenty minutes.
probe() {
    STAGE=$(mktemp -d)
    cat >"$STAGE/CMakeLists.txt" <<'CMAKE'
cmake_minimum_required(VERSION 3.18)
project(probe LANGUAGES CXX CUDA)
find_package(CUDAToolkit REQUIRED)
message(STATUS "architectures: ${CMAKE_CUDA_ARCHITECTURES}")
add_executable(probe probe.cu)
target_link_libraries(probe PRIVATE CUDA::cudart CUDA::cublas CUDA::cuda_driver)
CMAKE
    cat >"$STAGE/probe.cu" <<'CUDA'
#include <cublas_v2.h>
#include <cuda.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
__global__ void add(__half* a, const __half* b) { a[threadIdx.x] = __hadd(a[threadIdx.x], b[threadIdx.x]); }
int main() {
    cublasHandle_t handle = nullptr;
    CUdevice device = 0;
    int count = 0;
    add<<<1, 32>>>(nullptr, nullptr);
    return cudaGetDeviceCount(&count) + cublasCreate(&handle) + cuDeviceGet(&device, 0);
}
CUDA
    if ! cmake -S "$STAGE" -B "$STAGE/build" -DCMAKE_CUDA_ARCHITECTURES="$ARCHITECTURES" \
        -DCMAKE_CUDA_FLAGS="$CMAKE_CUDA_FLAGS" >"$STAGE/log" 2>&1 || ! cmake --build "$STAGE/build" >>"$STAGE/log" 2>&1; then
        tail -n 40 "$STAGE/log" >&2
        die "the probe cannot be built with this toolkit"
    fi
    note "probe: compiled and linked; it needs $(needs "$STAGE/build/probe")"
    rm -rf "$STAGE"
    STAGE=
}

# What CTranslate2 needs besides: the older module finds the toolkit and knows the architectures, the thrust and cub that come
# with the crate and cuRAND's headers go through this nvcc, and one program holds both engines' ways to the CUDA runtime and to
# cuBLAS. It is run as well, without touching a card: CTranslate2 has to find cuBLAS by its name.
probe_ctranslate2() {
    STAGE=$(mktemp -d)
    sources=$(cd "$ROOT" && "$CARGO" metadata --locked --all-features --format-version 1 2>"$STAGE/log" | python3 -c '
import json, os, sys
print(next(os.path.dirname(p["manifest_path"]) for p in json.load(sys.stdin)["packages"] if p["name"] == "ct2rs"))' 2>>"$STAGE/log") || {
        tail -n 3 "$STAGE/log" >&2
        die "cargo cannot say where the sources of ct2rs are"
    }
    cat >"$STAGE/CMakeLists.txt" <<'CMAKE'
cmake_minimum_required(VERSION 3.7)
project(probe)
find_package(CUDA 11.0 REQUIRED)
list(APPEND CUDA_NVCC_FLAGS -std=c++17)
string(REPLACE "," ";" CUDA_ARCH_LIST "$ENV{CUDA_ARCH_LIST}")
foreach(arch ${CUDA_ARCH_LIST}) # as the crate does it
  if(arch VERSION_LESS 10)
    list(APPEND archs ${arch})
  else()
    string(REPLACE "." "" number ${arch})
    list(APPEND CUDA_NVCC_FLAGS -gencode=arch=compute_${number},code=sm_${number})
  endif()
endforeach()
cuda_select_nvcc_arch_flags(flags ${archs})
list(APPEND CUDA_NVCC_FLAGS ${flags})
message(STATUS "flags: ${CUDA_NVCC_FLAGS}")
set(third_party ${SOURCES}/CTranslate2/third_party)
set(CUDA_HOST_COMPILER ${CMAKE_CXX_COMPILER})
set(CMAKE_CXX_STANDARD 17)
include_directories(${SOURCES}/CTranslate2/include ${SOURCES}/CTranslate2/src ${third_party}/spdlog/include)
include_directories(${CUDA_TOOLKIT_ROOT_DIR}/include)
cuda_include_directories(${third_party}/thrust/cub ${third_party}/thrust/thrust ${third_party}/thrust/libcudacxx/include
  ${third_party}/cutlass/include)
cuda_add_library(batched STATIC batched.cu ${SOURCES}/CTranslate2/src/cuda/cublas_stub.cc)
cuda_add_library(single STATIC single.cu)
add_executable(probe main.cc)
target_link_libraries(probe batched ${LIB}/libcudart_static.a single ${LIB}/libcudart.so ${LIB}/libcublas.so dl rt pthread)
CMAKE
    cat >"$STAGE/batched.cu" <<'CUDA'
#include <cublas_v2.h>
#include <cub/block/block_reduce.cuh>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <curand_kernel.h>
#include <thrust/device_ptr.h>
#include <thrust/execution_policy.h>
#include <thrust/reduce.h>
static_assert(CUB_VERSION / 100000 == 2, "these are not the headers that come with CTranslate2");
__global__ void draw(curandStatePhilox4_32_10_t* state, float* out) {
    using Reduce = cub::BlockReduce<float, 32>;
    __shared__ typename Reduce::TempStorage storage;
    curand_init(1, threadIdx.x, 0, state);
    *out = Reduce(storage).Sum(curand_uniform(state));
}
int batched(bool on_card) {
    cublasHandle_t handle = nullptr;
    if (!on_card) return cublasCreate(&handle); // throws where the library is not found
    draw<<<1, 32>>>(nullptr, nullptr);
    return thrust::reduce(thrust::device, thrust::device_ptr<int>(), thrust::device_ptr<int>());
}
CUDA
    cat >"$STAGE/single.cu" <<'CUDA'
#include <cublas_v2.h>
__global__ void nothing() {}
int single(bool on_card) {
    int count = 0;
    cublasHandle_t handle = nullptr;
    if (on_card) nothing<<<1, 1>>>();
    return cudaGetDeviceCount(&count) + cublasCreate(&handle);
}
CUDA
    cat >"$STAGE/main.cc" <<'CXX'
int batched(bool on_card);
int single(bool on_card);
int main(int argc, char**) {
    batched(argc > 1);
    single(argc > 1);
}
CXX
    if ! cmake -S "$STAGE" -B "$STAGE/build" -DCMAKE_POLICY_VERSION_MINIMUM=3.5 -DCUDA_TOOLKIT_ROOT_DIR="$TOOLKIT" -DLIB="$LIB" \
        -DSOURCES="$sources" >"$STAGE/log" 2>&1 || ! cmake --build "$STAGE/build" >>"$STAGE/log" 2>&1; then
        tail -n 40 "$STAGE/log" >&2
        die "what CTranslate2 needs cannot be built with this toolkit"
    fi
    "$STAGE/build/probe" >"$STAGE/log.run" 2>&1 || die "the probe for CTranslate2 does not run: $(tail -n 2 "$STAGE/log.run")"
    note "probe for CTranslate2: compiled, linked and run ($(sed -n 's/^-- flags: -std=c++17;//p' "$STAGE/log" | tr ';' ' ')$NVCC_APPEND_FLAGS)"
    rm -rf "$STAGE"
    STAGE=
}

needs() { readelf -d "$1" 2>/dev/null | sed -n 's/.*(NEEDED).*\[\(lib\(cu\|nv\)[^]]*\)\].*/\1/p' | tr '\n' ' '; }

probe
[ -z "$CT2" ] || probe_ctranslate2
if [ -n "$CHECK" ]; then
    note "would run: $CARGO build --release --locked -p voxfleet --no-default-features --features $FEATURES"
    note "in $ROOT, into $CARGO_TARGET_DIR; about 22 minutes for one architecture on 2 cores${CT2:+ and up to 20 more for CTranslate2}, several times that for all"
    exit 0
fi

# ---------------------------------------------------------------------------------------------- the build

cd "$ROOT"
# The crate links culibos, cublas and the driver by bare names: RUSTFLAGS says where they are.
"$CARGO" build --release --locked -p voxfleet --no-default-features --features "$FEATURES"
mkdir -p "$OUT"
install -m 755 "$CARGO_TARGET_DIR/release/voxfleet" "$OUT/voxfleet"
if [ -n "$LIBRARIES" ]; then
    mkdir -p "$OUT/lib"
    for name in libcudart libcublas libcublasLt; do
        for file in "$LIB/$name".so.[0-9]*; do
            case $file in *.so.[0-9] | *.so.[0-9][0-9]) cp -fL "$file" "$OUT/lib/" ;; esac
        done
    done
fi
printf 'architectures %s\n%s\n' "$ARCHITECTURES" "$("$NVCC" --version | sed -n 's/^Cuda compilation tools, //p')" >"$OUT/BUILD"
note "$OUT/voxfleet: $(wc -c <"$OUT/voxfleet") bytes; it needs $(needs "$OUT/voxfleet")"
