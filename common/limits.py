"""Every bound, with its name, its unit and its reason. Nothing in nbdshard grows, waits or retries without one."""

from __future__ import annotations

from typing import Final

KIB: Final = 1 << 10
MIB: Final = 1 << 20
GIB: Final = 1 << 30

# -- the NBD protocol (spec, "Protocol phases" and "Size constraints") ------------------------------------------------
EXPORT_NAME_BYTES_MAX: Final = 4096  # spec: a string is at most 4096 bytes
OPTION_REPLY_BYTES_MAX: Final = (
    64 * KIB
)  # the longest reply we have a use for is far shorter; a peer's length is not trusted
OPTION_REPLIES_MAX: Final = 1024  # replies to one option before the peer is held to be babbling
OPTION_BYTES_MAX: Final = 4 * MIB  # all replies to one option together
CONTEXTS_MAX: Final = 64  # metadata contexts one negotiation may select
HINTS_BYTES_MAX: Final = 4096  # spec: a string is at most 4096 bytes
HINT_DIGITS_MAX: Final = 15  # of a number of milliseconds: 30,000 years
ERROR_MESSAGE_BYTES_MAX: Final = 4096  # spec: human-readable strings are at most 4096 bytes
EXTENTS_PER_REPLY_MAX: Final = 32 * KIB  # kept of one reply, about 6 MiB as objects; nbdkit sends at most 1 Mi of them
CHUNKS_WITHOUT_DATA_MAX: Final = 64  # error or empty chunks in one reply before the peer is held to be babbling
EXTENTS_ON_WIRE_MAX: Final = 1 << 20  # spec: no server should send more; those beyond the kept ones are dropped
CHUNK_BYTES_MEAN_MIN: Final = 512  # data chunks of a read are this long on average, or the peer is babbling
ERROR_CHUNK_BYTES_MAX: Final = 8 * KIB  # header, message and what an error type unknown to us may add
HEAD_BYTES_MAX: Final = 4 * KIB  # reply headers taken with one receive while no payload can come
DRAIN_BUFFER_BYTES: Final = 64 * KIB  # for payload that is thrown away
ZERO_FILL_BYTES: Final = 64 * KIB  # a hole in a reply is filled in steps of this
BLOCK_BYTES_MAX_DEFAULT: Final = 32 * MIB  # spec: what a client may send when the server names no maximum

# -- one copy ---------------------------------------------------------------------------------------------------------
REQUEST_BYTES_MIN: Final = 4 * KIB  # nbdcopy's limits for --request-size
REQUEST_BYTES_MAX: Final = 32 * MIB
REQUEST_BYTES_DEFAULT: Final = MIB  # or half as much, where that is found to be faster
REQUESTS_MAX: Final = 1024
REQUESTS_DEFAULT: Final = 64  # in flight per connection (nbdcopy's default)
QUEUE_BYTES_DEFAULT: Final = 16 * MIB  # in flight per connection (nbdcopy's default)
QUEUE_BYTES_MAX: Final = GIB  # a mistyped --queue-size must not take all the memory there is
CONNECTIONS_DEFAULT: Final = 4  # per side and job
CONNECTIONS_MAX: Final = 1024
WORKERS_MAX: Final = 1024
HOLE_BYTES_MIN: Final = 128 * KIB  # a shorter one, or a quarter of a request, is read sooner than left out (measured)
SPARSE_UNIT_DEFAULT: Final = 4 * KIB
SPARSE_UNIT_MIN: Final = 512  # nbdcopy's limit for --sparse
RANGE_BYTES_DEFAULT: Final = 128 * MIB  # the peers' measured unit of work
RANGE_BYTES_MAX: Final = 1024 * GIB  # more would leave nothing to share out
RANGE_BYTES_MIN: Final = 64 * KIB  # the spec's largest minimum block size: a range boundary is aligned for every server
RANGE_SECONDS: Final = 5.0  # a lease is to be no more work than this: what a loss costs, as much as a checkpoint leaves
TEMPO_SECONDS: Final = 1.0  # over which it is measured, at least, how fast a worker gets on
RANGE_UNITS_MAX: Final = 4  # range sizes in one lease of a worker that meets no data: what a lost lease costs
RANGES_PER_WORKER_MIN: Final = 4  # smaller ranges for small exports, so that every worker has work
LEASES_PER_WORKER: Final = 2  # the one being copied and the next, so that extents are asked while data moves
RETRIES: Final = 4  # of one read or write, before its range fails
RETRIES_MAX: Final = 1000
SALVAGE_BYTES: Final = 4 * KIB  # what cannot be read is lost in pieces of this: a sector of most disks
ATTEMPTS_PER_RANGE: Final = 3  # leases of one range before the job fails
RETRY_DELAY_SECONDS: Final = 0.05  # before the second try; doubles with each ...
RETRY_DELAY_SECONDS_MAX: Final = 5.0  # ... up to this
SEGMENTS_MAX: Final = 16 * KIB  # stretches of data and zeroes a lease knows of at a time, about 200 bytes each
SEGMENTS_LOW: Final = KIB  # when so many are left, the next are asked for
LEAF_BYTES: Final = 64 * KIB  # of a checksum: nbdcopy's blkhash; ranges are cut at multiples of it
CHECKSUM_RANGE_BYTES_MAX: Final = GIB  # with a checksum: its worker holds 32 bytes for each leaf of a range, 512 KiB
ZERO_RUNS_MAX: Final = 256  # runs of zeroes a lease holds back to coalesce them
ZERO_BYTES_MAX: Final = GIB  # one WRITE_ZEROES (the length field has 32 bits)
DIFFERENCE_BYTES: Final = 512  # two sides differ by whole blocks of this: a sector, so what a disk damages
DIFFERENCE_SEARCH_BYTES: Final = 32 * KIB  # compared at once in a payload that differs, before its blocks are
DIFFERENCES_MAX: Final = 64  # ranges that differ, of one lease and of a job: to look at, and few in a message
DIFFERENCES_SHOWN_MAX: Final = 10  # of them on a terminal

# -- the ring ---------------------------------------------------------------------------------------------------------
RING_OPERATIONS_MAX: Final = 8192  # in flight; io_uring's completion queue has as many entries, so it cannot overflow
RING_BUFFERS_MAX: Final = 1024  # of one operation (IOV_MAX); more are left to the next call, as after a short count
RING_THREADS_MAX: Final = 4  # for what blocks: a stuck fsync must not hold up a file system call on another disk
RING_EVENTS_MAX: Final = 256  # taken from epoll at once
RING_CLOSE_SECONDS: Final = 5.0  # for cancelled operations and threads to end when the ring is closed
RING_RETRY_SECONDS: Final = 0.01  # until a submission is tried again that the kernel had no memory for

# -- time (seconds) ---------------------------------------------------------------------------------------------------
CONNECT_SECONDS: Final = 5.0
HANDSHAKE_SECONDS: Final = 10.0
REQUEST_SECONDS: Final = 30.0  # age of the oldest request outstanding ...
REQUEST_SECONDS_PER_MIB: Final = 1.0  # ... plus this for each MiB of it
FLUSH_SECONDS: Final = 30.0
FLUSH_BYTES_PER_SECOND: Final = 10 * MIB  # plus what is unflushed at this rate, or a slow disk would be cut off
HEARTBEAT_SECONDS: Final = 2.0
LEASE_SECONDS: Final = 10.0
LEASE_EARLY_SHARE: Final = 0.1  # of a lease, by which its worker ends it early: clocks run apart (chrony slews by 8 %)
LOCAL_LEASE_SECONDS: Final = 86_400.0  # of workers that are killed and reaped before their ranges are given away
PROGRESS_SECONDS: Final = 0.25  # between a worker's reports of one lease
DISCONNECT_SECONDS: Final = 2.0  # for a soft disconnect before the socket is shut down
BACKOFF_SECONDS_MIN: Final = 0.2  # before a lost server is tried again; doubled with each loss in a row ...
BACKOFF_SECONDS_MAX: Final = 5.0  # ... up to this
TIMEOUT_SECONDS_MIN: Final = 0.1  # of what may be asked for: less is a mistake of units
TIMEOUT_SECONDS_MAX: Final = 86_400.0
HINT_REQUEST_SECONDS_MIN: Final = 1.0  # what a server may ask for; a user may ask for anything
HINT_REQUEST_SECONDS_MAX: Final = 3600.0
HINT_LOSS_SECONDS_MIN: Final = 1.0
HINT_LOSS_SECONDS_MAX: Final = 86_400.0
HINT_BACKOFF_SECONDS_MIN: Final = 0.05  # a thousand clients that come back more often would be an attack
HINT_BACKOFF_SECONDS_MAX: Final = 300.0
BACKOFF_JITTER: Final = 0.25  # of the pause by which workers differ
LOSS_SECONDS: Final = 600.0  # for a lost server to come back, then the job pauses
RESUME_SAMPLES: Final = 16  # places of what is durable that a resumed copy reads from both sides first ...
RESUME_SAMPLE_BYTES: Final = 65536  # ... and how much of each
LOSS_SECONDS_MAX: Final = 30 * 86_400.0  # of what may be asked for
DRAIN_SECONDS: Final = 10.0  # for workers to finish what is on the wire after a stop was asked
WORKER_START_SECONDS: Final = 30.0  # from starting a local worker process to its Hello
IDLE_JOB_SECONDS: Final = 300.0  # a coordinator of a distributed job without any worker gives up

# -- the control channel ----------------------------------------------------------------------------------------------
MESSAGE_BYTES_MAX: Final = 64 * KIB  # a control message is a few hundred bytes; ZeroMQ's MAXMSGSIZE
MESSAGES_QUEUED_MAX: Final = 1000  # high-water mark of either side
LEAF_BYTES_PER_MESSAGE: Final = 32 * KIB  # of digests and what they are wrapped in: the leaves of 64 MiB
TEXT_BYTES_MAX: Final = 8 * KIB  # any string in a control message
MESSAGES_PER_TURN_MAX: Final = 256  # received in one go, so that a chatty peer cannot keep a loop from its timers
BAD_MESSAGES_LOGGED_MAX: Final = 20  # log lines about malformed messages in one life of a channel; then only counted
UNKNOWN_KEYS_LOGGED_MAX: Final = 100  # turned-away keys that are told, once each
CONTROL_HANDSHAKE_SECONDS: Final = 10.0  # from a connection's start to the end of ZeroMQ's handshake
COORDINATOR_ANSWER_SECONDS: Final = 10.0  # for a worker's first answer before it says what is wrong and leaves
CHANNEL_LINGER_SECONDS: Final = 1.0  # for the last messages to leave when a channel closes
RECONNECT_SECONDS_MIN: Final = 0.02  # a worker's tries to reach its coordinator again, doubling ...
RECONNECT_SECONDS_MAX: Final = 2.0  # ... up to this
KEY_FILE_BYTES_MAX: Final = MIB  # an allow-list of ten thousand keys
KEYS_ALLOWED_MAX: Final = 10_000
UNIX_PATH_BYTES_MAX: Final = 107  # sun_path without its final NUL
COORDINATOR_DESCRIPTORS: Final = WORKERS_MAX + 256  # a connection each, and the rest; a process has 1024 as a rule
LOG_LINE_CHARACTERS_MAX: Final = 900  # at most four bytes each in UTF-8: a line is one write, not split by a pipe
LOG_WRITE_SECONDS: Final = 0.2  # for a log's reader to make room; then the line is lost, the work goes on

# -- the blocking client of `info` and `map` ---------------------------------------------------------------------------
ADDRESSES_MAX: Final = 16  # addresses of one host name that are tried
EXTENTS_QUERY_BYTES_MAX: Final = GIB  # one block status query: bounds what a server has to look up in one request time
EXPORTS_LISTED_MAX: Final = 1024  # of NBD_OPT_LIST; a server that names more is babbling

# -- the coordinator --------------------------------------------------------------------------------------------------
RANGE_BYTES_TAIL_MIN: Final = 4 * MIB  # ranges shrink to this towards the end, so that workers finish together
WORKER_BYTES_MIN: Final = 16 * MIB  # less than this for each worker does not pay for starting another process
CONNECTION_BYTES_MIN: Final = 4 * MIB  # less than this for each connection does not pay for another handshake
UNREADABLE_PER_LEASE_MAX: Final = (
    1024  # places told of one lease: 30 KiB of a message; more are told as fewer, larger ones
)
UNREADABLE_MAX: Final = (
    64 * KIB
)  # places of one job; of a lease that comes later only one is kept, around all of its own
UNREADABLE_SHOWN_MAX: Final = 100  # of them in the last line of JSON; the journal has them all
UNREADABLE_NAMED_MAX: Final = 3  # of them in the summary line
RETURNS_PER_RANGE: Final = 16  # times one range comes back with a lost connection before the job fails
RETURNS_BEFORE_FLUSH: Final = 2  # of them, then it is flushed as soon as it is written: there may be no checkpoint
WRITTEN_LEASES_MAX: Final = 4096  # of one worker before it is asked to flush: `Flushed` names them in one message
CHECKPOINT_SECONDS: Final = 5.0  # between flushes while a copy runs: what a crash costs; a disk writes back as often
CHECKPOINT_BYTES: Final = 4 * GIB  # or after so much, a second of the fastest copy; a flush then takes 440 s at most
JOURNAL_DELAY_SECONDS: Final = (
    0.5  # of a copy, before a journal is made in which nothing is durable: a short one has none
)
JOURNAL_PATIENCE_SECONDS: Final = 2.0  # for who folds in the log of a dead run's journal to be done with it
FOLD_SECONDS_MIN: Final = 0.1  # between two times the journal's log is folded in ...
FOLD_PAUSE_FACTOR: Final = 50.0  # ... or so often the time it took: 2 % of the coordinator's time
CHECKPOINT_ASKS_PER_TICK_MAX: Final = 64  # workers asked to flush in one go; a larger crew is asked in turns
COVERED_LEASES_MAX: Final = 64 * KIB  # covered by a flush while an older one is unanswered, before no new one is asked
WRITTEN_LEASES_JOB_MAX: Final = 64 * KIB  # of all workers together: about 400 bytes each until a flush covers them
DIGEST_BYTES_MAX: Final = 64 * MIB  # of leaves that are not yet in the checksum: 128 GiB of data out of order
DIGEST_RUN_BYTES: Final = 192  # of memory for a run of digests beside the digests, or for a range that waits (measured)
EARLIER_STEP_BYTES: Final = 8 * GIB  # of the image, whose digests are taken from the journal at a time: 4 MiB
BEATS_PER_TICK_MAX: Final = 64  # heartbeats sent in one go; the workers of a larger crew have theirs in turns
WORKER_START_ATTEMPTS: Final = 3  # local processes that end, one after another, before they opened anything
WORKER_REPLACEMENTS_MAX: Final = 64  # local processes started in place of others, in the whole job
NOTES_MAX: Final = 64  # remarks kept for the shell to log
OPEN_SECONDS: Final = 120.0  # for the first worker to open both sides: a net below its own connect and handshake
STALL_SECONDS: Final = 900.0  # without a completed byte the job fails: a net below every other time-out
LEAVE_SECONDS: Final = 1.0  # for a worker without connections to leave at the end, and for all after a hard stop
KILL_SECONDS: Final = 10.0  # from killing a local worker to having reaped it (it may hang in the kernel)

# -- a worker's loop --------------------------------------------------------------------------------------------------
BUFFERS_PER_SEND_MAX: Final = 64  # headers and payloads in one writev(2); IOV_MAX is 1024
SOCKET_BUFFER_BYTES: Final = 2 * MIB  # SO_SNDBUF asked for on unix sockets (the peers' published finding)
RECEIVES_PER_TURN_MAX: Final = 64  # direct calls for one connection before the others have their turn
YIELDS_MAX: Final = 4  # of the processor, to a sender, before the rest of a payload is waited for (measured)
SPLICED_PER_CONNECTION: Final = 4  # operations with a pipe; more of them do not stay in the CPU's cache (measured) ...
SPLICED_BYTES_PER_SECOND: Final = GIB  # ... but as many as this rate takes of a source that is slow to answer
SPLICE_BYTES_MIN: Final = 256 * KIB  # shorter payload is copied sooner than it is spliced (measured)
STORED_BYTES_MIN: Final = 64 * KIB  # of a WRITE whose payload comes: so much goes to its file before the rest is there
LANE_DEPTH: Final = 4  # reads asked ahead and writes unanswered of a lane, unless its servers are slow to answer
LANE_LOOK_SECONDS: Final = 0.25  # for a lane's thread to see that it is to stop
LANE_FEED_MAX: Final = 64  # stretches a lane is given at a time ...
LANE_FEED_BYTES: Final = 128 * MIB  # ... and bytes: what a fast copy moves while the copier's thread is busy otherwise
LANE_STRETCH_BYTES: Final = 16 * MIB  # between two looks of the copier at what a lane has done
LANE_TRIAL_STRETCHES: Final = 4  # copied with one request size before another is tried
LANE_BYTES_MIN: Final = 4 * MIB  # less is not worth a thread
LANE_REQUESTS_MIN: Final = 8  # with fewer requests allowed in flight a lane would have no depth
LANE_ROWS_MAX: Final = 128  # requests without an answer of both sides: on a unix socket a server stops with 277 unread
LANE_GATHER_SHARE: Final = 4  # so much of its rows for writes a lane sends in one call at most
LANE_STRIKES_MAX: Final = 3  # loans in a row that end without LANE_BYTES_MIN copied: something is the matter for good
PIPES_MAX: Final = 64  # of one worker: what an ordinary user's share of pipe memory allows (pipe-user-pages-soft)
TICK_SECONDS: Final = 0.5  # between looks at the clocks of connections and leases
COORDINATOR_SILENCE_SECONDS: Final = 60.0  # without a word from the coordinator a worker gives up and ends

# -- local files and streams ------------------------------------------------------------------------------------------
PIPE_BYTES: Final = MIB  # asked for a pipe that is our standard input or output; /proc/sys/fs/pipe-max-size by default
FILE_OPERATIONS_MAX: Final = RING_OPERATIONS_MAX // 2  # on a ring, before requests to files wait for room
FILE_EXTENTS_MAX: Final = 16 * KIB  # in one answer: two system calls each, on a thread that others wait for
CACHE_WINDOW_BYTES: Final = 8 * MIB  # looked at, written back and dropped from the page cache at a time
PAGES_TOGETHER_BYTES: Final = 2 * MIB  # the largest unit of the kernel's page cache
CACHE_LOOK_AHEAD_BYTES: Final = 32 * MIB  # ahead of a read: further than the kernel's readahead, which may be 16 MiB
CACHE_WINDOWS_BEHIND: Final = 2  # written windows left to write-back before their pages are dropped
CACHE_RUNS_MAX: Final = 64  # separate ranges in one hint to the kernel, and in what a connection remembers
CACHE_HINTS_MAX: Final = 2  # under way on one connection: requests must not wait behind hints

# -- a rate for the whole job ------------------------------------------------------------------------------------------
RATE_BYTES_MIN: Final = 64 * KIB  # a second: less is a mistake of units, and a worker of a thousand is to get some
RATE_BURST_SECONDS: Final = 0.25  # what a worker may read at once after it had nothing to read; or one request
RATE_STRETCH_SECONDS: Final = 0.125  # what a lane is given at a time, so that the rate is smooth; or one request
RATE_WAIT_EXTRA_SECONDS: Final = 1e-6  # a sum of floats must not fall short of what was waited for
RATE_SHARE_SECONDS: Final = 0.1  # between two looks at who has work, and so a share of the rate
RATE_STALL_SECONDS: Final = 5.0  # without a completed byte, and what two requests take at its rate: others get more
RATE_WEIGHT: Final = 8  # of a worker that gets on; one that has stalled has 1, to show when it gets on again

# -- the socket of `nbdshard ctl` --------------------------------------------------------------------------------------
ORDER_BYTES_MAX: Final = 1 * KIB
ANSWER_BYTES_MAX: Final = 64 * KIB  # a path may have 4096 characters, each of which may be an escape of six
ORDER_CLIENTS_MAX: Final = 8  # at a time; one more, and the oldest is dropped
ORDER_SECONDS: Final = 2.0  # from a client's connection to its order
ORDER_ANSWER_SECONDS: Final = 10.0  # for the answer: a coordinator may wait for a disk
ORDER_DEAF_SECONDS: Final = 1.0  # when no client can be taken: there is no descriptor
PACE_SAMPLE_SECONDS: Final = 0.1  # between samples of the rate that `ctl status` tells; RATE_SAMPLES_MAX of them

# -- processes --------------------------------------------------------------------------------------------------------
SOCKET_NAME_BYTES_MAX: Final = 20  # names of sockets in the private directory
SPARE_WORKERS_MAX: Final = 3  # forked in case; one costs a small copy 4 ms of CPU, and saves a large one 80
WORKER_EXIT_SECONDS: Final = 2.0  # for local workers to end by themselves when the job is over
NEW_OBJECTS_MAX: Final = 20_000  # before Python looks for cycles among them; by itself it does so after each 700
DESCRIPTORS_MIN: Final = 40  # of a process: standard streams, ring, channel, a connection or two and their pipes
COMMAND_EXIT_SECONDS: Final = 5.0  # for a server of `[ CMD ]` to end after SIGTERM, then it is killed
COMMAND_GRACE_SECONDS: Final = 2.0  # a server that left with status 0 may just have seen its last client go
KILLED_CHILD_SECONDS: Final = 5.0  # for a killed process to be gone
DEPARTURE_SETTLE_SECONDS: Final = 0.05  # for the last messages of a worker whose process is seen to have ended
POLL_SECONDS_MIN: Final = 0.001  # a deadline in the past must not make the coordinator spin
POLL_SECONDS_MAX: Final = 1.0  # nor one far away make it deaf to its own mistakes
SUSPENSION_SECONDS_MIN: Final = 1.0  # a wait that took this much too long means that we were stopped
FINISH_SECONDS_MAX: Final = 60.0  # from a wish to stop to the end of the job; more is a fault of ours

# -- progress ---------------------------------------------------------------------------------------------------------
BAR_DELAY_SECONDS: Final = 0.5  # a copy shorter than this does not pay for the import of rich
DISPLAY_SECONDS: Final = 0.2  # between redraws of the bar
JSON_PROGRESS_SECONDS: Final = 1.0
RATE_WINDOW_SECONDS: Final = 10.0  # what the rate shown, and so the ETA, is averaged over
RATE_SAMPLES_MAX: Final = 100
LAST_PROGRESS_SECONDS: Final = 1.0  # for the reader of the last line to make room for it

# -- the server --------------------------------------------------------------------------------------------------------

OPTION_DATA_BYTES_MAX: Final = 64 * KIB  # of an option that is looked at: an export's name and some hundred queries
OPTION_DATA_BYTES_SKIPPED_MAX: Final = MIB  # of one that is refused as too big; who sends more is cut off
OPTIONS_MAX: Final = 256  # of one client before it has chosen: each may have so many replies
SERVED_REQUESTS_MAX: Final = 128  # of one connection that are not answered yet; then it is not listened to
SERVED_BYTES_MAX: Final = 64 * MIB  # of their payload and of answers that are not sent yet
SERVED_PAYLOAD_SKIPPED_MAX: Final = 64 * MIB  # of a request that is refused for its size; who sends more is cut off
EXTENTS_TOLD_MAX: Final = 8192  # in one answer: 64 KiB, or twice that with extended headers
NEGOTIATION_SECONDS_MAX: Final = 30.0  # from a client's coming to its choice; what it costs the server is little
KEEPALIVE_IDLE_SECONDS: Final = (
    60  # nothing was heard of a client for so long: its machine is asked whether it is there
)
KEEPALIVE_PROBE_SECONDS: Final = 10  # between two questions
KEEPALIVE_PROBES: Final = 6  # without an answer; then it has gone. One that is there, and only silent, stays for ever
HELD_BACK_BYTES_MAX: Final = 64  # of answers without payload, while requests come without a gap ...
HELD_BACK_PAYLOAD_MAX: Final = 512 * KIB  # ... and none of them is larger than this
SENT_PIECES_MAX: Final = 64  # of answers in one sendmsg
SERVED_AT_ONCE: Final = 16  # requests of one connection that are carried out side by side
SERVER_BYTES_MAX: Final = (
    32 * MIB
)  # payload in memory, of all connections of a process: as much as one request may have
SERVER_BYTES_RESERVE: Final = 2 * MIB  # beside that, for small requests while a large one waits for the rest
HEAP_PIECE_BYTES_MAX: Final = 128 * KIB  # of memory that is kept for the next piece; what is larger goes back at once
HEAP_ARENAS_MAX: Final = 2  # heaps of all threads, which take turns anyway
SERVED_STALL_SECONDS: Final = (
    30.0  # a client that takes nothing for so long, holding memory others wait for, is cut off
)
SERVED_STALL_LOOKS: Final = 6  # in that time, of who waits at those who hold it
SERVED_BYTES_PER_SECOND_MIN: Final = MIB  # and so is one that is slower, of what it holds: a link of 10 Mbit/s is not
CREW_CALLS_MAX: Final = 32  # reads of one export's backend at a time, for all its clients, and as many changes ...
CREW_FLUSHES_MAX: Final = 4  # ... and flushes beside them: a slow one must not stand in the way of reads
INLINE_BYTES_MAX: Final = MIB  # read by a connection's own thread before it sends what it has
INLINE_SECONDS_MAX: Final = 0.02  # a write that took its thread longer: others wait for it no more ...
INLINE_PAUSE: Final = 64  # ... until so many were left to the crew
SERVED_PIPE_BYTES: Final = (4 * MIB, MIB)  # asked for in turn: pipe-max-size allows everybody the second
SERVED_SOCKET_BYTES: Final = MIB  # asked for as a unix socket's buffer: the default one takes a mebibyte in five pieces
CONNECTION_STACK_BYTES: Final = 512 * KIB
LISTEN_BACKLOG: Final = 1024  # clients that come at once are not turned away for want of a moment
ACCEPT_PAUSE_SECONDS: Final = 1.0  # before the next client is let in, where there was no descriptor for one
SERVER_DRAIN_SECONDS: Final = 30.0  # for what was accepted before the end was asked for
FLUSH_TOLD_SECONDS: Final = 10.0  # between two lines that say that the last flush is still waited for; it has no end
PARTING_SECONDS: Final = 1.0  # for a client to close its end, so that it can read the last answers
PARTING_BYTES: Final = 64 * KIB  # of what it still sends, read and dropped at a time
SERVED_CONNECTIONS_MAX: Final = 4096  # as many bytes as any pipe holds
CONNECTION_DESCRIPTORS: Final = 6  # of a client: its socket, what wakes its thread, a pipe for either direction
EXPORT_DESCRIPTORS: Final = 4112  # of an export: STORE_FILES_OPEN and some
SERVER_DESCRIPTORS: Final = 64  # of everything else
SERVER_PROCESSES_MAX: Final = 64
CONFIG_BYTES_MAX: Final = MIB
CREDENTIALS_BYTES_MAX: Final = 64 * KIB  # a file of some lines; anything longer is another file
LAYERS_MAX: Final = 16  # in front of one store
LAYER_DELAY_SECONDS_MAX: Final = 600.0  # of one request; who asks for more has mistaken the unit
LINKS: Final = 4  # to another server that an export is kept at, if a flush of one covers all ...
LINKS_MAX: Final = 16  # ... or so many
LINK_REQUESTS_MAX: Final = 64  # of all threads on one of them
LINK_REQUEST_SECONDS: Final = 25.0  # for an answer, a new connection included: less than our own clients wait
LINK_RETRY_SECONDS: Final = 0.2  # after a connection was refused, before the next is tried for
EXTRA_LINK_SECONDS: Final = 2.0  # for each step of a connection that can be done without
ALIGNED_REGION_BYTES: Final = 256 * KIB  # in which changes wait for one another, where only whole blocks are taken
REMOTE_PIECE_BYTES: Final = 4 * MIB  # in one READ or WRITE to another server
REMOTE_RANGE_BYTES: Final = GIB  # in one request without payload
OVERLAY_BLOCK_BYTES: Final = 64 * KIB  # copied from the base when a part of it is written for the first time
OVERLAY_MAP_BYTES_MAX: Final = 64 * MIB  # of an overlay, in memory: 32 TiB; blocks of larger images are larger
OVERLAY_SAMPLES: Final = 16  # of a base, to see whether an overlay is of it ...
OVERLAY_SAMPLE_BYTES: Final = 4 * KIB  # ... so long each
STATS_SECONDS: Final = 1.0  # between two times the statistics of an export are written, while requests come
LAYER_RETRIES: Final = 10  # of one request, before its client is told
LAYER_RETRIES_MAX: Final = 100_000
LAYER_RETRY_DELAY_SECONDS: Final = 0.2  # before the second try; doubles with each ...
LAYER_RETRY_PAUSE_SECONDS_MAX: Final = 5.0  # ... up to this
LAYER_RETRY_SECONDS: Final = 20.0  # from a request to its last try: below the time after which clients give it up
LAYER_RETRY_SECONDS_MAX: Final = 3600.0  # where the clients are known to be as patient
LAYER_RETRY_ENDING_SECONDS: Final = 5.0  # for what is to be written, once the server ends; the drain takes 30 at most
# Of each store, and half of what the process may have for all: one that is closed for another is synced first.
STORE_FILES_OPEN: Final = 4096
CHUNKS_WALKED_MAX: Final = 64  # of one request; where it covers more, a list of those that are there is made first
CHUNKS_PAGE: Final = 4096  # of that list are kept together, a bit each
CHUNK_BYTES_DEFAULT: Final = 4 * MIB
VOLUME_CHUNK_BYTES_MIN: Final = 64 * KIB
VOLUME_CHUNK_BYTES_MAX: Final = 64 * MIB

# -- object stores -----------------------------------------------------------------------------------------------------
OBJECT_CALL_SECONDS: Final = 12.0  # a call, its transfer included: two of them, a read and a put, within a request's 30
OBJECT_CALL_SECONDS_MAX: Final = 30.0  # what a user may make of it: a lease is renewed within what it leaves of 60
OBJECT_CONNECT_SECONDS: Final = 3.0
OBJECT_RETRIES_MAX: Final = 2  # by obstore, of a connection that was closed in between, say ...
OBJECT_RETRY_SECONDS: Final = 2.0  # ... begun this long after the first try at most
OBJECT_READS_AT_ONCE: Final = 16  # of one store; writes have places of their own, so that reads never wait for them
OBJECT_WRITES_AT_ONCE: Final = 16
OBJECT_TRANSFER_BYTES_MAX: Final = 64 * MIB  # of chunks that are read, or written, at a time: fewer if they are larger
OBJECT_WAIT_SECONDS: Final = 60.0  # for such a place: a net below every call's own time-out
LISTING_PAUSE_SECONDS: Final = 5.0  # after a listing that failed
LISTING_WAIT_SECONDS: Final = (
    5.0  # of block status for the listing, from its beginning; then what is not known is called data
)
VOLUME_LEASE_SECONDS: Final = 60.0  # without a word from a server, its volume may be taken over
VOLUME_LEASE_RENEWAL_SECONDS: Final = 15.0
VOLUME_LEASE_RETRY_SECONDS: Final = 3.0  # after a renewal that failed
VOLUME_LEASE_SETTLE_SECONDS: Final = (
    3.0  # where a store puts objects that are there: for another server's to come to light
)
VOLUME_LEASE_NOTE_BYTES_MAX: Final = 4096
VOLUME_LEASE_TRIES_MAX: Final = 3  # to take a free volume, where others do the same
OBJECT_PARTS_MAX: Final = 10_000  # of an object that is uploaded in parts, in S3 ...
OBJECT_PARTS_WANTED: Final = 1000  # ... and in Swift, as it comes
OBJECT_PART_BYTES_MIN: Final = 8 * MIB
OBJECT_PART_BYTES_MAX: Final = 64 * MIB
OBJECT_SPOOL_BYTES: Final = (
    GIB  # of data of a raw object that is not uploaded yet, and as much while it is being uploaded
)
OBJECT_SPOOL_BYTES_MIN: Final = 64 * MIB  # more than a request may have

# -- the server's cache ------------------------------------------------------------------------------------------------
CACHE_BYTES_DEFAULT: Final = 256 * MIB  # in memory
CACHE_DISK_BYTES_DEFAULT: Final = 10 * GIB
CACHE_BYTES_MAX: Final = 1 << 44
CACHE_BLOCK_BYTES_DEFAULT: Final = 64 * KIB  # what a miss of a few bytes costs
CACHE_DISK_BLOCK_BYTES_DEFAULT: Final = 256 * KIB  # 10 GiB of them take 20 to 40 MiB of memory to remember
CACHE_BLOCK_BYTES_MIN: Final = 4 * KIB
CACHE_BLOCK_BYTES_MAX: Final = 4 * MIB
CACHE_BLOCKS_MIN: Final = 16  # fewer are no cache
CACHE_GRAIN_BYTES: Final = (
    512  # of which a block in memory remembers whether it holds it: the smallest sector of a disk
)
CACHE_DISK_GRAIN_BYTES: Final = 4 * KIB  # and a block on disk, with a checksum for each
CACHE_DISK_GRAINS_MAX: Final = 512  # of a block: its record fits into a page
CACHE_EXPORT_BYTES_MAX: Final = 500  # of what a cache on disk is said to be of: a page has room for it, escaped
CACHE_UNIT_BYTES_MIN: Final = MIB  # written back together, where what is below does not care: a call costs as much
CACHE_UNIT_BYTES_MAX: Final = 64 * MIB  # the largest chunk
CACHE_FETCH_BYTES_MAX: Final = 4 * MIB  # asked of what is below at a time
CACHE_TRANSFER_SHARE: Final = 4  # this share of the limit in memory is for transfers, and no block's
CACHE_TRANSFER_BYTES_MAX: Final = 64 * MIB  # ... and no more than this
CACHE_TRANSFERS_MAX: Final = 16  # fetches at once, and half as many write-backs, where that much memory allows it
CACHE_SPARE_SHARE: Final = 8  # this share of the blocks is never dirty: readers find room
CACHE_DIRTY_SHARE_START: Final = 2  # when this share of the others is dirty, it is written back before it has aged
CACHE_AGE_SECONDS: Final = 5.0  # of what is dirty, before it is written back; sooner it may change again
CACHE_REST_SECONDS_MIN: Final = 0.5  # after a write-back that failed; doubled with each that fails
CACHE_REST_SECONDS_MAX: Final = 5.0
CACHE_FAILING_SECONDS: Final = 15.0  # a writer waits for room while write-backs fail: less than its client waits for it
