/* What the C tests share: checks that say where they failed, a client of the disk, and that nothing is left. */

#ifndef CHECK_H
#define CHECK_H

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#ifdef __cplusplus
#include <atomic>
using std::atomic_int;
#else
#include <stdatomic.h>
#endif
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
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

/*
 * A client of the disk, which makes one direct I/O: in a process of its own, so that a test which fails can end though its
 * client waits for it. The child allocates nothing: another thread may have held the allocator's lock.
 */
struct client_answer {
    int result;
    unsigned char first;
};

struct client {
    pid_t pid;
    int ended, result;
    unsigned char first;
    struct client_answer *answer;
};

static inline void client_start_with(struct client *client, const char *path, int write_it, off_t offset,
                                     unsigned char fill) {
    static unsigned char memory[2 * BLOCK];
    memset(client, 0, sizeof *client);
    client->answer = (struct client_answer *)mmap(NULL, sizeof *client->answer, PROT_READ | PROT_WRITE,
                                                  MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    CHECK(client->answer != MAP_FAILED);
    client->pid = fork();
    CHECK(client->pid >= 0);
    if (client->pid != 0) return;
    unsigned char *buf = memory + (BLOCK - (uintptr_t)memory % BLOCK);
    memset(buf, fill, BLOCK);
    int fd = open(path, O_RDWR | O_DIRECT);
    if (fd < 0) fd = open(path, O_RDONLY | O_DIRECT);
    if (fd < 0) _exit(1);
    ssize_t n = write_it ? pwrite(fd, buf, BLOCK, offset) : pread(fd, buf, BLOCK, offset);
    client->answer->result = n < 0 ? errno : n == BLOCK ? 0 : EMSGSIZE;
    client->answer->first = buf[0];
    close(fd);
    _exit(0);
}

static inline void client_start(struct client *client, const char *path, int write_it, off_t offset) {
    client_start_with(client, path, write_it, offset, 0x5a);
}

/* Waits for its end, or only looks. */
static inline int client_ended(struct client *client, int options) {
    int status = 0;
    if (client->ended) return 1;
    pid_t pid = waitpid(client->pid, &status, options);
    if (pid == 0) return 0;
    EQUAL(pid, client->pid);
    EQUAL(status, 0);
    client->ended = 1;
    client->result = client->answer->result;
    client->first = client->answer->first;
    munmap(client->answer, sizeof *client->answer);
    return 1;
}

/* Answers what the client asks for, and the kernel, which looks for partitions when it likes. */
static inline void client_dispatch(struct client *client, ublk_rs_device *device) {
    while (!client_ended(client, WNOHANG)) {
        CHECK(ublk_rs_device_dispatch(device, 1) >= 0);
        nap();
    }
}

/* 0 or the errno that the client has got. */
static inline int client_end(struct client *client) {
    client_ended(client, 0);
    return client->result;
}

/* One direct I/O, waited for. */
static inline int disk_io(const char *path, int write_it, off_t offset, unsigned char fill, unsigned char *first) {
    struct client client;
    client_start_with(&client, path, write_it, offset, fill);
    int result = client_end(&client);
    if (first != NULL) *first = client.first;
    return result;
}

#endif
