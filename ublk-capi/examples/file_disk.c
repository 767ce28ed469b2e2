/*
 * A file as a disk, its I/O done by a pool of threads: `file_disk FILE SIZE_IN_BYTES [OPTION=VALUE ...]`.
 *
 * submit only hands the request to the pool; whichever thread has done it completes it. Prints the disk, serves it until
 * the end of stdin, and stops it when nobody uses it.
 */

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <ublk_rs.h>

enum { THREADS = 4, ROOM = 4096 };

struct job {
    ublk_rs_device *device;
    uint64_t request;
    ublk_rs_io io;
};

struct disk {
    int file;
    pthread_mutex_t lock;
    pthread_cond_t arrived;
    /* A ring: never more than the tags of all queues, which main() sees to. */
    struct job jobs[ROOM];
    unsigned first, count;
    int closed;
    pthread_t threads[THREADS];
};

static int transfer(const struct disk *disk, const struct job *job) {
    const ublk_rs_io *io = &job->io;
    void *buf = NULL;
    size_t length = 0, done = 0;
    int code = ublk_rs_request_buffer(job->device, job->request, &buf, &length);
    if (code != 0) return code;
    while (done < length) {
        char *at = (char *)buf + done;
        size_t rest = length - done;
        off_t where = (off_t)(io->offset + done);
        ssize_t n = io->op == UBLK_RS_OP_READ ? pread(disk->file, at, rest, where) : pwrite(disk->file, at, rest, where);
        if (n < 0 && errno == EINTR) continue;
        if (n < 0) return -errno;
        if (n == 0) return -EIO; /* somebody has truncated the file */
        done += (size_t)n;
    }
    return 0;
}

static int perform(const struct disk *disk, const struct job *job) {
    const ublk_rs_io *io = &job->io;
    off_t offset = (off_t)io->offset, length = (off_t)io->length;
    int code = 0;
    switch (io->op) {
    case UBLK_RS_OP_READ:
    case UBLK_RS_OP_WRITE:
        code = transfer(disk, job);
        if (code == 0 && io->op == UBLK_RS_OP_WRITE && (io->flags & UBLK_RS_FLAG_FUA)) code = fdatasync(disk->file) ? -errno : 0;
        return code;
    case UBLK_RS_OP_FLUSH:
        return fdatasync(disk->file) ? -errno : 0;
    case UBLK_RS_OP_DISCARD:
        return fallocate(disk->file, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, length) ? -errno : 0;
    default:
        return -EOPNOTSUPP;
    }
}

static void *serve(void *user) {
    struct disk *disk = user;
    ublk_rs_declare_io_flusher(); /* the disk's own writeback must not wait for this thread; needs a privilege */
    for (;;) {
        pthread_mutex_lock(&disk->lock);
        while (disk->count == 0 && !disk->closed) pthread_cond_wait(&disk->arrived, &disk->lock);
        if (disk->count == 0) {
            pthread_mutex_unlock(&disk->lock);
            return NULL;
        }
        struct job job = disk->jobs[disk->first];
        disk->first = (disk->first + 1) % ROOM;
        disk->count--;
        pthread_mutex_unlock(&disk->lock);
        /* -ESTALE: a stop did not wait for us, and the client has its answer. */
        ublk_rs_request_complete(job.device, job.request, perform(disk, &job));
    }
}

static int submit(void *user, ublk_rs_device *device, uint64_t request, const ublk_rs_io *io) {
    struct disk *disk = user;
    pthread_mutex_lock(&disk->lock);
    int full = disk->count == ROOM;
    if (!full) {
        disk->jobs[(disk->first + disk->count++) % ROOM] = (struct job){device, request, *io};
        pthread_cond_signal(&disk->arrived);
    }
    pthread_mutex_unlock(&disk->lock);
    return full ? -ENOMEM : 0;
}

static int fail(const char *what, const ublk_rs_error *error) {
    fprintf(stderr, "file_disk: %s\n", error ? ublk_rs_error_message(error) : what);
    return EXIT_FAILURE;
}

int main(int argc, char **argv) {
    if (argc < 3) return fail("usage: file_disk FILE SIZE_IN_BYTES [OPTION=VALUE ...]", NULL);
    uint64_t size = strtoull(argv[2], NULL, 0);
    static struct disk disk = {.lock = PTHREAD_MUTEX_INITIALIZER, .arrived = PTHREAD_COND_INITIALIZER};
    disk.file = open(argv[1], O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    if (disk.file < 0 || ftruncate(disk.file, (off_t)size)) return fail(strerror(errno), NULL);

    ublk_rs_error *error = ublk_rs_error_new();
    ublk_rs_device *device = NULL;
    ublk_rs_backend backend = {.size = sizeof backend, .submit = submit};
    int code = ublk_rs_device_new(size, &backend, &disk, &device, error);
    if (code == 0) code = ublk_rs_device_set(device, "flush", "yes", error);
    if (code == 0) code = ublk_rs_device_set(device, "fua", "yes", error);
    if (code == 0) code = ublk_rs_device_set(device, "discard", "yes", error);
    for (int i = 3; code == 0 && i < argc; i++) {
        char *value = strchr(argv[i], '=');
        if (value == NULL) return fail("options are NAME=VALUE", NULL);
        *value = '\0';
        code = ublk_rs_device_set(device, argv[i], value + 1, error);
    }
    if (code != 0) return fail(NULL, error);

    /* Before the start, which may already read the disk, to look for partitions. */
    for (int i = 0; i < THREADS; i++)
        if (pthread_create(&disk.threads[i], NULL, serve, &disk)) return fail("no thread", NULL);
    if (ublk_rs_device_start(device, error)) return fail(NULL, error);
    puts(ublk_rs_device_path(device));
    fflush(stdout);
    while (getchar() != EOF) {
    }
    code = ublk_rs_device_stop(device, 30000, error);

    pthread_mutex_lock(&disk.lock);
    disk.closed = 1;
    pthread_cond_broadcast(&disk.arrived);
    pthread_mutex_unlock(&disk.lock);
    for (int i = 0; i < THREADS; i++) pthread_join(disk.threads[i], NULL);
    if (code != 0) fail(NULL, error);
    ublk_rs_device_free(device);
    ublk_rs_error_free(error);
    close(disk.file);
    return code ? EXIT_FAILURE : EXIT_SUCCESS;
}
