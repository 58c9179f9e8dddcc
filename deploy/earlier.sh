#!/bin/sh
# sh deploy/earlier.sh COMMIT: builds voxfleet as it was at a commit of this repository, and prints where the binary is. For the tests
# that have two versions side by side:
#
#   VOXFLEET_OLD_BIN=$(sh deploy/earlier.sh HEAD~1) cargo test -p voxfleet-tests upgrade
#
# Takes minutes the first time; each commit is built once and kept in the cache, and the next one uses what the last one compiled.
set -eu

[ $# -eq 1 ] || {
    echo "usage: sh deploy/earlier.sh COMMIT" >&2
    exit 64
}
ROOT=$(cd -- "$(dirname -- "$0")/.." && pwd -P)
cache=${VOXFLEET_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/voxfleet}/earlier
commit=$(git -C "$ROOT" rev-parse --verify --quiet "$1^{commit}") || {
    echo "earlier: $1 is no commit here; a shallow copy has no history" >&2
    exit 69
}
mkdir -p "$cache"
# One at a time, where that can be said.
exec 9>"$cache/lock"
! command -v flock >/dev/null 2>&1 || flock 9
binary=$cache/$commit/voxfleet
if [ ! -x "$binary" ]; then
    mkdir -p "$cache/$commit"
    # Always in one place: what cargo has compiled there is of use to the next commit.
    tree=$cache/tree
    git -C "$ROOT" worktree remove --force "$tree" 2>/dev/null || :
    git -C "$ROOT" worktree prune
    git -C "$ROOT" worktree add --force --detach "$tree" "$commit" >&2
    (cd "$tree" && CARGO_TARGET_DIR=$cache/target cargo build --locked -p voxfleet) >&2
    git -C "$ROOT" worktree remove --force "$tree"
    cp "$cache/target/debug/voxfleet" "$binary.$$"
    mv "$binary.$$" "$binary"
fi
echo "$binary"
