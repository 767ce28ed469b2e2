/*
 * The data path zero-copy with an io_uring of the program's own: each request's pages are put into that ring's table, a
 * file is read straight into them or written straight from them, they are taken out, and the request is completed.
 *
 * Ends with 77 where the kernel does not have it.
 */

#define _GNU_SOURCE
#include "check.h"

#include <linux/io_uring.h>
#include <sys/mman.h>
#include <sys/syscall.h>

enum { PLACES = 4 };

static struct {
    int ring, file;
    struct io_uring_params params;
    unsigned char *rings;
    struct io_uring_sqe *entries;
    atomic_int requests;
    atomic_int bad;
} it;

static unsigned *at(unsigned offset) { return (unsigned *)(void *)(it.rings + offset); }

static void ring_open(void) {
    it.ring = (int)syscall(__NR_io_uring_setup, 8, &it.params);
    CHECK(it.ring >= 0);
    CHECK(it.params.features & IORING_FEAT_SINGLE_MMAP);
    size_t sq = it.params.sq_off.array + it.params.sq_entries * sizeof(unsigned);
    size_t cq = it.params.cq_off.cqes + it.params.cq_entries * sizeof(struct io_uring_cqe);
    it.rings = mmap(NULL, sq > cq ? sq : cq, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, it.ring, IORING_OFF_SQ_RING);
    CHECK(it.rings != MAP_FAILED);
    it.entries = mmap(NULL, it.params.sq_entries * sizeof(struct io_uring_sqe), PROT_READ | PROT_WRITE,
                      MAP_SHARED | MAP_POPULATE, it.ring, IORING_OFF_SQES);
    CHECK(it.entries != MAP_FAILED);
    struct io_uring_rsrc_register table = {.nr = PLACES, .flags = IORING_RSRC_REGISTER_SPARSE};
    CHECK(syscall(__NR_io_uring_register, it.ring, IORING_REGISTER_BUFFERS2, &table, sizeof table) == 0);
}

/* One entry, submitted and waited for: what it came to. */
static int perform(const struct io_uring_sqe *entry) {
    unsigned tail = *at(it.params.sq_off.tail), place = tail & *at(it.params.sq_off.ring_mask);
    it.entries[place] = *entry;
    at(it.params.sq_off.array)[place] = place;
    __atomic_store_n(at(it.params.sq_off.tail), tail + 1, __ATOMIC_RELEASE);
    CHECK(syscall(__NR_io_uring_enter, it.ring, 1, 1, IORING_ENTER_GETEVENTS, NULL, 0) == 1);
    unsigned head = *at(it.params.cq_off.head);
    CHECK(__atomic_load_n(at(it.params.cq_off.tail), __ATOMIC_ACQUIRE) != head);
    const struct io_uring_cqe *done = (struct io_uring_cqe *)(void *)(it.rings + it.params.cq_off.cqes);
    int result = done[head & *at(it.params.cq_off.ring_mask)].res;
    __atomic_store_n(at(it.params.cq_off.head), head + 1, __ATOMIC_RELEASE);
    return result;
}

/* One worker, one queue: this is never called by two threads. */
static int submit(void *user, ublk_rs_device *device, uint64_t request, const ublk_rs_io *io) {
    (void)user;
    struct io_uring_sqe entry;
    if (io->op != UBLK_RS_OP_READ && io->op != UBLK_RS_OP_WRITE) return -EOPNOTSUPP;
    uint16_t place = (uint16_t)(it.requests++ % PLACES);
    if (ublk_rs_request_register_sqe(device, request, place, &entry) != 0) return -EIO;
    if (perform(&entry) != 0) return -EIO;
    memset(&entry, 0, sizeof entry);
    entry.opcode = io->op == UBLK_RS_OP_READ ? IORING_OP_READ_FIXED : IORING_OP_WRITE_FIXED;
    entry.fd = it.file;
    entry.off = io->offset;
    entry.len = (uint32_t)io->length;
    entry.buf_index = place;
    int moved = perform(&entry);
    if (ublk_rs_request_unregister_sqe(device, request, place, &entry) != 0 || perform(&entry) != 0) it.bad++;
    return ublk_rs_request_complete(device, request, moved == (int)io->length ? 0 : -EIO);
}

int main(void) {
    ublk_rs_error *error = ublk_rs_error_new();
    ublk_rs_device *device = NULL;
    ublk_rs_backend backend = {.size = sizeof backend, .submit = submit};
    ring_open();
    it.file = memfd_create("disk", MFD_CLOEXEC);
    CHECK(it.file >= 0 && ftruncate(it.file, SIZE) == 0);
    WORKS(ublk_rs_device_new(SIZE, &backend, NULL, &device, error));
    WORKS(ublk_rs_device_set(device, "data_path", "zero-copy", error));
    int code = ublk_rs_device_start(device, error);
    if (code == -EOPNOTSUPP) {
        fprintf(stderr, "%s\n", ublk_rs_error_message(error));
        EQUAL(ublk_rs_device_free(device), 0);
        ublk_rs_error_free(error);
        return 77;
    }
    EQUAL(code, 0);
    const char *path = ublk_rs_device_path(device);
    unsigned char first = 0, there[BLOCK];
    for (int i = 0; i < 20; i++) {
        off_t where = (off_t)i * BLOCK;
        EQUAL(disk_io(path, 1, where, (unsigned char)(i + 1), NULL), 0);
        EQUAL(pread(it.file, there, BLOCK, where), BLOCK);
        EQUAL(there[0], i + 1);
        EQUAL(there[BLOCK - 1], i + 1);
        memset(there, 100 + i, BLOCK);
        EQUAL(pwrite(it.file, there, BLOCK, where), BLOCK);
        EQUAL(disk_io(path, 0, where, 0, &first), 0);
        EQUAL(first, 100 + i);
    }
    CHECK(it.requests >= 40);
    EQUAL(it.bad, 0);
    WORKS(ublk_rs_device_stop(device, (uint64_t)(20000 * scale()), error));
    EQUAL(ublk_rs_device_free(device), 0);
    ublk_rs_error_free(error);
    close(it.file);
    close(it.ring);
    return 0;
}
