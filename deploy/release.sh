#!/bin/sh
# Makes a release: one archive, its checksum, its bill of materials. The same commit gives the same bytes.
#
#   sh deploy/release.sh                 release build, then dist/release/voxfleet-VERSION-ARCH-linux.tar.gz, .cdx.json, SHA256SUMS
#   sh deploy/release.sh --verify        builds the committed tree twice, in two folders of different names, and compares archives
#   sh deploy/release.sh --binary FILE   packs a binary that was built before; says nothing of how that one was built
#   sh deploy/release.sh help
#
# What makes bytes equal: one time (SOURCE_DATE_EPOCH, by default that of the commit) for every file and every __DATE__; crates by
# Cargo.lock (--locked); no path of this machine (--remap-path-prefix, -ffile-prefix-map); no tuning to this processor; symbols
# stripped; names sorted, owner 0, fixed modes in the archive, and no time in the compression. What remains of the machine is its
# compilers and its C library: the archive says which they were (BUILD), and the same are needed for the same bytes.
#
# POSIX sh and GNU tar. Fetches nothing but crates.
set -eu

ROOT=$(cd -- "$(dirname -- "$0")/.." && pwd -P)

usage() {
    sed -n '2,/^set -eu/{ /^set -eu/d; s/^# \{0,1\}//; p; }' "$0"
    cat <<'USAGE'
options:
  --out DIR         where the result goes (default: dist/release)
  --features LIST   cargo features besides none (default: worker,dispatcher,ct2-source)

environment:
  SOURCE_DATE_EPOCH   another time (seconds since 1970)
  CARGO_TARGET_DIR    default: target/reproducible, so that other builds keep theirs
  CARGO               the cargo to call
USAGE
}

note() { printf 'release: %s\n' "$*" >&2; }
die() {
    note "$*"
    exit 1
}

BINARY=
VERIFY=
FEATURES=worker,dispatcher,ct2-source
OUT=$ROOT/dist/release
while [ $# -gt 0 ]; do
    case $1 in
        --binary) BINARY=${2:?--binary needs a file}; shift ;;
        --verify) VERIFY=1 ;;
        --features) FEATURES=${2:?--features needs a list}; shift ;;
        --out) OUT=${2:?--out needs a folder}; shift ;;
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
export FEATURES

for tool in tar gzip sha256sum python3 strip; do
    command -v "$tool" >/dev/null 2>&1 || die "$tool is missing"
done
tar --version 2>/dev/null | grep -q 'GNU tar' || die "GNU tar is needed: others cannot sort names"
CARGO=${CARGO:-cargo}

STAGE=$(mktemp -d)
trap 'rm -rf "$STAGE"' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

if [ -z "${SOURCE_DATE_EPOCH:-}" ]; then
    SOURCE_DATE_EPOCH=$(git -C "$ROOT" log -1 --format=%ct 2>/dev/null) || die "no git here to take the time from: set SOURCE_DATE_EPOCH"
fi
export SOURCE_DATE_EPOCH
# Sorting and texts by bytes, times without a zone, files for everybody to read, whoever builds.
export LC_ALL=C TZ=UTC
umask 022

# ---------------------------------------------------------------------------------------------- twice

if [ -n "$VERIFY" ]; then
    [ -z "$BINARY" ] || die "--verify builds; it takes no --binary"
    # What is committed, and nothing else: a file that was forgotten would be in both.
    for folder in one another-folder; do
        mkdir -p "$STAGE/$folder/source"
        git -C "$ROOT" archive HEAD | tar -xf - -C "$STAGE/$folder/source"
        note "building in $STAGE/$folder/source"
        CARGO_TARGET_DIR=$STAGE/$folder/work sh "$STAGE/$folder/source/deploy/release.sh" --features "$FEATURES" --out "$STAGE/$folder/out" ||
            die "the build in $folder failed"
        rm -rf "$STAGE/$folder/work"
    done
    if cmp -s "$STAGE/one/out/SHA256SUMS" "$STAGE/another-folder/out/SHA256SUMS"; then
        mkdir -p "$OUT"
        cp "$STAGE"/one/out/* "$OUT/"
        note "the same twice: $(tr '\n' ' ' <"$OUT/SHA256SUMS")"
        exit 0
    fi
    for folder in one another-folder; do
        mkdir "$STAGE/$folder/tree"
        tar -xzf "$STAGE/$folder"/out/*.tar.gz -C "$STAGE/$folder/tree"
    done
    diff -rq "$STAGE/one/tree" "$STAGE/another-folder/tree" >&2 || :
    die "the two builds differ, in the files above or in how they are packed"
fi

# ---------------------------------------------------------------------------------------------- the build

if [ -n "$(git -C "$ROOT" status --porcelain 2>/dev/null)" ]; then
    note "the tree has changes that no commit has: nobody else can make this archive"
fi
VERSION=$(sed -n '/^\[workspace.package\]/,/^\[/s/^version = "\(.*\)"/\1/p' "$ROOT/Cargo.toml")
[ -n "$VERSION" ] || die "Cargo.toml has no version"
if [ -z "$BINARY" ]; then
    export CARGO_TARGET_DIR="${CARGO_TARGET_DIR:-$ROOT/target/reproducible}"
    home=${CARGO_HOME:-${HOME:?HOME is not set}/.cargo}
    map="-ffile-prefix-map=$ROOT=. -ffile-prefix-map=$CARGO_TARGET_DIR=target -ffile-prefix-map=$home=cargo"
    export CFLAGS="${CFLAGS:-} $map" CXXFLAGS="${CXXFLAGS:-} $map"
    # The last rule that fits counts.
    export RUSTFLAGS="${RUSTFLAGS:-} --remap-path-prefix=$ROOT=. --remap-path-prefix=$CARGO_TARGET_DIR=target --remap-path-prefix=$home=cargo"
    export CARGO_INCREMENTAL=0 CARGO_PROFILE_RELEASE_STRIP=symbols ZERO_AR_DATE=1 WHISPER_DONT_GENERATE_BINDINGS=1
    # As the images: AVX2 (2013 and later) is what every rented x86 host has; other processors ignore it.
    export GGML_NATIVE=OFF GGML_SSE42=ON GGML_AVX=ON GGML_AVX2=ON GGML_FMA=ON GGML_F16C=ON GGML_BMI2=ON
    (cd "$ROOT" && "$CARGO" build --release --locked -p voxfleet --no-default-features --features "$FEATURES")
    BINARY=$CARGO_TARGET_DIR/release/voxfleet
fi
[ -f "$BINARY" ] || die "there is no $BINARY"

# ---------------------------------------------------------------------------------------------- the archive

NAME=voxfleet-$VERSION-$(uname -m)-linux
TREE=$STAGE/$NAME
mkdir -p "$TREE/bin" "$TREE/docs"
strip -o "$TREE/bin/voxfleet" "$BINARY"
for path in LICENSE NOTICE README.md voxfleet.example.toml deploy/entrypoint.sh deploy/docker/runtime-parts.sh deploy/nats \
    deploy/observability deploy/systemd deploy/tools/runtime-wheels.txt nats/conf; do
    mkdir -p "$TREE/$(dirname "$path")"
    cp -R "$ROOT/$path" "$TREE/$path"
done
cp "$ROOT"/docs/*.md "$TREE/docs/"
python3 "$ROOT/deploy/supply.py" licences "$TREE/LICENCES-OF-OTHERS.txt"
python3 "$ROOT/deploy/supply.py" sbom "$TREE/voxfleet.cdx.json"
{
    echo "voxfleet $VERSION, features $FEATURES"
    (cd "$ROOT" && "$CARGO" --version && "${RUSTC:-rustc}" --version)
    "${CC:-cc}" --version 2>/dev/null | head -n 1
    "${CXX:-c++}" --version 2>/dev/null | head -n 1
    # Of the library that is linked to, not of the one that runs here.
    echo "C library: $(getconf GNU_LIBC_VERSION 2>/dev/null || echo unknown)"
} >"$TREE/BUILD"
find "$TREE" -type f -exec chmod 644 {} +
find "$TREE" -type d -exec chmod 755 {} +
chmod 755 "$TREE/bin/voxfleet"
find "$TREE" -name '*.sh' -exec chmod 755 {} +

mkdir -p "$OUT"
rm -f "$OUT"/voxfleet-*.tar.gz "$OUT"/voxfleet-*.cdx.json "$OUT/SHA256SUMS"
tar --sort=name --format=ustar --owner=0 --group=0 --numeric-owner --mtime="@$SOURCE_DATE_EPOCH" -cf - -C "$STAGE" "$NAME" |
    gzip -9 -n >"$OUT/$NAME.tar.gz"
cp "$TREE/voxfleet.cdx.json" "$OUT/$NAME.cdx.json"
(cd "$OUT" && sha256sum "$NAME.cdx.json" "$NAME.tar.gz" >SHA256SUMS)
note "$OUT/$NAME.tar.gz: $(wc -c <"$OUT/$NAME.tar.gz") bytes, sha256 $(sed -n "s/  $NAME.tar.gz\$//p" "$OUT/SHA256SUMS")"
