// recording.h: calls of the CPU operators, kept to be run again: a step's hundreds of calls become one.
// Method  while a thread records, the bindings of this thread put what they would run (its parameters by value) into
//         the recording and run nothing. Whoever records keeps every address valid (mixattn/ops/recording.py).
#pragma once

#include <pybind11/pybind11.h>

#include <chrono>
#include <functional>
#include <string>
#include <utility>
#include <vector>

namespace mixattn {

class Recording {
 public:
  void add(const char* name, std::function<void()> call) { calls_.push_back({name, std::move(call)}); }

  size_t size() const { return calls_.size(); }

  // Runs the calls in order; an exception ends the run where it was thrown.
  void run() const {
    const pybind11::gil_scoped_release unlocked;
    for (const Call& call : calls_) call.run();
  }

  // As run; the name of each call and the microseconds it took.
  std::vector<std::pair<std::string, double>> run_timed() const {
    const pybind11::gil_scoped_release unlocked;
    std::vector<std::pair<std::string, double>> times;
    for (const Call& call : calls_) {
      const auto start = std::chrono::steady_clock::now();
      call.run();
      const std::chrono::duration<double, std::micro> elapsed = std::chrono::steady_clock::now() - start;
      times.emplace_back(call.name, elapsed.count());
    }
    return times;
  }

 private:
  struct Call {
    const char* name;
    std::function<void()> run;
  };
  std::vector<Call> calls_;
};

inline thread_local Recording* active_recording = nullptr;

// Runs the call without the GIL, or records it under its name, a literal.
template <typename Run>
void run_or_record(const char* name, Run run) {
  if (active_recording != nullptr) return active_recording->add(name, std::move(run));
  const pybind11::gil_scoped_release unlocked;
  run();
}

}  // namespace mixattn
