#!/bin/sh
# The main job, on this machine's own files: an ext4 image is built, served over NBD by one server, copied by four workers
# to a second one, which keeps it in chunks, read back, and checked by e2fsck and byte for byte. Run by `make demo`; needs
# no network and no other NBD software.
set -eu

IMAGE_MIB=${IMAGE_MIB:-384}
FILES_MIB=${FILES_MIB:-240}
WORKERS=${WORKERS:-4}
RATE=${RATE:-80M} # bytes per second of the source: slow enough to watch the bar

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
truncate -s "${IMAGE_MIB}M" "$folder/source.img"
mke2fs -q -F -t ext4 -E lazy_itable_init=0 -d "$folder/files" "$folder/source.img" "${IMAGE_MIB}M"
rm -rf "$folder/files"
echo "$(wc -l <"$folder/list") files; the image occupies $(du -m "$folder/source.img" | cut -f1) of $IMAGE_MIB MiB"

step 'Starting two NBD servers: one serves the image, one an empty volume that is kept in chunks'
mkdir "$folder/volume"
"$nbdshard" serve -e disk raw "rate:file:$folder/source.img?rate=$RATE&read-only=yes" \
    --unix "$folder/source.sock" 2>"$folder/source.log" &
source_pid=$!
"$nbdshard" serve -e disk sharded "file:$folder/volume/?size=${IMAGE_MIB}M" \
    --unix "$folder/destination.sock" 2>"$folder/destination.log" &
destination_pid=$!
await_socket "$folder/source.sock" "$source_pid"
await_socket "$folder/destination.sock" "$destination_pid"

step "Copying with $WORKERS worker processes (the source is slowed down so that the bar can be watched)"
set -- copy --workers "$WORKERS" --connections "$WORKERS" --progress \
    "nbd+unix:///disk?socket=$folder/source.sock" "nbd+unix:///disk?socket=$folder/destination.sock"
echo "\$ nbdshard $*"
"$nbdshard" "$@" || {
    code=$?
    cat "$folder/source.log" "$folder/destination.log" >&2
    exit "$code"
}

step 'Stopping both servers'
kill "$source_pid" "$destination_pid"
wait "$source_pid" && wait "$destination_pid" || {
    echo 'a server did not end well' >&2
    cat "$folder/source.log" "$folder/destination.log" >&2
    exit 1
}
source_pid=''
destination_pid=''
echo "the volume has $(find "$folder/volume" -name '*.chunk' | wc -l) chunks of 4 MiB;" \
    "they occupy $(du -m "$folder/volume" | cut -f1) of $IMAGE_MIB MiB"

step 'Reading the volume back, from a server that is started for the copy, then checking it'
set -- copy '[' "$nbdshard" serve -e disk sharded "file:$folder/volume/" ']' "$folder/destination.img"
echo "\$ nbdshard $*"
"$nbdshard" "$@"
e2fsck -fn "$folder/destination.img"
cmp "$folder/source.img" "$folder/destination.img"
echo "cmp: all $((IMAGE_MIB << 20)) bytes are the same"

step "That was: one export, copied between two servers by a coordinator and $WORKERS workers over io_uring or epoll."
echo 'The holes of the source were not read, and are no chunks of the destination. The copy was flushed before success'
echo 'was reported; read back, it is a clean ext4 file system and equals the source in every byte.'
