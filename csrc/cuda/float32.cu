#include "cuda/launch.cuh"

namespace da::cuda {
DA_LAUNCHERS(template, Dtype::float32)
}
