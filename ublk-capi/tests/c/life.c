/*
 * What becomes of a disk in its life, by the C library: `life CASE`, or `life list`. Says "unsupported" on stdout where the
 * kernel does not have it, after it has seen the documented error.
 */

#define _GNU_SOURCE
#include "check.h"

#include <signal.h>
#include <sys/prctl.h>

static unsigned char memory[2 * SIZE];
static ublk_rs_error *error;

static uint64_t patience(void) { return (uint64_t)(20000 * scale()); }

static int do_read(void *user, void *buf, size_t length, uint64_t offset) {
    memcpy(buf, (unsigned char *)user + offset, length);
    return 0;
}

static int do_write(void *user, const void *data, size_t length, uint64_t offset, uint32_t flags) {
    (void)flags;
    memcpy((unsigned char *)user + offset, data, length);
    return 0;
}

static const ublk_rs_backend MEMORY = {.size = sizeof MEMORY, .read = do_read, .write = do_write};

static ublk_rs_device *made(const char *require) {
    ublk_rs_device *device = NULL;
    WORKS(ublk_rs_device_new(SIZE, &MEMORY, memory, &device, error));
    if (*require) WORKS(ublk_rs_device_set(device, "require", require, error));
    WORKS(ublk_rs_device_set_number(device, "fingerprint", 0x4711, error));
    return device;
}

static void stopped(ublk_rs_device *device) {
    WORKS(ublk_rs_device_stop(device, patience(), error));
    EQUAL(ublk_rs_device_free(device), 0);
}

/* Whether a call has failed because the kernel is too old, and says so. */
static int unsupported(int code) {
    if (code != -EOPNOTSUPP) {
        if (code != 0) fprintf(stderr, "%s\n", ublk_rs_error_message(error));
        EQUAL(code, 0);
        return 0;
    }
    EQUAL(ublk_rs_error_kind(error), UBLK_RS_KIND_UNSUPPORTED);
    CHECK(strlen(ublk_rs_error_message(error)) > 10);
    puts("unsupported");
    return 1;
}

static void resize(void) {
    ublk_rs_device *device = made("");
    WORKS(ublk_rs_device_start(device, error));
    if (!unsupported(ublk_rs_device_resize(device, 2 * SIZE, error))) {
        EQUAL(ublk_rs_device_size(device), 2 * SIZE);
        EQUAL(disk_io(ublk_rs_device_path(device), 1, SIZE, 0x21, NULL), 0);
        EQUAL(memory[SIZE], 0x21);
        EQUAL(ublk_rs_device_resize(device, 1000, error), -EINVAL);
    }
    stopped(device);
}

static void hand_over(void) {
    ublk_rs_device *device = made("USER_RECOVERY"), *next = made("USER_RECOVERY");
    WORKS(ublk_rs_device_start(device, error));
    uint32_t id = (uint32_t)ublk_rs_device_id(device);
    EQUAL(disk_io(ublk_rs_device_path(device), 1, 4096, 0x42, NULL), 0);
    EQUAL(ublk_rs_device_recover(next, id, error), -EBUSY); /* its server lives */
    if (unsupported(ublk_rs_device_hand_over(device, patience(), error))) {
        EQUAL(ublk_rs_device_free(next), 0);
        stopped(device);
        return;
    }
    EQUAL(ublk_rs_device_ending(device), UBLK_RS_ENDING_HANDED_OVER);
    WORKS(ublk_rs_device_set_number(next, "fingerprint", 1, error));
    EQUAL(ublk_rs_device_recover(next, id, error), -EINVAL); /* another's */
    WORKS(ublk_rs_device_set_number(next, "fingerprint", 0x4711, error));
    WORKS(ublk_rs_device_recover(next, id, error));
    EQUAL(ublk_rs_device_free(device), 0); /* not its disk any more */
    EQUAL(ublk_rs_device_id(next), id);
    unsigned char first = 0;
    EQUAL(disk_io(ublk_rs_device_path(next), 0, 4096, 0, &first), 0);
    EQUAL(first, 0x42);
    stopped(next);
}

static void killed(void) {
    int pipe_[2];
    uint32_t id = 0;
    CHECK(pipe(pipe_) == 0);
    pid_t server = fork();
    CHECK(server >= 0);
    if (server == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        ublk_rs_device *device = made("USER_RECOVERY");
        WORKS(ublk_rs_device_start(device, error));
        id = (uint32_t)ublk_rs_device_id(device);
        CHECK(write(pipe_[1], &id, sizeof id) == sizeof id);
        for (;;) pause();
    }
    close(pipe_[1]);
    EQUAL(read(pipe_[0], &id, sizeof id), (long long)sizeof id);
    close(pipe_[0]);
    kill(server, SIGKILL);
    int status = 0;
    CHECK(waitpid(server, &status, 0) == server);
    ublk_rs_device *next = made("USER_RECOVERY");
    WORKS(ublk_rs_device_set_number(next, "start_timeout_ms", 3 * patience(), error));
    WORKS(ublk_rs_device_recover(next, id, error));
    memory[8192] = 0x63;
    unsigned char first = 0;
    EQUAL(disk_io(ublk_rs_device_path(next), 0, 8192, 0, &first), 0);
    EQUAL(first, 0x63);
    stopped(next);
}

static void quiesce(void) {
    ublk_rs_device *device = made("USER_RECOVERY"), *next = made("USER_RECOVERY");
    ublk_rs_control *control = NULL;
    ublk_rs_device_info info = {.size = sizeof info};
    WORKS(ublk_rs_device_start(device, error));
    uint32_t id = (uint32_t)ublk_rs_device_id(device);
    WORKS(ublk_rs_control_open(&control, error));
    if (unsupported(ublk_rs_control_quiesce(control, id, patience(), error))) {
        EQUAL(ublk_rs_device_free(next), 0);
        stopped(device);
    } else {
        WORKS(ublk_rs_device_wait(device, patience(), error));
        EQUAL(ublk_rs_device_ending(device), UBLK_RS_ENDING_STOPPED_BY_OTHERS);
        WORKS(ublk_rs_control_info(control, id, &info, error));
        EQUAL(info.state, UBLK_RS_STATE_QUIESCED);
        EQUAL(info.fingerprint, 0x4711);
        EQUAL(ublk_rs_device_free(device), 0);
        WORKS(ublk_rs_device_recover(next, id, error));
        stopped(next);
    }
    ublk_rs_control_free(control);
}

/* A slow disk with more clients than a turn of the event loop has patience for. */
static int do_slow_read(void *user, void *buf, size_t length, uint64_t offset) {
    nap();
    return do_read(user, buf, length, offset);
}

static void dispatch_busy(void) {
    const ublk_rs_backend slow = {.size = sizeof slow, .read = do_slow_read, .write = do_write};
    enum { CLIENTS = 8 };
    pid_t clients[CLIENTS];
    ublk_rs_device *device = NULL;
    WORKS(ublk_rs_device_new(SIZE, &slow, memory, &device, error));
    WORKS(ublk_rs_device_set(device, "dispatch", "yes", error));
    WORKS(ublk_rs_device_start(device, error));
    const char *path = ublk_rs_device_path(device);
    int depth = 128, turns = 0, ended = 0;
    for (int i = 0; i < CLIENTS; i++) {
        clients[i] = fork();
        CHECK(clients[i] >= 0);
        if (clients[i] != 0) continue;
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        static unsigned char room[2 * BLOCK];
        int fd = open(path, O_RDONLY | O_DIRECT);
        if (fd < 0) _exit(1);
        while (pread(fd, room + (BLOCK - (uintptr_t)room % BLOCK), BLOCK, i * BLOCK) == BLOCK) continue;
        _exit(1);
    }
    /* All of them are at it. */
    while (turns < CLIENTS) {
        int done = ublk_rs_device_dispatch(device, 0);
        CHECK(done >= 0 && done <= depth);
        turns = done >= CLIENTS / 2 ? turns + 1 : turns;
        if (done == 0) nap();
    }
    double began = seconds();
    EQUAL(ublk_rs_device_wait(device, 200, error), -ETIMEDOUT);
    EQUAL(ublk_rs_device_stop(device, 200, error), -EBUSY);
    CHECK(seconds() - began < 20 * scale());
    for (int i = 0; i < CLIENTS; i++) kill(clients[i], SIGKILL);
    while (ended < CLIENTS) {
        CHECK(ublk_rs_device_dispatch(device, 0) >= 0);
        if (waitpid(-1, NULL, WNOHANG) > 0) ended++;
    }
    stopped(device);
}

static void share(void) {
    ublk_rs_device *device = made("SHMEM_ZC");
    uint32_t number = 0;
    if (unsupported(ublk_rs_device_start(device, error))) {
        EQUAL(ublk_rs_device_free(device), 0);
        return;
    }
    int file = memfd_create("shared", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    CHECK(file >= 0 && ftruncate(file, 1 << 20) == 0);
    EQUAL(ublk_rs_device_share(device, file, 0, &number, error), -EINVAL); /* not sealed */
    CHECK(fcntl(file, F_ADD_SEALS, F_SEAL_SHRINK) == 0);
    WORKS(ublk_rs_device_share(device, file, 0, &number, error));
    /* A client that uses the same pages. */
    unsigned char *pages = mmap(NULL, 1 << 20, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    CHECK(pages != MAP_FAILED);
    memset(pages, 0x91, BLOCK);
    int fd = open(ublk_rs_device_path(device), O_RDWR | O_DIRECT | O_CLOEXEC);
    CHECK(fd >= 0);
    EQUAL(pwrite(fd, pages, BLOCK, 4 * BLOCK), BLOCK);
    EQUAL(memory[4 * BLOCK], 0x91);
    memset(pages, 0, BLOCK);
    EQUAL(pread(fd, pages, BLOCK, 4 * BLOCK), BLOCK);
    EQUAL(pages[BLOCK - 1], 0x91);
    close(fd);
    munmap(pages, 1 << 20);
    WORKS(ublk_rs_device_unshare(device, number, error));
    EQUAL(ublk_rs_device_unshare(device, number, error), -ENOENT);
    EQUAL(ublk_rs_device_share(device, 9999, 0, &number, error), -EINVAL);
    close(file);
    stopped(device);
}

/* ---- zones: four of 4 MiB, each with its write pointer ---- */

enum { ZONE = 4 << 20, ZONES = SIZE / ZONE };
static uint64_t pointers[ZONES];
static atomic_int actions;

static int zone_report(void *user, uint64_t offset, ublk_rs_zone *zones, uint32_t capacity, uint32_t *count) {
    (void)user;
    uint32_t n = 0;
    for (uint64_t at = offset / ZONE; at < ZONES && n < capacity; at++, n++)
        zones[n] = (ublk_rs_zone){.start = at * ZONE,
                                  .length = ZONE,
                                  .capacity = ZONE,
                                  .write_pointer = at * ZONE + pointers[at],
                                  .kind = UBLK_RS_ZONE_SEQUENTIAL,
                                  .state = pointers[at] ? UBLK_RS_ZONE_IMPLICITLY_OPEN : UBLK_RS_ZONE_EMPTY};
    *count = n;
    return 0;
}

static int zone_write(void *user, const void *data, size_t length, uint64_t offset, uint32_t flags) {
    if (offset % ZONE != pointers[offset / ZONE]) return -EIO;
    pointers[offset / ZONE] += length;
    return do_write(user, data, length, offset, flags);
}

static int zone_append(void *user, const void *data, size_t length, uint64_t zone, uint32_t flags, uint64_t *offset) {
    *offset = zone + pointers[zone / ZONE];
    return zone_write(user, data, length, *offset, flags);
}

static int zone_action(void *user, uint32_t op, uint64_t zone) {
    (void)user;
    actions++;
    if (op == UBLK_RS_OP_ZONE_RESET) pointers[zone / ZONE] = 0;
    if (op == UBLK_RS_OP_ZONE_RESET_ALL) memset(pointers, 0, sizeof pointers);
    return 0;
}

static void zoned(void) {
    const ublk_rs_backend backend = {.size = sizeof backend,
                                     .read = do_read,
                                     .write = zone_write,
                                     .report_zones = zone_report,
                                     .zone_append = zone_append,
                                     .zone_action = zone_action};
    ublk_rs_device *device = NULL;
    unsigned char first = 0;
    WORKS(ublk_rs_device_new(SIZE, &backend, memory, &device, error));
    EQUAL(ublk_rs_device_start(device, error), -EINVAL); /* without zone_bytes */
    WORKS(ublk_rs_device_set(device, "zone_bytes", "4M", error));
    int code = ublk_rs_device_start(device, error);
    if (unsupported(code)) {
        EQUAL(ublk_rs_device_free(device), 0);
        return;
    }
    const char *path = ublk_rs_device_path(device);
    EQUAL(disk_io(path, 1, ZONE, 0x55, NULL), 0);
    EQUAL(pointers[1], BLOCK);
    EQUAL(disk_io(path, 1, ZONE, 0x56, NULL), EIO); /* not at the write pointer */
    EQUAL(disk_io(path, 0, ZONE, 0, &first), 0);
    EQUAL(first, 0x55);
    char command[128];
    snprintf(command, sizeof command, "blkzone reset -o %d -c 1 %s", ZONE >> 9, path);
    EQUAL(system(command), 0);
    EQUAL(pointers[1], 0);
    CHECK(actions > 0);
    stopped(device);
}

/* 8 bytes of metadata beside each 512 of the data; of 0xff where nothing is protected. */
enum { INTERVAL = 512, TUPLE = 8 };
static unsigned char tuples[SIZE / INTERVAL * TUPLE];
static int protected_writes, protected_reads;

static int integrity_submit(void *user, ublk_rs_device *device, uint64_t request, const ublk_rs_io *io) {
    unsigned char *data = (unsigned char *)user + io->offset, *tuple = tuples + io->offset / INTERVAL * TUPLE;
    void *buf;
    size_t length, count = io->length / INTERVAL * TUPLE;
    if (io->op != UBLK_RS_OP_READ && io->op != UBLK_RS_OP_WRITE) return -EOPNOTSUPP;
    EQUAL((io->flags & UBLK_RS_FLAG_INTEGRITY) != 0, io->metadata_length != 0);
    EQUAL(ublk_rs_request_buffer(device, request, &buf, &length), 0);
    EQUAL(length, io->length);
    if (io->op == UBLK_RS_OP_READ) {
        memcpy(buf, data, length);
        if (io->metadata_length != 0) {
            EQUAL(io->metadata_length, count);
            EQUAL(ublk_rs_request_put_metadata(device, request, tuple, count + 1), -EINVAL);
            EQUAL(ublk_rs_request_metadata(device, request, tuple, count), -EINVAL); /* of writes only */
            EQUAL(ublk_rs_request_put_metadata(device, request, tuple, count), 0);
            protected_reads++;
        }
        return ublk_rs_request_complete(device, request, 0);
    }
    memcpy(data, buf, length);
    memset(tuple, 0xff, count);
    if (io->metadata_length != 0) {
        EQUAL(io->metadata_length, count);
        EQUAL(ublk_rs_request_metadata(device, request, tuple, count - 1), -EINVAL);
        EQUAL(ublk_rs_request_put_metadata(device, request, tuple, count), -EINVAL); /* of reads only */
        EQUAL(ublk_rs_request_metadata(device, request, tuple, count), 0);
        protected_writes++;
    }
    return ublk_rs_request_complete(device, request, 0);
}

static void integrity(void) {
    const ublk_rs_backend backend = {.size = sizeof backend, .submit = integrity_submit};
    enum { WHERE = 8 << 20 };
    unsigned char *first_tuple = tuples + WHERE / INTERVAL * TUPLE, first = 0;
    ublk_rs_device *device = NULL;
    memset(tuples, 0xff, sizeof tuples);
    WORKS(ublk_rs_device_new(SIZE, &backend, memory, &device, error));
    WORKS(ublk_rs_device_set(device, "integrity_metadata_size", "8", error));
    WORKS(ublk_rs_device_set(device, "integrity_checksum", "t10dif", error));
    WORKS(ublk_rs_device_set(device, "integrity_reference_tags", "yes", error));
    int code = ublk_rs_device_start(device, error);
    if (unsupported(code)) {
        EQUAL(ublk_rs_device_free(device), 0);
        return;
    }
    const char *path = ublk_rs_device_path(device);
    EQUAL(disk_io(path, 1, WHERE, 0x77, NULL), 0);
    CHECK(protected_writes > 0);
    /* The kernel's: a checksum of 0x77s, a tag, and the number of the interval. */
    for (unsigned i = 0; i < BLOCK / INTERVAL; i++) {
        const unsigned char *tuple = first_tuple + i * TUPLE;
        EQUAL(tuple[4] << 24 | tuple[5] << 16 | tuple[6] << 8 | tuple[7], WHERE / INTERVAL + i);
        EQUAL(memcmp(tuple, first_tuple, 2), 0);
    }
    EQUAL(disk_io(path, 0, WHERE, 0, &first), 0);
    EQUAL(first, 0x77);
    CHECK(protected_reads > 0);
    EQUAL(disk_io(path, 0, 0, 0, &first), 0); /* never written, not protected */
    memory[WHERE + 5] ^= 1;
    EQUAL(disk_io(path, 0, WHERE, 0, NULL), EILSEQ);
    memory[WHERE + 5] ^= 1;
    EQUAL(disk_io(path, 0, WHERE, 0, NULL), 0);
    first_tuple[TUPLE + 7] ^= 1;
    EQUAL(disk_io(path, 0, WHERE, 0, NULL), EILSEQ);
    stopped(device);
}

/* ---- ready-made disks, and what options of another's are ---- */

static ublk_rs_device *target(const char *name, const char *size) {
    ublk_rs_device *device = NULL;
    WORKS(ublk_rs_device_new_target(name, &device, error));
    WORKS(ublk_rs_device_set(device, "size", size, error));
    return device;
}

static void refused(ublk_rs_device *device, const char *name, const char *value, const char *words) {
    WORKS(ublk_rs_device_set(device, name, value, error));
    EQUAL(ublk_rs_device_start(device, error), -EINVAL);
    if (strstr(ublk_rs_error_message(error), words) == NULL) {
        fprintf(stderr, "%s is not in: %s\n", words, ublk_rs_error_message(error));
        abort();
    }
    EQUAL(ublk_rs_device_free(device), 0);
}

static void targets(void) {
    char folder[] = "/tmp/ublk-stripe-XXXXXX", paths[128], one[64], other[64];
    CHECK(mkdtemp(folder) != NULL);
    snprintf(one, sizeof one, "%s/a:1", folder);
    snprintf(other, sizeof other, "%s/b,2", folder);
    snprintf(paths, sizeof paths, "%s\n%s", one, other);
    ublk_rs_device *device = target("stripe", "16M");
    EQUAL(ublk_rs_device_start(device, error), -EINVAL); /* without paths */
    WORKS(ublk_rs_device_set(device, "paths", paths, error));
    WORKS(ublk_rs_device_set(device, "chunk_bytes", "64K", error));
    WORKS(ublk_rs_device_set(device, "create", "yes", error));
    WORKS(ublk_rs_device_start(device, error));
    EQUAL(ublk_rs_device_size(device), SIZE);
    EQUAL(disk_io(ublk_rs_device_path(device), 1, 192 << 10, 0x44, NULL), 0);
    stopped(device);
    /* The fourth chunk of the disk is the second one of the second file. */
    unsigned char byte = 0;
    int fd = open(other, O_RDONLY | O_CLOEXEC);
    CHECK(fd >= 0);
    EQUAL(pread(fd, &byte, 1, 64 << 10), 1);
    EQUAL(byte, 0x44);
    close(fd);
    EQUAL(unlink(one) | unlink(other) | rmdir(folder), 0);

    refused(target("null", "16M"), "zone_bytes", "4M", "zone_bytes is for a backend with report_zones, or with submit");
    refused(target("null", "16M"), "integrity_metadata_size", "8", "integrity_metadata_size is for a backend with submit");
    refused(target("mem", "16M"), "require", "ZONED", "ZONED is asked for by the option zone_bytes");
    refused(target("mem", "16M"), "require", "USER_COPY", "USER_COPY is asked for by the option data_path");
    refused(target("mem", "16M"), "logical_block_size", "3", "logical_block_size is");

    device = target("mem", "16M");
    WORKS(ublk_rs_device_set(device, "integrity_metadata_size", "8", error));
    WORKS(ublk_rs_device_set(device, "integrity_checksum", "t10dif", error));
    int code = ublk_rs_device_start(device, error);
    if (code == -EOPNOTSUPP) {
        CHECK(strstr(ublk_rs_error_message(error), "INTEGRITY (since Linux 7.0)") != NULL);
        EQUAL(ublk_rs_device_free(device), 0);
        return;
    }
    EQUAL(code, 0);
    EQUAL(disk_io(ublk_rs_device_path(device), 1, 8 << 20, 0x45, NULL), 0);
    EQUAL(disk_io(ublk_rs_device_path(device), 0, 8 << 20, 0, &byte), 0);
    EQUAL(byte, 0x45);
    stopped(device);
}

static const struct {
    const char *name;
    void (*run)(void);
} CASES[] = {{"resize", resize}, {"hand-over", hand_over}, {"killed", killed},      {"quiesce", quiesce},
             {"share", share},   {"zoned", zoned},         {"integrity", integrity},
             {"targets", targets}, {"dispatch-busy", dispatch_busy}};

int main(int argc, char **argv) {
    int descriptors = entries("/proc/self/fd", ""), ran = 0;
    error = ublk_rs_error_new();
    for (size_t i = 0; i < sizeof CASES / sizeof *CASES; i++) {
        if (argc == 2 && strcmp(argv[1], "list") == 0) puts(CASES[i].name);
        if (argc != 2 || strcmp(argv[1], CASES[i].name) != 0) continue;
        CASES[i].run();
        nothing_left(descriptors);
        ran++;
    }
    ublk_rs_error_free(error);
    return argc == 2 && (ran == 1 || strcmp(argv[1], "list") == 0) ? 0 : 2;
}
