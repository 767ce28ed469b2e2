/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * libublk_rs: serve Linux block devices from userspace.
 *
 * Implement "read these bytes" and "write those bytes" (struct ublk_rs_backend), make a device of it
 * (ublk_rs_device_new), set options if the defaults do not do, start it, and /dev/ublkbN is there:
 *
 *      ublk_rs_device_new -> set options -> start (or recover) -> stop -> free
 *                                ^                    |
 *                                `-------- halt ------'
 *
 * Ownership. Handles are made by a function that ends in _new or _open and ended by the one that ends in _free, which
 * takes NULL. What is handed in is copied, unless its description says otherwise; the user pointer of a backend is the
 * device's from ublk_rs_device_new() on, and backend.destroy is called for it once. Strings that are returned belong to
 * their handle, or live for ever.
 *
 * Threads. Functions may be called from any thread, several at a time, but for those that end a handle, and an error
 * object is for one call at a time. Callbacks come on threads of the library, which have all signals blocked, unless the
 * option "dispatch" is set. A function whose description says that it waits returns -EDEADLK from inside of a callback,
 * because it would wait for itself. Everything else may be called there.
 *
 * Fork. A child holds nothing: what it does with a handle of its parent's fails with -ECHILD, and _free does nothing.
 *
 * Errors. Functions that return an int return 0 (or a count) or a negative errno; what the number stands for is at
 * UBLK_RS_KIND_*. Those with an error parameter also say it in words: what was tried, on which device, why it failed, what
 * to do. Out-parameters are written on success only. NULL where none may be is -EINVAL. Nothing throws or aborts.
 *
 * Requests. Each is answered once: by what a callback returns, or by ublk_rs_request_complete() for a backend with submit.
 * Its number says which one is meant for ever after: who completes it twice, or after the device was stopped, gets -ESTALE
 * and does no harm, until the device is freed. Numbers are never 0.
 *
 * Versions. Symbols are never removed or changed within libublk_rs.so.0. Structs of the program's begin with their size:
 * they grow at the end, and an older program's is served as it is. UBLK_RS_HAVE_* says what a header has.
 *
 * This file is generated; do not edit it.
 */


#ifndef UBLK_RS_H
#define UBLK_RS_H

#include <stddef.h>
#include <stdint.h>

/** The version of this header: MAJOR << 16 | MINOR << 8 | PATCH. */
#define UBLK_RS_VERSION \
    ((UBLK_RS_VERSION_MAJOR << 16) | (UBLK_RS_VERSION_MINOR << 8) | UBLK_RS_VERSION_PATCH)
#define UBLK_RS_VERSION_MAJOR 0
#define UBLK_RS_VERSION_MINOR 1
#define UBLK_RS_VERSION_PATCH 0

/** Completing requests later, from any thread: submit in struct ublk_rs_backend. */
#define UBLK_RS_HAVE_SUBMIT 1
/** Programs with an event loop: the option dispatch. */
#define UBLK_RS_HAVE_DISPATCH 1
/** Disks that outlive their server: ublk_rs_device_recover() and ublk_rs_device_hand_over(). */
#define UBLK_RS_HAVE_RECOVERY 1
/** Zoned disks. */
#define UBLK_RS_HAVE_ZONED 1
/** Integrity metadata. */
#define UBLK_RS_HAVE_INTEGRITY 1
/** Requests' pages on a ring of the program's: ublk_rs_request_register_sqe(). */
#define UBLK_RS_HAVE_REGISTER_SQE 1
/** Memory that clients share with the server: ublk_rs_device_share(). */
#define UBLK_RS_HAVE_SHARE 1

/** A device: first a description, then a disk, then what is left of it. */
typedef struct ublk_rs_device ublk_rs_device;
/** What went wrong, in numbers and words. A call that fails writes to it; one that succeeds leaves it alone. */
typedef struct ublk_rs_error ublk_rs_error;
/** The driver, open. */
typedef struct ublk_rs_control ublk_rs_control;
/** Worker threads that serve the queues of any number of devices. */
typedef struct ublk_rs_workers ublk_rs_workers;


/**
 * There was no failure yet.
 */
#define UBLK_RS_KIND_NONE 0

/**
 * The kernel has no ublk driver loaded (`modprobe ublk_drv`), or none at all: `-ENXIO`.
 */
#define UBLK_RS_KIND_DRIVER_MISSING 1

/**
 * io_uring is switched off or not in this kernel: `-ENOSYS`.
 */
#define UBLK_RS_KIND_IO_URING_DISABLED 2

/**
 * The caller lacks a privilege or a permission on a node: `-EACCES` or `-EPERM`.
 */
#define UBLK_RS_KIND_PERMISSION_DENIED 3

/**
 * No device has this number: `-ENODEV`.
 */
#define UBLK_RS_KIND_NO_SUCH_DEVICE 4

/**
 * The device number is taken: `-EEXIST`.
 */
#define UBLK_RS_KIND_ID_TAKEN 5

/**
 * A limit of devices, files or buffers is reached: `-EMFILE`, or what the kernel said.
 */
#define UBLK_RS_KIND_TOO_MANY 6

/**
 * Something still uses the device: `-EBUSY`. The message names what.
 */
#define UBLK_RS_KIND_BUSY 7

/**
 * A parameter broke a rule that the message names: `-EINVAL`.
 */
#define UBLK_RS_KIND_INVALID_PARAMETER 8

/**
 * The kernel, or what it granted, lacks a feature: `-EOPNOTSUPP`.
 */
#define UBLK_RS_KIND_UNSUPPORTED 9

/**
 * The time was over: `-ETIMEDOUT`.
 */
#define UBLK_RS_KIND_TIMED_OUT 10

/**
 * The wait was cancelled: `-ECANCELED`.
 */
#define UBLK_RS_KIND_CANCELLED 11

/**
 * The request is gone: `-ESTALE`.
 */
#define UBLK_RS_KIND_GONE 12

/**
 * The device is in another state than the call needs: `-EBADFD`.
 */
#define UBLK_RS_KIND_WRONG_STATE 13

/**
 * A worker thread ended unexpectedly; its device was taken down: `-EIO`.
 */
#define UBLK_RS_KIND_WORKER_DIED 14

/**
 * The handle was made before a `fork` by the parent: `-ECHILD`.
 */
#define UBLK_RS_KIND_FORKED 15

/**
 * The call would wait for the very thread that makes it: `-EDEADLK`.
 */
#define UBLK_RS_KIND_WOULD_DEADLOCK 16

/**
 * Any other failure of the kernel or of a file: what it said, or `-EIO`.
 */
#define UBLK_RS_KIND_IO 17

/**
 * A defect of this library: `-ENOTRECOVERABLE`. Please report it.
 */
#define UBLK_RS_KIND_DEFECT 18

/**
 * Nothing.
 */
#define UBLK_RS_LOG_OFF 0

/**
 * What went wrong: a defect, or a backend that broke a rule.
 */
#define UBLK_RS_LOG_ERROR 1

/**
 * What should be looked at.
 */
#define UBLK_RS_LOG_WARN 2

/**
 * What happened, seldom.
 */
#define UBLK_RS_LOG_INFO 3

/**
 * What happened, more of it.
 */
#define UBLK_RS_LOG_DEBUG 4

/**
 * Everything.
 */
#define UBLK_RS_LOG_TRACE 5

/**
 * Requests' pages can be registered with a ring. Since Linux 6.15.
 */
#define UBLK_RS_FEATURE_SUPPORT_ZERO_COPY (1 << 0)

/**
 * Requests arrive through task work; forced on by current drivers. Since Linux 6.0.
 */
#define UBLK_RS_FEATURE_URING_CMD_COMP_IN_TASK (1 << 1)

/**
 * The server names a WRITE's buffer when the request arrives. Since Linux 6.0.
 */
#define UBLK_RS_FEATURE_NEED_GET_DATA (1 << 2)

/**
 * The disk outlives its server; I/O waits for the next one. Since Linux 6.1.
 */
#define UBLK_RS_FEATURE_USER_RECOVERY (1 << 3)

/**
 * With USER_RECOVERY: requests that a dead server held are sent to the next one. Since Linux 6.1.
 */
#define UBLK_RS_FEATURE_USER_RECOVERY_REISSUE (1 << 4)

/**
 * The device belongs to an unprivileged user. Since Linux 6.3.
 */
#define UBLK_RS_FEATURE_UNPRIVILEGED_DEV (1 << 5)

/**
 * Commands are ioctl numbers; forced on by current drivers. Since Linux 6.4.
 */
#define UBLK_RS_FEATURE_CMD_IOCTL_ENCODE (1 << 6)

/**
 * Data moves by pread and pwrite on the device node. Since Linux 6.5.
 */
#define UBLK_RS_FEATURE_USER_COPY (1 << 7)

/**
 * The disk is zoned. Since Linux 6.6.
 */
#define UBLK_RS_FEATURE_ZONED (1 << 8)

/**
 * With USER_RECOVERY: I/O fails while there is no server. Since Linux 6.13.
 */
#define UBLK_RS_FEATURE_USER_RECOVERY_FAIL_IO (1 << 9)

/**
 * The disk can be resized. Since Linux 6.16.
 */
#define UBLK_RS_FEATURE_UPDATE_SIZE (1 << 10)

/**
 * The driver registers requests' pages by itself. Since Linux 6.16.
 */
#define UBLK_RS_FEATURE_AUTO_BUF_REG (1 << 11)

/**
 * With USER_RECOVERY: the device can be taken from a live server. Since Linux 6.16.
 */
#define UBLK_RS_FEATURE_QUIESCE (1 << 12)

/**
 * Each tag may have its own thread; forced on by current drivers, except with BATCH_IO. Since Linux 6.16.
 */
#define UBLK_RS_FEATURE_PER_IO_DAEMON (1 << 13)

/**
 * Any thread may register a request's pages; forced on by current drivers. Since Linux 6.17.
 */
#define UBLK_RS_FEATURE_BUF_REG_OFF_DAEMON (1 << 14)

/**
 * Requests and results travel in arrays. Since Linux 7.0.
 */
#define UBLK_RS_FEATURE_BATCH_IO (1 << 15)

/**
 * Requests may carry integrity metadata. Since Linux 7.0.
 */
#define UBLK_RS_FEATURE_INTEGRITY (1 << 16)

/**
 * The device can be stopped only if unused; forced on by current drivers. Since Linux 7.0.
 */
#define UBLK_RS_FEATURE_SAFE_STOP_DEV (1 << 17)

/**
 * The kernel does not look for partitions when the disk appears. Since Linux 7.0.
 */
#define UBLK_RS_FEATURE_NO_AUTO_PART_SCAN (1 << 18)

/**
 * Memory shared with clients is used without a copy. Since Linux 7.1.
 */
#define UBLK_RS_FEATURE_SHMEM_ZC (1 << 19)

/**
 * Descriptors have a chosen size. Since Linux 7.3.
 */
#define UBLK_RS_FEATURE_IO_DESC_SIZE (1 << 20)

/**
 * Fill the buffer from the range.
 */
#define UBLK_RS_OP_READ 0

/**
 * Store the data to the range.
 */
#define UBLK_RS_OP_WRITE 1

/**
 * Make every write that was completed before durable. Has no range.
 */
#define UBLK_RS_OP_FLUSH 2

/**
 * The range's contents are not needed any more.
 */
#define UBLK_RS_OP_DISCARD 3

/**
 * Make the range read as zeroes.
 */
#define UBLK_RS_OP_WRITE_ZEROES 5

/**
 * Open the zone that starts at the offset.
 */
#define UBLK_RS_OP_ZONE_OPEN 10

/**
 * Close the zone that starts at the offset.
 */
#define UBLK_RS_OP_ZONE_CLOSE 11

/**
 * Make the zone that starts at the offset full.
 */
#define UBLK_RS_OP_ZONE_FINISH 12

/**
 * Write the data at the write pointer of the zone that starts at the offset: ublk_rs_request_complete_append().
 */
#define UBLK_RS_OP_ZONE_APPEND 13

/**
 * Make every sequential zone empty. Has no range.
 */
#define UBLK_RS_OP_ZONE_RESET_ALL 14

/**
 * Make the zone that starts at the offset empty.
 */
#define UBLK_RS_OP_ZONE_RESET 15

/**
 * Describe zones: ublk_rs_request_complete_report().
 */
#define UBLK_RS_OP_REPORT_ZONES 18

/**
 * Of a write: it is durable before it is completed.
 */
#define UBLK_RS_FLAG_FUA (1 << 13)

/**
 * Of a write of zeroes: the range stays allocated.
 */
#define UBLK_RS_FLAG_NO_UNMAP (1 << 15)

/**
 * A file system's metadata.
 */
#define UBLK_RS_FLAG_META (1 << 11)

/**
 * Swap traffic: the system waits for memory.
 */
#define UBLK_RS_FLAG_SWAP (1 << 16)

/**
 * There is integrity metadata beside the data: ublk_rs_request_metadata().
 */
#define UBLK_RS_FLAG_INTEGRITY (1 << 18)

/**
 * A zone that takes writes anywhere.
 */
#define UBLK_RS_ZONE_CONVENTIONAL 1

/**
 * A zone that takes writes at its write pointer only.
 */
#define UBLK_RS_ZONE_SEQUENTIAL 2

/**
 * The condition of a conventional zone.
 */
#define UBLK_RS_ZONE_NO_WRITE_POINTER 0

/**
 * Nothing was written.
 */
#define UBLK_RS_ZONE_EMPTY 1

/**
 * Opened by a write.
 */
#define UBLK_RS_ZONE_IMPLICITLY_OPEN 2

/**
 * Opened by UBLK_RS_OP_ZONE_OPEN.
 */
#define UBLK_RS_ZONE_EXPLICITLY_OPEN 3

/**
 * Written in part, and not open.
 */
#define UBLK_RS_ZONE_CLOSED 4

/**
 * Cannot be written any more.
 */
#define UBLK_RS_ZONE_READ_ONLY 13

/**
 * No room is left, or it was finished.
 */
#define UBLK_RS_ZONE_FULL 14

/**
 * Cannot be used any more.
 */
#define UBLK_RS_ZONE_OFFLINE 15

/**
 * Wait as long as it takes.
 */
#define UBLK_RS_FOREVER UINT64_MAX

/**
 * A number without a sign; as text in decimal, or hexadecimal after 0x, with K, M, G or T for 1024 and its powers.
 */
#define UBLK_RS_TYPE_NUMBER 1

/**
 * Yes or no; as text yes, no, true, false, on, off, 1, 0.
 */
#define UBLK_RS_TYPE_BOOL 2

/**
 * Text.
 */
#define UBLK_RS_TYPE_TEXT 3

/**
 * UBLK_RS_FEATURE_* together, a number; as text their names with commas between.
 */
#define UBLK_RS_TYPE_FEATURES 4

/**
 * The program stopped it, or halted it.
 */
#define UBLK_RS_ENDING_STOPPED 1

/**
 * Somebody else stopped or deleted it, or quiesced it for another server.
 */
#define UBLK_RS_ENDING_STOPPED_BY_OTHERS 2

/**
 * This program gave it away by ublk_rs_device_hand_over().
 */
#define UBLK_RS_ENDING_HANDED_OVER 3

/**
 * It was taken down because something failed.
 */
#define UBLK_RS_ENDING_FAILED 4

/**
 * All queues together.
 */
#define UBLK_RS_ALL_QUEUES UINT32_MAX

/**
 * It has no disk: not started, stopped, or its server is gone.
 */
#define UBLK_RS_STATE_DEAD 0

/**
 * Its disk exists and is served.
 */
#define UBLK_RS_STATE_LIVE 1

/**
 * Its server is gone; the disk exists and its I/O waits for another.
 */
#define UBLK_RS_STATE_QUIESCED 2

/**
 * Its server is gone; the disk exists and its I/O fails until there is another.
 */
#define UBLK_RS_STATE_FAIL_IO 3

/**
 * Takes a line of the library's: its level, UBLK_RS_LOG_*, and its text without a newline, valid during the call. Any
 * thread, several at a time; must not block, and must not call what waits.
 */
typedef void (*ublk_rs_log_fn)(void *user, uint32_t level, const char *message);

/**
 * What a request asks for, as `submit` is told.
 */
typedef struct ublk_rs_io {
    /**
     * sizeof (struct ublk_rs_io) of the library: what follows reserved in later versions is there if it is larger.
     */
    size_t size;
    /**
     * Where the range starts on the disk, in bytes.
     */
    uint64_t offset;
    /**
     * The length of the range, in bytes; 0 for a flush and a report of zones. The data of it is had by
     * ublk_rs_request_buffer() or ublk_rs_request_put(): a program that needs none does not pay for it.
     */
    uint64_t length;
    /**
     * UBLK_RS_OP_*.
     */
    uint32_t op;
    /**
     * UBLK_RS_FLAG_*, and what else the kernel says.
     */
    uint32_t flags;
    /**
     * The queue that it came by.
     */
    uint16_t queue;
    /**
     * Its tag: unique among the queue's requests that are out.
     */
    uint16_t tag;
    /**
     * How many zones are to be reported at most.
     */
    uint32_t zones;
    /**
     * Bytes of integrity metadata that come with the data.
     */
    uint64_t metadata_length;
    /**
     * 0.
     */
    uint64_t reserved[2];
} ublk_rs_io;

/**
 * A zone, as a report tells of it. All in bytes, multiples of the logical block size.
 */
typedef struct ublk_rs_zone {
    /**
     * Where it starts on the disk.
     */
    uint64_t start;
    /**
     * From one zone's start to the next one's: the same for all zones of a disk.
     */
    uint64_t length;
    /**
     * What can be written of it, from its start on; not more than length.
     */
    uint64_t capacity;
    /**
     * Where on the disk the next write goes: start, of an empty zone.
     */
    uint64_t write_pointer;
    /**
     * UBLK_RS_ZONE_CONVENTIONAL or UBLK_RS_ZONE_SEQUENTIAL.
     */
    uint32_t kind;
    /**
     * UBLK_RS_ZONE_NO_WRITE_POINTER to UBLK_RS_ZONE_OFFLINE.
     */
    uint32_t state;
    /**
     * To be 0.
     */
    uint64_t reserved[2];
} ublk_rs_zone;

/**
 * What a disk does: the program's functions, of which each gets `user` back.
 *
 * Set `size` to sizeof (struct ublk_rs_backend), what is not implemented to NULL. Which are there decides what the disk
 * advertises: no write, a read-only disk; no flush, no volatile cache; and so on. Later versions add members at the end.
 *
 * Results are 0 or -errno. The number is what an O_DIRECT client of the disk sees as far as the block layer carries it,
 * and EIO otherwise; anything that is neither 0 nor a negated errno is EIO and logged. Of a flush, -EOPNOTSUPP becomes
 * EIO, because the block layer would take it for success.
 *
 * The functions are called on threads of the library: one at a time for each queue, concurrently for different queues;
 * with the option "threads" any number at a time; with the option "dispatch" by ublk_rs_device_dispatch(). While one
 * runs, its queue (or its thread) serves nobody else. Never do I/O on the disk itself from one: it would wait for its
 * own answer. They must not throw, longjmp, or end the thread.
 */
typedef struct ublk_rs_backend {
    /**
     * sizeof (struct ublk_rs_backend).
     */
    size_t size;
    /**
     * Fills buf, which arrives zeroed, from byte offset of the disk. Needed, unless there is submit.
     */
    int (*read)(void *user, void *buf, size_t length, uint64_t offset);
    /**
     * Stores data at byte offset. With UBLK_RS_FLAG_FUA it is durable before this returns.
     */
    int (*write)(void *user, const void *data, size_t length, uint64_t offset, uint32_t flags);
    /**
     * Makes every write that has returned before durable.
     */
    int (*flush)(void *user);
    /**
     * Forgets a range. What it reads as afterwards is the program's choice.
     */
    int (*discard)(void *user, uint64_t offset, uint64_t length);
    /**
     * Makes a range read as zeroes. With UBLK_RS_FLAG_NO_UNMAP its space stays allocated.
     */
    int (*write_zeroes)(void *user, uint64_t offset, uint64_t length, uint32_t flags);
    /**
     * Takes a request to be completed later, from any thread, by ublk_rs_request_complete() or one of its kind; or does
     * that at once. io is valid during the call only. Excludes all
     * functions above, the zone functions, and the option "threads". What the disk can do is then said by options:
     * "writable", "flush", "discard", "write_zeroes". 0: the request is the program's. -errno: it is not, and the
     * library answers it with that.
     */
    int (*submit)(void *user, ublk_rs_device *device, uint64_t request, const struct ublk_rs_io *io);
    /**
     * Describes up to capacity zones, beginning with the one that holds byte offset, and stores how many those are to
     * count. Of a zoned disk. After a shorter answer the rest is asked for again; an empty one means EIO.
     */
    int (*report_zones)(void *user,
                        uint64_t offset,
                        struct ublk_rs_zone *zones,
                        uint32_t capacity,
                        uint32_t *count);
    /**
     * Stores data at the write pointer of the zone that starts at byte zone, and the byte of the disk where that was to
     * offset. Of a zoned disk.
     */
    int (*zone_append)(void *user,
                       const void *data,
                       size_t length,
                       uint64_t zone,
                       uint32_t flags,
                       uint64_t *offset);
    /**
     * Opens, closes, finishes or resets (UBLK_RS_OP_ZONE_*) the zone that starts at byte zone. Of a zoned disk.
     */
    int (*zone_action)(void *user, uint32_t op, uint64_t zone);
    /**
     * Ends the program's part: called once, when no other function is running or will be called any more. That is
     * during ublk_rs_device_free(), on its thread, or, if a function was stuck by then, later on the thread that was in
     * it.
     */
    void (*destroy)(void *user);
} ublk_rs_backend;

/**
 * One kind of operation.
 */
typedef struct ublk_rs_op_stats {
    /**
     * Requests that ended, well or not.
     */
    uint64_t completed;
    /**
     * Bytes of those that ended well: data read, written or appended.
     */
    uint64_t bytes;
    /**
     * Requests that ended with an error.
     */
    uint64_t errors;
    /**
     * Nanoseconds within which half of them ended, from their arrival at the server to their commit; 0 without any.
     */
    uint64_t p50_ns;
    /**
     * The same, for 99 of 100.
     */
    uint64_t p99_ns;
    /**
     * The same, for 999 of 1000.
     */
    uint64_t p999_ns;
    /**
     * The same, for all.
     */
    uint64_t max_ns;
    /**
     * 0.
     */
    uint64_t reserved;
} ublk_rs_op_stats;

/**
 * A queue, or all queues of a device together, since the start. Counting is always on.
 */
typedef struct ublk_rs_stats {
    /**
     * sizeof (struct ublk_rs_stats), set by the program.
     */
    size_t size;
    /**
     * Reads.
     */
    struct ublk_rs_op_stats read;
    /**
     * Writes.
     */
    struct ublk_rs_op_stats write;
    /**
     * Flushes.
     */
    struct ublk_rs_op_stats flush;
    /**
     * Discards.
     */
    struct ublk_rs_op_stats discard;
    /**
     * Writes of zeroes.
     */
    struct ublk_rs_op_stats write_zeroes;
    /**
     * Appends to zones.
     */
    struct ublk_rs_op_stats zone_append;
    /**
     * Reports of zones.
     */
    struct ublk_rs_op_stats zone_report;
    /**
     * Zones that were opened, closed, finished or reset.
     */
    struct ublk_rs_op_stats zone_action;
    /**
     * Requests that are with the backend now.
     */
    uint64_t in_flight;
    /**
     * Nanoseconds that the oldest of them has been there.
     */
    uint64_t oldest_ns;
    /**
     * Requests that were dropped without an answer.
     */
    uint64_t dropped;
    /**
     * Requests that a stop took from the program.
     */
    uint64_t revoked;
    /**
     * Requests that were refused because the device was ending.
     */
    uint64_t refused;
    /**
     * Commands that the kernel did not accept. Anything but 0 is a defect.
     */
    uint64_t rejected;
    /**
     * Requests whose pages the ring did not take, so that their data was copied.
     */
    uint64_t unregistered;
    /**
     * How often the workers entered the kernel; of the whole device only.
     */
    uint64_t enters;
    /**
     * How often another thread had to wake one of them to hand a result over; of the whole device only.
     */
    uint64_t wake_ups;
    /**
     * Requests whose data lay in memory that clients share.
     */
    uint64_t shared;
} ublk_rs_stats;

/**
 * A device as the driver describes it.
 */
typedef struct ublk_rs_device_info {
    /**
     * sizeof (struct ublk_rs_device_info), set by the program.
     */
    size_t size;
    /**
     * What was granted: UBLK_RS_FEATURE_*.
     */
    uint64_t features;
    /**
     * The server's own 64 bits: the option fingerprint.
     */
    uint64_t fingerprint;
    /**
     * Bytes of its disk; 0 while it has none.
     */
    uint64_t capacity;
    /**
     * Its number: the N of /dev/ublkbN.
     */
    uint32_t id;
    /**
     * UBLK_RS_STATE_*, or another number of the driver's.
     */
    uint32_t state;
    /**
     * The process that serves it; 0 for none.
     */
    int32_t server_pid;
    /**
     * Hardware queues.
     */
    uint32_t queues;
    /**
     * Tags of each queue.
     */
    uint32_t queue_depth;
    /**
     * Bytes of the largest request.
     */
    uint32_t max_io_bytes;
    /**
     * The user that added it.
     */
    uint32_t owner_uid;
    /**
     * The group that added it.
     */
    uint32_t owner_gid;
} ublk_rs_device_info;

#ifdef __cplusplus
extern "C" {
#endif // __cplusplus

/**
 * The version of the library that runs, to be compared with UBLK_RS_VERSION, the header's: MAJOR << 16 | MINOR << 8 |
 * PATCH. Never blocks.
 */
uint32_t ublk_rs_version(void);

/**
 * The version of the library that runs, as text. Lives for ever. Never blocks.
 */
const char *ublk_rs_version_text(void);

/**
 * Makes an error object, to be given back to ublk_rs_error_free().
 *
 * Returns NULL without memory. Never blocks.
 */
ublk_rs_error *ublk_rs_error_new(void);

/**
 * Ends an error object, and with it the strings that it gave out. NULL is nothing.
 *
 * @param error  the object, which is in no call
 */
void ublk_rs_error_free(ublk_rs_error *error);

/**
 * The negative number that the last call that failed has returned; 0 if none has. Of NULL, 0.
 */
int ublk_rs_error_code(const ublk_rs_error *error);

/**
 * What kind of failure it was: UBLK_RS_KIND_*. Later versions may have more of these. Of NULL, UBLK_RS_KIND_NONE.
 */
uint32_t ublk_rs_error_kind(const ublk_rs_error *error);

/**
 * What the kernel said, positive; 0 if it was not asked. Of NULL, 0.
 */
int ublk_rs_error_errno(const ublk_rs_error *error);

/**
 * The number of the device that it was about; -1 if there was none. Of NULL, -1.
 */
int64_t ublk_rs_error_device(const ublk_rs_error *error);

/**
 * All about it in one line: what was tried, on which device, why it failed, what to do. Never NULL.
 *
 * The string belongs to the object and lives until it is in another call or freed.
 */
const char *ublk_rs_error_message(const ublk_rs_error *error);

/**
 * What to do about it, in words; empty if there is nothing to say. Never NULL.
 *
 * The string belongs to the object and lives until it is in another call or freed.
 */
const char *ublk_rs_error_remedy(const ublk_rs_error *error);

/**
 * Has a function of the program's told what the library has to say, in the whole process. Without one it says nothing.
 *
 * Never blocks. Any thread, at any time. A function that was replaced may still be running on other threads when this
 * returns: what user stands for should live as long as the program.
 *
 * @param function  the function; NULL for none
 * @param user      what it is given
 * @param level     the most that it is told: UBLK_RS_LOG_ERROR to UBLK_RS_LOG_TRACE
 * @return 0; -EINVAL for a level that is none
 */
int ublk_rs_set_log(ublk_rs_log_fn function,
                    void *user,
                    uint32_t level);

/**
 * The kernel's name of a single feature, without UBLK_F_; NULL for one that this version does not know, or several.
 * Lives for ever. Never blocks.
 */
const char *ublk_rs_feature_name(uint64_t feature);

/**
 * How many options there are. Those of this version keep their index in later ones.
 */
size_t ublk_rs_option_count(void);

/**
 * The name of the option with this index, below ublk_rs_option_count(); NULL beyond. Lives for ever.
 */
const char *ublk_rs_option_name(size_t index);

/**
 * What the option with this index takes: UBLK_RS_TYPE_*; 0 beyond the last one.
 */
uint32_t ublk_rs_option_type(size_t index);

/**
 * What the option with this index is if it is not set, as text; empty if that depends. NULL beyond the last one. Lives
 * for ever.
 */
const char *ublk_rs_option_default(size_t index);

/**
 * What the option with this index means, in a line, with units and range. NULL beyond the last one. Lives for ever.
 */
const char *ublk_rs_option_doc(size_t index);

/**
 * How many ready-made backends there are. Those of this version keep their index in later ones.
 */
size_t ublk_rs_target_count(void);

/**
 * The name of the ready-made backend with this index, for ublk_rs_device_new_target(); NULL beyond the last one. Lives
 * for ever.
 */
const char *ublk_rs_target_name(size_t index);

/**
 * What the ready-made backend with this index does, in a line; NULL beyond the last one. Lives for ever.
 */
const char *ublk_rs_target_doc(size_t index);

/**
 * Starts a pool of workers for many devices: ublk_rs_device_set_workers(). A backend that blocks stalls every device that
 * shares its worker: give such a device the option threads.
 *
 * Waits for the threads' start, a moment. Not from a callback.
 *
 * @param count    workers, at least 1
 * @param workers  the pool, to be given back to ublk_rs_workers_free()
 * @param error    NULL, or where to say what went wrong
 * @return 0; -EINVAL for 0 or NULL, -EDEADLK, and what keeps a thread or ring from being made
 */
int ublk_rs_workers_new(size_t count,
                        ublk_rs_workers **workers,
                        ublk_rs_error *error);

/**
 * Lets go of a pool: its threads end when the last device that it serves has. NULL is nothing.
 *
 * Never blocks. Any thread.
 *
 * @param workers  the pool
 */
void ublk_rs_workers_free(ublk_rs_workers *workers);

/**
 * Makes a device of size bytes that is served by the program's functions. Nothing exists in the kernel yet.
 *
 * From here on the library owns what user stands for: backend->destroy is called once for it, by
 * ublk_rs_device_free(). If this fails it is not called.
 *
 * Never blocks. Any thread.
 *
 * @param size     bytes of the disk, a multiple of the logical block size
 * @param backend  the functions; copied
 * @param user     what each of them is given
 * @param device   the device, to be given back to ublk_rs_device_free()
 * @param error    NULL, or where to say what went wrong
 * @return 0; -EINVAL for a table that makes no sense or a NULL where none may be
 */
int ublk_rs_device_new(uint64_t size,
                       const struct ublk_rs_backend *backend,
                       void *user,
                       ublk_rs_device **device,
                       ublk_rs_error *error);

/**
 * Makes a device that is served by a ready-made backend of the library: "null", "mem", "file", "zoned-mem", "stripe";
 * ublk_rs_target_name() lists them. Options say the rest, its size among them.
 *
 * Never blocks. Any thread.
 *
 * @param target  the backend's name
 * @param device  the device, to be given back to ublk_rs_device_free()
 * @param error   NULL, or where to say what went wrong
 * @return 0; -EINVAL for a name that is none or a NULL where none may be
 */
int ublk_rs_device_new_target(const char *target,
                              ublk_rs_device **device,
                              ublk_rs_error *error);

/**
 * Ends the handle, and what it still has: a disk that runs is stopped by force within five seconds, a halted device is
 * deleted. Then backend->destroy is called. NULL is nothing.
 *
 * No other function may be at work on the device, and none may come. Buffers of requests that were never completed end
 * with it. In a forked child nothing happens, and destroy is not called.
 *
 * Waits: for requests in progress, five seconds at most, and some twenty if a callback is stuck. Not from a callback.
 *
 * @param device  the device
 * @return 0; -EDEADLK from inside of a callback, and the device is as before
 */
int ublk_rs_device_free(ublk_rs_device *device);

/**
 * Sets an option that is a number, features, or yes and no (1 and 0).
 *
 * Never blocks. Any thread. Before the device starts, or while it is halted. Whether the value makes sense together
 * with the others is found by the start.
 *
 * @param device  the device
 * @param name    the option: "queue_depth"; ublk_rs_option_name() lists them
 * @param value   what it is to be
 * @param error   NULL, or where to say what went wrong
 * @return 0; -EINVAL for a name that is none or takes something else, -EBADFD once it was started
 */
int ublk_rs_device_set_number(ublk_rs_device *device,
                              const char *name,
                              uint64_t value,
                              ublk_rs_error *error);

/**
 * Sets any option from text: numbers as "65536" or "64K", yes and no as "yes" and "no", features as
 * "USER_RECOVERY,QUIESCE".
 *
 * Never blocks. Any thread. Before the device starts, or while it is halted. Whether the value makes sense together
 * with the others is found by the start.
 *
 * @param device  the device
 * @param name    the option
 * @param value   what it is to be; copied
 * @param error   NULL, or where to say what went wrong
 * @return 0; -EINVAL for a name that is none or text that is no such value, -EBADFD once it was started
 */
int ublk_rs_device_set(ublk_rs_device *device,
                       const char *name,
                       const char *value,
                       ublk_rs_error *error);

/**
 * Says what an option is, as text: what it was set to, or its default, which is empty if it depends.
 *
 * Never blocks. Any thread, at any time.
 *
 * @param device    the device
 * @param name      the option
 * @param capacity  bytes at value
 * @param value     where the text goes, with a NUL at its end
 * @param error     NULL, or where to say what went wrong
 * @return 0; -EINVAL for a name that is none, -ERANGE if the text does not fit
 */
int ublk_rs_device_get(const ublk_rs_device *device,
                       const char *name,
                       size_t capacity,
                       char *value,
                       ublk_rs_error *error);

/**
 * Has the device served by a pool of workers that it shares with others.
 *
 * Never blocks. Any thread. Before the device starts.
 *
 * @param device   the device
 * @param workers  the pool, which the device keeps; NULL: workers of its own again
 * @param error    NULL, or where to say what went wrong
 * @return 0; -EBADFD once it was started
 */
int ublk_rs_device_set_workers(ublk_rs_device *device, const ublk_rs_workers *workers, ublk_rs_error *error);

/**
 * Starts the disk: when this returns, its node can be opened.
 *
 * Waits: for the kernel, up to the option start_timeout_ms. Not from a callback. With the option dispatch the calling
 * thread calls the backend meanwhile. If it fails nothing stays behind, and it can be tried again with other options; so
 * can a halted device that these do not fit, which stays.
 *
 * @param device  the device
 * @param error   NULL, or where to say what went wrong
 * @return 0; -ENXIO without the driver, -EACCES or -EPERM without the privilege, -EINVAL for options that do not fit
 *         together, -EOPNOTSUPP for what the kernel does not have, -EEXIST if the id is taken, -ETIMEDOUT, -EBADFD if it
 *         was started before, -EDEADLK
 */
int ublk_rs_device_start(ublk_rs_device *device,
                         ublk_rs_error *error);

/**
 * Takes over a disk whose server is gone, or has handed it over: one that was started with the feature
 * UBLK_RS_FEATURE_USER_RECOVERY. Otherwise as ublk_rs_device_start().
 *
 * The disk stays as it is; size, fingerprint and what the backend can do have to fit it.
 *
 * @param device  the device, described and not started
 * @param id      the number of the disk
 * @param error   NULL, or where to say what went wrong
 * @return 0; -ENODEV, -EBUSY while its server lives, -EBADFD if it cannot be recovered, -EINVAL if it is not what the
 *         options describe, and as ublk_rs_device_start(). The disk is as before then
 */
int ublk_rs_device_recover(ublk_rs_device *device,
                           uint32_t id,
                           ublk_rs_error *error);

/**
 * Waits until the device has ended, by whomever.
 *
 * Waits. Not from a callback. With the option dispatch, on the thread that dispatches, this is the event loop.
 *
 * @param device      the device
 * @param timeout_ms  for how long at most; UBLK_RS_FOREVER
 * @param error       NULL, or where to say what went wrong
 * @return 0 once it has ended; -ETIMEDOUT if it goes on, -EBADFD if it was not started, -EDEADLK; what took it down, if
 *         it failed
 */
int ublk_rs_device_wait(ublk_rs_device *device,
                        uint64_t timeout_ms,
                        ublk_rs_error *error);

/**
 * Stops the disk when nobody uses it, and deletes the device.
 *
 * While the disk is open, mounted or claimed it is left alone; that is tried again until the time is over. Requests
 * that the program still has not answered by then are answered with EIO; their buffers stay valid until it completes
 * them, which gives -ESTALE, or frees the device.
 *
 * Waits: timeout_ms, and some seconds if the backend is stuck. Not from a callback.
 *
 * @param device      the device
 * @param timeout_ms  for how long at most
 * @param error       NULL, or where to say what went wrong
 * @return 0, also if it had ended before; -EBUSY: the disk goes on, and the message names who has it; -EBADFD if it was
 *         not started, -EDEADLK, -ECHILD in a forked child
 */
int ublk_rs_device_stop(ublk_rs_device *device,
                        uint64_t timeout_ms,
                        ublk_rs_error *error);

/**
 * As ublk_rs_device_stop(), whoever uses the disk: it is pulled from under them. What a file system on it has not
 * written is lost. Never -EBUSY.
 *
 * @param device      the device
 * @param timeout_ms  for how long requests are waited for
 * @param error       NULL, or where to say what went wrong
 * @return as ublk_rs_device_stop()
 */
int ublk_rs_device_stop_force(ublk_rs_device *device,
                              uint64_t timeout_ms,
                              ublk_rs_error *error);

/**
 * Stops the disk when nobody uses it and keeps the device: options can be set again, and ublk_rs_device_start() gives
 * it another disk with the same number (since Linux 7.3). ublk_rs_device_stop() deletes it.
 *
 * Waits, as ublk_rs_device_stop(). Not from a callback.
 *
 * @param device      the device
 * @param timeout_ms  for how long at most
 * @param error       NULL, or where to say what went wrong
 * @return 0; -EOPNOTSUPP where the kernel starts no device twice, -EBUSY, -EBADFD, -ETIMEDOUT, -EDEADLK
 */
int ublk_rs_device_halt(ublk_rs_device *device,
                        uint64_t timeout_ms,
                        ublk_rs_error *error);

/**
 * Gives the disk to the next server, which takes it by ublk_rs_device_recover(): under its users, without a failed
 * request. It must have been started with UBLK_RS_FEATURE_USER_RECOVERY.
 *
 * Memory that was shared with clients is shared no more, so that the next server can do that. That may have happened also
 * if the handover then fails: clients' data is copied until it is shared again.
 *
 * Waits: for what this program has not answered. Not from a callback.
 *
 * @param device      the device
 * @param timeout_ms  for how long at most
 * @param error       NULL, or where to say what went wrong
 * @return 0; -EOPNOTSUPP without the features, -ETIMEDOUT, -EBADFD, -EDEADLK
 */
int ublk_rs_device_hand_over(ublk_rs_device *device,
                             uint64_t timeout_ms,
                             ublk_rs_error *error);

/**
 * Gives a running disk another size (since Linux 6.16). The backend serves the larger of both meanwhile. Of the ready-made
 * ones "mem" keeps the bytes that it was made with: what a larger disk has behind them is EINVAL for clients.
 *
 * Waits: for the kernel, a moment. Not from a callback.
 *
 * @param device  the device
 * @param size    bytes, a multiple of the logical block size
 * @param error   NULL, or where to say what went wrong
 * @return 0; -EOPNOTSUPP, -EINVAL, -EBADFD, -EDEADLK
 */
int ublk_rs_device_resize(ublk_rs_device *device,
                          uint64_t size,
                          ublk_rs_error *error);

/**
 * Has requests whose data lies in a memory file travel without a copy (since Linux 7.1, with
 * UBLK_RS_FEATURE_SHMEM_ZC): clients map the same file and use it for direct I/O.
 *
 * Waits: the disk stands still for a moment. Not from a callback.
 *
 * ublk_rs_device_hand_over() and ublk_rs_device_halt() end it. What a killed server has shared the driver keeps: to the
 * server that recovers the disk requests in it are like others, and it can share the memory again once it has called
 * ublk_rs_device_unshare() with the number that the former one was told.
 *
 * @param device     the device
 * @param memfd      a memory file that is sealed against shrinking; not kept
 * @param read_only  not 0 for a file that may not be written to; such memory serves writes of the client alone
 * @param number     the memory's number with this device, for ublk_rs_device_unshare()
 * @param error      NULL, or where to say what went wrong
 * @return 0; -EOPNOTSUPP without the feature, -EINVAL without the seal or for another file, -EEXIST if a part of it is
 *         shared, -ETIMEDOUT if the backend does not answer the requests that it has, or the driver a former call,
 *         -EBADFD, -EDEADLK
 */
int ublk_rs_device_share(ublk_rs_device *device,
                         int memfd,
                         int read_only,
                         uint32_t *number,
                         ublk_rs_error *error);

/**
 * Ends the sharing of the memory with this number, which may be one that a former server of the disk was told, once the
 * requests that are out are answered.
 *
 * Waits: the disk stands still for a moment. Not from a callback.
 *
 * @param device  the device
 * @param number  what ublk_rs_device_share() has stored
 * @param error   NULL, or where to say what went wrong
 * @return 0; -ENOENT if there is none, -ETIMEDOUT as of ublk_rs_device_share(), or if the driver does not answer, which
 *         then goes on with it, -EBADFD, -EDEADLK
 */
int ublk_rs_device_unshare(ublk_rs_device *device,
                           uint32_t number,
                           ublk_rs_error *error);

/**
 * The descriptor to watch for readability, of a device with the option dispatch: while it is readable,
 * ublk_rs_device_dispatch() has something to do. It belongs to the device and must not be read or closed. Who watches for
 * its edges (EPOLLET) dispatches until that returns 0.
 *
 * Never blocks. Any thread, once the device was started.
 *
 * @param device  the device
 * @return the descriptor; -EINVAL for NULL, -EBADFD without the option or before the start
 */
int ublk_rs_device_fd(const ublk_rs_device *device);

/**
 * Calls the backend for requests that have come, of a device with the option dispatch, on the calling thread.
 *
 * Blocks only as far as the backend does. Any thread; several may do it at a time, and then the backend is called by
 * several. The thread that did it last is taken for the one that will: if it is the one that stops the device, it goes
 * on calling the backend while it waits.
 *
 * @param device  the device
 * @param most    how many requests at most; 0 for all that are there now. Those that come meanwhile have the next call,
 *                for which the descriptor is readable
 * @return how many it were; -ENODEV once the device has ended and nothing will come any more, -EINVAL for NULL, -EBADFD
 *         without the option or before the start, -EDEADLK from inside of a callback, -ECHILD
 */
int ublk_rs_device_dispatch(ublk_rs_device *device,
                            uint32_t most);

/**
 * The disk: "/dev/ublkbN"; NULL before the device was started. The string lives until the device is freed; a device that
 * was halted may have another number after its next start.
 *
 * Never blocks. Any thread.
 */
const char *ublk_rs_device_path(const ublk_rs_device *device);

/**
 * The device's number; -1 before it was started, and for NULL.
 *
 * Never blocks. Any thread.
 */
int64_t ublk_rs_device_id(const ublk_rs_device *device);

/**
 * UBLK_RS_FEATURE_* that the driver granted; 0 before the device was started, and for NULL.
 *
 * Never blocks. Any thread.
 */
uint64_t ublk_rs_device_features(const ublk_rs_device *device);

/**
 * The disk's present size in bytes; 0 before the device was started, and for NULL.
 *
 * Never blocks. Any thread.
 */
uint64_t ublk_rs_device_size(const ublk_rs_device *device);

/**
 * How the device ended: UBLK_RS_ENDING_*; 0 while it has not.
 *
 * Never blocks. Any thread.
 */
uint32_t ublk_rs_device_ending(const ublk_rs_device *device);

/**
 * What is not as it should be though the disk works, a privilege that is missing for instance, a line for each; empty if
 * there is nothing.
 *
 * Never blocks. Any thread.
 *
 * @param device    the device
 * @param capacity  bytes at text
 * @param text      where it goes, with a NUL at its end, cut if it does not fit
 * @return how many warnings there are; -EINVAL for NULL, -EBADFD before the start
 */
int ublk_rs_device_warnings(const ublk_rs_device *device,
                            size_t capacity,
                            char *text);

/**
 * Declares the calling thread to be one that the disk's I/O depends on (PR_SET_IO_FLUSHER): the kernel then does not make
 * it wait for writeback to that disk. For threads of the program that answer requests; those of the library do it by
 * themselves. Needs CAP_SYS_RESOURCE.
 *
 * Never blocks.
 *
 * @return 0; -EPERM without the privilege
 */
int ublk_rs_declare_io_flusher(void);

/**
 * Answers a request, once: 0 for all of it, or -errno as from a callback. Its buffers are not the program's any more.
 *
 * Never blocks. Any thread, also from inside of submit.
 *
 * @param device   the device that it is of
 * @param request  the request
 * @param result   0 or -errno
 * @return 0; -ESTALE if it was completed before or is gone, for instance because the device was stopped: until the device
 *         is freed this is safe to find out; -EBUSY while another thread is at it; -EINVAL for a result that is neither 0
 *         nor -errno, after which the request has ended with EIO, or for NULL
 */
int ublk_rs_request_complete(ublk_rs_device *device,
                             uint64_t request,
                             int result);

/**
 * Answers an append to a zone: all of it was written at byte offset of the disk. Otherwise as
 * ublk_rs_request_complete().
 *
 * @param device   the device that it is of
 * @param request  the request, an append
 * @param offset   where it went, in bytes
 * @return as ublk_rs_request_complete(); a request that is no append, or an offset that makes no sense, ends with EIO
 */
int ublk_rs_request_complete_append(ublk_rs_device *device,
                                    uint64_t request,
                                    uint64_t offset);

/**
 * Answers a report of zones, of which the first is the one that holds the request's offset and each other follows its
 * predecessor. Otherwise as ublk_rs_request_complete().
 *
 * @param device   the device that it is of
 * @param request  the request, a report
 * @param zones    the zones
 * @param count    how many; for what is missing the kernel asks again, none at all is EIO
 * @return as ublk_rs_request_complete(); -EINVAL for a zone of unknown kind or state, and the request goes on
 */
int ublk_rs_request_complete_report(ublk_rs_device *device,
                                    uint64_t request,
                                    const struct ublk_rs_zone *zones,
                                    size_t count);

/**
 * Finds a request's data in memory: of a write or an append what is to be stored, of a read where to put it, which is
 * zeroed. On every data path; on those that do not copy this does. May be called again.
 *
 * Blocks for a copy of the data on such paths, not otherwise. Any thread, one at a time for each request.
 *
 * @param device   the device that it is of
 * @param request  a read or write
 * @param buf      the data, valid until the request is completed; of a write to be read only
 * @param length   its bytes
 * @return 0; -ESTALE, -EBUSY, -EINVAL for another operation or a NULL where none may be
 */
int ublk_rs_request_buffer(ublk_rs_device *device,
                           uint64_t request,
                           void **buf,
                           size_t *length);

/**
 * Copies data to a read: straight to the client where the driver does not copy, and without zeroing a buffer first. What
 * was not put when the request is completed reads as zeroes.
 *
 * Blocks for the copy. Any thread, one at a time for each request.
 *
 * @param device   the device that it is of
 * @param request  a read
 * @param at       the first byte, from the start of the request's range
 * @param data     the data, elsewhere than in the request's own buffer
 * @param length   its bytes
 * @return 0; -ESTALE, -EBUSY, -EINVAL for another operation, a range that is not within the request's, or NULL
 */
int ublk_rs_request_put(ublk_rs_device *device,
                        uint64_t request,
                        uint64_t at,
                        const void *data,
                        size_t length);

/**
 * Copies a write's integrity metadata, all of it.
 *
 * Blocks for the copy. Any thread, one at a time for each request.
 *
 * @param device   the device that it is of
 * @param request  a write with UBLK_RS_FLAG_INTEGRITY
 * @param data     where it goes
 * @param length   what `submit` was told as metadata_length
 * @return 0; -ESTALE, -EBUSY, -EINVAL for another length or request
 */
int ublk_rs_request_metadata(ublk_rs_device *device, uint64_t request, void *data, size_t length);

/**
 * Gives a read's integrity metadata to the client, all of it.
 *
 * Blocks for the copy. Any thread, one at a time for each request.
 *
 * @param device   the device that it is of
 * @param request  a read with UBLK_RS_FLAG_INTEGRITY
 * @param data     the metadata
 * @param length   what `submit` was told as metadata_length
 * @return 0; -ESTALE, -EBUSY, -EINVAL for another length or request
 */
int ublk_rs_request_put_metadata(ublk_rs_device *device, uint64_t request, const void *data, size_t length);

/**
 * Fills a submission queue entry for an io_uring of the program's own: it puts the pages of a request of the data path
 * zero-copy into place index of that ring's sparse table of registered buffers. READ_FIXED, SEND_ZC and their like then
 * work on the client's own memory, whose byte 0 has address 0.
 *
 * Set user_data afterwards; submit it before the request is completed, on any thread (since Linux 6.17). The pages have
 * to leave the table again by ublk_rs_request_unregister_sqe(), or with the ring: as long as they are there the client
 * has no answer. A read is then not zeroed where nothing was put.
 *
 * Never blocks. Any thread, one at a time for each request.
 *
 * @param device   the device that it is of
 * @param request  a read or write
 * @param index    the place in the ring's table
 * @param sqe      the entry, 64 bytes (struct io_uring_sqe)
 * @return 0; -EOPNOTSUPP on other data paths, -EINVAL for a request without data or NULL, -ENODEV once the device has
 *         ended, -ESTALE, -EBUSY
 */
int ublk_rs_request_register_sqe(ublk_rs_device *device,
                                 uint64_t request,
                                 uint16_t index,
                                 void *sqe);

/**
 * Fills the entry that takes the pages out of the table again: the same index, the same ring. As
 * ublk_rs_request_register_sqe().
 *
 * @param device   the device that it is of
 * @param request  the request
 * @param index    the place in the ring's table
 * @param sqe      the entry, 64 bytes (struct io_uring_sqe)
 * @return as ublk_rs_request_register_sqe()
 */
int ublk_rs_request_unregister_sqe(ublk_rs_device *device, uint64_t request, uint16_t index, void *sqe);

/**
 * Says what the device has counted since it was started, also after its end.
 *
 * Never blocks. Any thread.
 *
 * @param device  the device
 * @param queue   the queue; UBLK_RS_ALL_QUEUES
 * @param stats   where to, with its size set
 * @param error   NULL, or where to say what went wrong
 * @return 0; -EINVAL for a queue that is none, a size that is none, NULL; -EBADFD before the start
 */
int ublk_rs_device_stats(const ublk_rs_device *device,
                         uint32_t queue,
                         struct ublk_rs_stats *stats,
                         ublk_rs_error *error);

/**
 * Opens the driver.
 *
 * Waits: for the driver, 30 seconds at most. Not from a callback.
 *
 * @param control  the handle, to be given back to ublk_rs_control_free()
 * @param error    NULL, or where to say what went wrong
 * @return 0; -ENXIO without the driver, -ENOSYS without io_uring, -EACCES or -EPERM without the privilege, -EINVAL for
 *         NULL, -EDEADLK
 */
int ublk_rs_control_open(ublk_rs_control **control,
                         ublk_rs_error *error);

/**
 * Closes the driver. NULL is nothing. Never blocks.
 *
 * @param control  the handle
 */
void ublk_rs_control_free(ublk_rs_control *control);

/**
 * What the driver offers: UBLK_RS_FEATURE_*; 0 from drivers that cannot say (before Linux 6.5), and for NULL.
 *
 * Never blocks. Any thread.
 */
uint64_t ublk_rs_control_features(const ublk_rs_control *control);

/**
 * Lists the devices of the machine that the caller may ask about, by ascending number, whoever made them.
 *
 * Waits: for the driver, 30 seconds at most. Not from a callback.
 *
 * @param control   the driver
 * @param ids       where the numbers go; NULL if capacity is 0
 * @param capacity  how many fit
 * @param count     how many there are, which may be more
 * @param error     NULL, or where to say what went wrong
 * @return 0; -EACCES or -EPERM if there are devices and the caller may ask about none, -EINVAL, -EDEADLK
 */
int ublk_rs_control_list(const ublk_rs_control *control,
                         uint32_t *ids,
                         size_t capacity,
                         size_t *count,
                         ublk_rs_error *error);

/**
 * Describes a device of the machine, whoever made it.
 *
 * Waits: for the driver, 30 seconds at most. Not from a callback.
 *
 * @param control  the driver
 * @param id       the device's number
 * @param info     where to, with its size set
 * @param error    NULL, or where to say what went wrong
 * @return 0; -ENODEV, -EACCES or -EPERM, -EINVAL, -EDEADLK
 */
int ublk_rs_control_info(const ublk_rs_control *control,
                         uint32_t id,
                         struct ublk_rs_device_info *info,
                         ublk_rs_error *error);

/**
 * Stops a device if it has a disk, and deletes it: also one whose server is gone, and whoever made it. Its disk is pulled
 * from under its users. For a device of this program use ublk_rs_device_stop().
 *
 * Waits. Not from a callback.
 *
 * @param control     the driver
 * @param id          the device's number
 * @param timeout_ms  for how long at most; UBLK_RS_FOREVER
 * @param error       NULL, or where to say what went wrong
 * @return 0; -ENODEV; -ETIMEDOUT for a server that does not answer or somebody who has it open, which the message names;
 *         -EACCES or -EPERM, -EINVAL, -EDEADLK
 */
int ublk_rs_control_delete(const ublk_rs_control *control,
                           uint32_t id,
                           uint64_t timeout_ms,
                           ublk_rs_error *error);

/**
 * Takes a live disk from its server, whoever that is, for another to recover it (UBLK_RS_FEATURE_QUIESCE, since Linux
 * 6.16): new requests wait until then, those that the server has are waited for. A server that is to give its disk away by
 * itself has ublk_rs_device_hand_over(). A disk that is quiesced already is what was asked for.
 *
 * Waits. Not from a callback.
 *
 * @param control     the driver
 * @param id          the device's number
 * @param timeout_ms  for how long at most; UBLK_RS_FOREVER
 * @param error       NULL, or where to say what went wrong
 * @return 0 once the server has let go of it; -ETIMEDOUT if it has not: new requests wait all the same, and this has to be
 *         called again; -EBADFD without a disk, or if somebody stopped it meanwhile, -EOPNOTSUPP without the feature and
 *         with UBLK_RS_FEATURE_BATCH_IO, -ENODEV, -EINVAL, -EDEADLK
 */
int ublk_rs_control_quiesce(const ublk_rs_control *control,
                            uint32_t id,
                            uint64_t timeout_ms,
                            ublk_rs_error *error);

/**
 * Names what keeps a device in use, as far as this process can see, a line for each: processes, mounts, devices on top.
 *
 * Blocks for a look around in /proc. Any thread.
 *
 * @param control   the driver
 * @param id        the device's number
 * @param capacity  bytes at text
 * @param text      where it goes, with a NUL at its end, cut if it does not fit
 * @return how many there are; -EINVAL
 */
int ublk_rs_control_holders(const ublk_rs_control *control,
                            uint32_t id,
                            size_t capacity,
                            char *text);

#ifdef __cplusplus
}  // extern "C"
#endif  // __cplusplus

#endif  /* UBLK_RS_H */
