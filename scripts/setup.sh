# Sourced by ./mis-run, ./mis and ./run-tests: set up what is missing, say what, do it once.
#
# Nothing to do costs a few comparisons of file times and no process. Exit codes as in
# docs/exit-codes.md: 120 when this machine lacks something, 121 when a step failed.

say() { printf 'mis-run: %s\n' "$1" >&2; }
die() {
    say "$2"
    [ -z "${3:-}" ] || printf '  hint: %s\n' "$3" >&2
    exit "$1"
}

# Program or file → the Debian package that has it.
needed_packages() {
    local package missing=()
    have() { command -v "$1" >/dev/null 2>&1 || [ -x "/usr/sbin/$1" ]; }
    have clang || missing+=(clang)
    have nft || missing+=(nftables)
    have ip || missing+=(iproute2)
    have setpriv || missing+=(util-linux)
    have runc || have crun || missing+=(runc)
    have ld || missing+=(binutils)
    [ -e /usr/include/bpf/bpf_helpers.h ] || missing+=(libbpf-dev)
    [ -e /usr/include/stdio.h ] || missing+=(libc6-dev)
    "$python" -c 'import ensurepip, venv' 2>/dev/null || missing+=(python3-venv)
    compgen -G '/usr/lib/*/libbpf.so.1' >/dev/null || missing+=(libbpf1)
    for package in "$@"; do
        dpkg -s "$package" >/dev/null 2>&1 || missing+=("$package")
    done
    packages=("${missing[@]}")
}

install_packages() {
    [ "${#packages[@]}" -gt 0 ] || return 0
    [ "$(id -u)" = 0 ] || die 120 "missing packages: ${packages[*]}" "sudo apt-get install ${packages[*]}"
    command -v apt-get >/dev/null 2>&1 ||
        die 120 "missing: ${packages[*]} (Debian names), and there is no apt-get" "install them by hand"
    say "installing ${packages[*]}"
    local log
    log=$(mktemp)
    if ! DEBIAN_FRONTEND=noninteractive apt-get -qq -o DPkg::Lock::Timeout=120 update >"$log" 2>&1 ||
        ! DEBIAN_FRONTEND=noninteractive apt-get -qq -o DPkg::Lock::Timeout=120 install -y \
            --no-install-recommends "${packages[@]}" >>"$log" 2>&1; then
        tail -n 5 "$log" >&2
        rm -f "$log"
        die 120 "these packages cannot be had: ${packages[*]}" "apt-get install ${packages[*]}"
    fi
    rm -f "$log"
}

# The newest Python ≥ 3.11 that every user can read: an agent must be able to run it too.
find_python() {
    for python in /usr/bin/python3 /usr/bin/python3.13 /usr/bin/python3.12 /usr/bin/python3.11 \
        "$(command -v python3 || true)"; do
        [ -n "$python" ] && [ -x "$python" ] || continue
        if "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            return 0
        fi
    done
    die 120 "Python 3.11 or newer is missing" "apt-get install python3"
}

# set_up EXTRA [PACKAGE…]: packages, virtual environment, compiled objects. EXTRA: "" or "dev".
set_up() {
    local extra=$1
    shift
    local lock="$root/.venv.lock"
    if [ ! -w "$root" ]; then
        die 120 "not set up yet, and $root is not writable for you" "sudo $0"
    fi
    exec 9>"$lock"
    flock 9 # two starters at once: the second finds everything done
    is_set_up "$extra" && { exec 9>&-; return 0; }
    find_python
    needed_packages "$@"
    install_packages
    if [ ! -x "$root/.venv/bin/python" ]; then
        say "making a virtual environment"
        "$python" -m venv "$root/.venv" || die 121 "cannot make $root/.venv" "rm -r $root/.venv"
    fi
    say "installing Python packages${extra:+ for $extra}"
    "$root/.venv/bin/python" -m pip install -q --disable-pip-version-check -e "$root${extra:+[$extra]}" ||
        die 121 "pip could not install the packages above" "check the network, then try again"
    "$root/.venv/bin/python" -I -m mis_run.build >&2 || exit $?
    # Byte code now, so that the first run is as fast as the others.
    "$root/.venv/bin/python" -m compileall -q "$root/mis_run" || true
    : >"$root/.venv/stamp${extra:+-$extra}"
    exec 9>&-
}

# Everything there and newer than what it was made from? File tests only.
is_set_up() {
    local stamp="$root/.venv/stamp${1:+-$1}" source
    [ -e "$stamp" ] && [ -x "$root/.venv/bin/python" ] || return 1
    for source in "$root"/pyproject.toml "$root"/bpf/* "$root"/shim/*.c "$root"/scripts/setup.sh; do
        [ "$source" -nt "$stamp" ] && return 1
    done
    for source in net.bpf.o mis-init mis-watchdog; do
        [ -e "$root/mis_run/_built/$source" ] || return 1
    done
    return 0
}
