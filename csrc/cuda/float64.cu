#include "cuda/launch.cuh"
#include "cuda/tail/launch.cuh"

namespace da::cuda {
DA_LAUNCHERS(template, Dtype::float64)
DA_TAIL_LAUNCHER(template, Dtype::float64)
}  // namespace da::cuda
