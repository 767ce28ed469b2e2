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
#include <functional>
#include <memory>
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
    error(int code, std::uint32_t kind, std::int64_t device, std::string text, std::string remedy)
        : std::system_error(code, std::generic_category(), text), text_(std::move(text)), remedy_(std::move(remedy)),
          kind_(kind), device_(device) {}

    const char *what() const noexcept override { return text_.c_str(); }
    /// UBLK_RS_KIND_*.
    std::uint32_t kind() const noexcept { return kind_; }
    /// What to do about it; may be empty.
    const std::string &remedy() const noexcept { return remedy_; }
    /// The device's number; -1 for none.
    std::int64_t device() const noexcept { return device_; }

private:
    std::string text_, remedy_;
    std::uint32_t kind_;
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
        throw error(-code, ublk_rs_error_kind(object.get()), ublk_rs_error_device(object.get()),
                    ublk_rs_error_message(object.get()), ublk_rs_error_remedy(object.get()));
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

/// A request in the hands of who answers it. One that is destroyed without an answer is answered with EIO.
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
    const ublk_rs_control *native() const noexcept { return handle_.get(); }

private:
    std::unique_ptr<ublk_rs_control, detail::control_free> handle_;
};

} // namespace ublk_rs

#endif // UBLK_RS_HPP
