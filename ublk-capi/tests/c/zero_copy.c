/*
 * The data path zero-copy with an io_uring of the program's own: each request's pages are put into that ring's table, a
 * file is read straight into them or written straight from them, they are taken out, and the request is completed. First
 * on the library's worker, which fetched the request; then on a thread that never saw it, for which the driver has another
 * way; and there also with the pages leaving the table last, which is when the client has its answer.
 *
 * Ends with 77 where the kernel does not have it.
 */

#define _GNU_SOURCE
#include "check.h"

#include <linux/io_uring.h>
#include <pthread.h>
#include <sys/mman.h>
#include <sys/syscall.h>

enum { PLACES = 4, ROUNDS = 8 };
enum { ON_THE_WORKER, ELSEWHERE, PAGES_LAST, STAGES };

static struct {
    int ring, file;
    struct io_uring_params params;
    unsigned char *rings;
    struct io_uring_sqe *entries;
    atomic_int requests;
    atomic_int bad;
    atomic_int stage;
    /* Calls of the client that have returned. */
    atomic_int answered;
} it = {.stage = ON_THE_WORKER};

/* One request on its way to the other thread. */
static struct {
    pthread_mutex_t lock;
    pthread_cond_t changed;
    int full, over, served;
    ublk_rs_device *device;
    uint64_t request;
    ublk_rs_io io;
} way = {.lock = PTHREAD_MUTEX_INITIALIZER, .changed = PTHREAD_COND_INITIALIZER};

/* The ring is for one at a time: at a change of stages a reader of the kernel's may be with the thread before. */
static pthread_mutex_t ring_lock = PTHREAD_MUTEX_INITIALIZER;

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

static int move(ublk_rs_device *device, uint64_t request, const ublk_rs_io *io, int pages_last) {
    struct io_uring_sqe entry;
    uint16_t place = (uint16_t)(it.requests++ % PLACES);
    if (ublk_rs_request_register_sqe(device, request, place, &entry) != 0) return -EIO;
    if (perform(&entry) != 0) return -EIO;
    memset(&entry, 0, sizeof entry);
    entry.opcode = io->op == UBLK_RS_OP_READ ? IORING_OP_READ_FIXED : IORING_OP_WRITE_FIXED;
    entry.fd = it.file;
    entry.off = io->offset;
    entry.len = (uint32_t)io->length;
    entry.buf_index = place;
    int moved = perform(&entry), result = moved == (int)io->length ? 0 : -EIO;
    if (ublk_rs_request_unregister_sqe(device, request, place, &entry) != 0) it.bad++;
    if (pages_last) {
        int answered = it.answered;
        result = ublk_rs_request_complete(device, request, result);
        /* Time for an answer that there must not be. */
        nap();
        if (it.answered != answered) it.bad++;
    }
    if (perform(&entry) != 0) it.bad++;
    return pages_last ? result : ublk_rs_request_complete(device, request, result);
}

static int handle(ublk_rs_device *device, uint64_t request, const ublk_rs_io *io, int pages_last) {
    pthread_mutex_lock(&ring_lock);
    int code = move(device, request, io, pages_last);
    pthread_mutex_unlock(&ring_lock);
    return code;
}

static void *elsewhere(void *nothing) {
    pthread_mutex_lock(&way.lock);
    for (;;) {
        while (!way.full && !way.over) pthread_cond_wait(&way.changed, &way.lock);
        if (!way.full) break;
        ublk_rs_device *device = way.device;
        uint64_t request = way.request;
        ublk_rs_io io = way.io;
        way.full = 0;
        way.served++;
        pthread_cond_broadcast(&way.changed);
        pthread_mutex_unlock(&way.lock);
        int code = handle(device, request, &io, it.stage == PAGES_LAST);
        if (code != 0) {
            it.bad++;
            ublk_rs_request_complete(device, request, code);
        }
        pthread_mutex_lock(&way.lock);
    }
    pthread_mutex_unlock(&way.lock);
    return nothing;
}

static int submit(void *user, ublk_rs_device *device, uint64_t request, const ublk_rs_io *io) {
    (void)user;
    if (io->op != UBLK_RS_OP_READ && io->op != UBLK_RS_OP_WRITE) return -EOPNOTSUPP;
    if (it.stage == ON_THE_WORKER) return handle(device, request, io, 0);
    pthread_mutex_lock(&way.lock);
    while (way.full) pthread_cond_wait(&way.changed, &way.lock);
    way.device = device;
    way.request = request;
    way.io = *io;
    way.full = 1;
    pthread_cond_broadcast(&way.changed);
    pthread_mutex_unlock(&way.lock);
    return 0;
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
    pthread_t thread;
    EQUAL(pthread_create(&thread, NULL, elsewhere, NULL), 0);
    unsigned char first = 0, there[BLOCK];
    for (int i = 0; i < STAGES * ROUNDS; i++) {
        off_t where = (off_t)i * BLOCK;
        it.stage = i / ROUNDS;
        EQUAL(disk_io(path, 1, where, (unsigned char)(i + 1), NULL), 0);
        it.answered++;
        EQUAL(pread(it.file, there, BLOCK, where), BLOCK);
        EQUAL(there[0], i + 1);
        EQUAL(there[BLOCK - 1], i + 1);
        memset(there, 100 + i, BLOCK);
        EQUAL(pwrite(it.file, there, BLOCK, where), BLOCK);
        EQUAL(disk_io(path, 0, where, 0, &first), 0);
        it.answered++;
        EQUAL(first, 100 + i);
    }
    CHECK(it.requests >= 2 * STAGES * ROUNDS);
    EQUAL(it.bad, 0);
    WORKS(ublk_rs_device_stop(device, (uint64_t)(20000 * scale()), error));
    pthread_mutex_lock(&way.lock);
    way.over = 1;
    pthread_cond_broadcast(&way.changed);
    pthread_mutex_unlock(&way.lock);
    EQUAL(pthread_join(thread, NULL), 0);
    CHECK(way.served >= 2 * (STAGES - 1) * ROUNDS);
    EQUAL(ublk_rs_device_free(device), 0);
    ublk_rs_error_free(error);
    close(it.file);
    close(it.ring);
    return 0;
}
