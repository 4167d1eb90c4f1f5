// da_ops._plan: the planners, for Python. Plain data in and out.
#include <pybind11/pybind11.h>

#include "cpu/plan.h"
#include "cuda/plan/cache.h"
#include "cuda/plan/choose.h"
#include "cuda/plan/tail.h"
#include "cuda/plan/tile.h"

namespace py = pybind11;

namespace {

da::Problem problem(const py::tuple& shape, bool channels_last, const std::string& dtype,
                    const std::string& order) {
  da::Problem p;
  p.n = shape[0].cast<int64_t>(), p.c = shape[1].cast<int64_t>();
  p.h = shape[2].cast<int64_t>(), p.w = shape[3].cast<int64_t>();
  if (p.n < 0 || p.c < 1 || p.h < 1 || p.w < 1)  // planners divide by C, H and W
    throw py::value_error("shape: expected N of at least 0, and C, H and W of at least 1; got " +
                          std::string(py::str(shape)));
  p.channels_last = channels_last;
  if (!da::parse(dtype, p.dtype)) throw py::value_error("unknown dtype " + dtype);
  if (order == "none")  // of the residual tail
    p.order = da::Order::none;
  else if (!da::parse(order, p.order))
    throw py::value_error("unknown order " + order);
  return p;
}

py::list passes(const da::Schedule& schedule) {
  py::list list;
  for (const da::Pass& pass : schedule)
    list.append(py::dict(py::arg("name") = pass.name, py::arg("reads") = da::count(pass.reads),
                         py::arg("writes") = da::count(pass.writes)));
  return list;
}

py::list axes(da::Axes axes) {
  py::list list;
  if (axes.pixels) list.append("pixels");
  if (axes.channels) list.append("channels");
  return list;
}

py::list tensors(unsigned set) {
  py::list list;
  for (const auto& [tensor, name] : {std::pair(da::kDy, "dy"), std::pair(da::kX, "x"),
                                     std::pair(da::kY, "y"), std::pair(da::kDx, "dx")})
    if (set & tensor) list.append(name);
  return list;
}

py::list schedule(const da::Schedule& schedule) {
  py::list list;
  for (const da::Pass& pass : schedule)
    list.append(py::dict(py::arg("name") = pass.name, py::arg("reads") = tensors(pass.reads),
                         py::arg("writes") = tensors(pass.writes),
                         py::arg("weights") = pass.weights == da::Maps::masks ? "masks" : "terms",
                         py::arg("sums") = axes(pass.sums),
                         py::arg("complete") = axes(pass.complete)));
  return list;
}

py::dict cpu(const py::tuple& shape, bool channels_last, const std::string& dtype,
             const std::string& order, int64_t threads, const std::string& limits, int tensors) {
  const da::Problem p = da::cpu::joined(problem(shape, channels_last, dtype, order));
  da::cpu::Machine machine{threads, {}};
  if (!da::cpu::parse(limits, machine.limits)) throw py::value_error(da::cpu::kLimits + limits);
  const da::cpu::Plan plan = da::cpu::plan(p, machine, tensors);
  py::dict d;
  d["instruction_set"] = da::cpu::name(da::cpu::instruction_set());
  d["threads"] = plan.threads;
  d["whole_images"] = plan.whole_images;
  d["slab_rows"] = plan.slab_rows;
  d["slabs"] = plan.slabs;
  d["sum_together"] = plan.sums == da::cpu::Rows::together;
  d["scale_together"] = plan.combines == da::cpu::Rows::together;
  d["stream"] = plan.stores == da::cpu::Stores::streamed;
  d["hot"] = plan.stores == da::cpu::Stores::hot;
  d["stream_du"] = plan.du_stores == da::cpu::Stores::streamed;
  d["joint"] = plan.joint;
  d["forward"] = passes(da::schedule(p.order, false));
  d["backward"] = passes(da::schedule(p.order, true));
  d["cached_tensors"] = da::cpu::cached_tensors(p, machine);
  return d;
}

py::dict waves(const da::cuda::Waves& w) {
  return py::dict(py::arg("blocks") = w.blocks, py::arg("slots") = w.slots,
                  py::arg("waves") = w.waves, py::arg("efficiency") = w.efficiency);
}

py::list steps(const da::Problem& p, const da::cuda::Device& device, const da::cuda::Plan& plan,
               const da::cuda::Direction& direction) {
  py::list list;
  for (const auto& step : direction.steps) {
    const bool on_chip = step.kernel == da::cuda::Kernel::on_chip;
    const da::Pass& pass = step.pass;
    list.append(
        py::dict(py::arg("name") = pass.name, py::arg("reads") = da::count(pass.reads),
                 py::arg("writes") = da::count(pass.writes), py::arg("grid") = step.grid,
                 py::arg("threads") = on_chip ? direction.chip.threads : da::cuda::kThreads,
                 py::arg("shared_bytes") = step.shared_bytes, py::arg("backwards") = step.backwards,
                 py::arg("once") = step.count.once, py::arg("again") = step.count.again,
                 py::arg("finishes") = step.extra > 0 || step.last_finishes,
                 py::arg("waves") = waves(da::cuda::waves(p, device, plan, direction, step)),
                 py::arg("in_l2") = da::cuda::expected_in_l2(p, device, direction, step)));
  }
  return list;
}

// One launch as chosen, or {"refused": why there is none}.
py::dict one_launch(const da::cuda::OnChip& plan, const da::Problem& p,
                    const da::cuda::Device& device) {
  py::dict d;
  if (plan.refused) {
    d["refused"] = plan.refused;
    return d;
  }
  d["barrier"] = da::cuda::kBarriers[static_cast<int>(plan.barrier)];
  d["blocks_an_image"] = plan.blocks;
  d["images_at_once"] = plan.images_at_once;
  d["waves"] = (p.n + plan.images_at_once - 1) / plan.images_at_once;
  d["x_kept"] = double(plan.kept) / plan.chunks;
  d["dy_kept"] = double(plan.kept_dy) / plan.chunks;
  d["mail"] = plan.mail;
  d["recalls_alone"] = plan.by_pixel || plan.recalled == plan.cols;
  d["chunks"] = plan.chunks;
  d["rounds"] = (plan.slab_rows + plan.round_rows() - 1) / plan.round_rows();
  d["cost"] = da::cuda::cost(p, device, plan);
  return d;
}

da::cuda::Device device_of(int sm, int multiprocessors, int64_t l2_bytes) {
  da::cuda::Device device = da::cuda::typical_device(sm);
  if (multiprocessors > 0) device.multiprocessors = multiprocessors;
  if (l2_bytes > 0) device.l2_bytes = l2_bytes;
  return device;
}

void set_gate(da::Problem& p, const std::string& gate, int64_t kernel_size) {
  if (!da::parse(gate, p.gate)) throw py::value_error("unknown gate " + gate);
  if (p.gate == da::Gate::eca) p.kernel_size = kernel_size;
}

py::dict cuda(const py::tuple& shape, bool channels_last, const std::string& dtype,
              const std::string& order, const std::string& gate, int sm, int multiprocessors,
              const std::string& wish, int64_t l2_bytes, int64_t kernel_size) {
  da::Problem p = problem(shape, channels_last, dtype, order);
  set_gate(p, gate, kernel_size);
  const da::cuda::Device device = device_of(sm, multiprocessors, l2_bytes);
  da::cuda::Wish wished;
  if (!da::cuda::parse(wish, wished)) throw py::value_error(da::cuda::kWishes + wish);
  constexpr bool aligned = true;  // as PyTorch allocates tensors
  da::cuda::Plan plan = da::cuda::plan(p, device, aligned, wished.limits);
  const auto choose = [&](da::cuda::Way way, da::cuda::Direction& direction) {
    const double passes = da::cuda::cost(p, device, plan, way);
    const da::cuda::OnChip chip =
        da::cuda::choose(p, way, device, aligned, wished, da::cuda::typical_residents(device));
    if (!chip.refused) direction = da::cuda::on_chip_direction(p, chip, wished.limits);
    py::dict d = one_launch(chip, p, device);
    d["cost_of_passes"] = passes;
    return d;
  };
  const py::dict forward = choose(da::cuda::Way::forward, plan.forward);
  const py::dict backward = choose(da::cuda::Way::backward, plan.backward);
  const da::cuda::Tiling& t = plan.tiling;
  py::dict d;
  d["multiprocessors"] = device.multiprocessors;
  d["l2_mib"] = double(device.l2_bytes) / (1 << 20);
  d["early_launches"] = plan.early;
  d["vector_bytes"] = t.vector * p.element_size();
  d["rows_a_super_row"] = t.period;
  d["tile"] = py::str(std::to_string(t.tile_channels()) + " channels x " +
                      std::to_string(t.tile_pixels()) + " pixels");
  d["tiles_an_image"] = t.tiles();
  d["forward"] = steps(p, device, plan, plan.forward);
  d["backward"] = steps(p, device, plan, plan.backward);
  d["one_launch_forward"] = forward;
  d["one_launch_backward"] = backward;
  return d;
}

py::dict cuda_tail(const py::tuple& shape, bool channels_last, const std::string& dtype,
                   const std::string& order, const std::string& gate, bool batch, bool shortcut,
                   int sm, int multiprocessors, const std::string& wish, int64_t l2_bytes,
                   bool shortcut_norm, bool shortcut_batch, int64_t kernel_size) {
  da::Problem p = problem(shape, channels_last, dtype, order);
  set_gate(p, gate, kernel_size);
  const da::cuda::Device device = device_of(sm, multiprocessors, l2_bytes);
  da::cuda::Wish wished;
  if (!da::cuda::parse(wish, wished)) throw py::value_error(da::cuda::kWishes + wish);
  const da::cuda::TailKind kind{batch, shortcut, shortcut_norm, shortcut_batch, false};
  const da::cuda::TailPlan plan = da::cuda::tail_plan(p, kind, device, true, wished.limits);
  const auto steps = [&](const da::cuda::TailDirection& direction) {
    py::list list;
    for (const auto& step : direction.steps)
      list.append(py::dict(
          py::arg("name") = step.name, py::arg("reads") = da::count(step.reads),
          py::arg("writes") = da::count(step.writes), py::arg("grid") = step.grid,
          py::arg("threads") = da::cuda::kThreads, py::arg("shared_bytes") = step.shared_bytes,
          py::arg("backwards") = step.backwards,
          py::arg("waves") = waves(da::cuda::waves(p, device, plan, step)),
          py::arg("in_l2") = da::cuda::expected_in_l2(p, device, direction, step)));
    return list;
  };
  py::dict d;
  d["vector_bytes"] = plan.tiling.vector * p.element_size();
  d["tiles_an_image"] = plan.tiling.tiles();
  d["forward"] = steps(plan.forward);
  d["backward"] = steps(plan.backward);
  return d;
}

}  // namespace

PYBIND11_MODULE(_plan, m) {
  m.doc() = "Which kernels run for which problem; see da_ops.explain.";
  m.def("cpu", &cpu, py::arg("shape"), py::arg("channels_last"), py::arg("dtype"), py::arg("order"),
        py::arg("threads"), py::arg("limits") = "", py::arg("tensors") = 2,
        "How the CPU backend splits a problem: threads, slabs, and its passes over x; within the "
        "limits that DA_OPS_CPU_PLAN would set to this text, for a call that reads and writes so "
        "many tensors of the size of x.");
  m.def(
      "cuda", &cuda, py::arg("shape"), py::arg("channels_last"), py::arg("dtype"), py::arg("order"),
      py::arg("gate"), py::arg("sm"), py::arg("multiprocessors"), py::arg("wish") = "",
      py::arg("l2_bytes") = 0, py::arg("kernel_size") = 3,
      "The CUDA backend's launches on a GPU of this compute capability, with so many "
      "multiprocessors and bytes of L2 (0: as many as a typical one); kernel_size: an eca gate's.");
  m.def(
      "cuda_tail", &cuda_tail, py::arg("shape"), py::arg("channels_last"), py::arg("dtype"),
      py::arg("order"), py::arg("gate"), py::arg("batch"), py::arg("shortcut"), py::arg("sm"),
      py::arg("multiprocessors") = 0, py::arg("wish") = "", py::arg("l2_bytes") = 0,
      py::arg("shortcut_norm") = false, py::arg("shortcut_batch") = false,
      py::arg("kernel_size") = 3,
      "The launches of the CUDA backend's residual tail, as cuda() has them; order \"none\" leaves "
      "attention out; batch: the norm's statistics are the batch's; shortcut: there is one; "
      "shortcut_norm: it goes through a norm; shortcut_batch: whose statistics are the batch's.");
  m.def(
      "schedules",
      [] {
        py::dict d;
        for (const da::Schedules& both : da::kOrders)
          d[both.order] = py::dict(py::arg("forward") = schedule(both.forward),
                                   py::arg("backward") = schedule(both.backward));
        return d;
      },
      "csrc/schedule.h as data: the passes of every order, forward and backward.");
  m.def(
      "proofs",
      [] {
        py::dict d;
        for (const da::cuda::Proof& proof : da::cuda::proofs())
          d[py::int_(proof.sm)] = proof.results;
        return d;
      },
      "Results that make the one launch the default, by compute capability.");
}
