// recording.h: one launch as a file: the kernel's name, its parameters and the tensors that these point to. So a launch
// that Python has made runs again in a program of its own (replay.cpp), which sanitizers can watch.
#pragma once

#include <stdint.h>

#include <fstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace recording {

// A tensor's memory where it was recorded.
struct Span {
  uint64_t begin;
  uint64_t num_bytes;
};

struct Launch {
  std::string name;
  int num_blocks;
  int num_threads;
  size_t shared_bytes;
  std::vector<std::string> params;
  std::vector<Span> tensors;
  std::vector<std::string> before, after;  // what each tensor holds
};

inline std::vector<std::string> contents(const std::vector<Span>& tensors) {
  std::vector<std::string> bytes;
  for (const Span& tensor : tensors) bytes.emplace_back(reinterpret_cast<const char*>(tensor.begin), tensor.num_bytes);
  return bytes;
}

inline void write(const std::string& path, const Launch& launch) {
  std::ofstream file(path, std::ios::binary);
  const auto put = [&](uint64_t number) { file.write(reinterpret_cast<const char*>(&number), sizeof number); };
  const auto put_bytes = [&](const std::string& bytes) {
    put(bytes.size());
    file.write(bytes.data(), std::streamsize(bytes.size()));
  };
  put_bytes(launch.name);
  put(launch.num_blocks);
  put(launch.num_threads);
  put(launch.shared_bytes);
  put(launch.params.size());
  for (const std::string& param : launch.params) put_bytes(param);
  put(launch.tensors.size());
  for (size_t i = 0; i < launch.tensors.size(); ++i) {
    put(launch.tensors[i].begin);
    put_bytes(launch.before[i]);
    put_bytes(launch.after[i]);
  }
  if (!file) throw std::runtime_error("cannot write " + path);
}

inline Launch read(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  const auto number = [&] {
    uint64_t value = 0;
    file.read(reinterpret_cast<char*>(&value), sizeof value);
    if (!file) throw std::runtime_error(path + " is no recording of a launch");
    return value;
  };
  const auto bytes = [&] {
    std::string value(number(), '\0');
    file.read(value.data(), std::streamsize(value.size()));
    return value;
  };
  Launch launch;
  launch.name = bytes();
  launch.num_blocks = int(number());
  launch.num_threads = int(number());
  launch.shared_bytes = number();
  for (uint64_t left = number(); left > 0; --left) launch.params.push_back(bytes());
  for (uint64_t left = number(); left > 0; --left) {
    const uint64_t begin = number();
    launch.before.push_back(bytes());
    launch.after.push_back(bytes());
    launch.tensors.push_back({begin, launch.before.back().size()});
  }
  return launch;
}

}  // namespace recording
