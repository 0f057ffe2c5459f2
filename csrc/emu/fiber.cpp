// fiber.cpp: the switch of stacks.

#include "emu/fiber.h"

#include <stdint.h>
#include <sys/mman.h>

#include <new>

#if !defined(__x86_64__)
#error "the emulation of CUDA kernels switches stacks in x86-64 assembly; other CPUs are not supported"
#endif

extern "C" void emu_switch_stack(void** from, void* to);

// Saves the registers that a call preserves and the stack pointer, loads the other stack's and returns on it.
asm(R"(
  .text
  .globl emu_switch_stack
  .hidden emu_switch_stack
emu_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");

namespace emu {
namespace {

constexpr size_t kGuardBytes = 4096;  // an overflow is a crash, not another fiber's wrong result
constexpr size_t kStackBytes = sanitizer::kWidensFrames ? 1 << 20 : 128 << 10;
constexpr int kSavedRegisters = 6;

Fiber* entering = nullptr;  // the one that resume() starts

}  // namespace

Fiber::Fiber() {
  void* const mapping =
      mmap(nullptr, kGuardBytes + kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapping == MAP_FAILED) throw std::bad_alloc();
  stack_ = static_cast<char*>(mapping);
  mprotect(stack_, kGuardBytes, PROT_NONE);
}

Fiber::~Fiber() {
  munmap(stack_, kGuardBytes + kStackBytes);
}

void Fiber::start(void (*entry)()) {
  // At a function's first instruction the stack pointer is 8 below a multiple of 16: where a call would have put the
  // return address.
  void** top = reinterpret_cast<void**>(stack_ + kGuardBytes + kStackBytes - 64);
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(enter);
  for (int i = 0; i < kSavedRegisters; ++i) *--top = nullptr;
  stack_pointer_ = top;
  entry_ = entry;
  switch_.forget_frames(stack_ + kGuardBytes, kStackBytes);
}

void Fiber::enter() {
  Fiber& fiber = *entering;
  fiber.switch_.entered();
  fiber.entry_();
}

void Fiber::resume() {
  entering = this;
  switch_.before_resume(stack_ + kGuardBytes, kStackBytes);
  emu_switch_stack(&caller_, stack_pointer_);
  switch_.after_resume();
}

void Fiber::suspend() {
  switch_.before_suspend();
  emu_switch_stack(&stack_pointer_, caller_);
  switch_.entered();
}

}  // namespace emu
