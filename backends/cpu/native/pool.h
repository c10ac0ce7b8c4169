// A persistent team of threads for loops of a few microseconds.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace ondevice::cpu {

// `run` hands out the numbers 0 ... tasks-1 to the caller and the workers: to each a share of neighbours first, the same
// in every loop of so many, so that what one loop wrote lies in the cache of the core that reads it in the next; who is
// done helps the others. Workers wait for the next
// loop spinning, for a while, then asleep. A worker that comes too late finds the gate closed: nobody waits for it.
class Pool {
  public:
    explicit Pool(int threads);
    ~Pool();
    Pool(const Pool&) = delete;
    Pool& operator=(const Pool&) = delete;

    int threads() const { return threads_; }
    std::recursive_mutex turn;

    // work(task, thread) for each task. Not reentrant; one caller at a time, who holds `turn`.
    template <class Work>
    void run(int64_t tasks, const Work& work) {
        if (tasks <= 1 || threads_ == 1) {
            for (int64_t task = 0; task < tasks; task++) work(task, 0);
            return;
        }
        const auto call = [](const void* self, int64_t task, int thread) {
            (*static_cast<const Work*>(self))(task, thread);
        };
        share(tasks, call, &work);
    }

    // At least `floats` floats, aligned to 64 bytes: one room a thread, and four for all: 0 and 1 are an operation's own, 2 and 3
    // belong to products, which it may call. Valid until asked for again.
    float* scratch(int thread, size_t floats) { return scratch_[thread].reserve(floats); }
    float* shared(int which, size_t floats) { return scratch_[threads_ + which].reserve(floats); }

  private:
    using Call = void (*)(const void* self, int64_t task, int thread);

    class Room {
      public:
        Room() = default;
        Room(const Room&) = delete;
        ~Room();
        float* reserve(size_t floats);

      private:
        float* data_ = nullptr;
        size_t size_ = 0;
    };

    void share(int64_t tasks, Call call, const void* self);
    void work(int thread);
    void serve(int thread);
    uint32_t await(uint32_t seen);

    const int threads_;
    std::vector<Room> scratch_;
    std::vector<std::thread> workers_;
    Call call_ = nullptr;
    const void* self_ = nullptr;
    alignas(64) std::atomic<uint32_t> gate_{0};   // kOpen while a loop runs, plus the number of workers inside
    alignas(64) std::atomic<uint32_t> epoch_{0};  // counts loops; workers wait for it to change
    std::atomic<int> sleepers_{0};
    std::atomic<bool> stop_{false};
    std::mutex mutex_;
    std::condition_variable wake_;

    struct alignas(64) Share {
        std::atomic<int64_t> next{0};
        int64_t end = 0;
    };
    std::vector<Share> shares_;  // one a thread
};

// Tasks of a loop that others of the same loop wait for. They must have the lower numbers: the caller
// takes what is left in order, so all that stands before a task it waits in is done or being done.
class Countdown {
  public:
    explicit Countdown(int64_t tasks) : left_(tasks) {}
    void arrive() { left_.fetch_sub(1, std::memory_order_release); }
    void wait() const;

  private:
    std::atomic<int64_t> left_;
};

// The one pool of `threads` threads in this process, made on first use and gone with its last user.
std::shared_ptr<Pool> shared_pool(int threads);

// Pieces to cut `amount` of work into, each of at least `least`: several a thread, so that a slow one is helped out, and
// as many for each.
inline int64_t pieces(const Pool& pool, int64_t amount, int64_t least) {
    const int64_t most = pool.threads() == 1 ? 1 : 4 * static_cast<int64_t>(pool.threads());
    const int64_t fit = amount / (least > 0 ? least : 1), even = fit - fit % pool.threads();
    return fit < 1 ? 1 : even < 1 ? fit : (even < most ? even : most);
}

}  // namespace ondevice::cpu
