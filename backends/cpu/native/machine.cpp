#include "machine.h"

#include <new>
#include <stdexcept>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace ondevice::cpu {
namespace {

constexpr size_t kHuge = 2 << 20;
constexpr size_t kOwn = 128 << 10;  // bytes from which a buffer has pages of its own
constexpr int64_t kShelf = 16 << 20;
constexpr int64_t kPage = 64 << 10;  // the largest that Linux is built with

#if defined(__linux__)

// Whole pages of its own, so that what is given back is the system's again and not a hole in the heap.
void* take_pages(size_t bytes) {
    const size_t all = bytes < kHuge ? bytes : bytes + kHuge;
    void* data = mmap(nullptr, all, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (data == MAP_FAILED) throw std::bad_alloc();
    if (bytes < kHuge) return data;
    auto* begin = static_cast<uint8_t*>(data);
    const size_t before = (kHuge - reinterpret_cast<uintptr_t>(data) % kHuge) % kHuge;
    if (before) munmap(begin, before);
    munmap(begin + before + bytes, kHuge - before);
    madvise(begin + before, bytes, MADV_HUGEPAGE);
    return begin + before;
}

constexpr bool kPages = true;
void give_pages(void* data, size_t bytes) { munmap(data, bytes); }

#else

constexpr bool kPages = false;
void* take_pages(size_t) { return nullptr; }
void give_pages(void*, size_t) {}

#endif

size_t whole_pages(int64_t bytes) { return static_cast<size_t>(round_up(bytes, kPage)); }

}  // namespace

Buffer::Buffer(int64_t bytes) : bytes_(bytes) {
    if (kPages && static_cast<size_t>(bytes) >= kOwn) data_ = take_pages(whole_pages(bytes));
    else data_ = ::operator new(static_cast<size_t>(bytes), std::align_val_t{kLine});
}

Buffer::~Buffer() {
    if (kPages && static_cast<size_t>(bytes_) >= kOwn) give_pages(data_, whole_pages(bytes_));
    else ::operator delete(data_, std::align_val_t{kLine});
}

std::shared_ptr<uint8_t> Shelf::alone(int64_t bytes) {
    const auto own = std::make_shared<Buffer>(bytes);
    return {own, own->as()};
}

std::shared_ptr<uint8_t> Shelf::take(int64_t bytes) {
    std::lock_guard turn(turn_);
    bytes = round_up(bytes, kLine);
    if (bytes > kShelf / 8) return alone(bytes);
    if (!open_ || used_ + bytes > kShelf) {
        open_ = std::make_shared<Buffer>(kShelf);
        used_ = 0;
    }
    used_ += bytes;
    return {open_, open_->as() + used_ - bytes};
}

uint8_t* Arena::take(int64_t bytes) {
    // A somewhat larger one will do: lengths differ from batch to batch, and fresh pages cost more than what is computed.
    const auto found = free_.lower_bound(bytes);
    const bool fits = found != free_.end() && found->first <= bytes + bytes / 4;
    used_ += fits ? found->first : bytes;
    most_ = used_ > most_ ? used_ : most_;
    if (fits) {
        uint8_t* data = found->second.back();
        found->second.pop_back();
        if (found->second.empty()) free_.erase(found);
        return data;
    }
    if (bounded_) shrink(most_ + most_ / 16 - bytes);
    auto made = std::make_unique<Buffer>(bytes);
    uint8_t* data = made->as();
    all_[data] = std::move(made);
    held_ += bytes;
    return data;
}

void Arena::tidy() {
    most_ = used_;
    shrink(used_);
}

void Arena::shrink(int64_t most) {
    while (!free_.empty() && held_ > most) {
        const auto size = std::prev(free_.end());
        all_.erase(size->second.back());
        held_ -= size->first;
        size->second.pop_back();
        if (size->second.empty()) free_.erase(size);
    }
}

void Arena::give(uint8_t* data) {
    const int64_t bytes = all_.at(data)->size();
    used_ -= bytes;
    free_[bytes].push_back(data);
}

bool Arena::owns(const void* data) const {
    auto* address = static_cast<uint8_t*>(const_cast<void*>(data));
    const auto next = all_.upper_bound(address);
    return next != all_.begin() && address < std::prev(next)->first + std::prev(next)->second->size();
}

void Plan::append(Node node) {
    open_.reset();
    nodes_.push_back(std::move(node));
}

void Plan::append(Kernel<LinearInt8> kernel, const LinearInt8& products) {
    if (open_ && open_->x.codes == products.x.codes && open_->count < kProducts) {
        open_->products[open_->count++] = products.products[0];
        return;
    }
    auto shared = std::make_shared<LinearInt8>(products);
    append([kernel, shared](Pool& pool) { kernel(*shared, pool); });
    open_ = shared;
}

void Plan::run(Pool& pool) const {
    for (const Node& node : nodes_) node(pool);
}

Machine::Machine(int threads, const std::string& name) : pool_(shared_pool(threads)), kernels_(nullptr) {
    const Variants found = variants();
    for (int i = found.count - 1; i >= 0; i--)
        if (name.empty() || name == found.all[i]->name) kernels_ = found.all[i];
    if (!kernels_) throw std::invalid_argument("this processor has no kernels called " + name);
}

void Machine::run(const std::function<void()>& work) {
    std::lock_guard turn(pool_->turn);
    work();
}

}  // namespace ondevice::cpu
