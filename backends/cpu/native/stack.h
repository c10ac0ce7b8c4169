// Stacks of matrices (a layer's experts) that are fetched when they are first needed, and let go again, those first that
// have not been needed for longest, when room is short: so a model need not fit in memory.
#pragma once

#include <atomic>
#include <chrono>
#include <functional>
#include <list>
#include <memory>
#include <mutex>
#include <vector>

#include "kernels.h"

namespace ondevice::cpu {

// One expert's matrix. bytes: memory of its own, 0 if it is used where its file is mapped. owner: keeps it.
struct Fetched {
    Matrix matrix;
    int64_t bytes;
    std::shared_ptr<const void> owner;
};

// The experts of all stacks that take memory of their own, in the order in which they were last needed.
class Residents {
  public:
    int64_t held() const { return held_; }
    // Bytes that they may take together; what one call needs stays even so.
    void allow(int64_t bytes);
    // Whether that was said too long ago to hold still.
    bool due() const;

  private:
    friend class Fetching;
    using Owner = std::shared_ptr<const void>;
    struct Resident {
        Owner* owner;
        int64_t bytes, call;
    };
    using Order = std::list<Resident>;

    Owner leave(Order::iterator place);
    std::vector<Owner> make_room(int64_t bytes);

    std::mutex turn_;  // never held while anything is fetched or let go, which may wait for Python's lock
    Order order_;      // longest unneeded first
    std::atomic<int64_t> held_{0};
    int64_t most_ = INT64_MAX, call_ = 0;
    std::chrono::steady_clock::time_point told_{};
};

// One stack. `need` is called by one thread at a time.
class Fetching : public Stack {
  public:
    using Fetch = std::function<Fetched(int64_t expert)>;

    Fetching(std::shared_ptr<Residents> residents, int64_t experts, Fetch fetch);
    ~Fetching() override;
    Fetching(const Fetching&) = delete;
    Fetching& operator=(const Fetching&) = delete;

    void need(const int32_t* experts, int64_t count) override;
    const Matrix& operator[](int64_t expert) const override { return seats_[expert].matrix; }

  private:
    struct Seat {
        Matrix matrix{};
        Residents::Owner owner;  // null: not here
        Residents::Order::iterator place;
    };
    void bring(Seat& seat, int64_t expert);

    std::shared_ptr<Residents> residents_;
    Fetch fetch_;
    std::vector<Seat> seats_;
    int64_t bytes_ = 0;  // of the last one fetched; all are alike
};

}  // namespace ondevice::cpu
