// recording.h: calls of the CPU operators, kept to be run again: a step's hundreds of calls become one.
// Method  while a thread records, the bindings of this thread put what they would run (its parameters by value) into
//         the recording and run nothing. Whoever records keeps every address valid (mixattn/ops/recording.py).
#pragma once

#include <pybind11/pybind11.h>

#include <functional>
#include <utility>
#include <vector>

namespace mixattn {

class Recording {
 public:
  void add(std::function<void()> call) { calls_.push_back(std::move(call)); }
  size_t size() const { return calls_.size(); }
  // Runs the calls in order; an exception ends the run where it was thrown.
  void run() const {
    const pybind11::gil_scoped_release unlocked;
    for (const std::function<void()>& call : calls_) call();
  }

 private:
  std::vector<std::function<void()>> calls_;
};

inline thread_local Recording* active_recording = nullptr;

// Runs the call without the GIL, or records it.
template <typename Call>
void run_or_record(Call call) {
  if (active_recording != nullptr) return active_recording->add(std::move(call));
  const pybind11::gil_scoped_release unlocked;
  call();
}

}  // namespace mixattn
