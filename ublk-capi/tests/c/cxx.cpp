// The C++ header: exceptions both ways, functions, requests that answer themselves, handles that end themselves.

#include <condition_variable>
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
