// Runs the CUDA backend on the CPU: calls from stdin, their results to stdout; test_cuda_kernels.py
// writes the one and reads the other. Numbers are raw, in the order below.
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <vector>

#include "cuda/launch.cuh"
#include "cuda/plan.cpp"

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
  int64_t aligned;  // 0: full-size tensors begin one element after a multiple of 16 bytes
  int64_t on_chip;  // 0: the portable passes; or else
  int64_t barrier, blocks, images_at_once;
  int64_t chunks;  // of x and dy, to keep in shared memory at most
};

bool get(void* data, size_t bytes) { return std::fread(data, 1, bytes, stdin) == bytes; }

void put_out(const void* data, size_t bytes) {
  if (std::fwrite(data, 1, bytes, stdout) != bytes) std::exit(3);
}

// A full-size tensor, with nothing after its last element.
template <class T>
struct Tensor {
  Buffer<T> memory;
  size_t skip;

  Tensor(int64_t elements, bool aligned) : memory(elements + !aligned), skip(!aligned) {}
  T* data() { return memory.data() + skip; }
  size_t bytes() const { return memory.bytes() - skip * sizeof(T); }
  void read() {
    if (!get(data(), bytes())) std::exit(2);
  }
  void write() { put_out(data(), bytes()); }
};

void require(int error) {
  if (error != 0) std::exit(4);
}

Direction direction_on_chip(const Header& header, const Problem& p, bool backward) {
  OnChip chip{};
  size_t shared_limit = size_t(1) << 30;
  do {
    chip = on_chip(p, backward, header.aligned, static_cast<Barrier>(header.barrier), header.blocks,
                   shared_limit);
    if (chip.refused) {
      std::fprintf(stderr, "refused: %s\n", chip.refused);
      std::exit(5);
    }
    shared_limit = chip.memory.bytes - 1;
  } while (chip.kept + chip.kept_dy > header.chunks);
  chip.images_at_once = header.images_at_once;
  return on_chip_direction(p, chip);
}

template <class T>
void call(const Header& header, const Problem& p) {
  using A = accumulate_t<T>;
  Plan plan = da::cuda::plan(p, {90, int(header.multiprocessors), 50 << 20}, header.aligned);
  if (header.on_chip) {
    plan.forward = direction_on_chip(header, p, false);
    plan.backward = direction_on_chip(header, p, true);
  }
  const int64_t sizes[] = {
      9, 9, 2, 1, p.gate_weights(), p.gate == Gate::eca ? 0 : p.gate_weights()};
  const size_t each = header.wide ? sizeof(float) : sizeof(T);
  std::vector<std::unique_ptr<Buffer<unsigned char>>> given, gradients;
  void *values[6], *slopes[6];
  for (int i = 0; i < 6; i++) {
    const size_t bytes = header.present >> i & 1 ? sizes[i] * each : 0;
    given.push_back(std::make_unique<Buffer<unsigned char>>(bytes));
    gradients.push_back(std::make_unique<Buffer<unsigned char>>(bytes));
    if (!get(given[i]->data(), bytes)) std::exit(2);
    values[i] = bytes ? given[i]->data() : nullptr;
    slopes[i] = bytes ? gradients[i]->data() : nullptr;
  }
  const Parameters parameters{values[0], values[1], values[2],    values[3],
                              values[4], values[5], !!header.wide};

  Tensor<T> x(p.elements(), header.aligned), dy(p.elements(), header.aligned);
  Tensor<T> y(p.elements(), header.aligned), dx(p.elements(), header.aligned);
  x.read();
  dy.read();
  Buffer<A> channel_mean(p.spatial() ? p.n * p.pixels() : 0), pooled(p.channel() ? p.n * p.c : 0);
  {
    Buffer<A> workspace(plan.forward.workspace.elements);
    require(forward(p, plan, parameters, x.data(), y.data(), channel_mean.data(), pooled.data(),
                    workspace.data(), nullptr));
  }
  {
    Buffer<A> workspace(plan.backward.workspace.elements);
    require(backward(p, plan, parameters, dy.data(), x.data(), channel_mean.data(), pooled.data(),
                     dx.data(), {slopes[0], slopes[1], slopes[2], slopes[3], slopes[4], slopes[5]},
                     workspace.data(), nullptr));
  }
  y.write();
  dx.write();
  for (auto& gradient : gradients) put_out(gradient->data(), gradient->bytes());
}

}  // namespace

int main() {
  Header header;
  while (get(&header, sizeof header)) {
    Problem p;
    p.n = header.n, p.c = header.c, p.h = header.h, p.w = header.w;
    p.channels_last = header.channels_last;
    p.dtype = static_cast<Dtype>(header.dtype);
    p.order = static_cast<Order>(header.order);
    p.gate = static_cast<Gate>(header.gate);
    p.kernel_size = header.kernel_size;
    switch (p.dtype) {
      case Dtype::float16:
        call<simt::float16>(header, p);
        break;
      case Dtype::bfloat16:
        call<simt::bfloat16>(header, p);
        break;
      case Dtype::float32:
        call<float>(header, p);
        break;
      case Dtype::float64:
        call<double>(header, p);
        break;
    }
  }
  return 0;
}
