// Random numbers that a thread draws from torch's default CPU generator, which all threads share: the draws of the
// first pass of a step are noted, and those of the later passes get the same numbers, whatever other threads draw
// meanwhile.
#pragma once

#include <memory>

namespace gam {

// Follows the operations of the thread that begins a pass until it ends it. From the first use on, that costs every
// operation of the process a fifth of a microsecond.
class Draws {
 public:
  Draws();
  ~Draws() { end(); }
  Draws(const Draws&) = delete;
  Draws& operator=(const Draws&) = delete;

  // Starts a pass: the first, whose draws are noted, or another, whose draws are then those of the first.
  void begin();
  void end();

  // In the first pass, draws from one to the other are not those of later passes.
  void pause();
  void resume();

  // True if this thread has drawn, and nobody else since the step began: its draws can then be undone.
  bool can_undo() const;

  // After the last pass: the generator stands where this pass has ended, unless that drew nothing or somebody else did.
  void keep() const;

  struct Tape;

 private:
  void listen();

  std::shared_ptr<Tape> tape_;
};

}  // namespace gam
