#include "stack.h"

namespace ondevice::cpu {

constexpr std::chrono::milliseconds kWhile{250};

void Residents::allow(int64_t bytes) {
    const std::lock_guard turn(turn_);
    most_ = bytes;
    told_ = std::chrono::steady_clock::now();
}

bool Residents::due() const { return std::chrono::steady_clock::now() - told_ > kWhile; }

Residents::Owner Residents::leave(Order::iterator place) {
    Owner owner = std::move(*place->owner);
    held_ -= place->bytes;
    order_.erase(place);
    return owner;
}

std::vector<Residents::Owner> Residents::make_room(int64_t bytes) {
    std::vector<Owner> gone;
    while (held_ + bytes > most_ && !order_.empty() && order_.front().call != call_)
        gone.push_back(leave(order_.begin()));
    return gone;
}

Fetching::Fetching(std::shared_ptr<Residents> residents, int64_t experts, Fetch fetch)
    : residents_(std::move(residents)), fetch_(std::move(fetch)), seats_(static_cast<size_t>(experts)) {
    for (Seat& seat : seats_) seat.place = residents_->order_.end();
}

Fetching::~Fetching() {
    std::vector<Residents::Owner> gone;  // let go behind the lock
    const std::lock_guard turn(residents_->turn_);
    for (Seat& seat : seats_)
        if (seat.owner && seat.place != residents_->order_.end()) gone.push_back(residents_->leave(seat.place));
}

void Fetching::need(const int32_t* experts, int64_t count) {
    Residents& all = *residents_;
    {
        const std::lock_guard turn(all.turn_);
        all.call_++;
        for (int64_t i = 0; i < count; i++) {  // who is here must not go for those who are not
            const Seat& seat = seats_[experts[i]];
            if (!seat.owner || seat.place == all.order_.end()) continue;
            seat.place->call = all.call_;
            all.order_.splice(all.order_.end(), all.order_, seat.place);
        }
    }
    for (int64_t i = 0; i < count; i++)
        if (!seats_[experts[i]].owner) bring(seats_[experts[i]], experts[i]);
}

void Fetching::bring(Seat& seat, int64_t expert) {
    Residents& all = *residents_;
    std::vector<Residents::Owner> gone;
    {
        const std::lock_guard turn(all.turn_);
        gone = all.make_room(bytes_);
    }
    gone.clear();
    Fetched fetched = fetch_(expert);
    const std::lock_guard turn(all.turn_);
    seat.matrix = fetched.matrix;
    seat.owner = std::move(fetched.owner);
    bytes_ = fetched.bytes;
    seat.place = all.order_.end();
    if (!bytes_) return;
    seat.place = all.order_.insert(all.order_.end(), {&seat.owner, bytes_, all.call_});
    all.held_ += bytes_;
}

}  // namespace ondevice::cpu
