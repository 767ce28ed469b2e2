// The C++ header: exceptions both ways, functions, requests that answer themselves, handles that end themselves.

#include <algorithm>
#include <array>
#include <condition_variable>
#include <cstdlib>
#include <iostream>
#include <mutex>
#include <queue>
#include <thread>

#include <ublk_rs.hpp>

#include "check.h"

namespace {

constexpr std::uint64_t size = SIZE;
int alive = 0;

struct counted {
    counted() { ++alive; }
    counted(const counted &) = delete;
    counted &operator=(const counted &) = delete;
    ~counted() { --alive; }
};

class thrower : public ublk_rs::backend, counted {
public:
    void read(ublk_rs::bytes into, std::uint64_t offset) override {
        if (offset == 1 << 20) throw std::system_error(ENODATA, std::system_category());
        if (offset == 2 << 20) throw std::bad_alloc();
        if (offset == 3 << 20) throw 42;
        if (offset == 4 << 20) throw std::system_error(EPERM, std::iostream_category());
        std::fill(into.begin(), into.end(), std::byte{7});
    }
    void flush() override {}
};

// Answers on a thread of its own, or not at all.
class later : public ublk_rs::async_backend, counted {
public:
    later() : thread_([this] { serve(); }) {}
    ~later() override {
        {
            std::lock_guard lock(mutex_);
            done_ = true;
        }
        arrived_.notify_one();
        thread_.join();
    }
    void submit(ublk_rs::request request) override {
        if (request.io().offset == 1 << 20) return; // dropped
        if (request.io().offset == 2 << 20) throw std::runtime_error("refused");
        std::lock_guard lock(mutex_);
        waiting_.push(std::move(request));
        arrived_.notify_one();
    }

private:
    void serve() {
        std::unique_lock lock(mutex_);
        for (;;) {
            arrived_.wait(lock, [this] { return done_ || !waiting_.empty(); });
            if (waiting_.empty()) return;
            ublk_rs::request request = std::move(waiting_.front());
            waiting_.pop();
            const std::byte first{9};
            if (request.io().op == UBLK_RS_OP_READ) request.put(0, {&first, 1});
            request.complete();
            CHECK(!request.complete());
        }
    }
    std::mutex mutex_;
    std::condition_variable arrived_;
    std::queue<ublk_rs::request> waiting_;
    bool done_ = false;
    std::thread thread_;
};

// Zones of 4 MiB, each with its write pointer.
class zoned : public ublk_rs::backend, counted {
public:
    static constexpr std::uint64_t zone = 4 << 20, zones = size / zone;

    explicit zoned(bool &reset) : reset_(reset) {}
    void read(ublk_rs::bytes into, std::uint64_t offset) override {
        std::lock_guard lock(mutex_);
        const bool written = offset % zone < pointers_[offset / zone];
        std::fill(into.begin(), into.end(), std::byte{static_cast<unsigned char>(written ? 0x55 : 0)});
    }
    void write(ublk_rs::const_bytes data, std::uint64_t offset, std::uint32_t) override {
        std::lock_guard lock(mutex_);
        if (offset % zone != pointers_[offset / zone]) throw std::system_error(EIO, std::generic_category());
        pointers_[offset / zone] += data.size();
    }
    std::size_t report_zones(std::uint64_t offset, ublk_rs::span<ublk_rs::zone> into) override {
        std::lock_guard lock(mutex_);
        std::size_t count = 0;
        for (std::uint64_t at = offset / zone; at < zones && count < into.size(); ++at, ++count) {
            ublk_rs::zone &told = into[count] = {};
            told.start = at * zone;
            told.length = told.capacity = zone;
            told.write_pointer = told.start + pointers_[at];
            told.kind = UBLK_RS_ZONE_SEQUENTIAL;
            told.state = pointers_[at] ? UBLK_RS_ZONE_IMPLICITLY_OPEN : UBLK_RS_ZONE_EMPTY;
        }
        return count;
    }
    std::uint64_t zone_append(ublk_rs::const_bytes data, std::uint64_t start, std::uint32_t) override {
        std::lock_guard lock(mutex_);
        const std::uint64_t at = start + pointers_[start / zone];
        pointers_[start / zone] += data.size();
        return at;
    }
    void zone_action(std::uint32_t op, std::uint64_t start) override {
        std::lock_guard lock(mutex_);
        if (op != UBLK_RS_OP_ZONE_RESET) return;
        pointers_[start / zone] = 0;
        reset_ = true;
    }

private:
    bool &reset_;
    std::mutex mutex_;
    std::array<std::uint64_t, zones> pointers_{};
};

template <class Call> int errno_of(Call &&call) {
    try {
        call();
    } catch (const ublk_rs::error &e) {
        CHECK(std::string(e.what()).size() > 10);
        return e.code().value();
    }
    return 0;
}

} // namespace

int main() {
    const auto patience = std::chrono::milliseconds(static_cast<long long>(20000 * scale()));
    unsigned char first = 0;
    {
        ublk_rs::device disk(size, std::make_unique<thrower>());
        EQUAL(alive, 1);
        EQUAL(errno_of([&] { disk.set("luck", 1); }), EINVAL);
        EQUAL(errno_of([&] { disk.stop(patience); }), EBADFD);
        disk.set("queue_depth", 16).set("pin", false).start();
        EQUAL(disk.size(), size);
        const std::string path = disk.path();
        EQUAL(disk_io(path.c_str(), 0, 0, 0, &first), 0);
        EQUAL(first, 7);
        EQUAL(disk_io(path.c_str(), 0, 1 << 20, 0, nullptr), ENODATA);
        EQUAL(disk_io(path.c_str(), 0, 2 << 20, 0, nullptr), ENOMEM);
        EQUAL(disk_io(path.c_str(), 0, 3 << 20, 0, nullptr), EIO);
        EQUAL(disk_io(path.c_str(), 0, 4 << 20, 0, nullptr), EIO);
        CHECK(disk_io(path.c_str(), 1, 0, 0, nullptr) != 0); // write was not overridden: a read-only disk
        CHECK(disk.stats().read.errors >= 4);
        ublk_rs::control driver;
        EQUAL(driver.list().size(), 1);
        EQUAL(driver.info(static_cast<std::uint32_t>(disk.id())).state, UBLK_RS_STATE_LIVE);
        EQUAL(errno_of([&] { driver.info(4711); }), ENODEV);
    }
    EQUAL(alive, 0);
    {
        int writes = 0;
        ublk_rs::functions f;
        f.read = [](ublk_rs::bytes into, std::uint64_t) { into[0] = std::byte{5}; };
        f.write = [&](ublk_rs::const_bytes data, std::uint64_t, std::uint32_t) { writes += data.size() == BLOCK; };
        ublk_rs::workers pool(1);
        ublk_rs::device disk(size, std::move(f));
        disk.use(pool).start();
        EQUAL(disk_io(disk.path().c_str(), 1, 0, 1, nullptr), 0);
        EQUAL(writes, 1);
        EQUAL(disk_io(disk.path().c_str(), 0, 0, 0, &first), 0);
        EQUAL(first, 5);
        disk.stop(patience);
        EQUAL(disk.ending(), UBLK_RS_ENDING_STOPPED);
    }
    {
        ublk_rs::device disk(size, std::make_unique<later>());
        disk.start();
        EQUAL(disk_io(disk.path().c_str(), 0, 0, 0, &first), 0);
        EQUAL(first, 9);
        EQUAL(disk_io(disk.path().c_str(), 0, 1 << 20, 0, nullptr), EIO);
        EQUAL(disk_io(disk.path().c_str(), 0, 2 << 20, 0, nullptr), EIO);
        disk.stop(patience);
    }
    EQUAL(alive, 0);
    {
        bool reset = false;
        ublk_rs::device disk(size, std::make_unique<zoned>(reset));
        EQUAL(errno_of([&] { disk.start(); }), EINVAL); // without zone_bytes
        disk.set("zone_bytes", "4M").start();
        EQUAL(disk.features() & UBLK_RS_FEATURE_ZONED, UBLK_RS_FEATURE_ZONED);
        EQUAL(disk_io(disk.path().c_str(), 1, zoned::zone, 0x55, nullptr), 0);
        EQUAL(disk_io(disk.path().c_str(), 1, zoned::zone, 0x55, nullptr), EIO); // not at the write pointer
        EQUAL(disk_io(disk.path().c_str(), 0, zoned::zone, 0, &first), 0);
        EQUAL(first, 0x55);
        const std::string written = " | grep -q 'start: 0x000002000, len 0x002000.*wptr 0x000008'";
        EQUAL(std::system(("blkzone report " + disk.path() + written).c_str()), 0);
        EQUAL(std::system(("blkzone reset -o 8192 -c 1 " + disk.path()).c_str()), 0);
        CHECK(reset);
        EQUAL(disk_io(disk.path().c_str(), 1, zoned::zone, 0x55, nullptr), 0);
        disk.stop(patience);
    }
    EQUAL(alive, 0);
    {
        // A table of some of the three functions is no zoned disk.
        ublk_rs::functions some;
        some.read = [](ublk_rs::bytes, std::uint64_t) {};
        some.zone_action = [](std::uint32_t, std::uint64_t) {};
        EQUAL(errno_of([&] { ublk_rs::device(size, std::move(some)); }), EINVAL);
    }
    {
        // What is told of devices, options and the library; errors are in C's words.
        ublk_rs::device disk("mem");
        disk.set("size", size).set("prefer", "USER_RECOVERY").start();
        EQUAL(disk.get("size") == std::to_string(size), 1);
        EQUAL(disk.get("data_path") == "auto", 1);
        EQUAL(errno_of([&] { disk.get("luck"); }), EINVAL);
        CHECK(!disk.wait_for(std::chrono::milliseconds(10)));
        EQUAL(disk.warnings().size(), 0);
        ublk_rs::control driver;
        const int held = open(disk.path().c_str(), O_RDONLY);
        const auto holders = driver.holders(static_cast<std::uint32_t>(disk.id()));
        const std::string ours = "(pid " + std::to_string(getpid()) + ") has the disk open";
        EQUAL(std::count_if(holders.begin(), holders.end(),
                            [&](const std::string &one) { return one.find(ours) != std::string::npos; }),
              1);
        EQUAL(errno_of([&] { driver.quiesce(4711, patience); }), ENODEV);
        EQUAL(errno_of([&] { disk.unshare(3); }) != 0, 1);
        close(held);
        disk.stop(patience);
        CHECK(disk.wait_for(patience));
        try {
            disk.stop(patience);
            ublk_rs::device other("null");
            other.set("size", size).set("require", "ZONED").start();
            CHECK(false);
        } catch (const ublk_rs::error &e) {
            CHECK(std::string(e.what()).find("the option zone_bytes") != std::string::npos);
            EQUAL(e.kernel_errno(), 0);
        }
        bool found = false;
        for (const auto &option : ublk_rs::options()) {
            CHECK(*option.doc != '\0' && option.type >= UBLK_RS_TYPE_NUMBER && option.standard);
            found |= option.name == std::string("zone_bytes");
        }
        CHECK(found && ublk_rs::targets().size() >= 5);
        EQUAL(ublk_rs::version(), UBLK_RS_VERSION);
        CHECK(*ublk_rs::version_text() != '\0');
        CHECK(ublk_rs::feature_name(UBLK_RS_FEATURE_ZONED) == "ZONED" && ublk_rs::feature_name(3).empty());
        ublk_rs::set_log([](std::uint32_t, const char *) { throw 42; }, UBLK_RS_LOG_TRACE);
        ublk_rs::set_log(nullptr);
        std::thread([] { ublk_rs::declare_io_flusher(); }).join();
    }
    EQUAL(errno_of([] { ublk_rs::device("luck"); }), EINVAL);
    {
        ublk_rs::device disk("mem");
        disk.set("size", "16M").start();
        EQUAL(disk_io(disk.path().c_str(), 1, 0, 3, nullptr), 0);
        EQUAL(disk_io(disk.path().c_str(), 0, 0, 0, &first), 0);
        EQUAL(first, 3);
    } // stopped by its end
    EQUAL(entries("/sys/class/ublk-char", "ublkc"), 0);
    return 0;
}
