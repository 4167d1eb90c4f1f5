// The six parameters as one thing. Free of torch and of CUDA.
#pragma once

namespace da {

// One P for each parameter, in the order of the operators' schema.
template <class P>
struct Parameters {
  P conv, dilated, merge, spatial_bias, gate, gate_bias;
};

// f of each parameter of one or several bundles.
template <class F, class P, class... Q>
auto each(F f, const Parameters<P>& p, const Parameters<Q>&... q)
    -> Parameters<decltype(f(p.conv, q.conv...))> {
  return {f(p.conv, q.conv...),   f(p.dilated, q.dilated...),
          f(p.merge, q.merge...), f(p.spatial_bias, q.spatial_bias...),
          f(p.gate, q.gate...),   f(p.gate_bias, q.gate_bias...)};
}

}  // namespace da
