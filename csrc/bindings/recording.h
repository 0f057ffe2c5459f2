// recording.h: calls of the CPU operators, kept to be run again: a step's hundreds of calls become one.
// Method  while a thread records, the bindings of this thread put what they would run (its parameters by value) into
//         the recording and run nothing. Whoever records keeps every address valid (mixattn/ops/recording.py). A run
//         may be of a smaller step: every call has rows one behind the other, and takes the first of them.
#pragma once

#include <pybind11/pybind11.h>

#include <chrono>
#include <cstdint>
#include <functional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "cpu/parallel.h"

namespace mixattn {

constexpr int64_t kAnyNumSeqs = -1;  // of a call that has rows only

struct StepSize {
  int64_t num_rows;
  int64_t num_seqs;
};

class Recording {
 public:
  // num_threads: of the calls, at most.
  Recording(StepSize size, int64_t num_threads) : size_(size), num_threads_(num_threads) {}

  // A call that takes another number of rows or sequences than the recorded step has could not follow a smaller one.
  void add(const char* name, StepSize size, std::function<void(StepSize)> call) {
    if (size.num_rows != size_.num_rows || (size.num_seqs != kAnyNumSeqs && size.num_seqs != size_.num_seqs)) {
      throw std::invalid_argument(std::string(name) + " cannot be recorded: it must have the step's " +
                                  std::to_string(size_.num_rows) + " rows and " + std::to_string(size_.num_seqs) +
                                  " sequences, got " + std::to_string(size.num_rows) + " rows" +
                                  (size.num_seqs == kAnyNumSeqs ? "" : ", " + std::to_string(size.num_seqs)));
    }
    calls_.push_back({name, std::move(call)});
  }

  size_t num_calls() const { return calls_.size(); }

  // Runs the calls in order; an exception ends the run where it was thrown.
  void run(StepSize size) const {
    check(size);
    const pybind11::gil_scoped_release unlocked;
    cpu::with_team(num_threads_, [&] {
      for (const Call& call : calls_) call.run(size);
    });
  }

  // As run; the name of each call and the microseconds it took.
  std::vector<std::pair<std::string, double>> run_timed(StepSize size) const {
    check(size);
    const pybind11::gil_scoped_release unlocked;
    std::vector<std::pair<std::string, double>> times;
    cpu::with_team(num_threads_, [&] {
      for (const Call& call : calls_) {
        const auto start = std::chrono::steady_clock::now();
        call.run(size);
        const std::chrono::duration<double, std::micro> elapsed = std::chrono::steady_clock::now() - start;
        times.emplace_back(call.name, elapsed.count());
      }
    });
    return times;
  }

 private:
  struct Call {
    const char* name;
    std::function<void(StepSize)> run;
  };

  void check(StepSize size) const {
    for (const auto& [name, value, most] : {std::tuple("num_rows", size.num_rows, size_.num_rows),
                                            std::tuple("num_seqs", size.num_seqs, size_.num_seqs)}) {
      if (value < 0 || value > most) {
        throw std::invalid_argument(std::string(name) + " must be in [0, " + std::to_string(most) +
                                    "], what was recorded, got " + std::to_string(value));
      }
    }
  }

  StepSize size_;
  int64_t num_threads_;
  std::vector<Call> calls_;
};

inline thread_local Recording* active_recording = nullptr;

// Runs the call, call(size), without the GIL, or records it under its name, a literal.
template <typename Call>
void run_or_record(const char* name, StepSize size, Call call) {
  if (active_recording != nullptr) return active_recording->add(name, size, std::move(call));
  const pybind11::gil_scoped_release unlocked;
  call(size);
}

}  // namespace mixattn
