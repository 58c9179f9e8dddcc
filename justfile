# The one front door; everything behind it is deploy/bootstrap.sh, which also works without just.

# list what there is
default:
    @just --list

# transcribe a test call live with two workers
demo *args:
    sh deploy/bootstrap.sh demo {{args}}

# build and run every test
test *args:
    sh deploy/bootstrap.sh test {{args}}

# build with the batched engine, and run what that adds to the tests
test-ct2:
    sh deploy/bootstrap.sh test-ct2

# format check and clippy, warnings as errors
lint:
    sh deploy/bootstrap.sh lint

# measure; no argument lists the benches
bench *args:
    sh deploy/bootstrap.sh bench {{args}}
