#include "machine.h"

#include <new>
#include <stdexcept>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace ondevice::cpu {
namespace {

constexpr size_t kHuge = 2 << 20;

size_t alignment(int64_t bytes) { return static_cast<size_t>(bytes) >= kHuge ? kHuge : kLine; }

}  // namespace

Buffer::Buffer(int64_t bytes) : bytes_(bytes) {
    data_ = ::operator new(static_cast<size_t>(bytes), std::align_val_t{alignment(bytes)});
#if defined(__linux__)
    if (alignment(bytes) == kHuge) madvise(data_, static_cast<size_t>(bytes), MADV_HUGEPAGE);
#endif
}

Buffer::~Buffer() { ::operator delete(data_, std::align_val_t{alignment(bytes_)}); }

uint8_t* Arena::take(int64_t bytes) {
    auto& free = free_[bytes];
    if (free.empty()) {
        all_.push_back(std::make_unique<Buffer>(bytes));
        sizes_[all_.back()->as()] = bytes;
        return all_.back()->as();
    }
    uint8_t* data = free.back();
    free.pop_back();
    return data;
}

bool Arena::owns(const void* data) const {
    auto* address = static_cast<uint8_t*>(const_cast<void*>(data));
    const auto next = sizes_.upper_bound(address);
    return next != sizes_.begin() && address < std::prev(next)->first + std::prev(next)->second;
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
