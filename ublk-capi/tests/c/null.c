/*
 * A disk that keeps nothing, for `make bench`: `null calls|submit [OPTION=VALUE ...]`. Prints the disk and serves it until
 * the end of stdin.
 */

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ublk_rs.h>

static int null_read(void *user, void *buf, size_t length, uint64_t offset) {
    (void)user, (void)buf, (void)length, (void)offset; /* it arrives zeroed */
    return 0;
}

static int null_write(void *user, const void *data, size_t length, uint64_t offset, uint32_t flags) {
    (void)user, (void)data, (void)length, (void)offset, (void)flags;
    return 0;
}

static int null_flush(void *user) {
    (void)user;
    return 0;
}

static int null_submit(void *user, ublk_rs_device *device, uint64_t request, const ublk_rs_io *io) {
    (void)user, (void)io;
    ublk_rs_request_complete(device, request, 0);
    return 0;
}

int main(int argc, char **argv) {
    ublk_rs_backend calls = {.size = sizeof calls, .read = null_read, .write = null_write, .flush = null_flush};
    ublk_rs_backend submit = {.size = sizeof submit, .submit = null_submit};
    int is_submit = argc > 1 && strcmp(argv[1], "submit") == 0;
    ublk_rs_error *error = ublk_rs_error_new();
    ublk_rs_device *device = NULL;
    int code = ublk_rs_device_new(1 << 30, is_submit ? &submit : &calls, NULL, &device, error);
    for (int i = 2; code == 0 && i < argc; i++) {
        char *value = strchr(argv[i], '=');
        if (value == NULL) return 2;
        *value = '\0';
        code = ublk_rs_device_set(device, argv[i], value + 1, error);
    }
    if (code == 0) code = ublk_rs_device_start(device, error);
    if (code == 0) {
        puts(ublk_rs_device_path(device));
        fflush(stdout);
        while (getchar() != EOF) {
        }
        code = ublk_rs_device_stop(device, 30000, error);
    }
    if (code) fprintf(stderr, "null: %s\n", ublk_rs_error_message(error));
    ublk_rs_device_free(device);
    ublk_rs_error_free(error);
    return code != 0;
}
