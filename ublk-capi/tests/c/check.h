/* What the C tests share: checks that say where they failed, a client of the disk, and that nothing is left. */

#ifndef CHECK_H
#define CHECK_H

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#ifdef __cplusplus
#include <atomic>
using std::atomic_int;
#else
#include <stdatomic.h>
#endif
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include <ublk_rs.h>

#define CHECK(what)                                                                                          \
    do {                                                                                                     \
        if (!(what)) {                                                                                       \
            fprintf(stderr, "%s:%d: %s is not so\n", __FILE__, __LINE__, #what);                             \
            abort();                                                                                         \
        }                                                                                                    \
    } while (0)

#define EQUAL(what, wanted)                                                                                  \
    do {                                                                                                     \
        long long is_ = (long long)(what), wanted_ = (long long)(wanted);                                    \
        if (is_ != wanted_) {                                                                                \
            fprintf(stderr, "%s:%d: %s is %lld, not %lld\n", __FILE__, __LINE__, #what, is_, wanted_);       \
            abort();                                                                                         \
        }                                                                                                    \
    } while (0)

/* A call that has to succeed; if it does not, in its own words. */
#define WORKS(call)                                                                                          \
    do {                                                                                                     \
        ublk_rs_error *error = ublk_rs_error_new();                                                          \
        int code_ = (call);                                                                                  \
        if (code_ != 0) {                                                                                    \
            fprintf(stderr, "%s:%d: %s: %d: %s\n", __FILE__, __LINE__, #call, code_,                         \
                    ublk_rs_error_message(error));                                                           \
            abort();                                                                                         \
        }                                                                                                    \
        ublk_rs_error_free(error);                                                                           \
    } while (0)

enum { BLOCK = 4096, SIZE = 16 << 20 };

static inline void nap(void) {
    struct timespec two_milliseconds = {0, 2000000};
    nanosleep(&two_milliseconds, NULL);
}

static inline double seconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + (double)now.tv_nsec / 1e9;
}

/* How much longer than natively things may take. */
static inline double scale(void) {
    const char *text = getenv("UBLK_TIMESCALE");
    return text ? atof(text) : 1;
}

static inline int entries(const char *path, const char *prefix) {
    int count = 0;
    DIR *dir = opendir(path);
    if (dir == NULL) return 0;
    for (struct dirent *entry; (entry = readdir(dir)) != NULL;)
        count += entry->d_name[0] != '.' && strncmp(entry->d_name, prefix, strlen(prefix)) == 0;
    closedir(dir);
    return count;
}

/* No device, thread or descriptor of ours is left. What ends by itself is given some time. */
static inline void nothing_left(int descriptors) {
    for (double until = seconds() + 10 * scale(); seconds() < until; nap())
        if (entries("/proc/self/task", "") == 1 && entries("/proc/self/fd", "") == descriptors) break;
    EQUAL(entries("/proc/self/task", ""), 1);
    EQUAL(entries("/proc/self/fd", ""), descriptors);
    EQUAL(entries("/sys/class/ublk-char", "ublkc"), 0);
}

/* One direct I/O on the disk: 0 or the errno that its client sees. */
static inline int disk_io(const char *path, int write_it, off_t offset, unsigned char fill, unsigned char *first) {
    void *buf = NULL;
    CHECK(posix_memalign(&buf, BLOCK, BLOCK) == 0);
    memset(buf, fill, BLOCK);
    int fd = open(path, O_RDWR | O_DIRECT | O_CLOEXEC);
    if (fd < 0) fd = open(path, O_RDONLY | O_DIRECT | O_CLOEXEC);
    CHECK(fd >= 0);
    ssize_t n = write_it ? pwrite(fd, buf, BLOCK, offset) : pread(fd, buf, BLOCK, offset);
    int failed = n < 0 ? errno : 0;
    CHECK(n < 0 || n == BLOCK);
    if (first != NULL) *first = *(unsigned char *)buf;
    close(fd);
    free(buf);
    return failed;
}

/* The same on a thread of its own. */
struct client {
    pthread_t thread;
    char path[64];
    int write_it, result;
    off_t offset;
    unsigned char first;
    atomic_int done;
};

static inline void *client_main(void *at) {
    struct client *client = (struct client *)at;
    client->result = disk_io(client->path, client->write_it, client->offset, 0x5a, &client->first);
    client->done = 1;
    return NULL;
}

static inline void client_start(struct client *client, const char *path, int write_it, off_t offset) {
    client->result = client->first = 0;
    client->done = 0;
    snprintf(client->path, sizeof client->path, "%s", path);
    client->write_it = write_it;
    client->offset = offset;
    CHECK(pthread_create(&client->thread, NULL, client_main, client) == 0);
}

/* Answers what the client asks for, and the kernel, which looks for partitions when it likes. */
static inline void client_dispatch(struct client *client, ublk_rs_device *device) {
    while (!client->done) {
        CHECK(ublk_rs_device_dispatch(device, 1) >= 0);
        nap();
    }
}

static inline int client_end(struct client *client) {
    CHECK(pthread_join(client->thread, NULL) == 0);
    return client->result;
}

#endif
