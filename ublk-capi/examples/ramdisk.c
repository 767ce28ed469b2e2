/* A disk in memory, in 30 lines: `ramdisk [SIZE_IN_BYTES]`. */

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ublk_rs.h>

static int ram_read(void *ram, void *buf, size_t length, uint64_t offset) {
    memcpy(buf, (char *)ram + offset, length);
    return 0;
}

static int ram_write(void *ram, const void *data, size_t length, uint64_t offset, uint32_t flags) {
    (void)flags;
    memcpy((char *)ram + offset, data, length);
    return 0;
}

int main(int argc, char **argv) {
    uint64_t size = argc > 1 ? strtoull(argv[1], NULL, 0) : 64 << 20;
    ublk_rs_backend ram = {.size = sizeof ram, .read = ram_read, .write = ram_write, .destroy = free};
    ublk_rs_error *error = ublk_rs_error_new();
    ublk_rs_device *disk = NULL;
    if (ublk_rs_device_new(size, &ram, calloc(1, size), &disk, error) == 0 && ublk_rs_device_start(disk, error) == 0) {
        puts(ublk_rs_device_path(disk));
        fflush(stdout);
        ublk_rs_device_wait(disk, UBLK_RS_FOREVER, error);
    }
    int failed = ublk_rs_error_code(error) != 0;
    if (failed) fprintf(stderr, "ramdisk: %s\n", ublk_rs_error_message(error));
    ublk_rs_device_free(disk);
    ublk_rs_error_free(error);
    return failed;
}
