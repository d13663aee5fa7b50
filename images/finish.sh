#!/bin/sh
# The last step of every image, run inside it: a user, a workspace, and nothing that is not needed.
# SUITE is set where no base image brought sources of packages.
set -eu

# No passwd package in the smallest roots: the files are the interface.
grep -q '^agent:' /etc/passwd 2>/dev/null || {
    echo 'agent:x:1000:1000:agent:/home/agent:/bin/bash' >>/etc/passwd
    echo 'agent:x:1000:' >>/etc/group
    [ ! -e /etc/shadow ] || echo 'agent:!:20000:0:99999:7:::' >>/etc/shadow
}
mkdir -p /home/agent /work
chown 1000:1000 /home/agent /work

# mis-run and docker give no_new_privs or nothing: no program of an agent changes its user.
find / -xdev -type f -perm /6000 -exec chmod a-s {} +

if [ -n "${SUITE:-}" ] && [ -d /etc/apt ] && grep -qsx ID=debian /etc/os-release; then
    # Debian's own address, not that of the machine that built this.
    rm -rf /etc/apt/sources.list.d/*
    echo "deb http://deb.debian.org/debian $SUITE main" >/etc/apt/sources.list
fi

# What differs from build to build, or is made again when somebody wants it.
rm -rf /var/lib/apt/lists/* /var/cache/apt/* /var/cache/debconf/*-old /var/cache/ldconfig/aux-cache
rm -rf /var/lib/dpkg/*-old /etc/passwd- /etc/group- /etc/shadow- /etc/gshadow- /tmp/* /var/tmp/*
find /var/log -type f -delete
[ ! -e /etc/machine-id ] || : >/etc/machine-id
