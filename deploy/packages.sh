#!/bin/sh
# Install the Debian packages that `make demo`, `make test`, `make bench` or the virtual environment need, as far as
# they are missing.
#
# usage: packages.sh demo|test|bench|venv
set -eu

case "${1:-}" in
demo) wanted='e2fsprogs' ;;
test) wanted='nbdkit nbd-server nbd-client libnbd-bin python3-libnbd qemu-utils fio strace e2fsprogs iproute2 systemd libseccomp2 liberasurecode1 man-db groff-base' ;;
bench) wanted='nbdkit libnbd-bin qemu-utils fio' ;;
venv)
    # Debian's Python cannot make virtual environments without this package; others can.
    python3.11 -c 'import ensurepip' 2>/dev/null && exit 0
    wanted='python3.11 python3.11-venv'
    ;;
*)
    echo "usage: $0 demo|test|bench|venv" >&2
    exit 2
    ;;
esac

missing=''
for package in $wanted; do
    state=$(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null || true)
    [ "$state" = installed ] || missing="$missing $package"
done
[ -n "$missing" ] || exit 0

as_root=''
if [ "$(id -u)" != 0 ]; then
    as_root='sudo'
    command -v sudo >/dev/null || {
        echo "these packages are missing, and installing them needs root:$missing" >&2
        exit 1
    }
fi
echo "installing Debian packages:$missing"
install() {
    # A machine that has just started may hold dpkg's lock for its own updates.
    # shellcheck disable=SC2086  # a list of words
    $as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
        -o DPkg::Lock::Timeout=120 $missing </dev/null
}
# The lists may be absent (a fresh image) or name versions that the mirror no longer has: then fetch them and try again.
install >/dev/null 2>&1 || {
    $as_root apt-get update -qq
    said=$(install 2>&1) || {
        echo "$said" >&2
        exit 1
    }
}
