/*
 * A disk in a program with an event loop of its own: `epoll_disk [SIZE_IN_BYTES]`.
 *
 * One thread does everything: the loop watches stdin and the device's descriptor, and ublk_rs_device_dispatch() calls the
 * backend. Serves until the end of stdin, and stops the disk when nobody uses it.
 */

#define _GNU_SOURCE
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <unistd.h>

#include <ublk_rs.h>

static int mem_read(void *memory, void *buf, size_t length, uint64_t offset) {
    memcpy(buf, (char *)memory + offset, length);
    return 0;
}

static int mem_write(void *memory, const void *data, size_t length, uint64_t offset, uint32_t flags) {
    (void)flags;
    memcpy((char *)memory + offset, data, length);
    return 0;
}

static int mem_write_zeroes(void *memory, uint64_t offset, uint64_t length, uint32_t flags) {
    (void)flags;
    memset((char *)memory + offset, 0, (size_t)length);
    return 0;
}

static void complain(const ublk_rs_error *error) {
    fprintf(stderr, "epoll_disk: %s\n", ublk_rs_error_message(error));
}

static int watch(int loop, int fd) {
    struct epoll_event event = {.events = EPOLLIN, .data = {.fd = fd}};
    return epoll_ctl(loop, EPOLL_CTL_ADD, fd, &event);
}

int main(int argc, char **argv) {
    uint64_t size = argc > 1 ? strtoull(argv[1], NULL, 0) : 64 << 20;
    ublk_rs_backend backend = {
        .size = sizeof backend, .read = mem_read, .write = mem_write, .write_zeroes = mem_write_zeroes, .destroy = free};
    ublk_rs_error *error = ublk_rs_error_new();
    ublk_rs_device *device = NULL;
    if (ublk_rs_device_new(size, &backend, calloc(1, (size_t)size), &device, error) ||
        ublk_rs_device_set(device, "dispatch", "yes", error) || ublk_rs_device_start(device, error)) {
        complain(error);
        return EXIT_FAILURE;
    }
    puts(ublk_rs_device_path(device));
    fflush(stdout);

    int loop = epoll_create1(EPOLL_CLOEXEC), disk = ublk_rs_device_fd(device), going = 1;
    if (loop < 0 || watch(loop, STDIN_FILENO) || watch(loop, disk)) {
        perror("epoll_disk");
        return EXIT_FAILURE;
    }
    while (going) {
        struct epoll_event events[8];
        int count = epoll_wait(loop, events, 8, -1);
        for (int i = 0; i < count; i++) {
            char input[512];
            if (events[i].data.fd == disk)
                going = ublk_rs_device_dispatch(device, 0) != -ENODEV; /* ended, for instance stopped by somebody */
            else if (read(STDIN_FILENO, input, sizeof input) <= 0)
                going = 0;
        }
    }
    close(loop);
    /* This is the thread that dispatches: it goes on doing so while it waits. */
    int code = ublk_rs_device_stop(device, 30000, error);
    if (code) complain(error);
    ublk_rs_device_free(device);
    ublk_rs_error_free(error);
    return code ? EXIT_FAILURE : EXIT_SUCCESS;
}
