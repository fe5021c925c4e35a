#!/bin/sh
# Install edgelam on a 64-bit Linux machine as a service: sudo ./install.sh --help
#
# Run it from a clone, or from a bundle made by `make bundle` (then nothing is fetched). It plans first and then applies:
# every step checks whether its work is done already, so a second run changes nothing, and --dry-run changes nothing at
# all. It touches /opt/edgelam, /etc/edgelam, the unit, two commands in /usr/local/bin and its own user; never drivers,
# power modes, other users or the system's Python packages.
# shellcheck disable=SC2317 # steps are called by their names
set -eu

OLDEST_MINOR=10 # Python 3.10 is JetPack 6
NEWEST_MINOR=13
NEED_KB=700000  # measured: agent 180 MB, coordinator 292 MB; twice that during an upgrade, and the wheels
USER_NAME=edgelam

usage() {
    cat <<'HELP'
usage: sudo ./install.sh [options]
  --role agent|coordinator   what this machine becomes (default: agent)
  --site NAME                site to join or to make (default: the only one found / home)
  --broker mqtt://HOST:PORT  broker to use (agent: default is to find it by mDNS)
  --name NAME                name of this device (default: from the host name)
  --site-key -|FILE          the site's key, read from standard input or a file; kept in /etc/edgelam with mode 0600
  --offline DIR              install from this bundle or folder of wheels, without network
  --no-service               install the programs only (machines without systemd)
  --dry-run                  print what would be done; change nothing
  --uninstall [--purge]      remove the role; --purge removes settings, state, cache, user and log too
environment: PYTHON=/usr/bin/python3.X  DESTDIR=/other/root (for tests and packages)
HELP
}

say() { printf '%s\n' "$*"; }

# stop TEXT HINT: end before or between steps; nothing is half done.
stop() {
    printf 'install.sh: %s\n' "$1" >&2
    [ -z "${2:-}" ] || printf '  try: %s\n' "$2" >&2
    exit "${3:-1}"
}

# run COMMAND...: run it quietly into the log; on failure say step, command, exit code, last lines, log and what to try.
run() {
    status=0
    "$@" >>"$log" 2>&1 || status=$?
    [ "$status" -ne 0 ] || return 0
    {
        printf 'install.sh: failed at: %s\n  command: %s\n  exit code: %s\n  last lines:\n' "$step_text" "$*" "$status"
        tail -n 5 "$log" | sed 's/^/    /'
        printf '  log: %s\n  try: %s\n' "$log" "${hint:-run it again: finished steps are kept}"
    } >&2
    exit 1
}

# step TEXT CHECK APPLY: the whole installer is a list of these.
step() {
    step_text=$1
    if "$2"; then
        say "ok       $1"
    elif [ -n "$dry_run" ]; then
        say "would    $1"
    else
        "$3"
        changed=$((changed + 1))
        say "changed  $1"
    fi
}

# ---- what is asked for

parse() {
    role=agent site='' broker='' name='' key_from='' offline='' service=yes dry_run='' uninstall='' purge=''
    while [ $# -gt 0 ]; do
        case $1 in
        --role | --site | --broker | --name | --site-key | --offline)
            [ $# -ge 2 ] || stop "$1 needs a value" "./install.sh --help" 2
            ;;
        esac
        case $1 in
        --role) role=$2 && shift ;;
        --site) site=$2 && shift ;;
        --broker) broker=$2 && shift ;;
        --name) name=$2 && shift ;;
        --site-key) key_from=$2 && shift ;;
        --offline) offline=$2 && shift ;;
        --no-service) service='' ;;
        --dry-run) dry_run=yes ;;
        --uninstall) uninstall=yes ;;
        --purge) purge=yes ;;
        -h | --help) usage && exit 0 ;;
        *) stop "unknown option $1" "./install.sh --help" 2 ;;
        esac
        shift
    done
    case $role in agent | coordinator) ;; *) stop "no role '$role'" "--role agent or --role coordinator" 2 ;; esac
    for given in "$site" "$name"; do
        case $given in *[!a-z0-9-]*) stop "'$given' is not a name" "lower-case letters, digits and hyphens" 2 ;; esac
    done
    case $broker in *[!][A-Za-z0-9.:/_-]*) stop "'$broker' is not a broker's address" "mqtt://HOST:PORT" 2 ;; esac
    if [ "$role" = coordinator ] && [ -n "$broker$name$key_from" ]; then
        stop "--broker, --name and --site-key are for agents" "the coordinator makes the site's key by itself" 2
    fi
    [ -z "$purge" ] || [ -n "$uninstall" ] || stop "--purge goes with --uninstall" "./install.sh --uninstall --purge" 2
}

# Names of everything that is made, in one place.
name_places() {
    root=${DESTDIR:-}
    opt=$root/opt/edgelam
    etc=$root/etc/edgelam
    unit=$root/etc/systemd/system/edgelam-$role.service
    drop_in=$unit.d/jetson.conf
    settings=$etc/$role.env
    key_file=$etc/site.key
    state=$root/var/lib/edgelam
    cache=$root/var/cache/edgelam
    final_log=$root/var/log/edgelam-install.log
    pending=$opt/pending
    if [ "$role" = agent ]; then
        program=edgelam-agent other=coordinator other_program=edgelam
    else
        program=edgelam other=agent other_program=edgelam-agent
    fi
    link=$root/usr/local/bin/$program
    other_role_here=''
    if [ -L "$root/usr/local/bin/$other_program" ]; then other_role_here=yes; fi
    # Both roles of one machine share one release.
    extra='' flavour=agent
    if [ "$role" = coordinator ] || [ -n "$other_role_here" ]; then extra='[coordinator]' flavour=coordinator; fi
    here=$(cd "$(dirname "$0")" && pwd)
}

# ---- what this machine is, and whether it will do

require_machine() {
    case $(uname -m) in
    x86_64 | aarch64) ;;
    *) stop "$(uname -m) is not supported: onnxruntime and numpy exist for 64-bit x86 and ARM only" "a 64-bit system image" 3 ;;
    esac
    # A 64-bit kernel under a 32-bit system is common on Raspberry Pi OS.
    [ "$(getconf LONG_BIT)" = 64 ] || stop "this is a 32-bit system" "the 64-bit image of the same system" 3
    if [ -n "$service" ] && [ ! -d "$root/run/systemd/system" ]; then
        remedy="./install.sh --no-service, then: $program run"
        [ -n "$dry_run" ] || stop "systemd does not run here" "$remedy" 3
        say "note     systemd does not run here, so this would stop before its first step; try: $remedy"
    fi
    place=$opt
    while [ ! -d "$place" ]; do place=$(dirname "$place"); done
    free_kb=$(df -Pk "$place" | awk 'NR == 2 { print $4 }')
    [ "$free_kb" -ge $NEED_KB ] ||
        stop "$place has $((free_kb / 1024)) MB free, $((NEED_KB / 1024)) MB are needed" "free some space" 3
    if [ "$(date +%s)" -lt $(($(stat -c %Y "$here/install.sh") - 86400)) ]; then
        stop "the clock says $(date +%F), before this file was made: TLS would fail" "sudo timedatectl set-ntp true" 3
    fi
}

find_board() {
    jetson=''
    board=$(uname -m)
    because="no device tree"
    if [ -r "$root/proc/device-tree/model" ]; then
        board=$(tr -d '\0' <"$root/proc/device-tree/model")
        because="from the device tree"
    fi
    if [ -e "$root/etc/nv_tegra_release" ]; then
        jetson=yes
        because="$because; /etc/nv_tegra_release: system packages (TensorRT) stay visible"
    fi
    say "board    $board ($because)"
    case $board in
    *"Raspberry Pi"*)
        if awk '$1 == "memory" && $4 == 0 { off = 1 } END { exit !off }' "$root/proc/cgroups" 2>/dev/null; then
            say "note     the memory cgroup is off: MemoryMax has no effect; add cgroup_enable=memory to cmdline.txt"
        fi
        ;;
    esac
}

# The service's user must be able to run it, so a Python in somebody's home is never chosen by itself.
choose_python() {
    python='' lacking=''
    for candidate in ${PYTHON:-/usr/bin/python3 /usr/local/bin/python3 /usr/bin/python3.13 /usr/bin/python3.12 \
        /usr/bin/python3.11 /usr/bin/python3.10}; do
        candidate=$(command -v "$candidate") || continue
        minor=$("$candidate" -c 'import sys; print(sys.version_info[1] if sys.version_info[0] == 3 else 0)')
        if [ "$minor" -lt $OLDEST_MINOR ] || [ "$minor" -gt $NEWEST_MINOR ]; then continue; fi
        if "$candidate" -c 'import ensurepip, venv' 2>/dev/null; then
            python=$candidate
            say "python   $candidate (3.$minor)"
            return
        fi
        lacking=$minor
    done
    [ -z "$lacking" ] || stop "Python 3.$lacking has no venv module" "sudo apt install python3.$lacking-venv" 3
    stop "no Python 3.$OLDEST_MINOR to 3.$NEWEST_MINOR in /usr/bin" "sudo apt install python3 python3-venv" 3
}

# Set `source_folder` or `wheel`, and `release`: the name of what would be installed, told apart by content.
find_source() {
    wheel='' source_folder='' wheels=''
    if [ -n "$offline" ]; then
        wheels=$(cd "$offline" 2>/dev/null && pwd) || stop "no folder $offline" "--offline DIR, made by: make bundle" 2
        [ -f "$wheels/SHA256SUMS" ] || stop "$wheels has no SHA256SUMS" "make the bundle with: make bundle" 2
        (cd "$wheels" && sha256sum --check --quiet --strict SHA256SUMS >/dev/null 2>&1) ||
            stop "$wheels does not match its SHA256SUMS: a file is damaged or missing" "copy the bundle again"
        for found in "$wheels"/edgelam-*.whl; do
            [ ! -f "$found" ] || wheel=$found
        done
        [ -n "$wheel" ] || stop "$wheels has no edgelam wheel" "make the bundle with: make bundle" 2
        version=$(basename "$wheel" | cut -d- -f2)
        content=$(sha256sum "$wheels/SHA256SUMS" | cut -c1-8)
    elif [ -f "$here/pyproject.toml" ]; then
        source_folder=$here
        version=$(sed -n 's/^VERSION = "\(.*\)"$/\1/p' "$here/wire/version.py")
        content=$(cd "$here" && list_source | LC_ALL=C sort | xargs sha256sum | sha256sum | cut -c1-8)
    else
        stop "this is neither a clone nor a bundle" "run install.sh in a clone, or with --offline DIR" 2
    fi
    release=$version-$content-$flavour
}

list_source() {
    find pyproject.toml constraints.txt README.md LICENSE wire hwprofiles models agent coordinator testbed -type f \
        -not -path '*/__pycache__/*'
}

# ---- the steps: is_* tells, make_* does

is_user() { getent passwd "$USER_NAME" >/dev/null; }
make_user() {
    run useradd --system --user-group --home-dir /var/lib/edgelam --no-create-home --shell /usr/sbin/nologin "$USER_NAME"
}

is_in_groups() {
    for group in video render; do
        if getent group "$group" >/dev/null; then
            is_user && id -nG "$USER_NAME" | tr ' ' '\n' | grep -qx "$group" || return 1
        fi
    done
}
make_in_groups() {
    for group in video render; do
        if getent group "$group" >/dev/null; then run usermod --append --groups "$group" "$USER_NAME"; fi
    done
}

# A release is complete once the file `complete` stands in it; a torn one is made again.
is_release() { [ -f "$opt/releases/$release/complete" ]; }
make_release() {
    target=$opt/releases/$release
    run rm -rf "$target"
    run mkdir -p "$opt/releases"
    unset PIP_USER PIP_TARGET PIP_PREFIX PIP_REQUIRE_VIRTUALENV PYTHONHOME PYTHONPATH || true
    export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1
    if [ -n "$jetson" ]; then
        run "$python" -m venv --system-site-packages "$target"
    else
        run "$python" -m venv "$target"
    fi
    if [ -n "$wheel" ]; then
        hint="make a bundle for this Python and machine: make bundle BUNDLE='--python 3.$minor --machine $(uname -m)'"
        run "$target/bin/python" -m pip install --no-index --find-links "$wheels" "$wheel$extra"
    else
        hint="check the network and pip's index, or use --offline DIR"
        # Built from a copy: a build leaves files beside its sources, and these would belong to root.
        copy=$target/source
        run mkdir -p "$copy"
        (cd "$source_folder" && list_source | tar -cf - -T -) | tar -xf - -C "$copy"
        run "$target/bin/python" -m pip install --only-binary=:all: --constraint "$copy/constraints.txt" "$copy$extra"
        run rm -rf "$copy"
    fi
    hint=''
    run "$target/bin/$program" version
    # Readable by the service's user whatever root's umask is.
    run chmod -R a+rX "$target"
    run chmod a+rx "$opt" "$opt/releases"
    run touch "$target/complete"
}

is_current() { [ "$(readlink "$opt/current" 2>/dev/null)" = "releases/$release" ]; }
make_current() {
    # What runs now is noted first: if this run is cut off, the next one still knows that a restart is due.
    if [ -n "$service" ]; then readlink "$opt/current" >"$pending" 2>/dev/null || true; fi
    point_to "releases/$release"
}
# A rename, so that `current` is never absent.
point_to() {
    run ln -sfn "$1" "$opt/current.new"
    run mv -Tf "$opt/current.new" "$opt/current"
}

# The file `pending` stands while a restart is due, and holds the release to fall back to.
needs_restart() {
    if [ -n "$service" ] && [ ! -e "$pending" ]; then : >"$pending"; fi
}

is_linked() { [ "$(readlink "$link" 2>/dev/null)" = "/opt/edgelam/current/bin/$program" ]; }
make_linked() {
    run mkdir -p "$(dirname "$link")"
    run ln -sfn "/opt/edgelam/current/bin/$program" "$link"
}

# Settings given now, over those that stand in the file.
wanted_settings() {
    if [ -f "$settings" ]; then
        given_now='^$'
        [ -z "$site" ] || given_now="$given_now|^EDGELAM_SITE="
        [ -z "$broker" ] || given_now="$given_now|^EDGELAM_BROKER="
        [ -z "$name" ] || given_now="$given_now|^EDGELAM_NAME="
        [ -z "$key_from" ] || given_now="$given_now|^EDGELAM_SITE_KEY_FILE="
        grep -Ev "$given_now" "$settings" || true
    else
        say "# Read by edgelam-$role.service. docs/install.md lists the variables"
    fi
    [ -z "$site" ] || say "EDGELAM_SITE=$site"
    [ -z "$broker" ] || say "EDGELAM_BROKER=$broker"
    [ -z "$name" ] || say "EDGELAM_NAME=$name"
    [ -z "$key_from" ] || say "EDGELAM_SITE_KEY_FILE=/etc/edgelam/site.key"
}
is_settled() { [ -f "$settings" ] && [ "$(wanted_settings | sort)" = "$(sort "$settings")" ]; }
make_settled() {
    run install -d -m 0755 "$etc"
    wanted_settings >"$settings.new"
    run chmod 0644 "$settings.new"
    run mv -f "$settings.new" "$settings"
    needs_restart
}

is_key() { [ -f "$key_file" ] && [ "$(cat "$key_file")" = "$key" ] && [ "$(stat -c %a "$key_file")" = 600 ]; }
make_key() {
    run install -d -m 0755 "$etc"
    (umask 077 && printf '%s\n' "$key" >"$key_file.new")
    run chown "$USER_NAME:$USER_NAME" "$key_file.new"
    run mv -f "$key_file.new" "$key_file"
    needs_restart
}

is_unit() {
    cmp -s "$here/systemd/edgelam-$role.service" "$unit" || return 1
    [ -z "$jetson" ] || [ "$role" != agent ] || cmp -s "$here/systemd/edgelam-agent-jetson.conf" "$drop_in"
}
make_unit() {
    run install -D -m 0644 "$here/systemd/edgelam-$role.service" "$unit"
    if [ -n "$jetson" ] && [ "$role" = agent ]; then
        run install -D -m 0644 "$here/systemd/edgelam-agent-jetson.conf" "$drop_in"
    fi
    run systemctl daemon-reload
    needs_restart
}

is_enabled() { systemctl --quiet is-enabled "edgelam-$role.service" 2>/dev/null; }
make_enabled() { run systemctl enable "edgelam-$role.service"; }

# Starting waits for READY=1; a release that never says it is taken back.
is_running() { [ ! -e "$pending" ] && systemctl --quiet is-active "edgelam-$role.service" 2>/dev/null; }
make_running() {
    hint="journalctl -u edgelam-$role -n 50"
    previous=$(cat "$pending" 2>/dev/null || true)
    if [ -n "$previous" ] && [ "$previous" != "releases/$release" ] && [ -d "$opt/$previous" ]; then
        if ! systemctl restart "edgelam-$role.service" >>"$log" 2>&1; then
            point_to "$previous"
            rm -rf "$opt/releases/$release" "$pending"
            systemctl restart "edgelam-$role.service" >>"$log" 2>&1 || true
            stop "the new release did not start; $previous is active again (log: $log)" "$hint"
        fi
        run systemctl try-restart "edgelam-$other.service"
        forget_old_releases
    else
        run systemctl restart "edgelam-$role.service"
    fi
    run rm -f "$pending"
    hint=''
}

# All but this release and the one before it.
forget_old_releases() {
    for folder in "$opt"/releases/*; do
        case releases/$(basename "$folder") in
        "releases/$release" | "$previous") ;;
        *) run rm -rf "$folder" ;;
        esac
    done
}

install_role() {
    require_machine
    find_board
    choose_python
    find_source
    key=''
    if [ "$key_from" = - ]; then
        IFS= read -r key || [ -n "$key" ] || stop "no site key on standard input" "echo KEY | ./install.sh --site-key -" 2
    elif [ -n "$key_from" ]; then
        key=$(head -n 1 "$key_from") || stop "can't read $key_from" "--site-key FILE" 2
    fi
    step "user $USER_NAME" is_user make_user
    step "$USER_NAME in groups video and render, where they exist" is_in_groups make_in_groups
    step "release $release" is_release make_release
    step "current release is $release" is_current make_current
    step "command $program" is_linked make_linked
    step "settings $settings" is_settled make_settled
    if [ -n "$key" ]; then step "site key $key_file" is_key make_key; fi
    if [ -n "$service" ]; then
        step "unit edgelam-$role.service" is_unit make_unit
        step "starts at boot" is_enabled make_enabled
        step "running" is_running make_running
    fi
    if [ -n "$jetson" ] && [ -z "$dry_run" ]; then
        "$opt/current/bin/python" -c 'import tensorrt; print("tensorrt", tensorrt.__version__)' 2>/dev/null ||
            say "note     tensorrt can't be imported: install JetPack's python3-libnvinfer; never pip install tensorrt"
    fi
}

# ---- and back

gone() { [ ! -e "$1" ] && [ ! -L "$1" ]; }
is_stopped() { gone "$unit"; }
make_stopped() {
    run systemctl disable --now "edgelam-$role.service"
    run rm -rf "$unit" "$unit.d"
    run systemctl daemon-reload
}
is_unlinked() { gone "$link"; }
make_unlinked() { run rm -f "$link"; }
is_opt_gone() { gone "$opt"; }
make_opt_gone() { run rm -rf "$opt"; }
is_data_gone() { gone "$etc" && gone "$state" && gone "$cache" && gone "$state-coordinator" && gone "$cache-coordinator"; }
make_data_gone() { run rm -rf "$etc" "$state" "$cache" "$state-coordinator" "$cache-coordinator"; }
is_user_gone() { ! is_user; }
make_user_gone() {
    run userdel "$USER_NAME"
    if getent group "$USER_NAME" >/dev/null; then run groupdel "$USER_NAME"; fi
}

uninstall_role() {
    step "no unit edgelam-$role.service" is_stopped make_stopped
    step "no command $program" is_unlinked make_unlinked
    if [ -n "$other_role_here" ]; then
        say "kept     programs, settings and user: the role $other needs them"
        return
    fi
    step "no programs in $opt" is_opt_gone make_opt_gone
    if [ -n "$purge" ]; then
        step "no settings, state and cache" is_data_gone make_data_gone
        step "no user $USER_NAME" is_user_gone make_user_gone
    else
        say "kept     $etc, $state, $cache and the user; --purge removes them"
    fi
}

main() {
    parse "$@"
    name_places
    if [ -z "$dry_run" ] && [ -z "$root" ] && [ "$(id -u)" -ne 0 ]; then
        stop "needs root to make a user and a service" "sudo ./install.sh $*, or --dry-run to see what it would do" 2
    fi
    umask 022
    changed=0 previous='' hint='' step_text=start log=/dev/null
    if [ -z "$dry_run" ]; then
        mkdir -p "$(dirname "$final_log")"
        log=$final_log
        : >"$log"
    fi
    if [ -n "$uninstall" ]; then uninstall_role; else install_role; fi
    if [ -n "$purge" ] && [ -z "$dry_run" ]; then rm -f "$final_log"; fi
    if [ -n "$dry_run" ]; then say "dry run: nothing was changed"; else say "done: $changed changed"; fi
    if [ -z "$uninstall$dry_run" ] && [ -n "$service" ]; then say "watch it: journalctl -fu edgelam-$role"; fi
}

# In braces: a download that was cut off anywhere above or inside runs nothing.
{ main "$@"; exit; }
