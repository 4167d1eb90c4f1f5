"""What a call will do, told before it is done: `explain` and the command line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import da_ops
from da_ops import cli
from da_ops.layout import dense
from da_ops.reference import GATES, ORDERS

from .cases import CASES, DTYPES, LAYOUTS

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("order", "gate"), CASES)
def test_explain(backend, device, order, gate, dtype, layout):
    x = torch.empty(4, 64, 28, 28, dtype=dtype, device=device)
    x = x.contiguous(memory_format=LAYOUTS[layout])
    answer = da_ops.explain(x, order=order, gate=gate, backend=backend).to_dict()
    assert answer["backend"] == backend
    assert answer["shape"] == [4, 64, 28, 28]
    assert answer["layout"] == layout
    assert answer["dtype"] == str(dtype).removeprefix("torch.")
    assert (answer["order"], answer["gate"]) == (order, gate)
    size = x.numel() * x.element_size()
    for direction, floor in (("forward", 2 * size), ("backward", 3 * size)):
        told = answer[direction]
        assert told["floor_bytes"] == floor
        assert told["bytes_moved"] >= floor
        assert told["percent_of_floor"] == pytest.approx(100 * floor / told["bytes_moved"])
        assert sum(p["writes"] for p in told["passes"]) >= 1
        reads_and_writes = sum(p["reads"] + p["writes"] for p in told["passes"])
        assert told["bytes_moved"] <= reads_and_writes * size
    json.dumps(answer)


def test_text(backend, device):
    """Names the backend, the shape and every pass."""
    answer = da_ops.explain(torch.empty(4, 64, 28, 28, device=device), backend=backend)
    text = str(answer)
    assert backend in text
    assert "4x64x28x28" in text
    for direction in ("forward", "backward"):
        assert all(p["name"] in text for p in answer.to_dict()[direction]["passes"])


def test_says_why_not_a_better_one():
    answer = da_ops.explain(torch.empty(1, 4, 5, 5)).to_dict()
    better = list(da_ops.backends())
    better = better[: better.index(answer["backend"])]
    assert list(answer["passed_over"]) == better
    assert all(answer["passed_over"].values())


def test_nothing_is_computed():
    """On memory that does not exist."""
    answer = da_ops.explain(torch.empty(1024, 2048, 112, 112, device="meta"), backend="eager")
    assert answer.to_dict()["forward"]["floor_bytes"] == 2 * 4 * 1024 * 2048 * 112 * 112


@pytest.mark.parametrize(
    ("x", "options"),
    [
        ([1.0], {}),
        (torch.empty(3), {}),
        (torch.empty(1, 2, 3, 4), {"order": "both"}),
        (torch.empty(1, 2, 3, 4), {"gate": "se"}),
        (torch.empty(1, 2, 3, 4), {"backend": "tpu"}),
        (torch.empty(1, 2, 3, 4), {"backend": ["cpu"]}),
        (torch.empty(1, 2, 3, 4), {"order": "none"}),
        (torch.empty(1, 2, 3, 4), {"device": torch.device("cuda")}),
        (torch.empty(1, 2, 3, 4), {"device": 90}),
        (torch.empty(1, 2, 3, 4), {"device": "sm_" + "9" * 30}),
        (torch.empty(1, 2, 3, 4), {"norm": "batch"}),
        (torch.empty(1, 2, 3, 4), {"layer": da_ops.DAModule(99)}),
        (torch.empty(1, 2, 3, 4), {"layer": da_ops.DAResidual(99)}),
    ],
)
def test_explain_refuses(x, options):
    with pytest.raises((TypeError, ValueError), match=r"^da_attention: "):
        da_ops.explain(x, **options)


@pytest.mark.parametrize("options", [{}, {"tail": "training"}, {"device": "sm_90"}])
@pytest.mark.parametrize(
    "x",
    [
        torch.empty(2, 0, 5, 7),
        torch.empty(2, 3, 0, 7),
        torch.empty(2, 3, 5, 0),
        torch.empty(2, 3, 5, 7, dtype=torch.int32),
        torch.empty(2, 3, 5, 7, dtype=torch.complex64),
        torch.zeros(2, 3, 5, 7).to_sparse(),
    ],
)
def test_explain_refuses_what_a_call_refuses(x, options):
    layer = da_ops.DAModule(3)
    with pytest.raises((TypeError, ValueError)) as of_call:
        layer(x)
    with pytest.raises(type(of_call.value)) as told:
        da_ops.explain(x, **options)
    assert str(told.value) == str(of_call.value)


@pytest.mark.parametrize("gate", ["scalar", "eca", "sigmoid"])
def test_a_layer_that_takes_any_channels_is_explained_for_any(gate):
    layer, x = da_ops.DAModule(99, gate=gate), torch.empty(1, 2, 3, 4)
    assert layer(x).shape == x.shape
    assert da_ops.explain(x, layer=layer).call.gate == gate


WHOLE = torch.empty(2, 8, 9, 10)
LAST = WHOLE.contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("x", "layout", "copied"),
    [
        (WHOLE[:, :, 1:], "contiguous", True),
        (WHOLE[..., ::2], "contiguous", True),
        (WHOLE[:, :6], "contiguous", True),
        (WHOLE[1:], "contiguous", False),
        (WHOLE.transpose(2, 3), "contiguous", True),
        (LAST[:, :6], "channels_last", True),
        (LAST[:, :, 1:], "channels_last", True),
        (LAST[1:], "channels_last", False),
    ],
)
def test_the_layout_is_that_of_what_the_kernels_read(x, layout, copied):
    """And the copy of a view that is in neither is told, and counted."""
    assert (dense(x) is not x) == copied
    y = da_ops.DAModule(x.shape[1])(x)
    assert y.is_contiguous(memory_format=LAYOUTS[layout])
    size = x.numel() * x.element_size()
    for options in ({}, {"tail": "training"}, {"backend": "eager"}, {"device": "sm_90"}):
        answer = da_ops.explain(x, **options)
        told, plain = answer.to_dict(), da_ops.explain(dense(x), **options).to_dict()
        assert told["layout"] == layout
        more = told["forward"]["bytes_moved"] - plain["forward"]["bytes_moved"]
        fused = options != {"tail": "training"} or told["tail"]["unfused"] is None
        assert more == (2 * size if copied and fused else 0)
        assert (f"copy to {layout}" in str(answer)) == (copied and fused)
        assert told["backward"] == plain["backward"]
    layer = da_ops.DAModule(x.shape[1])
    layer.conv.register_forward_hook(print)  # in plain operations, which need no copy
    assert "copy" not in str(da_ops.explain(x, layer=layer))


def test_cpu_directions_store_alike(monkeypatch):
    """Both write past the cache or neither, since each is given memory that the other wrote."""
    if da_ops.backends()["cpu"] is not None:
        pytest.skip("no CPU kernels here")
    limit = torch.empty(2, 8, 4, 32).nbytes
    monkeypatch.setenv("DA_OPS_CPU_PLAN", f"cache={4 * limit}")
    for columns, past in ((16, False), (32, False), (33, True)):
        x = torch.empty(2, 8, 4, columns)
        assert da_ops.explain(x, backend="cpu").plan.details["stream"] is past


def run(capsys, *arguments):
    """The status, what was printed and what was complained of."""
    try:
        status = cli.main(list(arguments))
    except SystemExit as exit:
        status = exit.code
    return status, *capsys.readouterr()


class TestCommandLine:
    def test_info(self, capsys):
        status, text, _ = run(capsys, "info")
        assert status == 0
        assert da_ops.__version__ in text
        assert torch.__version__ in text
        for name, reason in da_ops.backends().items():
            assert name in text
            assert reason is None or reason in text

    def test_info_for_programs(self, capsys):
        status, text, _ = run(capsys, "info", "--json")
        assert status == 0
        assert json.loads(text)["backends"] == da_ops.backends()

    @pytest.mark.parametrize("order", ORDERS)
    @pytest.mark.parametrize("gate", GATES)
    def test_explain(self, capsys, order, gate):
        shape = ("explain", "4x64x28x28", "--order", order, "--gate", gate)
        options = ("--layout", "channels_last", "--dtype", "bfloat16")
        status, text, _ = run(capsys, *shape, *options)
        assert status == 0
        x = torch.empty(4, 64, 28, 28, dtype=torch.bfloat16)
        x = x.contiguous(memory_format=torch.channels_last)
        answer = da_ops.explain(x, order=order, gate=gate)
        assert text.strip() == str(answer).strip()
        status, text, _ = run(capsys, *shape, *options, "--json")
        assert json.loads(text) == answer.to_dict()

    @pytest.mark.parametrize(
        "arguments",
        [
            (),
            ("inform",),
            ("explain",),
            ("explain", "64x28x28"),
            ("explain", "4x0x28x28"),
            ("explain", "4x64x28xa"),
            ("explain", "4x64x28x28", "--order", "both"),
            ("explain", "4x64x28x28", "--dtype", "int8"),
            ("explain", "4x64x28x28", "--backend", "tpu"),
            ("explain", "4x64x28x28", "--device", "abacus"),
        ],
    )
    def test_bad_arguments(self, capsys, arguments):
        """A line that says what is wrong, and a status that says that something is."""
        status, text, complaint = run(capsys, *arguments)
        assert status not in (0, None)
        assert not text
        assert complaint.strip()

    @pytest.mark.parametrize(
        ("arguments", "told"),
        [
            ("1x2x3x4 --device abacus", "got 'abacus': "),
            ("1x2x3x4 --device xpu", "got 'xpu': "),
            ("1x2x3x4 --device mps", "got 'mps': "),
            ("1x2x3x4 --device sm_123456789012345678901234567890", "from 'sm_75' on"),
            ("1x2x3x4 --order none", "order='none' goes with a tail"),
            ("99999999999999999999x1x1x1", "of at most 281474976710656 elements, got '9999"),
        ],
    )
    def test_what_torch_cannot_make_is_told_in_a_line(self, capsys, monkeypatch, arguments, told):
        def refused(*sizes, device, **options):
            if device in ("xpu", "mps"):  # as a torch without it says it
                error = NotImplementedError if device == "mps" else AssertionError
                raise error("Could not run\n" + 50 * "its table of kernels\n")
            return empty(*sizes, device=device, **options)

        empty = torch.empty
        monkeypatch.setattr(torch, "empty", refused)
        status, text, complaint = run(capsys, "explain", *arguments.split())
        assert status in (1, 2) and not text
        *usage, line = complaint.splitlines()
        assert told in line and line.startswith("da-ops")
        assert not usage or usage[0].startswith("usage: ")

    def test_runs_as_a_module(self):
        done = subprocess.run(
            [sys.executable, "-m", "da_ops", "--version"],
            cwd=ROOT, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0
        assert done.stdout.strip() == da_ops.__version__
