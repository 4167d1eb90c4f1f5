// Tells Python of a first call as the CUDA library does, where there is no GPU.
#include "cuda/first_call.h"

namespace {

void tell(const da::Tensor& x, const std::string& order, const std::string& gate, bool backward) {
  da::Problem p;
  STD_TORCH_CHECK(da::parse(order, p.order) && da::parse(gate, p.gate), order, ", ", gate);
  da::cuda::tell_of_first_call(p, x, backward);
}

}  // namespace

STABLE_TORCH_LIBRARY(da_ops_first_call, m) {
  m.def("schema" DA_FIRST_CALL_SCHEMA);
  m.def("tell(Tensor x, str order, str gate, bool backward) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(da_ops_first_call, CompositeExplicitAutograd, m) {
  m.impl("schema", TORCH_BOX(&da::cuda::no_first_call));
  m.impl("tell", TORCH_BOX(&tell));
}
