// A disk in C++: `disk [SIZE_IN_BYTES]`. A class whose overridden functions say what the disk can do; serves until the end
// of stdin, and stops the disk when nobody uses it.

#include <algorithm>
#include <chrono>
#include <cstring>
#include <iostream>
#include <limits>
#include <mutex>
#include <shared_mutex>
#include <string>
#include <vector>

#include <ublk_rs.hpp>

class memory : public ublk_rs::backend {
public:
    explicit memory(std::size_t size) : bytes_(size) {}

    void read(ublk_rs::bytes into, std::uint64_t offset) override {
        std::shared_lock lock(mutex_);
        std::copy_n(bytes_.begin() + at(offset), into.size(), into.begin());
    }
    void write(ublk_rs::const_bytes data, std::uint64_t offset, std::uint32_t) override {
        std::unique_lock lock(mutex_);
        std::copy(data.begin(), data.end(), bytes_.begin() + at(offset));
    }
    void write_zeroes(std::uint64_t offset, std::uint64_t length, std::uint32_t) override {
        std::unique_lock lock(mutex_);
        std::fill_n(bytes_.begin() + at(offset), length, std::byte{});
    }

private:
    static std::ptrdiff_t at(std::uint64_t offset) { return static_cast<std::ptrdiff_t>(offset); }

    std::shared_mutex mutex_;
    std::vector<std::byte> bytes_;
};

int main(int argc, char **argv) try {
    const std::uint64_t size = argc > 1 ? std::stoull(argv[1]) : 64u << 20;
    ublk_rs::device disk(size, std::make_unique<memory>(size));
    disk.set("queues", 2).set("queue_depth", 64).start();
    std::cout << disk.path() << std::endl;
    std::cin.ignore(std::numeric_limits<std::streamsize>::max(), std::char_traits<char>::eof());
    disk.stop(std::chrono::seconds(30));
    return 0;
} catch (const std::exception &e) {
    std::cerr << "disk: " << e.what() << '\n';
    return 1;
}
