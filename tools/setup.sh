#!/bin/sh
# Make .venv in this clone ready for an extra of pyproject.toml: tools/setup.sh [demo|dev]
#
# Needs Python 3.10 to 3.13 with venv, nothing else: no root, no compiler, nothing installed by hand. It writes to the
# clone and to the user's cache folder only, and follows the user's own pip configuration (index, mirrors, proxies).
#
#   PYTHON=/usr/bin/python3.12     use this Python
#   EDGELAM_CACHE=DIR              cache folder (else $XDG_CACHE_HOME/edgelam, else ~/.cache/edgelam)
#   EDGELAM_VENV=.venv-3.10        another environment in the clone
#
# Wheels go to the cache first and are installed from there without an index, so that a second clone, or a second run
# without network, needs nothing from outside. An interrupted run is made good by the next one: wheels are moved into
# the cache whole, and the stamp that says "ready" is written last.
set -eu

OLDEST=10 # Python 3.10: JetPack 6
NEWEST=13 # Python 3.13: the newest that the tests run on

say() { printf 'setup: %s\n' "$*" >&2; }

fail() {
    say "$*"
    exit 2
}

# Print "<minor> ready", "<minor> no-venv" or nothing: what `$1` is worth as the environment's Python.
appraise() {
    "$1" - 2>/dev/null <<'PROBE' || true
import sys
state = "ready"
try:
    import ensurepip, venv
except ImportError:
    state = "no-venv"
print(sys.version_info[1] if sys.version_info[0] == 3 else -1, state)
PROBE
}

# Set `python`, or fail in one line that says what to install.
choose_python() {
    seen=''
    lacking=''
    for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11 python3.10}; do
        found=$(appraise "$candidate")
        [ -n "$found" ] || continue
        minor=${found% *}
        seen="$candidate is Python 3.$minor"
        if [ "$minor" -lt $OLDEST ] || [ "$minor" -gt $NEWEST ]; then continue; fi
        if [ "${found#* }" = ready ]; then
            python=$candidate
            return
        fi
        lacking=${lacking:-$minor}
    done
    if [ -n "$lacking" ]; then
        fail "Python 3.$lacking has no venv module; try: sudo apt install python3.$lacking-venv"
    fi
    fail "needs Python 3.$OLDEST to 3.$NEWEST, but ${seen:-${PYTHON:-python3} is not there}; try: sudo apt install python3 python3-venv, or PYTHON=/path/to/python3.12 make demo"
}

# Run a long command quietly; on failure show its last lines and where the rest is.
logged() {
    if ! "$@" >>"$log" 2>&1; then
        tail -n 5 "$log" >&2
        return 1
    fi
}

# The key of everything that decides what the environment holds; the clone's path too, because environments don't move.
key_of() {
    {
        printf '%s\n%s\n' "$1" "$PWD"
        cat pyproject.toml constraints.txt tools/setup.sh
    } | sha256sum | cut -c1-16
}

# Install what `$extra` needs from the cache alone; pip resolves first, so it is all or nothing.
install_from_wheelhouse() {
    "$venv/bin/python" -m pip install --no-index --find-links "$wheelhouse" --constraint constraints.txt \
        --requirement "$needed" >>"$log" 2>&1
}

# Fetch all that `$extra` needs into the cache; each wheel arrives there whole or not at all.
fill_wheelhouse() {
    say "fetching packages for '$extra' into $wheelhouse (once)"
    find "$wheelhouse" -maxdepth 1 -name 'incoming.*' -mtime +0 -exec rm -rf {} + # left by a killed run
    incoming=$(mktemp -d "$wheelhouse/incoming.XXXXXX")
    trap 'rm -rf "$incoming"' EXIT
    if ! logged "$venv/bin/python" -m pip download --only-binary=:all: --constraint constraints.txt \
        --dest "$incoming" --find-links "$wheelhouse" --requirement "$needed"; then
        fail "packages could not be fetched (log: $log); try: check the network and pip's index (pip config list), then run it again"
    fi
    find "$incoming" -type f -exec mv -f {} "$wheelhouse/" \;
    rm -rf "$incoming"
    trap - EXIT
}

build() {
    if [ ! -e "$venv/made" ]; then
        say "making $venv with $($python --version 2>&1) ($(command -v "$python"))"
        logged "$python" -m venv --clear "$venv" || fail "venv failed (log: $log); try: rm -rf $venv and run it again"
        command -v "$python" >"$venv/made"
    fi
    machine=$("$venv/bin/python" -c 'import platform, sys; print("cp%d%d-%s" % (*sys.version_info[:2], platform.machine()))')
    wheelhouse="$cache/wheels/$machine"
    mkdir -p "$wheelhouse"
    "$venv/bin/python" tools/requirements.py "$extra" >"$needed"
    say "installing into $venv"
    if ! install_from_wheelhouse; then
        fill_wheelhouse
        install_from_wheelhouse ||
            fail "installing failed (log: $log); try: rm -rf $venv $wheelhouse and run it again"
    fi
    logged "$venv/bin/python" -m pip install --no-index --no-deps --no-build-isolation --editable . ||
        fail "installing the project failed (log: $log); try: git status, then rm -rf $venv and run it again"
}

main() {
    extra=${1:-demo}
    cd "$(dirname "$0")/.."
    venv=${EDGELAM_VENV:-.venv}
    stamp="$venv/ready-$extra"
    key=$(key_of "$extra")
    made_with=$(cat "$venv/made" 2>/dev/null || true)
    if [ -n "${PYTHON:-}" ] && [ "$made_with" != "$(command -v "$PYTHON" || true)" ]; then
        made_with=''
    fi
    if [ -n "$made_with" ] && [ "$(cat "$stamp" 2>/dev/null)" = "$key" ] && [ -x "$venv/bin/python" ]; then
        return
    fi
    # pip's own switches that would send packages elsewhere or forbid this environment.
    unset PIP_USER PIP_TARGET PIP_PREFIX PIP_REQUIRE_VIRTUALENV PYTHONHOME PYTHONPATH || true
    export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1
    cache=${EDGELAM_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/edgelam}
    mkdir -p "$cache" .edgelam
    log="$PWD/.edgelam/setup.log"
    needed="$PWD/.edgelam/needed.txt"
    : >"$log"
    exec 9>.edgelam/setup.lock
    if command -v flock >/dev/null; then flock 9; fi # a second make waits for the first
    rm -f "$venv"/ready-*
    if [ -z "$made_with" ] || ! "$venv/bin/python" -c '' 2>/dev/null || [ "$(cat "$venv/place" 2>/dev/null)" != "$PWD" ]; then
        rm -f "$venv/made"
        choose_python
    fi
    build
    printf '%s\n' "$PWD" >"$venv/place"
    printf '%s\n' "$key" >"$stamp"
    if [ "$extra" = dev ]; then key_of demo >"$venv/ready-demo"; fi # dev holds demo
    say "ready"
}

main "$@"
