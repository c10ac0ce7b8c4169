#include "pool.h"

#include <chrono>
#include <map>
#include <new>

#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#endif
#if defined(__linux__)
#include <sys/mman.h>
#endif
#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

namespace ondevice::cpu {
namespace {

constexpr uint32_t kOpen = 1u << 31;
// Longer than what lies between two tokens (sampling and text: some 100 us), so that workers stay awake while decoding.
constexpr std::chrono::microseconds kSpin{400};
constexpr size_t kHuge = 2 << 20;

inline void pause() {
#if defined(__x86_64__) || defined(_M_X64)
    _mm_pause();
#elif defined(__aarch64__)
    __asm__ __volatile__("yield");
#endif
}

template <class Condition>
void spin_until(const Condition& holds) {
    for (int spins = 0; !holds(); spins++) {
        if (spins < 4096) pause();
        else std::this_thread::yield();  // more threads than cores: let the others finish
    }
}

std::atomic<bool> forked{false};  // a forked child has our memory but none of our threads

void watch_forks() {
#if defined(__unix__) || defined(__APPLE__)
    static const int once = pthread_atfork(nullptr, nullptr, [] { forked = true; });
    (void)once;
#endif
}

}  // namespace

Pool::Room::~Room() { ::operator delete[](data_, std::align_val_t{kHuge}); }

// In huge pages if there are such: products go through a room back and forth, and would miss small pages' addresses.
float* Pool::Room::reserve(size_t floats) {
    if (floats > size_) {
        ::operator delete[](data_, std::align_val_t{kHuge});
        data_ = nullptr;
        size_ = 0;
        const size_t bytes = floats * sizeof(float);
        data_ = static_cast<float*>(::operator new[](bytes, std::align_val_t{kHuge}));
        size_ = floats;
#if defined(__linux__)
        if (bytes >= kHuge) madvise(data_, bytes / kHuge * kHuge, MADV_HUGEPAGE);
#endif
    }
    return data_;
}

Pool::Pool(int threads) : threads_(threads), scratch_(static_cast<size_t>(threads) + 4), shares_(static_cast<size_t>(threads)) {
    watch_forks();
    for (int thread = 1; thread < threads; thread++) workers_.emplace_back([this, thread] { serve(thread); });
}

Pool::~Pool() {
    if (forked) {  // there is nobody to join
        for (auto& worker : workers_) worker.detach();
        return;
    }
    {
        std::lock_guard lock(mutex_);
        stop_ = true;
        epoch_++;
    }
    wake_.notify_all();
    for (auto& worker : workers_) worker.join();
}

void Pool::share(int64_t tasks, Call call, const void* self) {
    call_ = call;
    self_ = self;
    for (int thread = 0; thread < threads_; thread++) {
        shares_[thread].next.store(tasks * thread / threads_, std::memory_order_relaxed);
        shares_[thread].end = tasks * (thread + 1) / threads_;
    }
    if (forked) return work(0);
    gate_.fetch_or(kOpen, std::memory_order_release);
    epoch_.fetch_add(1);
    if (sleepers_.load() > 0) {
        std::lock_guard lock(mutex_);
        wake_.notify_all();
    }
    work(0);
    gate_.fetch_and(~kOpen, std::memory_order_acq_rel);
    spin_until([this] { return gate_.load(std::memory_order_acquire) == 0; });
}

void Countdown::wait() const {
    spin_until([this] { return left_.load(std::memory_order_acquire) <= 0; });
}

void Pool::work(int thread) {
    for (int i = 0; i < threads_; i++) {
        Share& share = shares_[(thread + i) % threads_];
        while (share.next.load(std::memory_order_relaxed) < share.end) {  // the others' are not written to in vain
            const int64_t task = share.next.fetch_add(1, std::memory_order_relaxed);
            if (task < share.end) call_(self_, task, thread);
        }
    }
}

void Pool::serve(int thread) {
    for (uint32_t seen = 0;;) {
        seen = await(seen);
        if (stop_) return;
        if (gate_.fetch_add(1, std::memory_order_acquire) & kOpen) work(thread);
        gate_.fetch_sub(1, std::memory_order_release);
    }
}

uint32_t Pool::await(uint32_t seen) {
    const auto start = std::chrono::steady_clock::now();
    for (int spins = 1;; spins++) {
        const uint32_t now = epoch_.load(std::memory_order_acquire);
        if (now != seen) return now;
        pause();
        if (spins % 256 == 0 && std::chrono::steady_clock::now() - start > kSpin) break;
    }
    std::unique_lock lock(mutex_);
    sleepers_++;
    wake_.wait(lock, [&] { return epoch_.load() != seen; });
    sleepers_--;
    return epoch_.load();
}

std::shared_ptr<Pool> shared_pool(int threads) {
    static std::mutex mutex;
    static std::map<int, std::weak_ptr<Pool>> pools;
    std::lock_guard lock(mutex);
    auto pool = pools[threads].lock();
    if (!pool) pools[threads] = pool = std::make_shared<Pool>(threads);
    return pool;
}

}  // namespace ondevice::cpu
