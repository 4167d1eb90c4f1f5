// Calls that come from stdin, and their results to stdout, for what runs the CUDA backend on the
// CPU. Numbers are raw.
#pragma once

#include <sys/mman.h>

#include <cstdio>
#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

#include "cuda/plan/choose.h"
#include "formula.h"

namespace {

using namespace da;
using namespace da::cuda;
template <class T>
using Buffer = simt::host::Buffer<T>;

struct Header {
  int64_t n, c, h, w, channels_last, dtype, order, gate, kernel_size;
  int64_t wide;     // the parameters are float32
  int64_t present;  // bit i: parameter i is there
  int64_t multiprocessors;
  int64_t aligned;         // 0: full-size tensors begin one element after a multiple of 16 bytes
  int64_t images_at_once;  // of a launch on the chip
  int64_t far;             // images before these, all zero, whose tiles are left out
  int64_t plan_bytes;      // of the text that follows, a plan as in DA_OPS_PLAN
};

bool get(void* data, size_t bytes) { return std::fread(data, 1, bytes, stdin) == bytes; }

void put_out(const void* data, size_t bytes) {
  if (std::fwrite(data, 1, bytes, stdout) != bytes) std::exit(3);
}

// Zeros, without memory for what is never written.
class Untouched {
 public:
  explicit Untouched(size_t bytes) : bytes_(bytes + 1) {
    constexpr int kHow = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    data_ = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, kHow, -1, 0);
    if (data_ == MAP_FAILED) std::exit(6);
  }
  ~Untouched() { munmap(data_, bytes_); }
  Untouched(const Untouched&) = delete;
  Untouched& operator=(const Untouched&) = delete;
  void* data() { return data_; }

 private:
  size_t bytes_;
  void* data_;
};

// An array with nothing after its last element, or (`far`) an untouched one.
template <class T>
struct Array {
  Buffer<T> near;
  Untouched zeros;
  bool far;

  Array(int64_t elements, bool far)
      : near(far ? 0 : elements), zeros(far ? elements * sizeof(T) : 0), far(far) {}
  T* data() { return far ? static_cast<T*>(zeros.data()) : near.data(); }
};

// A full-size tensor, of which the call's images are the last.
template <class T>
struct Tensor {
  Array<T> memory;
  size_t skip, before, bytes;

  Tensor(const Header& header, int64_t image)
      : memory((header.far + header.n) * image + !header.aligned, header.far > 0),
        skip(!header.aligned),
        before(header.far * image),
        bytes(header.n * image * sizeof(T)) {}
  T* data() { return memory.data() + skip; }
  void read() {
    if (!get(data() + before, bytes)) std::exit(2);
  }
  void write() { put_out(data() + before, bytes); }
};

void require(int error) {
  if (error != 0) std::exit(4);
}

// The parameters, and room for their gradients.
struct Given {
  std::vector<std::unique_ptr<Buffer<unsigned char>>> values, room;
  Parameters<const void*> parameters;
  Parameters<void*> gradients;

  Given(const Header& header, const Problem& p, size_t element_size) {
    const size_t size = header.wide ? sizeof(float) : element_size;
    int next = 0;  // parameter
    parameters = each(
        [&](int64_t elements) -> const void* {
          const size_t bytes = header.present >> next++ & 1 ? elements * size : 0;
          values.push_back(std::make_unique<Buffer<unsigned char>>(bytes));
          room.push_back(std::make_unique<Buffer<unsigned char>>(bytes));
          if (!get(values.back()->data(), bytes)) std::exit(2);
          return bytes ? values.back()->data() : nullptr;
        },
        sizes(p));
    next = 0;
    gradients = each(
        [&](const void* parameter) -> void* {
          void* const gradient = room[next++]->data();
          return parameter ? gradient : nullptr;
        },
        parameters);
  }
  void write() const {
    for (const auto& gradient : room) put_out(gradient->data(), gradient->bytes());
  }
};

// Answers every request: call(header, wish, problem, a number of the storage type).
template <class Call>
int answer_all(Call call) {
  Header header;
  while (get(&header, sizeof header)) {
    simt::host::left_out = {unsigned(header.far), unsigned(header.far + header.n)};
    std::string text(header.plan_bytes, 0);
    Wish wish;
    if (!get(text.data(), text.size()) || !parse(text, wish)) return 2;
    Problem p;
    p.n = header.far + header.n, p.c = header.c, p.h = header.h, p.w = header.w;
    p.channels_last = header.channels_last;
    p.dtype = static_cast<Dtype>(header.dtype);
    p.order = static_cast<Order>(header.order);
    p.gate = static_cast<Gate>(header.gate);
    p.kernel_size = header.kernel_size;
    switch (p.dtype) {
      case Dtype::float16:
        call(header, wish, p, simt::float16{});
        break;
      case Dtype::bfloat16:
        call(header, wish, p, simt::bfloat16{});
        break;
      case Dtype::float32:
        call(header, wish, p, float{});
        break;
      case Dtype::float64:
        call(header, wish, p, double{});
        break;
    }
  }
  return 0;
}

Device device_of(const Header& header) {
  return {90, static_cast<int>(header.multiprocessors), 50 << 20, true};
}

}  // namespace
