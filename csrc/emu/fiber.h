// fiber.h: a stack that can be left and come back to. x86-64, System V calling convention.
#pragma once

#include <stddef.h>

#include "emu/sanitizer.h"

namespace emu {

class Fiber {
 public:
  Fiber();
  ~Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // Makes the next resume() call entry, which must not return.
  void start(void (*entry)());
  // Runs the fiber until it suspends. Only from outside of any fiber.
  void resume();
  // Back to the caller of resume(). Only inside the fiber.
  void suspend();
  // Who does what the fiber does, for ThreadSanitizer.
  sanitizer::Identity identity() const { return switch_.identity(); }

 private:
  static void enter();

  char* stack_;
  void* stack_pointer_ = nullptr;
  void* caller_ = nullptr;
  void (*entry_)() = nullptr;
  sanitizer::Switch switch_;
};

}  // namespace emu
