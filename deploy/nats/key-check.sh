#!/bin/sh
# Lets a nats-server start only with the key its store was written with: key-check.sh STORE_DIR
# The key is VOXFLEET_NATS_JS_KEY; while it is being changed, the old one is VOXFLEET_NATS_JS_KEY_OLD. A server with another key
# would start, find no streams, and destroy them when a dispatcher makes them anew. The store keeps a digest of the key, never
# the key; so the key has to be a random one (openssl rand -hex 32), which nobody finds from its digest.
set -eu
umask 077
store=${1:?usage: key-check.sh STORE_DIR}
mark=$store/voxfleet-key.sha256
digest() { printf 'voxfleet jetstream key %s' "$1" | sha256sum | cut -d ' ' -f 1; }
refuse() {
    echo "key-check: $*; nats-server is not started" >&2
    exit 78
}

key=${VOXFLEET_NATS_JS_KEY:-}
if [ -z "$key" ]; then
    [ ! -e "$mark" ] || refuse "$store is encrypted, and VOXFLEET_NATS_JS_KEY is not set"
    exit 0
fi
[ "${#key}" -ge 32 ] || refuse "VOXFLEET_NATS_JS_KEY is shorter than 32 characters (openssl rand -hex 32)"
mkdir -p "$store"
if [ ! -e "$mark" ]; then
    # A store of plain files is encrypted by the server when it starts; one of another key is not ours to judge.
    if [ -n "$(find "$store" -name meta.key 2>/dev/null | head -n 1)" ]; then
        refuse "$store is encrypted and does not say with which key: once you know that this is the one, write its digest, $(digest "$key"), into $mark"
    fi
    digest "$key" >"$mark"
    exit 0
fi
was=$(cat "$mark")
[ "$was" != "$(digest "$key")" ] || exit 0
old=${VOXFLEET_NATS_JS_KEY_OLD:-}
if [ -n "$old" ] && [ "$was" = "$(digest "$old")" ]; then
    digest "$key" >"$mark.new"
    mv "$mark.new" "$mark"
    exit 0
fi
refuse "VOXFLEET_NATS_JS_KEY is not the key that $store was written with"
