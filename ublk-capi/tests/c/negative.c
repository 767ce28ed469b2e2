/*
 * What must not be done to libublk_rs, and what it answers: `negative CASE`, or `negative list`.
 *
 * Each case ends with nothing left: no device, thread or descriptor.
 */

#define _GNU_SOURCE
#include "check.h"

#if !UBLK_RS_HAVE_SUBMIT || !UBLK_RS_HAVE_DISPATCH || !UBLK_RS_HAVE_RECOVERY || !UBLK_RS_HAVE_ZONED || \
    !UBLK_RS_HAVE_INTEGRITY || !UBLK_RS_HAVE_REGISTER_SQE || !UBLK_RS_HAVE_SHARE || UBLK_RS_VERSION < 0x000100
#error "the header does not say what it has"
#endif

/* ---- a backend that is told what to do ---- */

static struct {
    atomic_int destroyed, read_code, write_code, flush_code, calls;
    atomic_ullong held[64];
    atomic_uint holding;
    void *buffer;
    size_t length;
    int keep, twice;
    atomic_int second;
    ublk_rs_device *device, *other;
} it;

static void destroy(void *user) {
    CHECK(user == &it);
    it.destroyed++;
}

/* Fails only where tests look: the kernel reads other places when it likes, to find partitions. */
static int do_read(void *user, void *buf, size_t length, uint64_t offset) {
    CHECK(user == &it);
    it.calls++;
    memset(buf, 0x77, length);
    return offset == 8 << 20 ? it.read_code : 0;
}

static int do_write(void *user, const void *data, size_t length, uint64_t offset, uint32_t flags) {
    CHECK(user == &it && data != NULL);
    (void)length, (void)offset, (void)flags;
    return it.write_code;
}

static int do_flush(void *user) {
    CHECK(user == &it);
    return it.flush_code;
}

/* Keeps requests of the block at 8 MiB, and answers all others. */
static int do_submit(void *user, ublk_rs_device *device, uint64_t request, const ublk_rs_io *io) {
    CHECK(user == &it && request != 0 && io->size >= sizeof *io);
    if (it.keep && io->op == UBLK_RS_OP_READ && io->offset == 8 << 20) {
        EQUAL(ublk_rs_request_buffer(device, request, &it.buffer, &it.length), 0);
        EQUAL(it.length, io->length);
        it.device = device;
        it.held[it.holding] = request;
        it.holding++;
        return 0;
    }
    if (it.read_code != 0 && io->op == UBLK_RS_OP_READ && io->offset == 8 << 20) return it.read_code;
    EQUAL(ublk_rs_request_complete(device, request, 0), 0);
    if (it.twice) it.second = ublk_rs_request_complete(device, request, 0);
    return 0;
}

static const ublk_rs_backend CALLS = {
    .size = sizeof CALLS, .read = do_read, .write = do_write, .flush = do_flush, .destroy = destroy};
static const ublk_rs_backend SUBMIT = {.size = sizeof SUBMIT, .submit = do_submit, .destroy = destroy};

static ublk_rs_device *made(const ublk_rs_backend *backend) {
    ublk_rs_device *device = NULL;
    WORKS(ublk_rs_device_new(SIZE, backend, &it, &device, error));
    CHECK(device != NULL);
    return device;
}

static ublk_rs_device *started(const ublk_rs_backend *backend) {
    ublk_rs_device *device = made(backend);
    WORKS(ublk_rs_device_start(device, error));
    return device;
}

static void freed(ublk_rs_device *device) {
    int before = it.destroyed;
    EQUAL(ublk_rs_device_free(device), 0);
    EQUAL(it.destroyed, before + 1);
}

static uint64_t await_held(unsigned count) {
    double until = seconds() + 20 * scale();
    while (it.holding < count && seconds() < until) nap();
    CHECK(it.holding >= count);
    return it.held[count - 1];
}

/* ---- cases ---- */

static void nulls(void) {
    ublk_rs_device *device = made(&CALLS), *none = (ublk_rs_device *)1;
    ublk_rs_error *error = ublk_rs_error_new();
    uint32_t number = 7, ids[4];
    size_t count = 7, length = 7;
    void *buf = NULL;
    char text[64], sqe[64];
    ublk_rs_stats stats = {.size = sizeof stats};
    ublk_rs_device_info info = {.size = sizeof info};
    ublk_rs_control *control = NULL;

    EQUAL(ublk_rs_device_new(SIZE, NULL, &it, &none, error), -EINVAL);
    CHECK(none == (ublk_rs_device *)1); /* written on success only */
    CHECK(strstr(ublk_rs_error_message(error), "NULL") != NULL);
    EQUAL(ublk_rs_error_code(error), -EINVAL);
    EQUAL(ublk_rs_error_kind(error), UBLK_RS_KIND_INVALID_PARAMETER);
    EQUAL(ublk_rs_device_new(SIZE, &CALLS, &it, NULL, error), -EINVAL);
    EQUAL(ublk_rs_device_new(SIZE, NULL, &it, &none, NULL), -EINVAL); /* no error object: as well */
    EQUAL(ublk_rs_device_new_target(NULL, &none, error), -EINVAL);
    EQUAL(ublk_rs_device_new_target("null", NULL, error), -EINVAL);
    EQUAL(ublk_rs_device_set(NULL, "queues", "1", error), -EINVAL);
    EQUAL(ublk_rs_device_set(device, NULL, "1", error), -EINVAL);
    EQUAL(ublk_rs_device_set(device, "queues", NULL, error), -EINVAL);
    EQUAL(ublk_rs_device_set_number(NULL, "queues", 1, error), -EINVAL);
    EQUAL(ublk_rs_device_set_number(device, NULL, 1, error), -EINVAL);
    EQUAL(ublk_rs_device_get(NULL, "queues", sizeof text, text, error), -EINVAL);
    EQUAL(ublk_rs_device_get(device, NULL, sizeof text, text, error), -EINVAL);
    EQUAL(ublk_rs_device_get(device, "queues", sizeof text, NULL, error), -EINVAL);
    EQUAL(ublk_rs_device_set_workers(NULL, NULL, error), -EINVAL);
    EQUAL(ublk_rs_device_set_workers(device, NULL, error), 0);
    EQUAL(ublk_rs_device_start(NULL, error), -EINVAL);
    EQUAL(ublk_rs_device_recover(NULL, 0, error), -EINVAL);
    EQUAL(ublk_rs_device_wait(NULL, 0, error), -EINVAL);
    EQUAL(ublk_rs_device_stop(NULL, 0, error), -EINVAL);
    EQUAL(ublk_rs_device_stop_force(NULL, 0, error), -EINVAL);
    EQUAL(ublk_rs_device_halt(NULL, 0, error), -EINVAL);
    EQUAL(ublk_rs_device_hand_over(NULL, 0, error), -EINVAL);
    EQUAL(ublk_rs_device_resize(NULL, SIZE, error), -EINVAL);
    EQUAL(ublk_rs_device_share(NULL, 0, 0, &number, error), -EINVAL);
    EQUAL(ublk_rs_device_share(device, 0, 0, NULL, error), -EINVAL);
    EQUAL(number, 7);
    EQUAL(ublk_rs_device_unshare(NULL, 0, error), -EINVAL);
    EQUAL(ublk_rs_device_fd(NULL), -EINVAL);
    EQUAL(ublk_rs_device_dispatch(NULL, 0), -EINVAL);
    CHECK(ublk_rs_device_path(NULL) == NULL);
    EQUAL(ublk_rs_device_id(NULL), -1);
    EQUAL(ublk_rs_device_features(NULL), 0);
    EQUAL(ublk_rs_device_size(NULL), 0);
    EQUAL(ublk_rs_device_ending(NULL), 0);
    EQUAL(ublk_rs_device_warnings(NULL, sizeof text, text), -EINVAL);
    EQUAL(ublk_rs_device_warnings(device, sizeof text, NULL), -EINVAL);
    EQUAL(ublk_rs_device_stats(NULL, 0, &stats, error), -EINVAL);
    EQUAL(ublk_rs_request_complete(NULL, 1, 0), -EINVAL);
    EQUAL(ublk_rs_request_complete_append(NULL, 1, 0), -EINVAL);
    EQUAL(ublk_rs_request_complete_report(NULL, 1, NULL, 0), -EINVAL);
    EQUAL(ublk_rs_request_complete_report(device, 1, NULL, 1), -EINVAL);
    EQUAL(ublk_rs_request_buffer(NULL, 1, &buf, &length), -EINVAL);
    EQUAL(ublk_rs_request_buffer(device, 1, NULL, &length), -EINVAL);
    EQUAL(ublk_rs_request_buffer(device, 1, &buf, NULL), -EINVAL);
    EQUAL(ublk_rs_request_put(NULL, 1, 0, text, 1), -EINVAL);
    EQUAL(ublk_rs_request_put(device, 1, 0, NULL, 1), -EINVAL);
    EQUAL(ublk_rs_request_metadata(device, 1, NULL, 1), -EINVAL);
    EQUAL(ublk_rs_request_put_metadata(device, 1, NULL, 1), -EINVAL);
    EQUAL(ublk_rs_request_metadata(NULL, 1, text, 1), -EINVAL);
    EQUAL(ublk_rs_request_put_metadata(NULL, 1, text, 1), -EINVAL);
    EQUAL(ublk_rs_request_register_sqe(NULL, 1, 0, sqe), -EINVAL);
    EQUAL(ublk_rs_request_register_sqe(device, 1, 0, NULL), -EINVAL);
    EQUAL(ublk_rs_request_unregister_sqe(NULL, 1, 0, sqe), -EINVAL);
    EQUAL(ublk_rs_request_unregister_sqe(device, 1, 0, NULL), -EINVAL);
    EQUAL(ublk_rs_workers_new(1, NULL, error), -EINVAL);
    EQUAL(ublk_rs_control_open(NULL, error), -EINVAL);
    EQUAL(ublk_rs_control_features(NULL), 0);
    EQUAL(ublk_rs_control_list(NULL, ids, 4, &count, error), -EINVAL);
    EQUAL(ublk_rs_control_info(NULL, 0, &info, error), -EINVAL);
    EQUAL(ublk_rs_control_delete(NULL, 0, 0, error), -EINVAL);
    EQUAL(ublk_rs_control_quiesce(NULL, 0, 0, error), -EINVAL);
    EQUAL(ublk_rs_control_holders(NULL, 0, sizeof text, text), -EINVAL);
    WORKS(ublk_rs_control_open(&control, error));
    EQUAL(ublk_rs_control_list(control, NULL, 4, &count, error), -EINVAL);
    EQUAL(ublk_rs_control_list(control, ids, 4, NULL, error), -EINVAL);
    EQUAL(ublk_rs_control_list(control, NULL, 0, &count, error), 0);
    EQUAL(count, 0);
    EQUAL(ublk_rs_control_info(control, 4711, NULL, error), -ENODEV);
    EQUAL(ublk_rs_control_info(control, 4711, &info, error), -ENODEV);
    EQUAL(ublk_rs_error_kind(error), UBLK_RS_KIND_NO_SUCH_DEVICE);
    EQUAL(ublk_rs_error_device(error), 4711);
    EQUAL(ublk_rs_control_delete(control, 4711, 1000, error), -ENODEV);
    EQUAL(ublk_rs_control_holders(control, 0, 0, text), -EINVAL);
    EQUAL(ublk_rs_control_holders(control, 0, 8, NULL), -EINVAL);
    ublk_rs_control_free(control);
    /* NULL is nothing to those that end something, and an error object that is NULL has nothing to say. */
    ublk_rs_control_free(NULL);
    ublk_rs_workers_free(NULL);
    ublk_rs_error_free(NULL);
    EQUAL(ublk_rs_device_free(NULL), 0);
    EQUAL(ublk_rs_error_code(NULL), 0);
    EQUAL(ublk_rs_error_kind(NULL), UBLK_RS_KIND_NONE);
    EQUAL(ublk_rs_error_errno(NULL), 0);
    EQUAL(ublk_rs_error_device(NULL), -1);
    EQUAL(strlen(ublk_rs_error_message(NULL)) + strlen(ublk_rs_error_remedy(NULL)), 0);
    EQUAL(ublk_rs_set_log(NULL, NULL, 99), -EINVAL);
    EQUAL(it.destroyed, 0);
    freed(device);
    ublk_rs_error_free(error);
}

static void sizes(void) {
    ublk_rs_error *error = ublk_rs_error_new();
    ublk_rs_device *device = NULL;
    struct {
        ublk_rs_backend known;
        void *unknown;
    } table = {.known = CALLS};
    const size_t wrong[] = {0, 1, 8, sizeof(ublk_rs_backend) - 1, 12, 1 << 20, SIZE_MAX};
    for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++) {
        table.known.size = wrong[i];
        EQUAL(ublk_rs_device_new(SIZE, &table.known, &it, &device, error), -EINVAL);
    }
    /* A later program's table, of which nothing is used that this library does not know; and one where something is. */
    table.known.size = sizeof table;
    WORKS(ublk_rs_device_new(SIZE, &table.known, &it, &device, error));
    freed(device);
    table.unknown = &table;
    EQUAL(ublk_rs_device_new(SIZE, &table.known, &it, &device, error), -EINVAL);
    /* An earlier program's: what it does not have is not looked at. */
    table.known.size = offsetof(ublk_rs_backend, flush);
    WORKS(ublk_rs_device_new(SIZE, &table.known, &it, &device, error));
    EQUAL(it.destroyed, 1);
    EQUAL(ublk_rs_device_free(device), 0);
    EQUAL(it.destroyed, 1);
    /* Tables that make no sense. */
    ublk_rs_backend odd = {.size = sizeof odd, .write = do_write};
    EQUAL(ublk_rs_device_new(SIZE, &odd, &it, &device, error), -EINVAL);
    odd = (ublk_rs_backend){.size = sizeof odd, .read = do_read, .submit = do_submit};
    EQUAL(ublk_rs_device_new(SIZE, &odd, &it, &device, error), -EINVAL);
    CHECK(strstr(ublk_rs_error_message(error), "excludes") != NULL);
    odd = (ublk_rs_backend){.size = sizeof odd, .submit = do_submit, .flush = do_flush};
    EQUAL(ublk_rs_device_new(SIZE, &odd, &it, &device, error), -EINVAL);

    device = started(&CALLS);
    ublk_rs_stats stats = {.size = 0};
    EQUAL(ublk_rs_device_stats(device, UBLK_RS_ALL_QUEUES, NULL, error), -EINVAL);
    EQUAL(ublk_rs_device_stats(device, UBLK_RS_ALL_QUEUES, &stats, error), -EINVAL);
    EQUAL(ublk_rs_device_stats(device, 99, &stats, error), -EINVAL);
    /* An earlier program's struct is not written beyond its end; a later one's is zeroed there. */
    stats.size = offsetof(ublk_rs_stats, write);
    stats.write.completed = 42;
    WORKS(ublk_rs_device_stats(device, UBLK_RS_ALL_QUEUES, &stats, error));
    EQUAL(stats.write.completed, 42);
    EQUAL(stats.size, offsetof(ublk_rs_stats, write));
    struct {
        ublk_rs_stats known;
        uint64_t later;
    } larger = {.known = {.size = sizeof larger}, .later = 42};
    WORKS(ublk_rs_device_stats(device, 0, &larger.known, error));
    EQUAL(larger.later, 0);
    freed(device);
    ublk_rs_error_free(error);
}

static void options(void) {
    ublk_rs_error *error = ublk_rs_error_new();
    ublk_rs_device *device = made(&CALLS);
    char text[64], name[64];
    for (size_t i = 0; i < ublk_rs_option_count(); i++) {
        CHECK(ublk_rs_option_type(i) >= UBLK_RS_TYPE_NUMBER && ublk_rs_option_type(i) <= UBLK_RS_TYPE_FEATURES);
        CHECK(strlen(ublk_rs_option_doc(i)) > 0);
        WORKS(ublk_rs_device_get(device, ublk_rs_option_name(i), sizeof text, text, error));
        if (strcmp(ublk_rs_option_name(i), "size") != 0) CHECK(strcmp(text, ublk_rs_option_default(i)) == 0);
    }
    CHECK(ublk_rs_option_name(SIZE_MAX) == NULL && ublk_rs_option_doc(SIZE_MAX) == NULL);
    CHECK(ublk_rs_option_default(ublk_rs_option_count()) == NULL);
    EQUAL(ublk_rs_option_type(ublk_rs_option_count()), 0);
    CHECK(ublk_rs_target_name(ublk_rs_target_count()) == NULL);
    EQUAL(ublk_rs_device_set(device, "luck", "1", error), -EINVAL);
    EQUAL(ublk_rs_device_set_number(device, "luck", 1, error), -EINVAL);
    EQUAL(ublk_rs_device_set(device, "queues", "many", error), -EINVAL);
    EQUAL(ublk_rs_device_set(device, "queues", "\xff\xfe", error), -EINVAL);
    EQUAL(ublk_rs_device_set(device, "pin", "perhaps", error), -EINVAL);
    EQUAL(ublk_rs_device_set_number(device, "pin", 2, error), -EINVAL);
    EQUAL(ublk_rs_device_set_number(device, "data_path", 1, error), -EINVAL);
    EQUAL(ublk_rs_device_set(device, "require", "LUCK", error), -EINVAL);
    EQUAL(ublk_rs_device_get(device, "max_io_bytes", 2, text, error), -ERANGE);
    WORKS(ublk_rs_device_set(device, "max_io_bytes", "1M", error));
    WORKS(ublk_rs_device_get(device, "max_io_bytes", sizeof text, text, error));
    CHECK(strcmp(text, "1048576") == 0);
    /* What only shows when it is put together is the start's to say, and it can be mended. */
    const char *wrong[][2] = {{"queues", "99999"},          {"queue_depth", "0"}, {"logical_block_size", "1000"},
                              {"data_path", "magic"},       {"size", "1000"},     {"threads", "5000"},
                              {"segment_max_bytes", "4096"}, {"fua", "yes"}};
    for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++) {
        ublk_rs_device *odd = made(i == 7 ? &SUBMIT : &CALLS);
        WORKS(ublk_rs_device_set(odd, wrong[i][0], wrong[i][1], error));
        EQUAL(ublk_rs_device_start(odd, error), -EINVAL);
        EQUAL(entries("/sys/class/ublk-char", "ublkc"), 0);
        freed(odd);
    }
    snprintf(name, sizeof name, "zone_bytes");
    WORKS(ublk_rs_device_set(device, "queue_depth", "0", error));
    EQUAL(ublk_rs_device_start(device, error), -EINVAL);
    CHECK(strstr(ublk_rs_error_message(error), "queue") != NULL);
    WORKS(ublk_rs_device_set(device, "queue_depth", "8", error));
    WORKS(ublk_rs_device_start(device, error));
    freed(device);
    EQUAL(ublk_rs_device_new_target("luck", &device, error), -EINVAL);
    CHECK(strstr(ublk_rs_error_message(error), "null, mem, file") != NULL);
    ublk_rs_error_free(error);
}

static void order(void) {
    ublk_rs_error *error = ublk_rs_error_new();
    ublk_rs_device *device = made(&CALLS);
    ublk_rs_stats stats = {.size = sizeof stats};
    uint32_t number = 0;
    char text[256];
    CHECK(ublk_rs_device_path(device) == NULL);
    EQUAL(ublk_rs_device_id(device), -1);
    EQUAL(ublk_rs_device_ending(device), 0);
    EQUAL(ublk_rs_device_wait(device, 0, error), -EBADFD);
    EQUAL(ublk_rs_error_kind(error), UBLK_RS_KIND_WRONG_STATE);
    EQUAL(ublk_rs_device_stop(device, 0, error), -EBADFD);
    EQUAL(ublk_rs_device_stop_force(device, 0, error), -EBADFD);
    EQUAL(ublk_rs_device_halt(device, 0, error), -EBADFD);
    EQUAL(ublk_rs_device_hand_over(device, 0, error), -EBADFD);
    EQUAL(ublk_rs_device_resize(device, SIZE, error), -EBADFD);
    EQUAL(ublk_rs_device_share(device, 0, 0, &number, error), -EBADFD);
    EQUAL(ublk_rs_device_unshare(device, 0, error), -EBADFD);
    EQUAL(ublk_rs_device_stats(device, 0, &stats, error), -EBADFD);
    EQUAL(ublk_rs_device_warnings(device, sizeof text, text), -EBADFD);
    EQUAL(ublk_rs_device_fd(device), -EBADFD);
    EQUAL(ublk_rs_device_dispatch(device, 0), -EBADFD);
    EQUAL(ublk_rs_device_recover(device, 4711, error), -ENODEV);

    WORKS(ublk_rs_device_start(device, error));
    CHECK(strncmp(ublk_rs_device_path(device), "/dev/ublkb", 10) == 0);
    EQUAL(ublk_rs_device_size(device), SIZE);
    EQUAL(ublk_rs_device_start(device, error), -EBADFD);
    EQUAL(ublk_rs_device_recover(device, 0, error), -EBADFD);
    EQUAL(ublk_rs_device_set(device, "queues", "2", error), -EBADFD);
    EQUAL(ublk_rs_device_set_number(device, "queues", 2, error), -EBADFD);
    EQUAL(ublk_rs_device_set_workers(device, NULL, error), -EBADFD);
    EQUAL(ublk_rs_device_hand_over(device, 0, error), -EOPNOTSUPP);
    EQUAL(ublk_rs_device_wait(device, 1, error), -ETIMEDOUT);
    CHECK(ublk_rs_device_warnings(device, sizeof text, text) >= 0);
    EQUAL(ublk_rs_device_fd(device), -EBADFD); /* without dispatch */
    EQUAL(ublk_rs_device_unshare(device, 1 << 20, error), -ENOENT);

    WORKS(ublk_rs_device_stop(device, (uint64_t)(20000 * scale()), error));
    EQUAL(ublk_rs_device_ending(device), UBLK_RS_ENDING_STOPPED);
    EQUAL(ublk_rs_device_wait(device, 0, error), 0);
    EQUAL(ublk_rs_device_stop(device, 0, error), 0); /* it has ended: nothing to do */
    EQUAL(ublk_rs_device_start(device, error), -EBADFD);
    EQUAL(ublk_rs_device_halt(device, 0, error), -EBADFD);
    CHECK(ublk_rs_device_path(device) != NULL);
    WORKS(ublk_rs_device_stats(device, UBLK_RS_ALL_QUEUES, &stats, error));
    EQUAL(stats.rejected, 0);
    freed(device);
    ublk_rs_error_free(error);
}

static void completions(void) {
    struct client client;
    char data[16] = "0123456789abcde", sqe[64];
    void *buf = NULL;
    size_t length = 0;
    it.keep = 1;
    ublk_rs_device *device = started(&SUBMIT);
    EQUAL(ublk_rs_request_complete(device, 0, 0), -ESTALE);
    EQUAL(ublk_rs_request_complete(device, 1, 0), -ESTALE);
    EQUAL(ublk_rs_request_complete(device, UINT64_MAX, 0), -ESTALE);

    client_start(&client, ublk_rs_device_path(device), 0, 8 << 20);
    uint64_t request = await_held(1);
    CHECK(it.buffer != NULL && it.length == BLOCK);
    EQUAL(ublk_rs_request_buffer(device, request, &buf, &length), 0);
    CHECK(buf == it.buffer && length == BLOCK);
    EQUAL(ublk_rs_request_put(device, request, BLOCK, data, 1), -EINVAL);
    EQUAL(ublk_rs_request_put(device, request, UINT64_MAX, data, 2), -EINVAL);
    EQUAL(ublk_rs_request_put(device, request, 0, data, 16), 0);
    EQUAL(ublk_rs_request_metadata(device, request, data, 16), -EINVAL);
    EQUAL(ublk_rs_request_register_sqe(device, request, 0, sqe), -EOPNOTSUPP);
    EQUAL(ublk_rs_request_complete(device, request ^ (1ull << 30), 0), -ESTALE); /* another generation */
    EQUAL(ublk_rs_request_complete(device, request, 0), 0);
    EQUAL(client_end(&client), 0);
    EQUAL(client.first, '0');
    EQUAL(ublk_rs_request_complete(device, request, 0), -ESTALE); /* a second time */
    EQUAL(ublk_rs_request_put(device, request, 0, data, 1), -ESTALE);
    EQUAL(ublk_rs_request_buffer(device, request, &buf, &length), -ESTALE);

    /* A result that is none: the client gets EIO, and the program is told. */
    const int results[] = {1, BLOCK, -5000, INT32_MIN};
    for (unsigned i = 0; i < 4; i++) {
        client_start(&client, ublk_rs_device_path(device), 0, 8 << 20);
        EQUAL(ublk_rs_request_complete(device, await_held(i + 2), results[i]), -EINVAL);
        EQUAL(client_end(&client), EIO);
    }
    /* Of the wrong kind. */
    client_start(&client, ublk_rs_device_path(device), 0, 8 << 20);
    EQUAL(ublk_rs_request_complete_append(device, await_held(6), 0), 0);
    EQUAL(client_end(&client), EIO);
    /* What a client sees is what the program said. */
    client_start(&client, ublk_rs_device_path(device), 0, 8 << 20);
    EQUAL(ublk_rs_request_complete(device, await_held(7), -ENOSPC), 0);
    EQUAL(client_end(&client), ENOSPC);
    /* Refused by submit itself; and completed by it twice. */
    it.keep = 0;
    it.read_code = -ENODATA;
    EQUAL(disk_io(ublk_rs_device_path(device), 0, 8 << 20, 0, NULL), ENODATA);
    it.read_code = 22;
    EQUAL(disk_io(ublk_rs_device_path(device), 0, 8 << 20, 0, NULL), EIO);
    it.read_code = 0;
    it.twice = 1;
    EQUAL(disk_io(ublk_rs_device_path(device), 0, 0, 0, NULL), 0);
    EQUAL(it.second, -ESTALE);
    freed(device);
}

static void never_completed(void) {
    struct client client;
    it.keep = 1;
    ublk_rs_device *device = started(&SUBMIT);
    client_start(&client, ublk_rs_device_path(device), 0, 8 << 20);
    uint64_t request = await_held(1);
    double began = seconds();
    WORKS(ublk_rs_device_stop_force(device, 300, error));
    CHECK(seconds() - began < 20 * scale());
    EQUAL(client_end(&client), EIO);
    memset(it.buffer, 0xee, it.length); /* still there, and nobody else's */
    char byte = 1;
    EQUAL(ublk_rs_request_put(device, request, 0, &byte, 1), 0);
    EQUAL(ublk_rs_request_complete(device, request, 0), -ESTALE);
    EQUAL(ublk_rs_request_complete(device, request, 0), -ESTALE);
    ublk_rs_stats stats = {.size = sizeof stats};
    WORKS(ublk_rs_device_stats(device, UBLK_RS_ALL_QUEUES, &stats, error));
    EQUAL(stats.revoked, 1);
    freed(device);

    /* The same, given up with the device. */
    it.holding = 0;
    device = started(&SUBMIT);
    client_start(&client, ublk_rs_device_path(device), 0, 8 << 20);
    await_held(1);
    freed(device);
    EQUAL(client_end(&client), EIO);
}

static int told;
static void tell(void *user, uint32_t level, const char *message) {
    CHECK(user == &told && level == UBLK_RS_LOG_WARN);
    if (strstr(message, "neither 0 nor -errno") != NULL) told++;
}

static void codes(void) {
    ublk_rs_device *device = started(&CALLS);
    const char *path = ublk_rs_device_path(device);
    EQUAL(ublk_rs_set_log(tell, &told, UBLK_RS_LOG_WARN), 0);
    const int given[] = {1, 4096, -4096, -5000, INT32_MIN, INT32_MAX}, errors[] = {EIO, ENOSPC, ENODATA, ETIMEDOUT, EILSEQ};
    for (size_t i = 0; i < sizeof given / sizeof *given; i++) {
        it.read_code = given[i];
        EQUAL(disk_io(path, 0, 8 << 20, 0, NULL), EIO);
        EQUAL(told, i + 1);
    }
    EQUAL(ublk_rs_set_log(NULL, NULL, 0), 0);
    for (size_t i = 0; i < sizeof errors / sizeof *errors; i++) {
        it.read_code = it.write_code = -errors[i];
        EQUAL(disk_io(path, 0, 8 << 20, 0, NULL), errors[i]);
        EQUAL(disk_io(path, 1, 8 << 20, 0, NULL), errors[i]);
    }
    EQUAL(told, sizeof given / sizeof *given);
    it.read_code = it.write_code = 0;
    /* A flush that is not supported is a failure, and not success. */
    it.flush_code = -EOPNOTSUPP;
    int fd = open(path, O_RDWR | O_CLOEXEC);
    CHECK(fd >= 0);
    EQUAL(pwrite(fd, "x", 1, 0), 1);
    EQUAL(fsync(fd), -1);
    EQUAL(errno, EIO);
    it.flush_code = 0;
    EQUAL(fsync(fd), 0);
    close(fd);
    freed(device);
}

static void destroyed_once(void) {
    ublk_rs_error *error = ublk_rs_error_new();
    ublk_rs_device *device = made(&CALLS);
    freed(device); /* never started */
    device = made(&CALLS);
    WORKS(ublk_rs_device_set(device, "id", "9999999", error));
    CHECK(ublk_rs_device_start(device, error) < 0);
    EQUAL(it.destroyed, 1);
    freed(device); /* start failed */
    device = started(&CALLS);
    freed(device); /* running */
    device = started(&CALLS);
    WORKS(ublk_rs_device_stop(device, (uint64_t)(20000 * scale()), error));
    EQUAL(it.destroyed, 3);
    freed(device); /* stopped */
    device = made(&CALLS);
    WORKS(ublk_rs_device_set(device, "threads", "3", error));
    WORKS(ublk_rs_device_start(device, error));
    freed(device); /* from a pool of threads */
    device = made(&SUBMIT);
    WORKS(ublk_rs_device_set(device, "dispatch", "1", error));
    WORKS(ublk_rs_device_start(device, error));
    freed(device); /* dispatched */
    EQUAL(it.destroyed, 6);

    /* Taken away and given back: the same backend goes on. */
    device = started(&CALLS);
    long id = (long)ublk_rs_device_id(device);
    int code = ublk_rs_device_halt(device, (uint64_t)(20000 * scale()), error);
    if (code == 0) {
        char node[32];
        snprintf(node, sizeof node, "/dev/ublkc%ld", id);
        WORKS(ublk_rs_device_set_number(device, "workers_per_queue", 2, error));
        WORKS(ublk_rs_device_set(device, "data_path", "user-copy", error));
        EQUAL(ublk_rs_device_start(device, error), -EOPNOTSUPP);
        CHECK(strstr(ublk_rs_error_message(error), "USER_COPY") != NULL);
        WORKS(ublk_rs_device_set(device, "data_path", "auto", error));
        WORKS(ublk_rs_device_set_number(device, "workers_per_queue", 1000, error));
        EQUAL(ublk_rs_device_start(device, error), -EINVAL);
        EQUAL(ublk_rs_device_recover(device, (uint32_t)id, error), -EBADFD);
        EQUAL(access(node, F_OK), 0); /* it is not what is described, and waits */
        WORKS(ublk_rs_device_set_number(device, "workers_per_queue", 1, error));
        WORKS(ublk_rs_device_set_number(device, "size", 2 * SIZE, error));
        WORKS(ublk_rs_device_start(device, error));
        EQUAL(ublk_rs_device_id(device), id);
        EQUAL(ublk_rs_device_size(device), 2 * SIZE);
        EQUAL(disk_io(ublk_rs_device_path(device), 0, SIZE, 0, NULL), 0);
        WORKS(ublk_rs_device_halt(device, (uint64_t)(20000 * scale()), error));

        /* A start that comes too late deletes it. What comes then is another disk, by another name. */
        const char *first = ublk_rs_device_path(device);
        WORKS(ublk_rs_device_set_number(device, "start_timeout_ms", 0, error));
        code = ublk_rs_device_start(device, error);
        CHECK(code == -ETIMEDOUT || code == -EBUSY); /* the driver may still have been at the former disk */
        EQUAL(access(node, F_OK), -1);
        WORKS(ublk_rs_device_set_number(device, "start_timeout_ms", 30000, error));
        WORKS(ublk_rs_device_set_number(device, "id", 77, error));
        WORKS(ublk_rs_device_start(device, error));
        EQUAL(strcmp(ublk_rs_device_path(device), "/dev/ublkb77"), 0);
        EQUAL(strncmp(first, "/dev/ublkb", 10), 0);
        WORKS(ublk_rs_device_halt(device, (uint64_t)(20000 * scale()), error));
        WORKS(ublk_rs_device_stop(device, 0, error));
        EQUAL(access("/dev/ublkc77", F_OK), -1);
        EQUAL(ublk_rs_device_start(device, error), -EBADFD);
    } else {
        EQUAL(code, -EOPNOTSUPP);
        EQUAL(disk_io(ublk_rs_device_path(device), 0, 0, 0, NULL), 0);
    }
    EQUAL(it.destroyed, 6);
    freed(device);

    /* From another device's program: stopped behind our back. */
    device = started(&CALLS);
    ublk_rs_control *control = NULL;
    WORKS(ublk_rs_control_open(&control, error));
    WORKS(ublk_rs_control_delete(control, (uint32_t)ublk_rs_device_id(device), (uint64_t)(20000 * scale()), error));
    EQUAL(ublk_rs_device_wait(device, (uint64_t)(20000 * scale()), error), 0);
    EQUAL(ublk_rs_device_ending(device), UBLK_RS_ENDING_STOPPED_BY_OTHERS);
    ublk_rs_control_free(control);
    freed(device);
    ublk_rs_error_free(error);
}

static void two_devices(void) {
    ublk_rs_error *error = ublk_rs_error_new();
    struct client client;
    it.keep = 1;
    ublk_rs_workers *workers = NULL;
    WORKS(ublk_rs_workers_new(2, &workers, error));
    EQUAL(ublk_rs_workers_new(0, &workers, error), -EINVAL);
    ublk_rs_device *one = made(&SUBMIT), *two = made(&SUBMIT);
    WORKS(ublk_rs_device_set_workers(one, workers, error));
    WORKS(ublk_rs_device_set_workers(two, workers, error));
    ublk_rs_workers_free(workers); /* they keep it */
    WORKS(ublk_rs_device_start(one, error));
    WORKS(ublk_rs_device_start(two, error));
    CHECK(strcmp(ublk_rs_device_path(one), ublk_rs_device_path(two)) != 0);
    client_start(&client, ublk_rs_device_path(one), 0, 8 << 20);
    uint64_t request = await_held(1);
    CHECK(it.device == one);
    EQUAL(disk_io(ublk_rs_device_path(two), 0, 0, 0, NULL), 0);
    ublk_rs_device_info info = {.size = sizeof info};
    ublk_rs_control *control = NULL;
    uint32_t ids[1];
    size_t count = 0;
    WORKS(ublk_rs_control_open(&control, error));
    WORKS(ublk_rs_control_list(control, ids, 1, &count, error));
    EQUAL(count, 2);
    WORKS(ublk_rs_control_info(control, (uint32_t)ublk_rs_device_id(two), &info, error));
    EQUAL(info.state, UBLK_RS_STATE_LIVE);
    EQUAL(info.server_pid, getpid());
    EQUAL(info.capacity, SIZE);
    ublk_rs_control_free(control);
    freed(two);
    EQUAL(ublk_rs_request_complete(one, request, 0), 0);
    EQUAL(client_end(&client), 0);
    freed(one);
    ublk_rs_error_free(error);
}

static void forked(void) {
    ublk_rs_error *error = ublk_rs_error_new();
    struct client client;
    it.keep = 1;
    ublk_rs_device *device = started(&SUBMIT), *later = made(&CALLS);
    client_start(&client, ublk_rs_device_path(device), 0, 8 << 20);
    uint64_t request = await_held(1);
    pid_t child = fork();
    CHECK(child >= 0);
    if (child == 0) {
        EQUAL(ublk_rs_device_stop(device, 1000, error), -ECHILD);
        EQUAL(ublk_rs_error_kind(error), UBLK_RS_KIND_FORKED);
        EQUAL(ublk_rs_device_stop_force(device, 1000, error), -ECHILD);
        EQUAL(ublk_rs_device_wait(device, 0, error), -ECHILD);
        EQUAL(ublk_rs_device_halt(device, 0, error), -ECHILD);
        EQUAL(ublk_rs_device_hand_over(device, 0, error), -ECHILD);
        EQUAL(ublk_rs_device_resize(device, 2 * SIZE, error), -ECHILD);
        EQUAL(ublk_rs_device_start(later, error), -ECHILD);
        EQUAL(ublk_rs_request_complete(device, request, 0), -ECHILD);
        EQUAL(ublk_rs_device_dispatch(device, 0), -ECHILD);
        EQUAL(ublk_rs_device_free(device), 0);
        EQUAL(ublk_rs_device_free(later), 0);
        EQUAL(it.destroyed, 0);
        _exit(0);
    }
    int status = 0;
    CHECK(waitpid(child, &status, 0) == child);
    EQUAL(status, 0);
    EQUAL(ublk_rs_request_put(device, request, 0, "parent", 7), 0);
    EQUAL(ublk_rs_request_complete(device, request, 0), 0);
    EQUAL(client_end(&client), 0);
    EQUAL(client.first, 'p');
    freed(later);
    WORKS(ublk_rs_device_stop(device, (uint64_t)(20000 * scale()), error));
    freed(device);
    ublk_rs_error_free(error);
}

static atomic_int inside;
static int inside_read(void *user, void *buf, size_t length, uint64_t offset) {
    (void)user, (void)buf, (void)length;
    if (offset != 8 << 20) return 0;
    ublk_rs_error *error = ublk_rs_error_new();
    ublk_rs_device *device = it.device;
    ublk_rs_control *control = NULL;
    ublk_rs_workers *workers = NULL;
    ublk_rs_device_info info = {.size = sizeof info};
    uint32_t number = 0;
    size_t count = 0;
    EQUAL(ublk_rs_device_stop(device, 1000, error), -EDEADLK);
    EQUAL(ublk_rs_error_kind(error), UBLK_RS_KIND_WOULD_DEADLOCK);
    EQUAL(ublk_rs_device_stop_force(device, 1000, error), -EDEADLK);
    EQUAL(ublk_rs_device_wait(device, 1000, error), -EDEADLK);
    EQUAL(ublk_rs_device_halt(device, 1000, error), -EDEADLK);
    EQUAL(ublk_rs_device_hand_over(device, 1000, error), -EDEADLK);
    EQUAL(ublk_rs_device_resize(device, 2 * SIZE, error), -EDEADLK);
    EQUAL(ublk_rs_device_share(device, 0, 0, &number, error), -EDEADLK);
    EQUAL(ublk_rs_device_unshare(device, 0, error), -EDEADLK);
    EQUAL(ublk_rs_device_free(device), -EDEADLK);
    EQUAL(ublk_rs_device_dispatch(device, 0), -EDEADLK);
    EQUAL(ublk_rs_device_start(it.other, error), -EDEADLK);
    EQUAL(ublk_rs_device_recover(it.other, 0, error), -EDEADLK);
    EQUAL(ublk_rs_control_open(&control, error), -EDEADLK);
    EQUAL(ublk_rs_workers_new(1, &workers, error), -EDEADLK);
    EQUAL(ublk_rs_control_list(NULL, NULL, 0, &count, error), -EDEADLK);
    EQUAL(ublk_rs_control_info(NULL, 0, &info, error), -EDEADLK);
    EQUAL(ublk_rs_control_delete(NULL, 0, 0, error), -EDEADLK);
    EQUAL(ublk_rs_control_quiesce(NULL, 0, 0, error), -EDEADLK);
    /* What does not wait is allowed. */
    CHECK(ublk_rs_device_path(device) != NULL);
    WORKS(ublk_rs_device_set(it.other, "queues", "1", error));
    ublk_rs_error_free(error);
    inside++;
    return 0;
}

static void in_callbacks(void) {
    const ublk_rs_backend backend = {.size = sizeof backend, .read = inside_read};
    const char *modes[] = {"threads", "dispatch", "pin"}; /* on a pool's thread, on this one, on the worker */
    for (int i = 0; i < 3; i++) {
        struct client client;
        ublk_rs_device *device = NULL;
        WORKS(ublk_rs_device_new(SIZE, &backend, NULL, &device, error));
        WORKS(ublk_rs_device_set(device, modes[i], "1", error));
        it.other = made(&CALLS);
        WORKS(ublk_rs_device_start(device, error));
        it.device = device;
        client_start(&client, ublk_rs_device_path(device), 0, 8 << 20);
        if (i == 1) client_dispatch(&client, device);
        EQUAL(client_end(&client), 0);
        EQUAL(inside, i + 1);
        freed(it.other);
        EQUAL(ublk_rs_device_free(device), 0);
    }
}

static void dispatching(void) {
    ublk_rs_error *error = ublk_rs_error_new();
    struct client client;
    ublk_rs_device *device = made(&CALLS);
    WORKS(ublk_rs_device_set(device, "dispatch", "yes", error));
    WORKS(ublk_rs_device_set(device, "threads", "2", error));
    EQUAL(ublk_rs_device_start(device, error), -EINVAL);
    WORKS(ublk_rs_device_set(device, "threads", "0", error));
    WORKS(ublk_rs_device_start(device, error)); /* this thread answers what the kernel asks meanwhile */
    CHECK(ublk_rs_device_fd(device) >= 0);
    client_start(&client, ublk_rs_device_path(device), 0, 0);
    client_dispatch(&client, device);
    CHECK(it.calls > 0);
    EQUAL(client_end(&client), 0);
    WORKS(ublk_rs_device_stop(device, (uint64_t)(20000 * scale()), error)); /* and again */
    EQUAL(ublk_rs_device_dispatch(device, 0), -ENODEV);
    freed(device);

    device = NULL;
    WORKS(ublk_rs_device_new_target("null", &device, error));
    WORKS(ublk_rs_device_set(device, "size", "16M", error));
    WORKS(ublk_rs_device_set(device, "dispatch", "yes", error));
    EQUAL(ublk_rs_device_start(device, error), -EINVAL);
    EQUAL(ublk_rs_device_free(device), 0);
    ublk_rs_error_free(error);
}

static void busy(void) {
    ublk_rs_error *error = ublk_rs_error_new();
    ublk_rs_device *device = started(&CALLS);
    int fd = open(ublk_rs_device_path(device), O_RDONLY | O_CLOEXEC);
    CHECK(fd >= 0);
    EQUAL(ublk_rs_device_stop(device, 100, error), -EBUSY);
    EQUAL(ublk_rs_error_kind(error), UBLK_RS_KIND_BUSY);
    EQUAL(ublk_rs_error_device(error), ublk_rs_device_id(device));
    char pid[32];
    snprintf(pid, sizeof pid, "pid %d", (int)getpid());
    CHECK(strstr(ublk_rs_error_message(error), pid) != NULL);
    EQUAL(disk_io(ublk_rs_device_path(device), 0, 0, 0, NULL), 0); /* it goes on */
    close(fd);
    WORKS(ublk_rs_device_stop(device, (uint64_t)(20000 * scale()), error));
    /* An error that was described stays until the next. */
    EQUAL(ublk_rs_error_code(error), -EBUSY);
    freed(device);
    ublk_rs_error_free(error);
}

/* Stuck in a callback until it is let go. */
static atomic_int let_go, stuck_now;
static int stuck_submit(void *user, ublk_rs_device *device, uint64_t request, const ublk_rs_io *io) {
    CHECK(user == &it);
    if (io->op == UBLK_RS_OP_READ && io->offset == 8 << 20) {
        stuck_now = 1;
        while (!let_go) nap();
        /* The device was freed meanwhile, but not from under this callback. */
        EQUAL(ublk_rs_request_complete(device, request, 0), -ESTALE);
        return 0;
    }
    return ublk_rs_request_complete(device, request, 0);
}

static void stuck(void) {
    const ublk_rs_backend backend = {.size = sizeof backend, .submit = stuck_submit, .destroy = destroy};
    struct client client;
    ublk_rs_device *device = started(&backend);
    client_start(&client, ublk_rs_device_path(device), 0, 8 << 20);
    while (!stuck_now) nap();
    double began = seconds();
    EQUAL(ublk_rs_device_free(device), 0);
    CHECK(seconds() - began < 30 * scale());
    EQUAL(client_end(&client), EIO);
    EQUAL(it.destroyed, 0);
    let_go = 1;
    for (double until = seconds() + 20 * scale(); !it.destroyed && seconds() < until;) nap();
    EQUAL(it.destroyed, 1);
}

static void targets(void) {
    char path[] = "/dev/shm/ublk-capi-XXXXXX";
    int file = mkstemp(path);
    CHECK(file >= 0);
    close(file);
    unlink(path);
    for (size_t i = 0; i < ublk_rs_target_count(); i++) {
        ublk_rs_error *error = ublk_rs_error_new();
        ublk_rs_device *device = NULL;
        const char *name = ublk_rs_target_name(i);
        unsigned char first = 1;
        WORKS(ublk_rs_device_new_target(name, &device, error));
        int code = ublk_rs_device_start(device, error); /* without a size, or a path */
        EQUAL(code, -EINVAL);
        WORKS(ublk_rs_device_set(device, "size", "16M", error));
        if (strcmp(name, "zoned-mem") == 0) WORKS(ublk_rs_device_set(device, "zone_bytes", "4M", error));
        WORKS(ublk_rs_device_set(device, "path", path, error));
        WORKS(ublk_rs_device_set(device, "paths", path, error));
        WORKS(ublk_rs_device_set(device, "create", "yes", error));
        code = ublk_rs_device_start(device, error);
        if (code != 0) fprintf(stderr, "%s: %s\n", name, ublk_rs_error_message(error));
        EQUAL(code, 0);
        EQUAL(ublk_rs_device_size(device), SIZE);
        EQUAL(disk_io(ublk_rs_device_path(device), 1, 0, 0x33, NULL), 0);
        EQUAL(disk_io(ublk_rs_device_path(device), 0, 0, 0, &first), 0);
        EQUAL(first, strcmp(name, "null") == 0 ? 0 : 0x33);
        EQUAL(ublk_rs_device_free(device), 0);
        ublk_rs_error_free(error);
    }
    unlink(path);
}

static const struct {
    const char *name;
    void (*run)(void);
} CASES[] = {{"nulls", nulls},
             {"sizes", sizes},
             {"options", options},
             {"order", order},
             {"completions", completions},
             {"never-completed", never_completed},
             {"codes", codes},
             {"destroyed-once", destroyed_once},
             {"two-devices", two_devices},
             {"forked", forked},
             {"in-callbacks", in_callbacks},
             {"dispatching", dispatching},
             {"busy", busy},
             {"targets", targets},
             {"stuck", stuck}};

int main(int argc, char **argv) {
    EQUAL(ublk_rs_version(), UBLK_RS_VERSION);
    int descriptors = entries("/proc/self/fd", ""), ran = 0;
    for (size_t i = 0; i < sizeof CASES / sizeof *CASES; i++) {
        if (argc == 2 && strcmp(argv[1], "list") == 0) puts(CASES[i].name);
        if (argc != 2 || strcmp(argv[1], CASES[i].name) != 0) continue;
        CASES[i].run();
        nothing_left(descriptors);
        ran++;
    }
    return argc == 2 && (ran == 1 || strcmp(argv[1], "list") == 0) ? 0 : 2;
}
