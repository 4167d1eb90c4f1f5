"""What is refused, with which words, and before anything is computed."""

from __future__ import annotations

import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import da_ops
from da_ops.backends import BACKENDS, NAMES, unserved
from da_ops.checks import name_want_of_memory
from da_ops.reference import GATES, ORDERS

from .cases import make

ROOT = Path(__file__).resolve().parents[1]


def through_function(call, backend):
    return call(backend=backend)


def through_autograd_function(call, backend):
    return da_ops.DAFunction.apply(*call.positional(), backend)


def through_gradient_transform(call, backend):
    """Where plain operations serve instead of a kernel."""
    return torch.func.vjp(lambda y: call(backend=backend) * y, torch.ones(()))


WAYS = [through_function, through_autograd_function, through_gradient_transform]


@pytest.fixture
def nothing_computes(monkeypatch):
    """Fails the test if a backend's forward returns, or is reached at all if it does not check."""
    wrong = []

    def watched(backend):
        def forward(*arguments):
            if not backend.checks:
                wrong.append(f"{backend.name} was reached")
            results = backend.forward(*arguments)
            wrong.append(f"{backend.name} computed")
            return results

        return forward

    for name, backend in BACKENDS.items():
        monkeypatch.setitem(BACKENDS, name, replace(backend, forward=watched(backend)))
    yield
    assert not wrong


def changed(**arguments):
    """A change to a call: new x, order or gate, new parameters; None leaves a parameter out."""

    def apply(call):
        fields = {k: v for k, v in arguments.items() if k in ("x", "order", "gate")}
        parameters = {k: v for k, v in arguments.items() if k not in fields}
        return replace(call, **fields, parameters=call.parameters | parameters)

    return apply


def without(*names):
    return lambda call: replace(
        call, parameters={k: v for k, v in call.parameters.items() if k not in names}
    )


def x(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype)


def nested(layout):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a prototype
        return torch.nested.nested_tensor([x(5, 6, 7), x(5, 4, 7)], layout=layout)


one = torch.ones(1)
five = torch.ones(5)
CONV, MERGE = torch.ones(1, 1, 3, 3), torch.ones(1, 2, 1, 1)

# What is wrong with x [2, 5, 6, 7] or another argument; the error; what its message must say: the
# argument, what was expected, what came.
BAD_X = {
    "a list": (changed(x=[1.0]), TypeError, "x", "torch.Tensor", "list"),
    "None": (changed(x=None), TypeError, "x", "torch.Tensor", "NoneType"),
    "three dimensions": (changed(x=x(5, 6, 7)), ValueError, "x", "[N, C, H, W]", "[5, 6, 7]"),
    "five dimensions": (changed(x=x(1, 2, 5, 6, 7)), ValueError, "x", "4 dim", "[1, 2, 5, 6, 7]"),
    "int64": (changed(x=x(2, 5, 6, 7, dtype=torch.int64)), TypeError, "x", "float32", "int64"),
    "bool": (changed(x=x(2, 5, 6, 7, dtype=torch.bool)), TypeError, "x", "float32", "bool"),
    "complex64": (
        changed(x=x(2, 5, 6, 7, dtype=torch.complex64)),
        TypeError,
        "x",
        "float32",
        "complex64",
    ),
    "float8": (
        changed(x=x(2, 5, 6, 7, dtype=torch.float8_e5m2)),
        TypeError,
        "x",
        "float16",
        "float8_e5m2",
    ),
    "sparse": (changed(x=x(2, 5, 6, 7).to_sparse()), ValueError, "x", "strided", "sparse"),
    "nested": (changed(x=nested(torch.strided)), ValueError, "x", "one tensor", "nested"),
    "jagged": (changed(x=nested(torch.jagged)), ValueError, "x", "one tensor", "nested"),
    "no channels": (changed(x=x(2, 0, 6, 7)), ValueError, "x", "at least 1", "[2, 0, 6, 7]"),
    "no rows": (changed(x=x(2, 5, 0, 7)), ValueError, "x", "at least 1", "[2, 5, 0, 7]"),
    "no columns": (changed(x=x(2, 5, 6, 0)), ValueError, "x", "at least 1", "[2, 5, 6, 0]"),
}
BAD_OPTIONS = {
    "order": (changed(order="both"), ValueError, "order", *map(repr, ORDERS), "'both'"),
    "order of None": (changed(order=None), ValueError, "order", "'parallel'", "None"),
    "gate": (changed(gate="se"), ValueError, "gate", *map(repr, GATES), "'se'"),
    "gate of a list": (changed(gate=["eca"]), ValueError, "gate", "'eca'", "['eca']"),
}
BAD_PARAMETERS = {
    "no conv_weight": (without("conv_weight"), TypeError, "conv_weight", "Tensor", "None"),
    "no gate_weight": (without("gate_weight"), TypeError, "gate_weight", "Tensor", "None"),
    "no gate_bias": (without("gate_bias"), TypeError, "gate_bias", "Tensor", "None"),
    "a number": (changed(gate_bias=1.0), TypeError, "gate_bias", "Tensor", "float"),
    "a bias that is a number": (
        changed(spatial_bias=0.5), TypeError, "spatial_bias", "Tensor", "float"
    ),
    "5x5": (
        changed(conv_weight=torch.ones(1, 1, 5, 5)),
        ValueError, "conv_weight", "[1, 1, 3, 3]", "[1, 1, 5, 5]",
    ),
    "dilated 3x3 alone": (
        changed(dilated_weight=torch.ones(3, 3)),
        ValueError, "dilated_weight", "[1, 1, 3, 3]", "[3, 3]",
    ),
    "merge of two": (
        changed(merge_weight=torch.ones(2)), ValueError, "merge_weight", "[1, 2, 1, 1]", "[2]"
    ),
    "spatial_bias without dimensions": (
        changed(spatial_bias=torch.ones(())), ValueError, "spatial_bias", "[1]", "[]"
    ),
    "gate for other channels": (
        changed(gate_weight=torch.ones(4)), ValueError, "gate_weight", "[5]", "[4]"
    ),
    "affine gate of one": (changed(gate_bias=one), ValueError, "gate_bias", "[5]", "[1]"),
    "scalar gate of five": (changed(gate="scalar"), ValueError, "gate_weight", "[1]", "[5]"),
    "even eca": (
        lambda call: changed(gate="eca", gate_weight=torch.ones(4))(without("gate_bias")(call)),
        ValueError, "gate_weight", "odd", "[4]",
    ),
    "empty eca": (
        lambda call: changed(gate="eca", gate_weight=torch.ones(0))(without("gate_bias")(call)),
        ValueError, "gate_weight", "odd", "[0]",
    ),
    "eca as Conv1d has it": (
        lambda call: changed(gate="eca", gate_weight=torch.ones(1, 1, 3))(
            without("gate_bias")(call)
        ),
        ValueError, "gate_weight", "[k]", "[1, 1, 3]",
    ),
    "eca with a bias": (changed(gate="eca"), ValueError, "gate_bias", "gate='eca'", "None"),
    "sigmoid with a weight": (
        changed(gate="sigmoid"), ValueError, "gate_weight", "gate='sigmoid'", "None"
    ),
    "channel order with a convolution": (
        changed(order="channel"), ValueError, "conv_weight", "order='channel'", "None"
    ),
    "channel order with a bias": (
        lambda call: changed(order="channel")(
            without("conv_weight", "dilated_weight", "merge_weight")(call)
        ),
        ValueError, "spatial_bias", "order='channel'", "None",
    ),
    "spatial order with a gate": (
        changed(order="spatial"), ValueError, "gate_weight", "order='spatial'", "None"
    ),
    "float64 parameter": (
        changed(gate_bias=five.double()), TypeError, "gate_bias", "float32", "float64"
    ),
    "half parameter of float32 x": (
        changed(gate_bias=five.half()), TypeError, "gate_bias", "float32", "float16"
    ),
    "float32 parameters of float64 x": (
        changed(x=x(2, 5, 6, 7, dtype=torch.float64)),
        TypeError, "conv_weight", "float64", "float32",
    ),
    "bfloat16 parameter of float16 x": (
        changed(x=x(2, 5, 6, 7, dtype=torch.float16), conv_weight=CONV.bfloat16()),
        TypeError, "conv_weight", "float16 like x or float32", "bfloat16",
    ),
    "two dtypes of parameters": (
        changed(x=x(2, 5, 6, 7, dtype=torch.float16), gate_bias=five.half()),
        TypeError, "gate_bias", "one dtype", "float32", "float16",
    ),
    "integer parameter": (
        changed(merge_weight=MERGE.int()), TypeError, "merge_weight", "float32", "int32"
    ),
    "another device": (
        changed(merge_weight=MERGE.to("meta")), ValueError, "merge_weight", "device cpu", "meta"
    ),
}  # fmt: skip
BAD = BAD_X | BAD_OPTIONS | BAD_PARAMETERS


def assert_refused(run, error, *words):
    with pytest.raises(error) as caught:
        run()
    assert type(caught.value) is error
    message = str(caught.value)
    assert message.startswith("da_attention: ")
    missing = [word for word in words if word not in message]
    assert not missing, message


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("change", "error", "words"), [(c, e, w) for c, e, *w in BAD.values()], ids=BAD
)
def test_bad_arguments(backend, nothing_computes, change, error, words, way):
    assert_refused(lambda: way(change(make()), backend), error, *words)


@pytest.mark.parametrize(
    ("change", "error", "words"), [(c, e, w) for c, e, *w in BAD_X.values()], ids=BAD_X
)
def test_bad_input_of_a_layer(backend, nothing_computes, change, error, words):
    layer = da_ops.DAModule(5, backend=backend)
    assert_refused(lambda: layer(change(make()).x), error, *words)


def test_layer_for_other_channels(backend, nothing_computes):
    layer = da_ops.DAModule(8, backend=backend)
    assert_refused(lambda: layer(x(2, 5, 6, 7)), ValueError, "gate_weight", "[5]", "[8]")


def test_layer_for_other_channels_of_fake_tensors(backend):
    with FakeTensorMode():
        layer = da_ops.DAModule(8, backend=backend)
        assert_refused(lambda: layer(x(2, 5, 6, 7)), ValueError, "gate_weight", "[5]", "[8]")


@pytest.mark.parametrize("fullgraph", [False, True])
def test_bad_arguments_in_a_compiled_graph(backend, fullgraph):
    """The words reach the user, whatever the compiler wraps them in."""
    torch._dynamo.reset()
    layer = da_ops.DAModule(8, backend=backend)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=fullgraph)
    with pytest.raises(Exception, match=r"da_attention: gate_weight must have shape \[5\]"):
        compiled(x(2, 5, 6, 7))


def test_no_grad_is_left_behind(backend):
    """A refused call changes no argument and leaves no graph."""
    call = make().leaves()
    before = call.x.detach().clone()
    with pytest.raises(TypeError):
        changed(gate_bias=five.double())(call)(backend=backend)
    assert torch.equal(call.x, before)
    assert call.x.grad is None


class TestBackends:
    def test_names_and_reasons(self):
        usable = da_ops.backends()
        assert list(usable) == ["cuda", "triton", "cpu", "eager"]
        assert usable["eager"] is None
        assert all(reason is None or len(reason) > 10 for reason in usable.values())

    @pytest.mark.parametrize("way", WAYS)
    @pytest.mark.parametrize("name", ["tpu", "", "CPU", None])
    def test_unknown(self, way, name):
        words = ("backend", "'auto'", *map(repr, NAMES), repr(name))
        assert_refused(lambda: way(make(), name), ValueError, *words)

    @pytest.mark.parametrize("way", WAYS)
    @pytest.mark.parametrize("name", NAMES)
    def test_unusable(self, monkeypatch, way, name):
        """Asked for by name, a backend that cannot serve is an error with its reason."""
        reason = "it has gone fishing"
        known = BACKENDS.get(name, BACKENDS["eager"])
        if unserved(name, "cpu") is None:
            way(make(), name)  # that it served is no reason to serve
        monkeypatch.setitem(BACKENDS, name, replace(known, reason=reason))
        assert da_ops.backends()[name] == reason
        assert_refused(lambda: way(make(), name), RuntimeError, repr(name), reason, "'auto'")

    def test_wrong_device(self, fused_cpu):
        call = make(device="meta")
        assert_refused(
            lambda: call(backend=fused_cpu), RuntimeError, "'cpu'", "does not serve", "'meta'"
        )

    def test_given_up(self, choice, monkeypatch, caplog, fused_cpu):
        """What turned out not to work is not chosen again, and that is said once."""
        monkeypatch.delenv("DA_OPS_BACKEND", raising=False)
        assert choice.select("auto", "cpu") == fused_cpu
        make()(backend=fused_cpu)  # that it served is no reason to serve
        reason = "it has gone fishing"
        for _ in range(2):
            choice.give_up(fused_cpu, reason)
        assert choice.select("auto", "cpu") == "eager"
        assert da_ops.backends()[fused_cpu] == reason
        assert_refused(lambda: make()(backend=fused_cpu), RuntimeError, repr(fused_cpu), reason)
        assert [r.levelname for r in caplog.records if reason in r.getMessage()] == ["WARNING"]
        choice.forget()
        assert choice.select("auto", "cpu") == fused_cpu

    def test_forgotten_while_it_is_chosen(self, choice, monkeypatch, fused_cpu):
        """As by another thread, for which a backend turned out not to work."""
        monkeypatch.delenv("DA_OPS_BACKEND", raising=False)
        monkeypatch.setattr(choice, "_broken", lambda *_: choice.forget())
        assert choice.select("auto", "cpu") == fused_cpu


WITHOUT_MEMORY = """
import resource, torch, da_ops
from da_ops.backends import BACKENDS
cpu = BACKENDS["cpu"]
x, maps, nothing = torch.ones(1, 1, 1, 2**26), torch.empty(0), (None,) * 6
norm = torch.nn.BatchNorm2d(1)
out = da_ops.residual_attention(x.detach().requires_grad_(), None, norm, None)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**27, used + 2**27))
for call in (
    lambda: cpu.forward(x, nothing, "channel", "sigmoid"),
    lambda: cpu.backward(x, x, nothing, maps, torch.ones(1, 1), "channel", "sigmoid"),
    lambda: da_ops.residual_attention(x, None, norm, None),
    lambda: out.backward(x),
):
    try:
        call()
    except torch.OutOfMemoryError as error:
        print(error)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs limits of a process")
def test_want_of_memory_is_pytorchs_error():
    """Not what the library knows of it, which is where it was compiled."""
    if da_ops.backends()["cpu"] is not None:
        pytest.skip(da_ops.backends()["cpu"])
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_MEMORY], cwd=ROOT, capture_output=True, text=True
    )
    told = "Out of memory. da_ops: there is none for the results of a call with "
    assert done.stdout.splitlines() == [f"{told}1x1x1x67108864 float32 on cpu"] * 4, done.stderr


def test_want_of_memory_on_a_gpu_is_told_in_the_words_that_others_look_for():
    x = SimpleNamespace(is_cuda=True, shape=(1, 2), dtype=torch.float16, device="cuda:0")
    name_want_of_memory(RuntimeError("an illegal memory access was encountered"), x)
    with pytest.raises(
        torch.OutOfMemoryError, match=r"^CUDA out of memory\. .* 1x2 float16 on cuda:0"
    ):
        name_want_of_memory(RuntimeError("aoti_torch_empty_strided( dim, ...) failed"), x)
