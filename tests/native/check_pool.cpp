#include <atomic>

#include "check.h"

namespace ondevice::cpu {

// Every task once, by threads that exist, however many loops follow one another and whoever sleeps in between.
void check_pool() {
    for (int threads : {1, 2, 5, 16}) {
        Pool pool(threads);
        std::vector<std::atomic<int>> done(37);
        for (int round = 0; round < 2000; round++) {
            const int64_t tasks = round % 38;
            for (auto& d : done) d = 0;
            pool.run(tasks, [&](int64_t task, int thread) {
                if (thread >= 0 && thread < threads) done[static_cast<size_t>(task)]++;
            });
            for (int64_t i = 0; i < 37; i++) expect(done[static_cast<size_t>(i)] == (i < tasks), "pool: each task once");
            if (round % 500 == 0) std::this_thread::sleep_for(std::chrono::milliseconds(3));  // workers fall asleep
        }
    }
}

}  // namespace ondevice::cpu
