#!/bin/sh
# What a board gets: size of the base install and time to import the agent. Prints two figures: tools/base_size.sh
#
# Makes an environment of its own from the cache's wheels (tools/setup.sh fills them) and removes it afterwards.
set -eu

cd "$(dirname "$0")/.."
tools/setup.sh demo
cache=${EDGELAM_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/edgelam}
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
machine=$(.venv/bin/python -c 'import platform, sys; print("cp%d%d-%s" % (*sys.version_info[:2], platform.machine()))')
.venv/bin/python tools/requirements.py base | grep -v '^setuptools' >"$scratch/base.txt"
.venv/bin/python -m venv "$scratch/venv"
"$scratch/venv/bin/python" -m pip install --quiet --no-index --find-links "$cache/wheels/$machine" \
    --constraint constraints.txt --requirement "$scratch/base.txt"
"$scratch/venv/bin/python" -m pip uninstall --quiet --yes pip setuptools 2>/dev/null || true
echo "base install without pip: $(du -sm "$scratch"/venv/lib/python3*/site-packages | cut -f1) MB of packages"
"$scratch/venv/bin/python" -c 'import agent.cli' # the first import writes byte code
# Least of five: what other programs do to the clock only adds.
"$scratch/venv/bin/python" - <<'TIMES'
import subprocess, sys, time
def seconds(code):
    begin = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True)
    return time.perf_counter() - begin
bare = min(seconds("pass") for _ in range(5))
full = min(seconds("import agent.cli") for _ in range(5))
print(f"import agent.cli: {(full - bare) * 1e3:.0f} ms over a bare Python of {bare * 1e3:.0f} ms")
TIMES
