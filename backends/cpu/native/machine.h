// What Python holds: a machine (kernels and threads), weights, and plans of recorded calls.
#pragma once

#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "kernels.h"
#include "pool.h"
#include "stack.h"

namespace ondevice::cpu {

// Bytes aligned to 64; large ones on huge pages where the system has them.
class Buffer {
  public:
    explicit Buffer(int64_t bytes);
    ~Buffer();
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;

    template <class T = uint8_t>
    T* as() const {
        return static_cast<T*>(data_);
    }
    int64_t size() const { return bytes_; }

  private:
    void* data_;
    int64_t bytes_;
};

// Memory for weights. Small ones stand side by side in a buffer large enough for huge pages, which spares a model's
// first use thousands of page faults; the buffer goes with the last of them.
class Shelf {
  public:
    std::shared_ptr<uint8_t> take(int64_t bytes);
    static std::shared_ptr<uint8_t> alone(int64_t bytes);  // given back with what lies in it

  private:
    std::mutex turn_;
    std::shared_ptr<Buffer> open_;
    int64_t used_ = 0;
};

// Buffers that are used again once Python has let go of them, which saves the system from clearing fresh pages: in a plan,
// whose replay runs its calls in the same order, and from step to step in training, from layer to layer of a prompt. If
// `bounded`, what lies idle is given back before a sixteenth more than ever was in use at once would be held; a plan points
// to its buffers for good.
class Arena {
  public:
    explicit Arena(bool bounded) : bounded_(bounded) {}
    Arena(const Arena&) = delete;
    Arena& operator=(const Arena&) = delete;

    uint8_t* take(int64_t bytes);
    bool owns(const void* data) const;
    void give(uint8_t* data);
    void tidy();  // gives back all that lies idle
    int64_t held() const { return held_; }

  private:
    void shrink(int64_t most);  // until no more than so many bytes are held, the largest idle buffers first

    const bool bounded_;
    std::map<uint8_t*, std::unique_ptr<Buffer>> all_;
    std::map<int64_t, std::vector<uint8_t*>> free_;
    int64_t held_ = 0, used_ = 0, most_ = 0;  // bytes: of all buffers, of those in use, of these at any time
};

// Recorded kernel calls, in order.
class Plan {
  public:
    using Node = std::function<void(Pool&)>;

    void append(Node node);
    // Products of the same activations that follow one another become one node.
    void append(Kernel<LinearInt8> kernel, const LinearInt8& products);
    void run(Pool& pool) const;
    size_t size() const { return nodes_.size(); }

    const std::shared_ptr<Arena> arena = std::make_shared<Arena>(false);

  private:
    std::vector<Node> nodes_;
    std::shared_ptr<LinearInt8> open_;  // the last node, if it is one that may grow
};

// Runs kernels now, or writes them down in a plan.
class Machine {
  public:
    // Throws std::invalid_argument if this processor has no kernels of that name ("" for its best).
    Machine(int threads, const std::string& name);

    template <class Arguments>
    void call(Kernel<Arguments> kernel, const Arguments& arguments) {
        if (!plan) return run([&] { kernel(arguments, *pool_); });
        if constexpr (std::is_same_v<Arguments, LinearInt8>) plan->append(kernel, arguments);
        else plan->append([kernel, arguments](Pool& pool) { kernel(arguments, pool); });
    }
    void replay(const Plan& recorded) {
        run([&] { recorded.run(*pool_); });
    }
    // One caller at a time, without Python's lock.
    void run(const std::function<void()>& work);

    Pool& pool() { return *pool_; }
    Shelf& shelf() { return shelf_; }
    const Kernels& kernels() const { return *kernels_; }

    std::shared_ptr<Plan> plan;  // while recording
    const std::shared_ptr<Residents> residents = std::make_shared<Residents>();

  private:
    std::shared_ptr<Pool> pool_;
    const Kernels* kernels_;
    Shelf shelf_;
};

}  // namespace ondevice::cpu
