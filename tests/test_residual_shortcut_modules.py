"""A shortcut that goes through a norm of its own, over modules and in networks: the same as one by
one."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from torchvision.ops import FrozenBatchNorm2d

from da_ops.backends import BACKENDS as KNOWN
from da_ops.models import fuse
from da_ops.residual import functional
from da_ops.residual.functional import residual_attention

from .cases import LAYOUTS
from .fused import blocks_of, make, pair
from .test_residual_layer import is_fused, layer_of, norm_of, tensors


@pytest.fixture(autouse=True)
def _forget(fused_cpu):
    functional._told.clear()


def one_by_one(u, shortcut, norm, attention, its):
    x = norm(u)
    x = x if attention is None else attention(x)
    return torch.relu(x + its(shortcut))


def takes_the_norm(out):
    """Whether one operator made `out`, the shortcut's norm within it."""
    return is_fused(out) and out.grad_fn.call[7] is not None


NORMS = {
    "training": norm_of,
    "evaluation": lambda: norm_of().eval(),
    "no statistics": lambda: norm_of(track_running_stats=False),
    "no statistics in evaluation": lambda: norm_of(track_running_stats=False).eval(),
    "no weight": lambda: norm_of(affine=False),
    "of all batches": lambda: norm_of(momentum=None),
    "fixed weight": lambda: norm_of().requires_grad_(False),
}


def strided():
    norm = norm_of()
    norm.running_mean, norm.running_var = (torch.rand(12).double()[::2] for _ in range(2))
    return norm


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("its", [*NORMS, "strided statistics"])
@pytest.mark.parametrize("norm", ["training", "evaluation", "of all batches"])
@pytest.mark.parametrize("attention", [True, False])
def test_norms_of_any_kind(fused_cpu, attention, norm, its, layout):
    u, shortcut, dout = tensors(layout=layout)
    kinds = {**NORMS, "strided statistics": strided}
    modules = NORMS[norm](), layer_of() if attention else None, kinds[its]()
    found = []
    for function in (residual_attention, one_by_one):
        mine = copy.deepcopy(modules)
        parameters = [p for m in mine if m for p in m.parameters() if p.requires_grad]
        for _ in range(2):
            out = function(u, shortcut, *mine)
        gradients = torch.autograd.grad(out, [u, shortcut, *parameters], dout)
        with torch.no_grad():
            again = function(u, shortcut, *mine)
        if function is residual_attention:
            assert takes_the_norm(out)
        buffers = [b for m in mine if m for b in m.buffers()]
        found.append([out, again, *gradients, *buffers])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("kind", ["torchvision's", "evaluated"])
def test_what_backward_does_without_is_not_kept(fused_cpu, kind):
    """A norm by constants is called where there is a backward."""
    u, shortcut, _ = tensors()
    its = FrozenBatchNorm2d(6).double() if kind == "torchvision's" else norm_of().eval()
    if kind == "evaluated":
        its.requires_grad_(False)
        shortcut = shortcut.detach()
    else:
        its.load_state_dict({k: torch.rand(6).double() + 0.5 for k in its.state_dict()})
    norm, large = norm_of().eval(), []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: large.append(t) if t.numel() == u.numel() else t, lambda t: t
    ):
        out = residual_attention(u, shortcut, norm, None, its)
    assert is_fused(out) and not takes_the_norm(out)
    assert {t.data_ptr() for t in large} == {u.data_ptr(), out.data_ptr()}
    with torch.no_grad(), torch.autograd.profiler.profile() as profile:
        again = residual_attention(u, shortcut, norm, None, its)
    torch.testing.assert_close(again, one_by_one(u, shortcut, norm, None, its))
    assert {"da_ops::residual_forward"} == {
        event.name for event in profile.function_events if "::" in event.name
    } & {"da_ops::residual_forward", "aten::batch_norm", "aten::mul"}


def test_a_shared_norm_learns_in_the_order_of_the_modules(fused_cpu):
    u, shortcut, _ = tensors()
    norm, layer = norm_of(), layer_of()
    same = copy.deepcopy(norm)
    out = residual_attention(u, shortcut, norm, layer, norm)
    torch.testing.assert_close(out, one_by_one(u, shortcut, same, layer, same))
    for ours, theirs in zip(norm.buffers(), same.buffers()):
        torch.testing.assert_close(ours, theirs)
    assert norm.num_batches_tracked == 2


@pytest.mark.parametrize("needed", range(1, 16))
def test_whatever_requires_gradients(fused_cpu, needed):
    u, shortcut, dout = tensors(requires_grad=False)
    norm, its = norm_of().requires_grad_(False), norm_of().requires_grad_(False)
    some = [u, shortcut, its.weight, its.bias]
    inputs = [t.requires_grad_() for i, t in enumerate(some) if needed >> i & 1]
    out = residual_attention(u, shortcut, norm, None, its)
    assert takes_the_norm(out) == (needed > 1)  # else backward stops before the norm
    torch.testing.assert_close(
        torch.autograd.grad(out, inputs, dout),
        torch.autograd.grad(one_by_one(u, shortcut, norm, None, its), inputs, dout),
    )


@pytest.mark.parametrize("which", ["shortcut", "weight", "running mean"])
def test_what_was_changed_before_backward_is_told(fused_cpu, which):
    u, shortcut, dout = tensors()
    shortcut, its = shortcut * 1, norm_of().eval()
    out = residual_attention(u, shortcut, norm_of(), None, its)
    assert takes_the_norm(out)
    changed = {"shortcut": shortcut, "weight": its.weight, "running mean": its.running_mean}
    with torch.no_grad():
        changed[which].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward(dout)


def test_a_backend_without_such_a_kernel_is_given_what_the_norm_makes(
    fused_cpu, choice, monkeypatch
):
    monkeypatch.setitem(KNOWN, "cpu", replace(KNOWN["cpu"], batch_statistics=None))
    u, shortcut, dout = tensors()
    modules, found = (norm_of(), layer_of(), norm_of()), []
    for function in (residual_attention, one_by_one):
        mine = copy.deepcopy(modules)
        out = function(u, shortcut, *mine)
        found.append([out, *torch.autograd.grad(out, [u, shortcut], dout), *mine[2].buffers()])
    assert is_fused(found[0][0]) and not takes_the_norm(found[0][0])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_running_statistics_are_bit_for_bit_those_of_another_run(fused_cpu):
    u, shortcut, _ = tensors(dtype=torch.float32)
    modules = norm_of(torch.float32), layer_of(torch.float32), norm_of(torch.float32)
    first, second = copy.deepcopy(modules), copy.deepcopy(modules)
    for mine in (first, second):
        assert takes_the_norm(residual_attention(u, shortcut, *mine))
    for ours, theirs in zip(first[2].buffers(), second[2].buffers()):
        assert torch.equal(ours, theirs)
    assert first[2].num_batches_tracked == 1


def hooked(norm, seen):
    norm.register_forward_hook(lambda module, args, out: seen.append(out))


@pytest.mark.parametrize(
    "how",
    [
        "hook",
        "group norm",
        "other dtype",
        "statistics to learn",
        "shortcut of other shape",
        "subclass",
    ],
)
def test_what_calls_the_norm_itself_and_once(fused_cpu, how):
    """Where a kernel does not take it, it has not learnt from the batch before."""
    dtype = torch.float32
    u, shortcut, _ = tensors(dtype=dtype)
    norm, layer, its = norm_of(dtype), layer_of(dtype), norm_of(dtype)
    seen = []
    if how == "hook":
        hooked(its, seen)
    elif how == "group norm":
        its = nn.GroupNorm(2, 6)
    elif how == "other dtype":
        its = norm_of(torch.float64).eval()
        shortcut = shortcut.double().detach()
    elif how == "statistics to learn":
        its.eval().running_mean.requires_grad_()
    elif how == "shortcut of other shape":
        shortcut = shortcut[:, :, :1, :1].detach()
    else:
        its.__class__ = type("Own", (nn.BatchNorm2d,), {})
    same = copy.deepcopy((norm, layer, its))
    with torch.set_grad_enabled(how != "statistics to learn"):  # which PyTorch's norm refuses
        out = residual_attention(u, shortcut, norm, layer, its)
        want = one_by_one(u, shortcut, *same)
    torch.testing.assert_close(out, want, rtol=1e-4, atol=1e-4)
    assert not takes_the_norm(out) and len(seen) == (2 if how == "hook" else 0)
    for ours, theirs in zip(its.buffers(), same[2].buffers()):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("refuses", ["u", "norm", "attention"])
def test_a_tail_that_is_refused_leaves_the_norm_to_itself(fused_cpu, refuses):
    u, shortcut, _ = tensors(dtype=torch.float32)
    norm, its = norm_of(torch.float32), norm_of(torch.float32)
    attention = nn.Identity() if refuses == "attention" else None
    if refuses == "u":
        u = u[:, :, :1]  # is broadcast
    elif refuses == "norm":
        hooked(norm, [])
    same = copy.deepcopy((norm, attention, its))
    out = residual_attention(u, shortcut, norm, attention, its)
    torch.testing.assert_close(out, one_by_one(u, shortcut, *same), rtol=1e-4, atol=1e-4)
    assert its.num_batches_tracked == 1
    for ours, theirs in zip(its.buffers(), same[2].buffers()):
        torch.testing.assert_close(ours, theirs)


def test_one_value_a_channel_is_refused_as_pytorch_refuses_it(fused_cpu):
    u, shortcut, _ = tensors((1, 6, 1, 1))
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        residual_attention(u, shortcut, norm_of().eval(), None, norm_of())


def test_a_norm_without_a_shortcut_is_refused():
    with pytest.raises(ValueError, match=r"shortcut must be what goes through it.*got None"):
        residual_attention(torch.ones(2, 6, 4, 4), None, norm_of(), None, norm_of())


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_updates_statistics_as_often_as_modules_do(fused_cpu, reentrant):
    u, shortcut, dout = tensors()
    modules, found = (norm_of(), layer_of(), norm_of()), []
    for function in (residual_attention, one_by_one):
        mine = copy.deepcopy(modules)
        out = checkpoint(function, u, shortcut, *mine, use_reentrant=reentrant)
        assert reentrant or takes_the_norm(out) == (function is residual_attention)
        out.backward(dout)
        found.append([out, *mine[0].buffers(), *mine[2].buffers()])
    assert found[0][-1] == 2  # batches tracked
    for ours, theirs in zip(*found):
        torch.testing.assert_close(ours, theirs)


class Graphs(list):
    """Those of a torch.compile that has this as its backend."""

    def __call__(self, graph, inputs):
        self.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    def norms(self):
        """PyTorch's own batch norms in them."""
        return sum("batch_norm" in str(node.target) for one in self for node in one.graph.nodes)


@pytest.mark.parametrize("its_training", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_a_graph_has_the_norm_within_the_operator(fused_cpu, training, its_training):
    u, shortcut, dout = tensors()
    modules, found = (norm_of(), layer_of(), norm_of()), []
    modules[0].train(training), modules[2].train(its_training)
    graphs = Graphs()
    compiled = torch.compile(residual_attention, backend=graphs, fullgraph=True)
    for function in (compiled, one_by_one):
        mine = copy.deepcopy(modules)
        out = function(u, shortcut, *mine)
        inputs = [u, shortcut, *(p for module in mine for p in module.parameters())]
        buffers = *mine[0].buffers(), *mine[2].buffers()
        found.append([out, *torch.autograd.grad(out, inputs, dout), *buffers])
    assert len(graphs) == 1 and graphs.norms() == 0
    for ours, theirs in zip(*found):
        torch.testing.assert_close(ours, theirs)


def test_a_graph_calls_a_norm_that_the_operator_does_not_take(fused_cpu):
    u, shortcut, _ = tensors()
    modules, graphs = (norm_of(), layer_of(), norm_of()), Graphs()
    modules[2].requires_grad_(False)
    compiled = torch.compile(residual_attention, backend=graphs, fullgraph=True)
    # Backward of this norm needs no shortcut.
    out = compiled(u, shortcut.detach(), *copy.deepcopy(modules))
    assert graphs.norms() == 1
    torch.testing.assert_close(out, one_by_one(u, shortcut.detach(), *modules))


def test_batched_gradients_and_saved_tensors_laid_out_anew(fused_cpu):
    u, shortcut, dout = tensors()
    modules = norm_of(), layer_of(), norm_of()
    inputs = [u, shortcut, *modules[2].parameters()]
    apart = (lambda t: torch.stack([t, t], -1)), (lambda t: t[..., 0])
    with torch.autograd.graph.saved_tensors_hooks(*apart):
        out = residual_attention(u, shortcut, *modules)
    assert takes_the_norm(out)
    want = torch.autograd.grad(one_by_one(u, shortcut, *modules), inputs, dout)
    torch.testing.assert_close(torch.autograd.grad(out, inputs, dout, retain_graph=True), want)
    twice = torch.autograd.grad(out, inputs, torch.stack([dout, dout]), is_grads_batched=True)
    torch.testing.assert_close([g[1] for g in twice], list(want))


# ------------------------------------------------------------------------------ in networks


def norms_called(network, x):
    """How often PyTorch's own batch norm is called."""
    with torch.autograd.profiler.profile() as profile:
        network(x)
    names = [event.name for event in profile.function_events]
    return names.count("aten::native_batch_norm") + names.count("aten::_native_batch_norm_legit")


@pytest.mark.parametrize("name", ["basic", "timm basic"])
def test_a_graph_of_a_fused_network_has_no_norm_of_its_own(fused_cpu, name):
    plain, fused = pair(name)
    x, graphs = torch.randn(3, 3, 32, 32, dtype=torch.float64), Graphs()
    torch.testing.assert_close(torch.compile(fused, backend=graphs, fullgraph=True)(x), plain(x))
    assert graphs.norms() == 0
    torch.testing.assert_close(dict(fused.named_buffers()), dict(plain.named_buffers()))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["basic", "bottleneck", "timm basic"])
def test_no_norm_of_a_fused_network_is_called(fused_cpu, name, training):
    plain, fused = (network.train(training) for network in pair(name))
    x = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    assert any(block.downsample is not None for block in blocks_of(fused).values())
    assert norms_called(fused, x) == 0 < norms_called(plain, x)


class OwnSequential(nn.Sequential):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize("how", ["subclass", "compiled", "one module", "more modules"])
@pytest.mark.parametrize("name", ["basic", "timm basic"])
def test_a_downsample_of_another_kind(fused_cpu, name, how):
    x, found = torch.randn(3, 3, 32, 32, dtype=torch.float64), []
    plain = make(name)
    for network in (copy.deepcopy(plain), fuse(plain)):
        block = next(b for b in blocks_of(network).values() if b.downsample)
        if how == "subclass":
            block.downsample = OwnSequential(*block.downsample)
        elif how == "one module":
            block.downsample = nn.Sequential(nn.Sequential(*block.downsample))
        elif how == "more modules":
            block.downsample = nn.Sequential(nn.ReLU(), *block.downsample, nn.Identity())
        calls = []
        if how == "compiled":
            block.downsample._compiled_call_impl = lambda x, of=block.downsample, calls=calls: (
                calls.append(1) or of._call_impl(x)
            )
        found.append([network(x), torch.tensor(len(calls))])
        assert len(calls) == (how == "compiled")
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("where", ["the whole", "the norm", "the convolution"])
@pytest.mark.parametrize("name", ["basic", "timm basic"])
def test_a_hook_on_part_of_a_downsample(fused_cpu, name, where):
    """It sees what it would see."""
    x, found = torch.randn(3, 3, 32, 32, dtype=torch.float64), []
    plain = make(name)
    for network in (copy.deepcopy(plain), fuse(plain)):
        seen = []
        downsample = next(b.downsample for b in blocks_of(network).values() if b.downsample)
        module = {"the whole": downsample, "the norm": downsample[-1]}.get(where, downsample[-2])
        hooked(module, seen)
        found.append([network(x), *seen])
        assert len(seen) == 1
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-8)
