// SPDX-License-Identifier: MIT OR Apache-2.0
//
// ublk_rs.h in C++17: handles that end themselves, a backend as a class or as functions, spans, exceptions. Header only;
// the rules of ublk_rs.h hold (threads, what waits, ownership).
//
//     class mine : public ublk_rs::backend { void read(ublk_rs::bytes into, std::uint64_t offset) override; ... };
//     ublk_rs::device disk(size, std::make_unique<mine>());
//     disk.set("queues", 2).start();

#ifndef UBLK_RS_HPP
#define UBLK_RS_HPP

#include <cerrno>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <new>
#include <string>
#include <system_error>
#include <type_traits>
#include <utility>
#include <vector>

#include "ublk_rs.h"

namespace ublk_rs {

/// What a call that failed has to say: code() is its errno, what() all of it in words.
class error : public std::system_error {
public:
    error(int code, std::uint32_t kind, int said, std::int64_t device, std::string text, std::string remedy)
        : std::system_error(code, std::generic_category(), text), text_(std::move(text)), remedy_(std::move(remedy)),
          kind_(kind), said_(said), device_(device) {}

    const char *what() const noexcept override { return text_.c_str(); }
    /// UBLK_RS_KIND_*.
    std::uint32_t kind() const noexcept { return kind_; }
    /// The errno that the kernel answered with; 0 if it was not asked.
    int kernel_errno() const noexcept { return said_; }
    /// What to do about it; may be empty.
    const std::string &remedy() const noexcept { return remedy_; }
    /// The device's number; -1 for none.
    std::int64_t device() const noexcept { return device_; }

private:
    std::string text_, remedy_;
    std::uint32_t kind_;
    int said_;
    std::int64_t device_;
};

namespace detail {

struct error_free {
    void operator()(ublk_rs_error *e) const noexcept { ublk_rs_error_free(e); }
};

/// Makes a call that takes an error object, and throws what it says.
template <class Call> void checked(Call &&call) {
    const std::unique_ptr<ublk_rs_error, error_free> object(ublk_rs_error_new());
    const int code = call(object.get());
    if (code < 0)
        throw error(-ublk_rs_error_code(object.get()), ublk_rs_error_kind(object.get()), ublk_rs_error_errno(object.get()),
                    ublk_rs_error_device(object.get()), ublk_rs_error_message(object.get()), ublk_rs_error_remedy(object.get()));
}

inline int checked_number(int code, const char *what) {
    if (code < 0) throw std::system_error(-code, std::generic_category(), what);
    return code;
}

/// What an exception in a callback is to the disk's client.
inline int errno_of_exception() noexcept {
    try {
        throw;
    } catch (const std::system_error &e) {
        const bool sensible = (e.code().category() == std::generic_category() ||
                               e.code().category() == std::system_category()) &&
                              e.code().value() > 0 && e.code().value() < 4096;
        return sensible ? -e.code().value() : -EIO;
    } catch (const std::bad_alloc &) {
        return -ENOMEM;
    } catch (...) {
        return -EIO;
    }
}

template <class Body> int guarded(Body &&body) noexcept {
    try {
        body();
        return 0;
    } catch (...) {
        return errno_of_exception();
    }
}

/// What a call that fills a text cuts where it does not fit, line by line.
template <class Call> std::vector<std::string> lines(Call &&call, const char *what) {
    std::vector<char> text(1024);
    for (;; text.resize(text.size() * 4)) {
        checked_number(call(text.size(), text.data()), what);
        if (std::strlen(text.data()) + 1 < text.size()) break;
    }
    std::vector<std::string> found;
    for (const char *at = text.data(); *at != '\0';) {
        const std::size_t length = std::strcspn(at, "\n");
        found.emplace_back(at, length);
        at += length + (at[length] == '\n');
    }
    return found;
}

inline std::uint64_t milliseconds(std::chrono::milliseconds time) noexcept {
    return time.count() < 0 ? 0 : static_cast<std::uint64_t>(time.count());
}

} // namespace detail

/// A range of bytes that is somebody else's; as std::span, which C++20 brings and converts from this.
template <class T> class span {
public:
    using value_type = std::remove_cv_t<T>;
    using iterator = T *;

    constexpr span() noexcept = default;
    constexpr span(T *data, std::size_t size) noexcept : data_(data), size_(size) {}
    constexpr T *data() const noexcept { return data_; }
    constexpr std::size_t size() const noexcept { return size_; }
    constexpr bool empty() const noexcept { return size_ == 0; }
    constexpr T *begin() const noexcept { return data_; }
    constexpr T *end() const noexcept { return data_ + size_; }
    constexpr T &operator[](std::size_t at) const noexcept { return data_[at]; }

private:
    T *data_ = nullptr;
    std::size_t size_ = 0;
};
using bytes = span<std::byte>;
using const_bytes = span<const std::byte>;
using zone = ublk_rs_zone;

/// A request in the hands of who answers it. One that is destroyed without an answer is answered with EIO. It must not outlive
/// its device: what a thread pool has in its queues is to be gone before the device is, or with its backend.
class request {
public:
    request(ublk_rs_device *device, std::uint64_t number, const ublk_rs_io &io) noexcept
        : device_(device), number_(number), io_(io) {}
    request(request &&other) noexcept
        : device_(std::exchange(other.device_, nullptr)), number_(other.number_), io_(other.io_) {}
    request &operator=(request &&other) noexcept {
        if (this != &other) {
            drop();
            device_ = std::exchange(other.device_, nullptr);
            number_ = other.number_;
            io_ = other.io_;
        }
        return *this;
    }
    request(const request &) = delete;
    request &operator=(const request &) = delete;
    ~request() { drop(); }

    /// What is asked for; see struct ublk_rs_io.
    const ublk_rs_io &io() const noexcept { return io_; }
    std::uint64_t number() const noexcept { return number_; }
    /// The data in memory, on any data path: of a write to be read only, of a read to be filled; it is zeroed.
    bytes buffer() {
        void *start = nullptr;
        std::size_t length = 0;
        detail::checked_number(ublk_rs_request_buffer(device_, number_, &start, &length), "find a request's data");
        return {static_cast<std::byte *>(start), length};
    }
    /// Copies data to byte at of a read.
    void put(std::uint64_t at, const_bytes data) {
        detail::checked_number(ublk_rs_request_put(device_, number_, at, data.data(), data.size()), "put data");
    }
    /// Answers it: 0 or -errno. False if the client had been answered before.
    bool complete(int result = 0) noexcept {
        ublk_rs_device *device = std::exchange(device_, nullptr);
        return device && ublk_rs_request_complete(device, number_, result) == 0;
    }
    bool complete_append(std::uint64_t offset) noexcept {
        ublk_rs_device *device = std::exchange(device_, nullptr);
        return device && ublk_rs_request_complete_append(device, number_, offset) == 0;
    }
    /// Answers a report: the zones from the one that holds io().offset on, io().zones of them at most. One of unknown kind
    /// or state is an exception, and the request goes on.
    bool complete_report(span<const zone> zones) {
        if (!device_) return false;
        const int code = ublk_rs_request_complete_report(device_, number_, zones.data(), zones.size());
        if (code == -EINVAL) detail::checked_number(code, "report zones");
        device_ = nullptr;
        return code == 0;
    }
    /// Copies a write's integrity metadata, all io().metadata_length bytes of it.
    void metadata(bytes into) {
        detail::checked_number(ublk_rs_request_metadata(device_, number_, into.data(), into.size()), "read metadata");
    }
    /// Gives a read's integrity metadata to the client, all io().metadata_length bytes of it.
    void put_metadata(const_bytes from) {
        detail::checked_number(ublk_rs_request_put_metadata(device_, number_, from.data(), from.size()),
                               "put metadata");
    }
    /// Fills an entry, 64 bytes, for a ring of the program's: see ublk_rs_request_register_sqe().
    void register_sqe(std::uint16_t index, void *sqe) {
        detail::checked_number(ublk_rs_request_register_sqe(device_, number_, index, sqe), "register pages");
    }
    void unregister_sqe(std::uint16_t index, void *sqe) {
        detail::checked_number(ublk_rs_request_unregister_sqe(device_, number_, index, sqe), "unregister pages");
    }
    /// Gives the number up, to be completed by the functions of ublk_rs.h.
    std::uint64_t release() noexcept {
        device_ = nullptr;
        return number_;
    }

private:
    void drop() noexcept {
        if (device_) ublk_rs_request_complete(device_, number_, -EIO);
    }

    ublk_rs_device *device_;
    std::uint64_t number_;
    ublk_rs_io io_;
};

/// A disk: override read and whatever else it can do. What is overridden decides what the disk advertises. An exception
/// is an error to the client: the errno of a std::system_error, EIO otherwise.
class backend {
public:
    virtual ~backend() = default;
    virtual void read(bytes into, std::uint64_t offset) = 0;
    virtual void write(const_bytes, std::uint64_t, std::uint32_t) { unsupported(); }
    virtual void flush() { unsupported(); }
    virtual void discard(std::uint64_t, std::uint64_t) { unsupported(); }
    virtual void write_zeroes(std::uint64_t, std::uint64_t, std::uint32_t) { unsupported(); }
    /// Of a zoned disk, all three: describes zones from the one that holds byte offset on, and returns how many that are;
    virtual std::size_t report_zones(std::uint64_t, span<zone>) { unsupported(); }
    /// writes at the write pointer of the zone that starts there, and returns the byte of the disk where that was;
    virtual std::uint64_t zone_append(const_bytes, std::uint64_t, std::uint32_t) { unsupported(); }
    /// does UBLK_RS_OP_ZONE_OPEN and its like to the zone that starts there.
    virtual void zone_action(std::uint32_t, std::uint64_t) { unsupported(); }

private:
    [[noreturn]] static void unsupported() { throw std::system_error(EOPNOTSUPP, std::generic_category()); }
};

/// A disk that takes requests to complete them later, from any thread. What it can do is said by options: "writable",
/// "flush", "discard", "write_zeroes".
class async_backend {
public:
    virtual ~async_backend() = default;
    virtual void submit(request request) = 0;
};

/// A disk as functions; what is empty it cannot do.
struct functions {
    std::function<void(bytes, std::uint64_t)> read;
    std::function<void(const_bytes, std::uint64_t, std::uint32_t)> write;
    std::function<void()> flush;
    std::function<void(std::uint64_t, std::uint64_t)> discard;
    std::function<void(std::uint64_t, std::uint64_t, std::uint32_t)> write_zeroes;
    std::function<std::size_t(std::uint64_t, span<zone>)> report_zones;
    std::function<std::uint64_t(const_bytes, std::uint64_t, std::uint32_t)> zone_append;
    std::function<void(std::uint32_t, std::uint64_t)> zone_action;
};

namespace detail {

template <class B> struct shims {
    static int read(void *user, void *buf, std::size_t length, std::uint64_t offset) noexcept {
        return guarded([&] { self(user).read(bytes(static_cast<std::byte *>(buf), length), offset); });
    }
    static int write(void *user, const void *data, std::size_t length, std::uint64_t offset, std::uint32_t flags) noexcept {
        return guarded(
            [&] { self(user).write(const_bytes(static_cast<const std::byte *>(data), length), offset, flags); });
    }
    static int flush(void *user) noexcept {
        return guarded([&] { self(user).flush(); });
    }
    static int discard(void *user, std::uint64_t offset, std::uint64_t length) noexcept {
        return guarded([&] { self(user).discard(offset, length); });
    }
    static int write_zeroes(void *user, std::uint64_t offset, std::uint64_t length, std::uint32_t flags) noexcept {
        return guarded([&] { self(user).write_zeroes(offset, length, flags); });
    }
    static int report_zones(void *user, std::uint64_t offset, ublk_rs_zone *zones, std::uint32_t capacity,
                            std::uint32_t *count) noexcept {
        return guarded([&] {
            const std::size_t told = self(user).report_zones(offset, span<zone>(zones, capacity));
            checked_number(told <= capacity ? 0 : -EIO, "report more zones than there is room for");
            *count = static_cast<std::uint32_t>(told);
        });
    }
    static int zone_append(void *user, const void *data, std::size_t length, std::uint64_t start, std::uint32_t flags,
                           std::uint64_t *offset) noexcept {
        return guarded([&] {
            *offset = self(user).zone_append(const_bytes(static_cast<const std::byte *>(data), length), start, flags);
        });
    }
    static int zone_action(void *user, std::uint32_t op, std::uint64_t start) noexcept {
        return guarded([&] { self(user).zone_action(op, start); });
    }
    static int submit(void *user, ublk_rs_device *device, std::uint64_t number, const ublk_rs_io *io) noexcept {
        // A request that an exception destroys is answered by that.
        guarded([&] { self(user).submit(request(device, number, *io)); });
        return 0;
    }
    static void destroy(void *user) noexcept { delete &self(user); }
    static B &self(void *user) noexcept { return *static_cast<B *>(user); }
};

template <class B> ublk_rs_backend table(const B &) {
    ublk_rs_backend t{};
    t.size = sizeof t;
    t.destroy = shims<B>::destroy;
    if constexpr (std::is_base_of_v<async_backend, B>) {
        t.submit = shims<B>::submit;
    } else {
        t.read = shims<B>::read;
        if constexpr (!std::is_same_v<decltype(&B::write), decltype(&backend::write)>) t.write = shims<B>::write;
        if constexpr (!std::is_same_v<decltype(&B::flush), decltype(&backend::flush)>) t.flush = shims<B>::flush;
        if constexpr (!std::is_same_v<decltype(&B::discard), decltype(&backend::discard)>) t.discard = shims<B>::discard;
        if constexpr (!std::is_same_v<decltype(&B::write_zeroes), decltype(&backend::write_zeroes)>)
            t.write_zeroes = shims<B>::write_zeroes;
        if constexpr (!std::is_same_v<decltype(&B::report_zones), decltype(&backend::report_zones)>)
            t.report_zones = shims<B>::report_zones;
        if constexpr (!std::is_same_v<decltype(&B::zone_append), decltype(&backend::zone_append)>)
            t.zone_append = shims<B>::zone_append;
        if constexpr (!std::is_same_v<decltype(&B::zone_action), decltype(&backend::zone_action)>)
            t.zone_action = shims<B>::zone_action;
    }
    return t;
}

inline ublk_rs_backend table(const functions &f) {
    ublk_rs_backend t{};
    t.size = sizeof t;
    t.destroy = shims<functions>::destroy;
    if (f.read) t.read = shims<functions>::read;
    if (f.write) t.write = shims<functions>::write;
    if (f.flush) t.flush = shims<functions>::flush;
    if (f.discard) t.discard = shims<functions>::discard;
    if (f.write_zeroes) t.write_zeroes = shims<functions>::write_zeroes;
    if (f.report_zones) t.report_zones = shims<functions>::report_zones;
    if (f.zone_append) t.zone_append = shims<functions>::zone_append;
    if (f.zone_action) t.zone_action = shims<functions>::zone_action;
    return t;
}

struct device_free {
    void operator()(ublk_rs_device *d) const noexcept { ublk_rs_device_free(d); }
};
struct workers_free {
    void operator()(ublk_rs_workers *w) const noexcept { ublk_rs_workers_free(w); }
};
struct control_free {
    void operator()(ublk_rs_control *c) const noexcept { ublk_rs_control_free(c); }
};

} // namespace detail

/// Workers that devices share.
class workers {
public:
    explicit workers(std::size_t count) {
        ublk_rs_workers *made = nullptr;
        detail::checked([&](ublk_rs_error *e) { return ublk_rs_workers_new(count, &made, e); });
        handle_.reset(made);
    }
    const ublk_rs_workers *native() const noexcept { return handle_.get(); }

private:
    std::unique_ptr<ublk_rs_workers, detail::workers_free> handle_;
};

/// A device. Its end is that of ublk_rs_device_free(): a disk that runs is stopped by force.
class device {
public:
    /// A disk that is served by an object of a class of the program's, by its type: what that overrides counts.
    template <class B, class = std::enable_if_t<std::is_base_of_v<backend, B> || std::is_base_of_v<async_backend, B>>>
    device(std::uint64_t size, std::unique_ptr<B> served) {
        make(size, std::move(served));
    }
    /// A disk that is served by functions.
    device(std::uint64_t size, functions served) { make(size, std::make_unique<functions>(std::move(served))); }
    /// A disk that is served by a ready-made backend.
    explicit device(const std::string &target) {
        ublk_rs_device *made = nullptr;
        detail::checked([&](ublk_rs_error *e) { return ublk_rs_device_new_target(target.c_str(), &made, e); });
        handle_.reset(made);
    }

    device &set(const std::string &name, const std::string &value) {
        detail::checked([&](ublk_rs_error *e) { return ublk_rs_device_set(native(), name.c_str(), value.c_str(), e); });
        return *this;
    }
    device &set(const std::string &name, const char *value) { return set(name, std::string(value)); }
    template <class N, class = std::enable_if_t<std::is_integral_v<N>>> device &set(const std::string &name, N value) {
        const auto number = static_cast<std::uint64_t>(value);
        detail::checked([&](ublk_rs_error *e) { return ublk_rs_device_set_number(native(), name.c_str(), number, e); });
        return *this;
    }
    /// What an option is: what it was set to, or its default.
    std::string get(const std::string &name) const {
        for (std::vector<char> text(256);; text.resize(text.size() * 4)) {
            try {
                detail::checked([&](ublk_rs_error *e) {
                    return ublk_rs_device_get(native(), name.c_str(), text.size(), text.data(), e);
                });
                return text.data();
            } catch (const error &e) {
                if (e.code().value() != ERANGE) throw;
            }
        }
    }
    device &use(const workers &pool) {
        detail::checked([&](ublk_rs_error *e) { return ublk_rs_device_set_workers(native(), pool.native(), e); });
        return *this;
    }

    void start() {
        detail::checked([&](ublk_rs_error *e) { return ublk_rs_device_start(native(), e); });
    }
    void recover(std::uint32_t id) {
        detail::checked([&](ublk_rs_error *e) { return ublk_rs_device_recover(native(), id, e); });
    }
    void wait() {
        detail::checked([&](ublk_rs_error *e) { return ublk_rs_device_wait(native(), UBLK_RS_FOREVER, e); });
    }
    /// The same within a time: whether it has ended.
    bool wait_for(std::chrono::milliseconds within) {
        const auto ms = detail::milliseconds(within);
        try {
            detail::checked([&](ublk_rs_error *e) { return ublk_rs_device_wait(native(), ms, e); });
        } catch (const error &e) {
            if (e.code().value() != ETIMEDOUT) throw;
            if (ending() == 0) return false;
            // It has ended since, or what took it down is called the same: this says which, at once.
            wait();
        }
        return true;
    }
    void stop(std::chrono::milliseconds within) {
        const auto ms = detail::milliseconds(within);
        detail::checked([&](ublk_rs_error *e) { return ublk_rs_device_stop(native(), ms, e); });
    }
    void stop_force(std::chrono::milliseconds within) {
        const auto ms = detail::milliseconds(within);
        detail::checked([&](ublk_rs_error *e) { return ublk_rs_device_stop_force(native(), ms, e); });
    }
    void halt(std::chrono::milliseconds within) {
        const auto ms = detail::milliseconds(within);
        detail::checked([&](ublk_rs_error *e) { return ublk_rs_device_halt(native(), ms, e); });
    }
    void hand_over(std::chrono::milliseconds within) {
        const auto ms = detail::milliseconds(within);
        detail::checked([&](ublk_rs_error *e) { return ublk_rs_device_hand_over(native(), ms, e); });
    }
    void resize(std::uint64_t size) {
        detail::checked([&](ublk_rs_error *e) { return ublk_rs_device_resize(native(), size, e); });
    }
    /// Has clients' I/O from and to a memory file, sealed against shrinking, travel without a copy: see
    /// ublk_rs_device_share(). Returns the number for unshare().
    std::uint32_t share(int memfd, bool read_only = false) {
        std::uint32_t number = 0;
        detail::checked([&](ublk_rs_error *e) { return ublk_rs_device_share(native(), memfd, read_only, &number, e); });
        return number;
    }
    void unshare(std::uint32_t number) {
        detail::checked([&](ublk_rs_error *e) { return ublk_rs_device_unshare(native(), number, e); });
    }

    /// For an event loop, with the option "dispatch".
    int fd() const { return detail::checked_number(ublk_rs_device_fd(native()), "find the descriptor"); }
    /// Calls the backend; false once the device has ended.
    bool dispatch(std::uint32_t most = 0) {
        const int count = ublk_rs_device_dispatch(native(), most);
        if (count == -ENODEV) return false;
        detail::checked_number(count, "dispatch requests");
        return true;
    }

    /// "/dev/ublkbN"; empty before the start.
    std::string path() const {
        const char *path = ublk_rs_device_path(native());
        return path ? path : "";
    }
    std::int64_t id() const noexcept { return ublk_rs_device_id(native()); }
    std::uint64_t features() const noexcept { return ublk_rs_device_features(native()); }
    std::uint64_t size() const noexcept { return ublk_rs_device_size(native()); }
    /// UBLK_RS_ENDING_*; 0 while it goes on.
    std::uint32_t ending() const noexcept { return ublk_rs_device_ending(native()); }
    /// What is not as it should be though the disk works.
    std::vector<std::string> warnings() const {
        return detail::lines(
            [&](std::size_t capacity, char *text) { return ublk_rs_device_warnings(native(), capacity, text); },
            "read warnings");
    }
    ublk_rs_stats stats(std::uint32_t queue = UBLK_RS_ALL_QUEUES) const {
        ublk_rs_stats stats{};
        stats.size = sizeof stats;
        detail::checked([&](ublk_rs_error *e) { return ublk_rs_device_stats(native(), queue, &stats, e); });
        return stats;
    }
    ublk_rs_device *native() const noexcept { return handle_.get(); }

private:
    template <class B> void make(std::uint64_t size, std::unique_ptr<B> served) {
        if (!served) throw std::system_error(EINVAL, std::generic_category(), "a backend that is null");
        const ublk_rs_backend table = detail::table(*served);
        ublk_rs_device *made = nullptr;
        detail::checked([&](ublk_rs_error *e) { return ublk_rs_device_new(size, &table, served.get(), &made, e); });
        served.release();
        handle_.reset(made);
    }

    std::unique_ptr<ublk_rs_device, detail::device_free> handle_;
};

/// The driver, and all devices of the machine.
class control {
public:
    control() {
        ublk_rs_control *made = nullptr;
        detail::checked([&](ublk_rs_error *e) { return ublk_rs_control_open(&made, e); });
        handle_.reset(made);
    }
    std::uint64_t features() const noexcept { return ublk_rs_control_features(native()); }
    std::vector<std::uint32_t> list() const {
        std::vector<std::uint32_t> ids(64);
        std::size_t count = 0;
        for (;;) {
            detail::checked(
                [&](ublk_rs_error *e) { return ublk_rs_control_list(native(), ids.data(), ids.size(), &count, e); });
            const bool all = count <= ids.size();
            ids.resize(count);
            if (all) return ids;
        }
    }
    ublk_rs_device_info info(std::uint32_t id) const {
        ublk_rs_device_info info{};
        info.size = sizeof info;
        detail::checked([&](ublk_rs_error *e) { return ublk_rs_control_info(native(), id, &info, e); });
        return info;
    }
    void remove(std::uint32_t id, std::chrono::milliseconds within) {
        const auto ms = detail::milliseconds(within);
        detail::checked([&](ublk_rs_error *e) { return ublk_rs_control_delete(native(), id, ms, e); });
    }
    /// Takes a live device from its server, for another to recover it.
    void quiesce(std::uint32_t id, std::chrono::milliseconds within) {
        const auto ms = detail::milliseconds(within);
        detail::checked([&](ublk_rs_error *e) { return ublk_rs_control_quiesce(native(), id, ms, e); });
    }
    /// What keeps a device in use, as far as this process can see.
    std::vector<std::string> holders(std::uint32_t id) const {
        return detail::lines(
            [&](std::size_t capacity, char *text) { return ublk_rs_control_holders(native(), id, capacity, text); },
            "look for holders");
    }
    const ublk_rs_control *native() const noexcept { return handle_.get(); }

private:
    std::unique_ptr<ublk_rs_control, detail::control_free> handle_;
};

/// An option of devices: UBLK_RS_TYPE_* and words, which live for ever.
struct option {
    const char *name;
    std::uint32_t type;
    const char *standard;
    const char *doc;
};

/// All that device::set() knows.
inline std::vector<option> options() {
    std::vector<option> all;
    for (std::size_t i = 0; i < ublk_rs_option_count(); ++i)
        all.push_back({ublk_rs_option_name(i), ublk_rs_option_type(i), ublk_rs_option_default(i), ublk_rs_option_doc(i)});
    return all;
}

/// A ready-made backend.
struct target {
    const char *name;
    const char *doc;
};

inline std::vector<target> targets() {
    std::vector<target> all;
    for (std::size_t i = 0; i < ublk_rs_target_count(); ++i)
        all.push_back({ublk_rs_target_name(i), ublk_rs_target_doc(i)});
    return all;
}

/// The kernel's name of a single feature; empty for one that the library does not know.
inline std::string feature_name(std::uint64_t feature) {
    const char *name = ublk_rs_feature_name(feature);
    return name ? name : "";
}

/// The library that runs, to be compared with UBLK_RS_VERSION.
inline std::uint32_t version() noexcept { return ublk_rs_version(); }
inline const char *version_text() noexcept { return ublk_rs_version_text(); }

/// Has a function told what the library has to say: UBLK_RS_LOG_* and a line, on any thread, several at a time. It must
/// not block, and it lives as long as the program: one that was replaced may still be running. Empty: nothing is told.
inline void set_log(std::function<void(std::uint32_t, const char *)> told, std::uint32_t level = UBLK_RS_LOG_WARN) {
    using function = std::function<void(std::uint32_t, const char *)>;
    static std::mutex &mutex = *new std::mutex;
    static std::vector<std::unique_ptr<function>> &kept = *new std::vector<std::unique_ptr<function>>;
    if (!told) {
        detail::checked_number(ublk_rs_set_log(nullptr, nullptr, level), "set the log");
        return;
    }
    const std::lock_guard<std::mutex> lock(mutex);
    kept.push_back(std::make_unique<function>(std::move(told)));
    const auto shim = [](void *user, std::uint32_t line_level, const char *line) {
        detail::guarded([&] { (*static_cast<function *>(user))(line_level, line); });
    };
    detail::checked_number(ublk_rs_set_log(shim, kept.back().get(), level), "set the log");
}

/// For threads of the program that answer requests: see ublk_rs_declare_io_flusher().
inline void declare_io_flusher() {
    detail::checked_number(ublk_rs_declare_io_flusher(), "declare an I/O flusher");
}

} // namespace ublk_rs

#endif // UBLK_RS_HPP
