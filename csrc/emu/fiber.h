// fiber.h: a stack that can be left and come back to. x86-64, System V calling convention.
#pragma once

#include <stddef.h>

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

 private:
  char* stack_;
  void* stack_pointer_ = nullptr;
  void* caller_ = nullptr;
};

}  // namespace emu
