// sanitizer.h: what the emulation tells ThreadSanitizer and AddressSanitizer; nothing in other builds.
// Method  a thread of the grid is a fiber of ThreadSanitizer's, switched without ordering anything. What a primitive
//         reads and writes is told at the kernel's line, an asynchronous copy or product both at its issue and at the
//         wait; what the hardware orders, and nothing else, is told as releases and acquires. So a kernel that leaves
//         out a barrier has a data race, whatever the schedule.
//         The emulation itself is compiled without ThreadSanitizer (EMU_THREAD_SANITIZER instead): it is one thread,
//         whose own accesses would look like races of the fibers. Where it calls libc, which is intercepted, it is
//         Quiet.
// Source  sanitizer/tsan_interface.h, sanitizer/common_interface_defs.h of GCC 12
#pragma once

#include <stddef.h>
#include <stdint.h>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#if defined(EMU_THREAD_SANITIZER)
extern "C" {
void* __tsan_create_fiber(unsigned flags);
void __tsan_destroy_fiber(void* fiber);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void* __tsan_get_current_fiber();
void __tsan_acquire(void* address);
void __tsan_release(void* address);
void __tsan_atomic8_store(volatile char* address, char value, int order);
void __tsan_read_range_pc(const void* address, size_t num_bytes, const void* pc);
void __tsan_write_range_pc(const void* address, size_t num_bytes, const void* pc);
void __tsan_ignore_thread_begin();
void __tsan_ignore_thread_end();
}
#endif

namespace emu {
namespace sanitizer {

#if defined(__SANITIZE_ADDRESS__)
constexpr bool kWidensFrames = true;  // red zones lie around every variable
#else
constexpr bool kWidensFrames = false;
#endif

using Identity = void*;

// The kernel's line that has called this function, for reports.
#define EMU_CALLER __builtin_return_address(0)

#if defined(EMU_THREAD_SANITIZER)

constexpr bool kSeesRaces = true;

// Until its end, what this thread does in libc is nobody's business.
struct Quiet {
  Quiet() { __tsan_ignore_thread_begin(); }
  ~Quiet() { __tsan_ignore_thread_end(); }
  Quiet(const Quiet&) = delete;
  Quiet& operator=(const Quiet&) = delete;
};

// Of a Quiet thread: until its end, what it does counts again.
struct Loud {
  Loud() { __tsan_ignore_thread_end(); }
  ~Loud() { __tsan_ignore_thread_begin(); }
  Loud(const Loud&) = delete;
  Loud& operator=(const Loud&) = delete;
};

// Until its end, whatever is told here is told as if that thread did it.
class As {
 public:
  explicit As(Identity who) : back_(__tsan_get_current_fiber()) { __tsan_switch_to_fiber(who, kNoSync); }
  ~As() { __tsan_switch_to_fiber(back_, kNoSync); }
  As(const As&) = delete;
  As& operator=(const As&) = delete;

  static constexpr unsigned kNoSync = 1;

 private:
  Identity back_;
};

// Hardware that goes on by itself with what a thread has started: behind all that the thread has done until then.
class Agent {
 public:
  Agent() : fiber_(__tsan_create_fiber(0)) {}
  ~Agent() { __tsan_destroy_fiber(fiber_); }
  Agent(const Agent&) = delete;
  Agent& operator=(const Agent&) = delete;
  Identity identity() const { return fiber_; }

 private:
  Identity fiber_;
};

inline void read(const void* address, size_t num_bytes, const void* line) {
  __tsan_read_range_pc(address, num_bytes, line);
}
inline void write(const void* address, size_t num_bytes, const void* line) {
  __tsan_write_range_pc(address, num_bytes, line);
}

// What threads have done when they release comes before what others do after they acquire.
class Order {
 public:
  void release() { __tsan_release(&word_); }
  // Also forgets the releases before.
  void release_anew() { __tsan_atomic8_store(&word_, 0, kRelease); }
  void acquire() { __tsan_acquire(&word_); }

 private:
  static constexpr int kRelease = 3;  // __ATOMIC_RELEASE
  char word_ = 0;
};

#else

constexpr bool kSeesRaces = false;
struct Quiet {
  Quiet() {}
};
struct Loud {
  Loud() {}
};
struct As {
  explicit As(Identity) {}
};
struct Agent {
  Agent() {}
  Identity identity() const { return nullptr; }
};
inline void read(const void*, size_t, const void*) {}
inline void write(const void*, size_t, const void*) {}
struct Order {
  void release() {}
  void release_anew() {}
  void acquire() {}
};

#endif

// Tells of the switch to a stack and back.
class Switch {
 public:
#if defined(EMU_THREAD_SANITIZER)
  Switch() : fiber_(__tsan_create_fiber(0)) {}
  ~Switch() { __tsan_destroy_fiber(fiber_); }
  void before_resume(void*, size_t) {
    caller_ = __tsan_get_current_fiber();
    __tsan_switch_to_fiber(fiber_, As::kNoSync);
  }
  void after_resume() {}
  void before_suspend() { __tsan_switch_to_fiber(caller_, As::kNoSync); }
  void entered() {}
  void forget_frames(void*, size_t) {}
  Identity identity() const { return fiber_; }

 private:
  Identity fiber_;
  Identity caller_ = nullptr;
#elif defined(__SANITIZE_ADDRESS__)
  void before_resume(void* stack, size_t num_bytes) {
    __sanitizer_start_switch_fiber(&caller_frames_, stack, num_bytes);
  }
  void after_resume() { __sanitizer_finish_switch_fiber(caller_frames_, nullptr, nullptr); }
  void before_suspend() { __sanitizer_start_switch_fiber(&own_frames_, caller_stack_, caller_bytes_); }
  void entered() { __sanitizer_finish_switch_fiber(own_frames_, &caller_stack_, &caller_bytes_); }
  // Of whatever was left on the stack.
  void forget_frames(void* stack, size_t num_bytes) {
    __asan_unpoison_memory_region(stack, num_bytes);
    own_frames_ = nullptr;
  }
  Identity identity() const { return nullptr; }

 private:
  void* caller_frames_ = nullptr;
  void* own_frames_ = nullptr;
  const void* caller_stack_ = nullptr;
  size_t caller_bytes_ = 0;
#else
  void before_resume(void*, size_t) {}
  void after_resume() {}
  void before_suspend() {}
  void entered() {}
  void forget_frames(void*, size_t) {}
  Identity identity() const { return nullptr; }
#endif
};

}  // namespace sanitizer
}  // namespace emu
