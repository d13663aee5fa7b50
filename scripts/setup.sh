# shellcheck shell=bash
# Sourced by ./mis-run, ./mis and ./run-tests: set up what is missing, say what, do it once.
#
# Nothing to do costs a few comparisons of file times and no process. Exit codes as in
# docs/exit-codes.md: 120 when this machine lacks something, 121 when a step failed. The current
# directory is the agent's and may hold a pip.py: every Python here runs with -I, every program
# is looked up in the system's directories only.

# Caller sets $root: the checkout, absolute and without symbolic links.

say() { printf 'mis-run: %s\n' "$1" >&2; }
die() {
    say "$2"
    [ -z "${3:-}" ] || printf '  hint: %s\n' "$3" >&2
    exit "$1"
}

# Everything there, made here and newer than what it was made from? File tests only.
is_set_up() {
    local stamp="$root/.venv/stamp${1:+-$1}" source place=
    [ -e "$stamp" ] && [ -x "$root/.venv/bin/python" ] || return 1
    read -r place <"$stamp"
    [ "$place" = "$root" ] || return 1 # the checkout was moved: installed paths are wrong
    for source in "$root"/{pyproject.toml,mis_run/build.py,scripts/setup.sh} \
        "$root"/bpf/* "$root"/shim/*; do
        [ "$source" -nt "$stamp" ] && return 1
    done
    for source in "$root"/bpf/*.bpf.c; do
        source=${source##*/}
        [ -e "$root/mis_run/_built/${source%.c}.o" ] || return 1
    done
    for source in "$root"/shim/*.c; do
        source=${source##*/}
        [ -e "$root/mis_run/_built/mis-${source%.c}" ] || return 1
    done
    return 0
}

# set_up EXTRA [PACKAGE…]: packages, virtual environment, compiled objects. EXTRA: "" or "dev".
set_up() {
    # A subshell: its PATH, umask and lock are not the agent's. Its exit code is ours.
    (_set_up "$@") || exit $?
}

_set_up() {
    local extra=$1 users_path=$PATH
    shift
    PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
    umask 022 # what root makes here, other users can run
    cd / || exit 121
    [ -w "$root" ] || die 120 "not set up yet, and $root is not writable for you" "sudo $root/mis-run"
    exec 9<"$root/mis-run" # a file of its own could be a link that an agent has left
    flock -n 9 || { say "waiting for another start that is setting up"; flock 9; }
    is_set_up "$extra" && return 0
    find_python
    needed_packages "$@"
    install_packages
    make_venv
    say "installing Python packages${extra:+ for $extra}"
    local wanted
    mapfile -t wanted < <("$root/.venv/bin/python" -I -c "$requirements" "$root/pyproject.toml" "$extra")
    # A folder of packages that is configured but not there is no news.
    "$root/.venv/bin/python" -I -m pip install -q --disable-pip-version-check --no-warn-script-location \
        "${wanted[@]}" 9>&- 2> >(grep -v 'Location .* is ignored' >&2) ||
        die 121 "pip could not install the packages above" "check the network, then try again"
    link_package
    "$root/.venv/bin/python" -I -m mis_run.build >&2 || exit $?
    # Byte code now, so that the first run is as fast as the others.
    "$root/.venv/bin/python" -I -m compileall -q "$root/mis_run" >/dev/null ||
        say "byte code could not be written; starts will be slower"
    printf '%s\n' "$root" | tee "$root/.venv/stamp${extra:+-$extra}" >"$root/.venv/stamp"
}

# Not `pip install -e`: it would build in the checkout (by a hatch.toml, if somebody left one) and put
# all of that on the environment's path.  What an agent leaves there, as org/python/core.py, which the
# standard library's copy.py tries to import, would run as root at the next start.
requirements='
import sys, tomllib
with open(sys.argv[1], "rb") as file:
    project = tomllib.load(file)["project"]
extra = project["optional-dependencies"][sys.argv[2]] if sys.argv[2] else []
print(*project["dependencies"], *extra, sep="\n")'
link_package() {
    local packages
    for packages in "$root"/.venv/lib/python3*/site-packages; do
        rm -rf "$packages"/_editable_impl_mis_run.pth "$packages"/mis_run-*.dist-info # of a former set-up
        ln -sfn "$root/mis_run" "$packages/mis_run" || die 121 "cannot link $packages/mis_run"
    done
}

# The newest Python ≥ 3.11, the distribution's first: its files are readable for every user.
find_python() {
    local found wanted
    found=$(PATH=$users_path command -v python3) || found=
    for python in /usr/bin/python3 /usr/bin/python3.1{4,3,2,1} /usr/local/bin/python3 "$found"; do
        case $python in /*) ;; *) continue ;; esac # a relative PATH entry is the agent's
        new_enough && return 0
    done
    # An older distribution with newer Pythons beside its own.
    if command -v apt-cache >/dev/null; then
        for wanted in python3.13 python3.12 python3.11 python3; do
            apt-cache show "$wanted-venv" >/dev/null 2>&1 || continue
            packages=("$wanted" "$wanted-venv")
            install_packages
            python=/usr/bin/$wanted
            new_enough && return 0
        done
    fi
    die 120 "Python 3.11 or newer is missing" "apt-get install python3.11 python3.11-venv"
}
new_enough() {
    [ -x "$python" ] && "$python" -I -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
}

# Program or file → the Debian package that has it. Fills $packages.
needed_packages() {
    local package version missing=()
    have() { command -v "$1" >/dev/null 2>&1; }
    have clang || missing+=(clang)
    have nft || missing+=(nftables)
    have ip || missing+=(iproute2)
    have setpriv || missing+=(util-linux)
    have crun || missing+=(crun)
    have runc || missing+=(runc) # engines' own, and for a crun before 0.20
    have ld || missing+=(binutils)
    [ -e /usr/include/bpf/bpf_helpers.h ] || missing+=(libbpf-dev)
    compgen -G '/usr/lib/*/libc.a' >/dev/null || [ -e /usr/lib/libc.a ] || missing+=(libc6-dev)
    compgen -G '/usr/include/*/asm/types.h' >/dev/null || [ -e /usr/include/asm/types.h ] ||
        missing+=(linux-libc-dev)
    compgen -G '/usr/lib*/*/libbpf.so.1' >/dev/null || compgen -G '/usr/lib*/libbpf.so.1' >/dev/null ||
        missing+=(libbpf1)
    if ! "$python" -I -c 'import ensurepip, venv' 2>/dev/null; then
        version=$("$python" -I -c 'import sys; print("%d.%d" % sys.version_info[:2])')
        missing+=("python$version-venv")
    fi
    for package in "$@"; do
        dpkg-query -W -f '${Status}' "$package" 2>/dev/null | grep -q ' installed' ||
            missing+=("$package")
    done
    packages=("${missing[@]}")
}

# Install $packages, or say in one line why that cannot be.
install_packages() {
    [ "${#packages[@]}" -gt 0 ] || return 0
    local log why by_hand="apt-get install ${packages[*]}"
    command -v apt-get >/dev/null ||
        die 120 "missing: ${packages[*]} (Debian names), and there is no apt-get" "install them by hand"
    [ "$(id -u)" = 0 ] || die 120 "missing packages: ${packages[*]}" "sudo $by_hand"
    say "installing ${packages[*]}"
    log=$(mktemp)
    # The lists may be absent or stale: only then is an update worth its time.
    if ! get install "${packages[@]}" && { ! get update || ! get install "${packages[@]}"; }; then
        case $(<"$log") in
        *[Cc]'ould not get lock'*) why="another program holds apt's lock" ;;
        *'Unable to locate'* | *'no installation candidate'*) why="apt's sources do not have them" ;;
        *'Could not resolve'* | *'Unable to connect'* | *'Could not connect'* | *'Failed to fetch'*)
            why="the package mirror cannot be reached" ;;
        *) why=$(grep -m 1 '^E:' "$log" || tail -n 1 "$log") ;;
        esac
        rm -f "$log"
        die 120 "cannot install ${packages[*]}: $why" "$by_hand"
    fi
    rm -f "$log"
}
# 9>&-: a daemon that a package starts must not keep our lock.
get() {
    local options=(-qq -o DPkg::Lock::Timeout=120 -o Acquire::Retries=2)
    local tries=1
    [ "$1" = update ] && tries=6 # apt has no waiting for the lock of its lists
    [ "$1" = install ] && options+=(-y --no-install-recommends)
    while :; do
        DEBIAN_FRONTEND=noninteractive apt-get "${options[@]}" -o APT::Update::Error-Mode=any "$@" \
            >"$log" 2>&1 </dev/null 9>&- && return 0
        [ $((tries -= 1)) -gt 0 ] && grep -q 'ould not get lock' "$log" || return 1
        sleep 10
    done
}

# The environment is made with the interpreter's real, versioned name: after an upgrade of the
# distribution that name is gone, the stamp's test fails and the environment is made anew.
make_venv() {
    local place=
    [ -e "$root/.venv/where" ] && read -r place <"$root/.venv/where"
    [ "$place" = "$root" ] && [ -x "$root/.venv/bin/python" ] &&
        "$root/.venv/bin/python" -I -m pip --version >/dev/null 2>&1 && return 0
    [ ! -L "$root/.venv" ] || rm -f "$root/.venv" # never empty what is another checkout's
    say "making a virtual environment"
    "$(readlink -f "$python")" -I -m venv --clear "$root/.venv" 9>&- ||
        die 121 "cannot make $root/.venv" "rm -r $root/.venv"
    printf '%s\n' "$root" >"$root/.venv/where"
}
