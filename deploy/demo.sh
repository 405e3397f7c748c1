#!/bin/sh
# The main job, on this machine's own files: an ext4 image is built, served over NBD by one server, copied to a second
# server by four workers, and then checked by e2fsck and byte for byte. Run by `make demo`; needs no network.
set -eu

IMAGE_MIB=${IMAGE_MIB:-384}
FILES_MIB=${FILES_MIB:-240}
WORKERS=${WORKERS:-4}
RATE=${RATE:-160M} # bits per second of each source connection: slow enough to watch the bar

top=$(cd "$(dirname "$0")/.." && pwd)
nbdshard=$top/.venv/bin/nbdshard
PATH=$PATH:/usr/sbin:/sbin # where Debian has mke2fs and e2fsck
folder=$(mktemp -d /tmp/nbdshard-demo.XXXXXX)
source_pid=''
destination_pid=''

clean_up() {
    trap '' HUP INT PIPE TERM
    for pid in $source_pid $destination_pid; do
        kill "$pid" 2>/dev/null || true
        wait "$pid" 2>/dev/null || true
    done
    rm -rf "$folder"
}
trap clean_up EXIT
trap 'exit 129' HUP
trap 'exit 130' INT
trap 'exit 141' PIPE # whoever read our output has left
trap 'exit 143' TERM

step() { printf '\n== %s\n' "$*"; }

await_socket() { # path pid: until the server listens, or has ended
    tries=0
    until [ -S "$1" ]; do
        kill -0 "$2" 2>/dev/null || { echo "the server did not start" >&2; exit 1; }
        tries=$((tries + 1))
        [ "$tries" -lt 200 ] || { echo "the server did not open $1 within 20 s" >&2; exit 1; }
        sleep 0.1
    done
}

step "Building a $IMAGE_MIB MiB ext4 image from up to $FILES_MIB MiB of files of this machine"
mkdir "$folder/files"
find /usr/share /usr/lib /usr/bin -xdev -type f -readable -size -8192k -printf '%s %p\n' 2>/dev/null |
    awk -v limit=$((FILES_MIB << 20)) '(sum += $1 + 4096) > limit { exit } { sub(/^[0-9]+ /, ""); print }' \
        >"$folder/list"
tar -C / --ignore-failed-read -cf - --verbatim-files-from -T "$folder/list" 2>/dev/null |
    tar -C "$folder/files" -xf - 2>/dev/null
truncate -s "${IMAGE_MIB}M" "$folder/source.img" "$folder/destination.img"
mke2fs -q -F -t ext4 -E lazy_itable_init=0 -d "$folder/files" "$folder/source.img" "${IMAGE_MIB}M"
rm -rf "$folder/files"
echo "$(wc -l <"$folder/list") files; the image occupies $(du -m "$folder/source.img" | cut -f1) of $IMAGE_MIB MiB"

step 'Starting two NBD servers: nbdkit serves the image, qemu-nbd serves an empty one'
nbdkit -f -r -U "$folder/source.sock" --filter=rate file "$folder/source.img" \
    connection-rate="$RATE" burstiness=0.25 2>"$folder/nbdkit.log" &
source_pid=$!
qemu-nbd -t -f raw -e 0 -k "$folder/destination.sock" --discard=unmap "$folder/destination.img" \
    2>"$folder/qemu-nbd.log" &
destination_pid=$!
await_socket "$folder/source.sock" "$source_pid"
await_socket "$folder/destination.sock" "$destination_pid"

step "Copying with $WORKERS worker processes (the source is slowed down so that the bar can be watched)"
set -- copy --workers "$WORKERS" --connections "$WORKERS" --progress \
    "nbd+unix:///?socket=$folder/source.sock" "nbd+unix:///?socket=$folder/destination.sock"
echo "\$ nbdshard $*"
"$nbdshard" "$@" || {
    code=$?
    cat "$folder/nbdkit.log" "$folder/qemu-nbd.log" >&2
    exit "$code"
}

step 'Stopping both servers, then checking the copy'
kill "$source_pid" "$destination_pid"
wait "$source_pid" 2>/dev/null || true
wait "$destination_pid" 2>/dev/null || true
source_pid=''
destination_pid=''
e2fsck -fn "$folder/destination.img"
cmp "$folder/source.img" "$folder/destination.img"
echo "cmp: all $((IMAGE_MIB << 20)) bytes are the same"

step "That was: one export, copied between two servers by a coordinator and $WORKERS workers over io_uring or epoll."
echo 'The holes of the source were not read, and became holes or zeroes of the destination. The copy was flushed'
echo 'before success was reported; it is a clean ext4 file system and equals the source in every byte.'
