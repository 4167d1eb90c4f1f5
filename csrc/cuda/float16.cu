#include "cuda/launch.cuh"
#include "cuda/tail/launch.cuh"

namespace da::cuda {
DA_LAUNCHERS(template, Dtype::float16)
DA_TAIL_LAUNCHER(template, Dtype::float16)
}  // namespace da::cuda
