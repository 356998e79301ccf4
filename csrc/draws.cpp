#include "draws.h"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/record_function.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <mutex>
#include <optional>
#include <utility>
#include <vector>

namespace gam {

namespace {

// Normal numbers are generated in pairs; the generator keeps the second.
struct State {
  at::mt19937 engine;
  std::optional<float> next_float;
  std::optional<double> next_double;

  // Every draw changes some of this: a new block of numbers changes its first number.
  bool operator==(const State& other) const {
    const at::mt19937_data_pod a = engine.data();
    const at::mt19937_data_pod b = other.engine.data();
    return a.left_ == b.left_ && a.next_ == b.next_ && a.state_[0] == b.state_[0] && next_float == other.next_float &&
           next_double == other.next_double;
  }
  bool operator!=(const State& other) const { return !(*this == other); }
};

at::CPUGeneratorImpl* generator() { return at::detail::getDefaultCPUGenerator().get<at::CPUGeneratorImpl>(); }

State look(at::CPUGeneratorImpl* impl) {
  return {impl->engine(), impl->next_float_normal_sample(), impl->next_double_normal_sample()};
}

State current() {
  at::CPUGeneratorImpl* impl = generator();
  const std::lock_guard<std::mutex> lock(impl->mutex_);
  return look(impl);
}

State exchange(const State& put) {
  at::CPUGeneratorImpl* impl = generator();
  const std::lock_guard<std::mutex> lock(impl->mutex_);
  State before = look(impl);
  impl->set_engine(put.engine);
  impl->set_next_float_normal_sample(put.next_float);
  impl->set_next_double_normal_sample(put.next_double);
  return before;
}

// Held by every operation that may draw, in any thread, also outside a pass, since a pass may begin meanwhile. Waits
// are limited: an operation written in Python needs the GIL, which a thread that waits for this mutex may hold.
std::timed_mutex drawing;
constexpr std::chrono::seconds kPatience{2};

}  // namespace

struct Draws::Tape {
  struct Jump {
    size_t operation;
    State state;
  };

  std::atomic<bool> active{false};  // whether a pass is in progress
  bool begun = false;
  bool first = true;
  bool jumps_next = true;
  bool disturbed = false;  // whether another thread drew during the first pass
  bool moved = false;      // whether this pass has drawn
  bool drawn = false;      // whether any pass has drawn
  size_t depth = 0;        // nesting depth of operations
  size_t operation = 0;    // number of operations so far in this pass that may draw
  size_t jump = 0;
  std::vector<Jump> jumps;  // operations of the first pass that did not continue from the one before
  State here;               // state of this pass's draws
  State after;              // state at the end of the first pass
  State others;             // the other threads' state, during an operation of a later pass

  void enter() {
    if (depth++ > 0) return;
    if (!first) {
      if (jump < jumps.size() && jumps[jump].operation == operation) here = jumps[jump++].state;
      others = exchange(here);
      return;
    }
    const State now = current();
    if (now != here) disturbed = jumps_next = true;
    if (jumps_next) jumps.push_back({operation, now});
    jumps_next = false;
    here = now;
  }

  void leave() {
    if (depth == 0 || --depth > 0) return;
    State now = first ? current() : exchange(others);
    moved = moved || now != here;
    drawn = drawn || moved;
    here = std::move(now);
    if (first) after = here;
    ++operation;
  }
};

namespace {

// The tapes of the passes that this thread is in, outermost first: the body of a pass may take a step of another
// optimizer.
thread_local std::vector<std::shared_ptr<Draws::Tape>> tapes;
thread_local size_t operations = 0;  // nesting depth

struct Within : at::ObserverContext {
  std::vector<std::shared_ptr<Draws::Tape>> entered;
  std::unique_lock<std::timed_mutex> lock;
};

std::unique_ptr<at::ObserverContext> start(const at::RecordFunction& function) {
  const std::optional<c10::OperatorName> name = function.operator_name();
  if (!name) return nullptr;
  const auto op = c10::Dispatcher::singleton().findOp(*name);
  if (!op || !op->hasTag(at::Tag::nondeterministic_seeded)) return nullptr;
  auto within = std::make_unique<Within>();
  if (operations++ == 0) within->lock = std::unique_lock<std::timed_mutex>(drawing, kPatience);
  for (const auto& tape : tapes) {
    if (!tape->active) continue;
    tape->enter();
    within->entered.push_back(tape);
  }
  return within;
}

void end(const at::RecordFunction& /*function*/, at::ObserverContext* context) {
  if (context == nullptr) return;
  auto& entered = static_cast<Within*>(context)->entered;
  std::for_each(entered.rbegin(), entered.rend(), [](const auto& tape) { tape->leave(); });
  if (operations > 0) --operations;
}

// Drops ended passes: another thread may have ended passes of this one.
void forget_ended() {
  tapes.erase(std::remove_if(tapes.begin(), tapes.end(), [](const auto& tape) { return !tape->active; }), tapes.end());
}

// Installs the observer for good: a pass must wait for other threads' operations that began before it.
void observe() {
  static const at::CallbackHandle handle =
      at::addGlobalCallback(at::RecordFunctionCallback(start, end).needsIds(false).scopes({at::RecordScope::FUNCTION}));
  static_cast<void>(handle);
}

}  // namespace

Draws::Draws() : tape_(std::make_shared<Tape>()) {}

void Draws::begin() {
  end();
  Tape& tape = *tape_;
  if (tape.begun) tape.first = false;
  if (!tape.begun) tape.here = tape.after = current();
  tape.begun = true;
  tape.moved = false;
  tape.operation = tape.jump = tape.depth = 0;
  listen();
}

void Draws::pause() {
  end();
  if (current() != tape_->here) tape_->disturbed = true;
}

void Draws::resume() {
  Tape& tape = *tape_;
  State now = current();
  tape.drawn = tape.drawn || now != tape.here;
  tape.here = tape.after = std::move(now);
  tape.jumps_next = true;
  listen();
}

void Draws::listen() {
  tape_->active = true;
  forget_ended();
  tapes.push_back(tape_);
  observe();
}

void Draws::end() {
  if (!tape_->active.exchange(false)) return;
  forget_ended();
}

bool Draws::can_undo() const {
  const Tape& tape = *tape_;
  return tape.drawn && !tape.disturbed && tape.after == current();
}

void Draws::keep() const {
  if (tape_->moved && can_undo()) exchange(tape_->here);
}

}  // namespace gam
