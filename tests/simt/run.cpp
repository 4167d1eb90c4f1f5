// Runs the CUDA backend on the CPU: calls from stdin, their results to stdout; test_cuda_kernels.py
// writes the one and reads the other. Numbers are raw, in the order below.
#include <sys/mman.h>

#include <cstdio>
#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

#include "cuda/launch.cuh"
#include "cuda/plan/choose.cpp"
#include "cuda/plan/maps.cpp"
#include "cuda/plan/onchip.cpp"
#include "cuda/plan/plan.cpp"
#include "cuda/plan/tile.cpp"

namespace da::cuda {
DA_LAUNCHERS(template, Dtype::float16)
DA_LAUNCHERS(template, Dtype::bfloat16)
DA_LAUNCHERS(template, Dtype::float32)
DA_LAUNCHERS(template, Dtype::float64)
}  // namespace da::cuda

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

Direction direction_on_chip(const Header& header, const Wish& wish, const Problem& p, Way way) {
  OnChip chip = on_chip(p, way, header.aligned, wish.barrier, std::max(wish.blocks, 1),
                        int64_t(1) << 30, wish.limits);
  if (chip.refused) {
    std::fprintf(stderr, "refused: %s\n", chip.refused);
    std::exit(5);
  }
  chip.images_at_once = header.images_at_once;
  return on_chip_direction(p, chip, wish.limits);
}

Plan plan_of(const Header& header, const Wish& wish, const Problem& p) {
  const Device device{90, int(header.multiprocessors), 50 << 20};
  Plan plan = da::cuda::plan(p, device, header.aligned, wish.limits);
  if (wish.kind == Wish::Kind::exact) {
    plan.forward = direction_on_chip(header, wish, p, Way::forward);
    plan.backward = direction_on_chip(header, wish, p, Way::backward);
  }
  return plan;
}

template <class T>
void call(const Header& header, const Wish& wish, const Problem& p) {
  using A = accumulate_t<T>;
  const Plan plan = plan_of(header, wish, p);
  const size_t size = header.wide ? sizeof(float) : sizeof(T);
  std::vector<std::unique_ptr<Buffer<unsigned char>>> given, gradients;
  Pointers at{};
  int next = 0;  // parameter
  at.parameters = each(
      [&](int64_t elements) -> const void* {
        const size_t bytes = header.present >> next++ & 1 ? elements * size : 0;
        given.push_back(std::make_unique<Buffer<unsigned char>>(bytes));
        gradients.push_back(std::make_unique<Buffer<unsigned char>>(bytes));
        if (!get(given.back()->data(), bytes)) std::exit(2);
        return bytes ? given.back()->data() : nullptr;
      },
      sizes(p));
  next = 0;
  at.gradients = each(
      [&](const void* parameter) -> void* {
        void* const gradient = gradients[next++]->data();
        return parameter ? gradient : nullptr;
      },
      at.parameters);
  at.wide = header.wide;

  const int64_t image = p.c * p.pixels();
  const bool far = header.far > 0;
  Tensor<T> x(header, image), dy(header, image), y(header, image), dx(header, image);
  x.read();
  dy.read();
  Array<A> channel_mean(p.spatial() ? p.n * p.pixels() : 0, far);
  Array<A> pooled(p.channel() ? p.n * p.c : 0, far);
  at.x = x.data(), at.dy = dy.data();
  at.channel_mean = channel_mean.data(), at.pooled = pooled.data();
  for (Way way : {Way::forward, Way::backward}) {
    Array<A> workspace(plan[way].workspace.elements, far);
    at.out = way == Way::forward ? y.data() : dx.data();
    at.workspace = workspace.data();
    require(run(p, plan, way, at));
  }
  y.write();
  dx.write();
  for (auto& gradient : gradients) put_out(gradient->data(), gradient->bytes());
}

}  // namespace

int main() {
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
        call<simt::float16>(header, wish, p);
        break;
      case Dtype::bfloat16:
        call<simt::bfloat16>(header, wish, p);
        break;
      case Dtype::float32:
        call<float>(header, wish, p);
        break;
      case Dtype::float64:
        call<double>(header, wish, p);
        break;
    }
  }
  return 0;
}
