"""Everything that can be asked of autograd, and of torch.func."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.autograd import forward_ad, gradcheck, gradgradcheck

import da_ops
from da_ops.reference import formula

from .cases import CASES, FULL, LAYOUTS, PARAMETERS, assert_close, assert_equal, distance, make
from .conftest import interpreted

# The two ways in: the function that users call, and the autograd function below it.
WAYS = ["da_attention", "DAFunction"]


def function(call, way, backend):
    """The operator as a function of x and the parameters given, in float64, and these."""
    names = list(call.parameters)

    def f(x, *given):
        now = replace(call, x=x, parameters=dict(zip(names, given)))
        if way == "da_attention":
            return now(backend=backend)
        return da_ops.DAFunction.apply(*now.positional(), backend)

    leaves = call.leaves()
    return f, (leaves.x, *leaves.parameters.values())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("order", "gate"), CASES)
def test_gradcheck(backend, device, order, gate, way, layout):
    call = make((2, 3, 4, 3), order, gate, dtype=torch.float64, layout=layout, device=device)
    fast = interpreted(backend) and not FULL
    assert gradcheck(*function(call, way, backend), fast_mode=fast)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("order", "gate"), CASES)
def test_gradgradcheck(backend, device, order, gate, way, layout):
    call = make((2, 3, 4, 3), order, gate, dtype=torch.float64, layout=layout, device=device)
    # The second derivative is plain PyTorch's: cuDNN adds a weight's gradient in no fixed order.
    nondeterminism = 1e-12 if device == "cuda" else 0.0
    assert gradgradcheck(
        *function(call, way, backend), fast_mode=not FULL, nondet_tol=nondeterminism
    )


@pytest.mark.parametrize("wanted", ["x", *PARAMETERS])
def test_only_one_gradient(backend, device, wanted):
    call = make(device=device)
    want = call.results(backend=backend)
    leaf = call.x if wanted == "x" else call.parameters[wanted]
    leaf.requires_grad_()
    call(backend=backend).backward(call.dy)
    assert torch.equal(leaf.grad, want["dx" if wanted == "x" else f"d_{wanted}"])
    others = [t for t in (call.x, *call.parameters.values()) if t is not leaf]
    assert all(t.grad is None for t in others)


def test_no_gradient(backend, device):
    call = make(device=device)
    want = call.leaves()(backend=backend)
    assert want.requires_grad
    with torch.no_grad():
        without = call.leaves()(backend=backend)
    with torch.inference_mode():
        inference = call(backend=backend)
        assert inference.is_inference()
    for y in (call(backend=backend), without, inference):
        assert not y.requires_grad
        assert torch.equal(y, want)


def test_inference_tensors_as_arguments(backend, device):
    with torch.inference_mode():
        call = make(device=device)
        inside = call(backend=backend)
    assert torch.equal(call(backend=backend), inside)


def test_second_backward(backend, device):
    """With retain_graph it adds the same again, without it is an error."""
    call = make(device=device)
    want = call.results(backend=backend)
    call = call.leaves()
    y = call(backend=backend)
    y.backward(call.dy, retain_graph=True)
    y.backward(call.dy)
    assert torch.equal(call.x.grad, 2 * want["dx"])
    with pytest.raises(RuntimeError, match="second time"):
        y.backward(call.dy)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("order", "gate"), CASES)
def test_saved_memory(backend, device, order, gate, layout):
    """Of x's size only x itself is kept for backward, and not as a copy."""
    call = make((2, 16, 12, 12), order, gate, layout=layout, device=device).leaves()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = call(backend=backend)
    large = [t for t in saved if t.numel() * t.element_size() >= call.x.numel()]
    assert [t.data_ptr() for t in large] == [call.x.data_ptr()]
    maps = 2 * (12 * 12 + 16)  # one number a pixel, one a channel
    parameters = sum(p.numel() for p in call.parameters.values())
    assert sum(t.numel() for t in saved) <= call.x.numel() + maps + parameters
    y.backward(call.dy)


def test_saved_tensors_may_move(backend, device):
    """As with activations kept on another device, or on disk."""
    call = make(device=device)
    want = call.results(backend=backend)
    with torch.autograd.graph.save_on_cpu():
        assert_equal(call.results(backend=backend), want)


def test_checkpointing(backend, device):
    call = make(device=device)
    want = call.results(backend=backend)
    call = call.leaves()
    y = torch.utils.checkpoint.checkpoint(
        lambda x: replace(call, x=x)(backend=backend), call.x, use_reentrant=False
    )
    y.backward(call.dy)
    assert torch.equal(call.x.grad, want["dx"])


def test_hooks(backend, device):
    call = make(device=device)
    want = call.results(backend=backend)
    call = call.leaves()
    call.x.register_hook(lambda g: 2 * g)
    y = call(backend=backend)
    y.register_hook(lambda g: 3 * g)
    seen = []
    y.grad_fn.register_hook(lambda into, out: seen.append(len(into)))
    y.backward(call.dy)
    assert len(seen) == 1
    assert distance(call.x.grad, 6 * want["dx"]) < 1e-6


@pytest.mark.parametrize("what", ["x", *PARAMETERS])
def test_modified_in_place_before_backward(backend, device, what):
    """Backward needs the values of forward: autograd says so when they are gone."""
    call = make(device=device).leaves()
    leaf = call.x if what == "x" else call.parameters[what]
    y = call(backend=backend)
    with torch.no_grad():
        leaf.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_y_may_be_modified_in_place(backend, device):
    """As by the ReLU that follows in a network: y itself is not kept."""
    call = make(device=device).leaves()
    call(backend=backend).relu_().backward(call.dy)
    want = make(device=device).leaves()
    want(formula).relu().backward(want.dy)
    assert distance(call.x.grad, want.x.grad) < 1e-6


def test_x_may_be_a_result_used_elsewhere(backend, device):
    """The shortcut of a residual block."""

    def run(f, **options):
        call = make(device=device).leaves()
        x = call.x * 2
        (x + replace(call, x=x)(f, **options)).backward(call.dy)
        return call.x.grad

    assert distance(run(da_ops.da_attention, backend=backend), run(formula)) < 1e-6


def test_create_graph_gives_the_same_gradient(backend, device):
    """The formulas that can be differentiated again agree with the kernels."""
    call = make((2, 16, 9, 8), device=device)
    want = call.results(backend=backend)
    call = call.leaves()
    inputs = {"x": call.x, **call.parameters}
    gradients = torch.autograd.grad(
        call(backend=backend), inputs.values(), call.dy, create_graph=True
    )
    assert all(g.requires_grad for g in gradients)
    got = {"y": want["y"]} | {
        "dx" if k == "x" else f"d_{k}": g.detach() for k, g in zip(inputs, gradients)
    }
    assert_close(got, want, 1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_create_graph_in_half(backend, device, dtype):
    """A gradient penalty, as it is trained with."""
    call = make(dtype=dtype, parameter_dtype=torch.float32, device=device).leaves()
    (dx,) = torch.autograd.grad(call(backend=backend), call.x, call.dy, create_graph=True)
    dx.float().square().sum().backward()
    truth = make(dtype=dtype, parameter_dtype=torch.float32, device=device).to(torch.float64)
    truth = truth.leaves()
    (dx,) = torch.autograd.grad(truth(formula), truth.x, truth.dy, create_graph=True)
    dx.square().sum().backward()
    assert distance(call.x.grad, truth.x.grad) < 2e-2
    for name, p in call.parameters.items():
        assert distance(p.grad, truth.parameters[name].grad) < 2e-2, name


def sliced(xs):
    return torch.cat([xs, xs], -1)[..., : xs.shape[-1]], 0


def batch_last(xs):
    return xs.movedim(0, -1).contiguous(), -1


def channels_last(xs):
    return xs.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3), 0


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("order", "gate"), CASES)
class TestFunc:
    """torch.func: the same function transforms to the same results as the plain formula's."""

    @pytest.fixture
    def pair(self, backend, device, order, gate, way):
        """The operator, the plain formula, both of (x, *parameters), and these."""
        call = make((2, 2, 3, 4), order, gate, dtype=torch.float64, device=device)
        names = list(call.parameters)
        ours, inputs = function(call, way, backend)

        def plain(x, *given):
            return replace(call, x=x, parameters=dict(zip(names, given)))(formula)

        return ours, plain, tuple(t.detach() for t in inputs)

    def test_grad(self, pair):
        ours, plain, inputs = pair
        everything = tuple(range(len(inputs)))

        def gradient(f):
            return torch.func.grad(lambda *a: f(*a).square().sum(), everything)(*inputs)

        torch.testing.assert_close(gradient(ours), gradient(plain))

    def test_vmap_over_x(self, pair):
        ours, _, (x, *parameters) = pair
        xs = torch.stack([x, 2 * x, -x])
        got = torch.vmap(lambda x: ours(x, *parameters))(xs)
        torch.testing.assert_close(got, torch.stack([ours(x, *parameters) for x in xs]))

    @pytest.mark.parametrize("lay", [sliced, batch_last, channels_last], ids=lambda f: f.__name__)
    def test_vmap_over_any_layout(self, pair, lay):
        ours, plain, (x, *parameters) = pair
        xs, dim = lay(torch.stack([x, 2 * x, -x]))
        assert not xs.movedim(dim, 0).is_contiguous()
        dims = dim, *[None] * len(parameters)
        got, want = (torch.vmap(f, dims)(xs, *parameters) for f in (ours, plain))
        torch.testing.assert_close(got, want)

    def test_derivatives_of_a_slice_in_channels_last(self, pair):
        ours, plain, (x, *parameters) = pair
        x = torch.cat([x, x], 1).contiguous(memory_format=torch.channels_last)[:, : x.shape[1]]
        got, want = (torch.func.jacfwd(f)(x, *parameters) for f in (ours, plain))
        torch.testing.assert_close(got, want)

    def test_vmap_over_everything(self, pair):
        """An ensemble of layers."""
        ours, _, inputs = pair
        stacked = [torch.stack([t, 0.5 * t]) for t in inputs]
        got = torch.vmap(ours)(*stacked)
        torch.testing.assert_close(got, torch.stack([ours(*each) for each in zip(*stacked)]))

    def test_gradients_per_sample(self, pair):
        ours, plain, (x, *parameters) = pair

        def per_sample(f):
            def loss(parameters, x):
                return f(x[None], *parameters).square().sum()

            return torch.vmap(torch.func.grad(loss), (None, 0))(tuple(parameters), x)

        torch.testing.assert_close(per_sample(ours), per_sample(plain))

    def test_jvp(self, pair):
        ours, plain, inputs = pair
        tangents = tuple(torch.randn_like(t) for t in inputs)
        got, want = (torch.func.jvp(f, inputs, tangents) for f in (ours, plain))
        torch.testing.assert_close(got, want)

    def test_forward_mode(self, pair):
        ours, plain, inputs = pair
        tangents = [torch.randn_like(t) for t in inputs]

        def derivative(f):
            with forward_ad.dual_level():
                duals = [forward_ad.make_dual(t, v) for t, v in zip(inputs, tangents)]
                return forward_ad.unpack_dual(f(*duals))

        torch.testing.assert_close(tuple(derivative(ours)), tuple(derivative(plain)))

    def test_vjp_and_jacobian(self, pair):
        ours, plain, inputs = pair
        got, want = (torch.func.jacrev(f)(*inputs) for f in (ours, plain))
        torch.testing.assert_close(got, want)

    def test_hessian(self, pair):
        ours, plain, (x, *parameters) = pair

        def hessian(f):
            return torch.func.hessian(lambda x: f(x, *parameters).square().sum())(x)

        torch.testing.assert_close(hessian(ours), hessian(plain))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_batched_gradients(backend, device, layout):
    """`is_grads_batched`, which runs backward under vmap."""
    call = make((1, 2, 2, 3), dtype=torch.float64, device=device, layout=layout).leaves()
    y = call(backend=backend)
    basis = torch.eye(y.numel(), dtype=y.dtype, device=device).view(-1, *y.shape)
    (batched,) = torch.autograd.grad(y, call.x, basis, is_grads_batched=True, retain_graph=True)
    one_by_one = [torch.autograd.grad(y, call.x, dy, retain_graph=True)[0] for dy in basis]
    torch.testing.assert_close(batched, torch.stack(one_by_one))
