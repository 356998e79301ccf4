// The threads of one block as fibers on one thread of the operating system, with the barriers that join them.
//
// A fiber runs until it waits at a barrier or ends; then the scheduler takes the next. In which order they are taken is
// chosen by set_order(): "fwd" is by index, "rev" backwards, "rand:7" at random with seed 7, for the threads of a block
// and for the blocks of a grid. A missing barrier shows itself as another result, or as shared memory that was read
// before it was written, in one order or another.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#if defined(__has_feature)
#if __has_feature(address_sanitizer)
#define __SANITIZE_ADDRESS__ 1  // as g++ says it
#endif
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#define CUEMU_ASAN 1
#else
#define CUEMU_ASAN 0
#endif

#if !defined(__x86_64__) || !defined(__linux__)
#error "the emulator switches stacks by x86-64 Linux code"
#endif

// Saves the callee-saved registers and the floating-point modes on the current stack, and goes on with another.
extern "C" void cuemu_switch(void** save_stack_pointer, void* stack_pointer);
asm(R"(.text
.weak cuemu_switch
.type cuemu_switch,@function
cuemu_switch:
  pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
  subq $8, %rsp; stmxcsr (%rsp); fnstcw 4(%rsp)
  movq %rsp, (%rdi); movq %rsi, %rsp
  ldmxcsr (%rsp); fldcw 4(%rsp); addq $8, %rsp
  popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
  ret
.size cuemu_switch,.-cuemu_switch
)");

namespace cuemu {

inline constexpr int kWarp = 32;
inline constexpr int kMaxThreads = 1024;
inline constexpr size_t kStackBytes = 256 * 1024;
inline constexpr uint64_t kPoison = 0xffffdeadffffdeadull;  // NaN as float and as double

// Where in the source an operation stands.
struct Site {
  const char* file;
  int line;

  bool operator==(const Site& other) const { return file == other.file && line == other.line; }
  std::string text() const { return std::string(file) + ":" + std::to_string(line); }
};

enum class Operation : uint8_t { kShuffle, kShuffleUp, kShuffleDown, kShuffleXor, kSync };

class Block {
 public:
  // Which fibers and blocks go first; see above.
  void set_order(const std::string& order) {
    reverse_ = order == "rev";
    random_ = order.rfind("rand", 0) == 0;
    if (!reverse_ && !random_ && order != "fwd") throw std::invalid_argument("unknown order " + order);
    generator_.seed(random_ && order.size() > 5 ? static_cast<unsigned>(std::stoul(order.substr(5))) : 0u);
  }

  template <class T>
  void permute(std::vector<T>& values) {
    if (reverse_) std::reverse(values.begin(), values.end());
    if (random_) std::shuffle(values.begin(), values.end(), generator_);
  }

  // Runs body() once in each thread; raises std::runtime_error with what went wrong. `enter(t)` is called whenever
  // thread t goes on.
  void run(int threads, const std::function<void()>& body, const std::function<void(int)>& enter) {
    body_ = &body, enter_ = &enter;
    threads_.assign(static_cast<size_t>(threads), Thread());
    warps_.assign(static_cast<size_t>((threads + kWarp - 1) / kWarp), {});
    waiting_to_start_.resize(static_cast<size_t>(threads));
    for (int t = 0; t < threads; ++t) waiting_to_start_[static_cast<size_t>(t)] = t;
    permute(waiting_to_start_);
    started_ = 0, ended_ = 0;
    ready_.clear();
    shared_.clear();
    error_.clear();
    size_t next = 0;
    while (ended_ < threads) {
      if (next < ready_.size()) {
        resume(threads_[static_cast<size_t>(ready_[next++])].fiber);
      } else if (started_ < waiting_to_start_.size() && error_.empty()) {
        resume(idle_fiber());
      } else if (error_.empty() && everyone_waits_at_one_barrier()) {
        ready_.clear(), next = 0;
        for (int t = 0; t < threads; ++t) {
          if (threads_[static_cast<size_t>(t)].state == State::kAtBarrier) ready_.push_back(t);
        }
        permute(ready_);
        for (const int t : ready_) threads_[static_cast<size_t>(t)].state = State::kRuns;
      } else {
        unwind();
        break;
      }
    }
    if (!error_.empty()) throw std::runtime_error(error_);
  }

  int current() const { return current_; }

  // __syncthreads()
  void barrier(const Site& site) {
    Thread& thread = threads_[static_cast<size_t>(current_)];
    thread.state = State::kAtBarrier, thread.site = site;
    leave();
  }

  // An operation of the lanes in `mask`: the value that this lane gets.
  uint64_t warp_operation(Operation operation, uint32_t mask, uint64_t value, int argument, const Site& site) {
    const int thread = current_, lane = thread % kWarp, first = thread - lane;
    if (!(mask >> lane & 1)) throw std::runtime_error(site.text() + ": the calling lane is not in the mask");
    const int lanes = std::min(kWarp, static_cast<int>(threads_.size()) - first);
    if (lanes < kWarp) mask &= (1u << lanes) - 1;  // those of a partial warp do not exist
    auto& pending = warps_[static_cast<size_t>(thread / kWarp)];
    auto found = std::find_if(pending.begin(), pending.end(), [&](const auto& p) {
      return p->mask == mask && p->operation == operation && p->site == site && !(p->arrived >> lane & 1);
    });
    if (found == pending.end()) {
      pending.push_back(std::make_shared<Pending>(Pending{operation, mask, site}));
      found = pending.end() - 1;
    }
    const std::shared_ptr<Pending> mine = *found;
    mine->value[lane] = value, mine->argument[lane] = argument, mine->arrived |= 1u << lane;
    if (mine->arrived == mask) {  // the last one; it lets the others go on
      pending.erase(found);
      std::vector<int> others;
      for (int l = 0; l < kWarp; ++l) {
        if ((mask >> l & 1) && l != lane) others.push_back(first + l);
      }
      permute(others);
      for (const int t : others) threads_[static_cast<size_t>(t)].state = State::kRuns, ready_.push_back(t);
    } else {
      threads_[static_cast<size_t>(thread)].state = State::kInWarp, threads_[static_cast<size_t>(thread)].site = site;
      leave();
    }
    return mine->result(lane);
  }

  // Shared memory of the running block: poisoned when the block first asks for it, on the heap, where the address
  // sanitizer sees its bounds.
  void* shared(const void* key, size_t bytes) {
    auto& memory = shared_[key];
    if (memory.empty()) {
      memory.resize((bytes + 7) / 8 * 8);
      for (size_t i = 0; i < memory.size(); i += 8) std::memcpy(memory.data() + i, &kPoison, 8);
      memory.resize(bytes);
      memory.shrink_to_fit();
    }
    return memory.data();
  }

 private:
  enum class State : uint8_t { kRuns, kAtBarrier, kInWarp, kEnded };

  // A stack, with the thread that runs on it. Threads that never wait run one after the other on the same.
  struct Fiber {
    void* stack_pointer = nullptr;
    char* stack = nullptr;
    int thread = -1;
    void* fake_stack = nullptr;
  };
  struct Thread {
    State state = State::kRuns;
    Fiber* fiber = nullptr;
    Site site{};
  };
  struct Pending {
    Operation operation;
    uint32_t mask;
    Site site;
    uint32_t arrived = 0;
    uint64_t value[kWarp] = {};
    int argument[kWarp] = {};

    uint64_t result(int lane) const {
      int source = lane;
      const int a = argument[lane];
      if (operation == Operation::kShuffle) source = a % kWarp;
      if (operation == Operation::kShuffleUp) source = lane - a < 0 ? lane : lane - a;
      if (operation == Operation::kShuffleDown) source = lane + a >= kWarp ? lane : lane + a;
      if (operation == Operation::kShuffleXor) source = (lane ^ a) >= kWarp ? lane : lane ^ a;
      return mask >> source & 1 ? value[source] : kPoison;  // of a lane that takes no part
    }
  };

  bool everyone_waits_at_one_barrier() {
    const Site* site = nullptr;
    for (const Thread& thread : threads_) {
      if (thread.state == State::kInWarp) return false;
      if (thread.state != State::kAtBarrier) continue;
      if (!site) site = &thread.site;
      if (!(thread.site == *site)) {
        error_ = "a barrier that threads reach at different places: " + site->text() + " and " + thread.site.text();
        return false;
      }
    }
    if (site && ended_ > 0) {
      error_ = "a barrier at " + site->text() + " after " + std::to_string(ended_) + " threads have ended";
      return false;
    }
    return site != nullptr;
  }

  // Lets every waiting fiber end, by an exception.
  void unwind() {
    if (error_.empty()) {
      error_ = "a dead lock";
      for (const Thread& thread : threads_) {
        if (thread.state == State::kInWarp) {
          error_ = "a warp operation at " + thread.site.text() + " that waits for lanes which never arrive";
          break;
        }
      }
    }
    const std::string error = error_;
    for (size_t t = 0; t < threads_.size(); ++t) {
      if (threads_[t].state == State::kAtBarrier || threads_[t].state == State::kInWarp) {
        threads_[t].state = State::kRuns;
        resume(threads_[t].fiber);
      }
    }
    error_ = error;
  }

  // From the scheduler to a fiber, and back.
  void resume(Fiber* fiber) {
    running_ = fiber;
    if (fiber->thread >= 0) enter(fiber->thread);
#if CUEMU_ASAN
    __sanitizer_start_switch_fiber(&main_fake_stack_, fiber->stack, kStackBytes);
#endif
    cuemu_switch(&main_stack_pointer_, fiber->stack_pointer);
#if CUEMU_ASAN
    __sanitizer_finish_switch_fiber(main_fake_stack_, nullptr, nullptr);
#endif
  }

  void suspend() {
    Fiber* fiber = running_;
#if CUEMU_ASAN
    __sanitizer_start_switch_fiber(&fiber->fake_stack, main_bottom_, main_bytes_);
#endif
    cuemu_switch(&fiber->stack_pointer, main_stack_pointer_);
#if CUEMU_ASAN
    __sanitizer_finish_switch_fiber(fiber->fake_stack, &main_bottom_, &main_bytes_);
#endif
  }

  void leave() {
    suspend();
    if (!error_.empty()) throw std::runtime_error("aborted");
  }

  void enter(int thread) {
    current_ = thread;
    (*enter_)(thread);
  }

  static void start();  // where a fresh stack begins

  void work() {
#if CUEMU_ASAN
    __sanitizer_finish_switch_fiber(nullptr, &main_bottom_, &main_bytes_);
#endif
    for (;;) {
      Fiber* fiber = running_;
      while (started_ < waiting_to_start_.size() && error_.empty()) {
        const int t = waiting_to_start_[started_++];
        fiber->thread = t, threads_[static_cast<size_t>(t)].fiber = fiber;
        enter(t);
        try {
          (*body_)();
        } catch (const std::exception& error) {
          if (error_.empty()) error_ = error.what();
        }
        threads_[static_cast<size_t>(t)].state = State::kEnded, ++ended_;
      }
      fiber->thread = -1;
      idle_.push_back(fiber);
      suspend();
    }
  }

  Fiber* idle_fiber() {
    if (!idle_.empty()) {
      Fiber* fiber = idle_.back();
      idle_.pop_back();
      return fiber;
    }
    auto* fiber = new Fiber;  // kept: a suspended stack cannot be unwound when the process ends
    fiber->stack = static_cast<char*>(std::aligned_alloc(64, kStackBytes));
    // Tops of stacks that are a power of two apart would share lines of the caches.
    auto** top = reinterpret_cast<void**>(fiber->stack + kStackBytes - fibers_++ % 61 * 192);
    *--top = nullptr;  // the return address of start(), which never returns
    *--top = reinterpret_cast<void*>(&Block::start);
    for (int registers = 0; registers < 6; ++registers) *--top = nullptr;
    *--top = nullptr;
    asm volatile("stmxcsr (%0); fnstcw 4(%0)" ::"r"(top) : "memory");
    fiber->stack_pointer = top;
    return fiber;
  }

  const std::function<void()>* body_ = nullptr;
  const std::function<void(int)>* enter_ = nullptr;
  std::vector<Thread> threads_;
  std::vector<std::vector<std::shared_ptr<Pending>>> warps_;
  std::vector<int> waiting_to_start_, ready_;
  size_t started_ = 0;
  int ended_ = 0, current_ = -1;
  std::vector<Fiber*> idle_;
  size_t fibers_ = 0;
  Fiber* running_ = nullptr;
  void* main_stack_pointer_ = nullptr;
  void* main_fake_stack_ = nullptr;
  const void* main_bottom_ = nullptr;
  size_t main_bytes_ = 0;
  std::unordered_map<const void*, std::vector<char>> shared_;
  std::string error_;
  bool reverse_ = false, random_ = false;
  std::mt19937 generator_;
};

// The block that is running; never destroyed, as its fibers are not.
inline Block& block() {
  static Block* const block = new Block;
  return *block;
}

inline void Block::start() { block().work(); }

}  // namespace cuemu
