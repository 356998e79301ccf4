// Random numbers that a thread draws from torch's default CPU generator, which all threads share. The first pass of a
// step records its draws, and the later passes get the same numbers, whatever other threads draw meanwhile.
#pragma once

#include <memory>

namespace gam {

// Follows the operations of the thread that begins a pass, until that thread ends it. After the first use, this costs
// every operation of the process a fifth of a microsecond.
class Draws {
 public:
  Draws();
  ~Draws() { end(); }
  Draws(const Draws&) = delete;
  Draws& operator=(const Draws&) = delete;

  // Starts a pass. The first pass records its draws; later passes repeat them.
  void begin();
  void end();

  // In the first pass, do not record the draws between these two calls.
  void pause();
  void resume();

  // True if this thread, and no other, has drawn since the step began: its draws can then be undone.
  bool can_undo() const;

  // After the last pass: leave the generator at the end of this pass, unless it drew nothing or another thread drew.
  void keep() const;

  struct Tape;

 private:
  void listen();

  std::shared_ptr<Tape> tape_;
};

}  // namespace gam
