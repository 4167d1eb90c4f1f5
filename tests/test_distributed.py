"""The layer under PyTorch's ways of sharing a network among processes."""

from __future__ import annotations

import os
import pickle
import traceback
import warnings
from collections import defaultdict
from datetime import timedelta
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import size_based_auto_wrap_policy
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Replicate,
    Shard,
    distribute_module,
    distribute_tensor,
)
from torch.nn.parallel import DistributedDataParallel
from torchvision.models.resnet import BasicBlock

from da_ops import DAModule
from da_ops.models import insert_attention, unfused_blocks

from .conftest import need
from .test_module import randomised

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("distributed")]

SIZE = 2  # processes


def layer(backend="auto", **options):
    torch.manual_seed(7)
    return randomised(DAModule(6, backend=backend, **options))


def batch():
    """x and dy of an odd number of images, so that the processes have different numbers."""
    generator = torch.Generator().manual_seed(8)
    return torch.randn(2, 5, 6, 9, 8, generator=generator)


def share(t, rank):
    return t[:3] if rank == 0 else t[3:]


def whole(t):
    return (t.full_tensor() if isinstance(t, DTensor) else t).detach().numpy()


def alone(**options):
    """Output and gradients of one process with the whole batch."""
    net = layer(**options)
    x, dy = batch()
    x.requires_grad_()
    y = net(x)
    y.backward(dy)
    return {"y": y.detach(), "x": x.grad, **{k: p.grad for k, p in net.named_parameters()}}


def distributed_tensor(rank, mesh, backend, order, memory_format, placement):
    net = distribute_module(layer(backend=backend, order=order, bias=True), mesh)
    x, dy = (t.contiguous(memory_format=memory_format) for t in batch())
    x = distribute_tensor(x, mesh, [placement]).requires_grad_()
    y = net(x)
    assert isinstance(y, DTensor) and y.stride() == x.stride()
    assert y.placements == (placement if placement == Shard(0) else Replicate(),)
    y.backward(distribute_tensor(dy, mesh, [Shard(0)]))
    for p in net.parameters():
        assert p.grad.placements in ((Replicate(),), (Partial(),))
    gradients = {name: whole(p.grad) for name, p in net.named_parameters()}
    return {"y": whole(y), "x": whole(x.grad), **gradients}


def mixed_tensors(rank, mesh):
    x = distribute_tensor(batch()[0], mesh, [Shard(0)])
    with pytest.raises(TypeError) as error:
        layer()(x)
    return str(error.value)


def step(rank, net, model):
    """Gradients after a step over this process's share of the batch."""
    x, dy = (share(t, rank) for t in batch())
    model(x).backward(SIZE * dy)  # the processes' gradients are averaged, those of `alone` added
    return {name: whole(p.grad) for name, p in net.named_parameters()}


def fully_sharded(rank, mesh, each_convolution):
    net = layer()
    for module in list(net.modules()):
        if each_convolution and isinstance(module, nn.Conv2d):
            fully_shard(module, mesh=mesh)
    fully_shard(net, mesh=mesh)
    return step(rank, net, net)


def sharded_by_size(rank, mesh, least, originals):
    """FSDP's first version, with each module of so many parameters wrapped for itself."""
    policy = partial(size_based_auto_wrap_policy, min_num_params=least)
    model = FullyShardedDataParallel(
        layer(), auto_wrap_policy=policy, device_id=torch.device("cpu"), use_orig_params=originals
    )
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(2):
        x, dy = (share(t, rank) for t in batch())
        optimizer.zero_grad()
        model(x).backward(SIZE * dy)
        optimizer.step()
    with FullyShardedDataParallel.summon_full_params(model):
        return {
            name.replace("_fsdp_wrapped_module.", ""): whole(p.clone())
            for name, p in model.named_parameters()
        }


def data_parallel(rank, mesh, backend, memory_format, as_view):
    net = layer(backend=backend, bias=True).to(memory_format=memory_format)
    model = DistributedDataParallel(net, gradient_as_bucket_view=as_view)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # what it says of strides is a warning
        gradients = step(rank, net, model)
    for name, p in net.named_parameters():
        assert p.grad.stride() == p.stride(), name
    return gradients


def fused_network(rank, mesh, how, fused):
    """Gradients and statistics after two steps of a network, each process's own."""
    torch.manual_seed(9)
    stem = nn.Conv2d(6, 8, 3, padding=1)
    net = nn.Sequential(stem, BasicBlock(8, 8), BasicBlock(8, 8))
    for p in insert_attention(net, fused=fused).parameters():
        p.data.add_(torch.rand_like(p), alpha=0.1)
    assert unfused_blocks(net) == {} or not fused
    if how == "fully_shard":
        for module in (net[1], net[2], net):
            fully_shard(module, mesh=mesh)
        model = net
    else:
        model = DistributedDataParallel(net, broadcast_buffers=how == "broadcast")
    x, _ = (share(t, rank) for t in batch())
    optimizer = torch.optim.SGD(net.parameters(), 0.01)
    for _ in range(2):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    gradients = {name: whole(p.grad) for name, p in net.named_parameters()}
    return {**gradients, **{name: whole(b) for name, b in net.named_buffers()}}


BACKENDS = ("cpu", "eager")
NETWORKS = ("broadcast", "own buffers", "fully_shard")
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
TENSORS = [
    ("spatial_channel", "contiguous", Shard(0)),
    ("parallel", "channels_last", Shard(0)),
    ("spatial", "channels_last", Shard(1)),  # no process has a whole image: they are gathered
    ("channel", "contiguous", Replicate()),
]
# All that the two processes do, by name: starting them takes longer than that.
WORK = {
    "mixed": (mixed_tensors,),
    **{
        f"tensor {backend} {i}": (distributed_tensor, backend, order, FORMATS[layout], placement)
        for backend in BACKENDS
        for i, (order, layout, placement) in enumerate(TENSORS)
    },
    **{f"fully_shard {each}": (fully_sharded, each) for each in (False, True)},
    **{
        f"fsdp {least} {originals}": (sharded_by_size, least, originals)
        for least in (1, 9, 1000)
        for originals in (False, True)
    },
    **{
        f"ddp {backend} {layout} {as_view}": (data_parallel, backend, memory_format, as_view)
        for backend in BACKENDS
        for layout, memory_format in FORMATS.items()
        for as_view in (False, True)
    },
    **{
        f"network {how} {fused}": (fused_network, how, fused)
        for how in NETWORKS
        for fused in (False, True)
    },
}


def worker(rank, store, queue):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=store, rank=rank, world_size=SIZE, timeout=timedelta(seconds=60)
    )
    mesh = init_device_mesh("cpu", (SIZE,))
    for name, (function, *arguments) in WORK.items():
        try:
            answer = function(rank, mesh, *arguments)
        except Exception:
            answer = traceback.format_exc()
        queue.put((name, rank, answer))
        dist.barrier()
    dist.destroy_process_group()
    # Gloo's threads may outlive the group, and abort a Python that tidies up meanwhile. The answers
    # are in the pipe.
    os._exit(0)


def work_of_two(folder):
    """What each function of WORK returns in each process, into a file."""
    queue = torch.multiprocessing.get_context("spawn").SimpleQueue()
    processes = torch.multiprocessing.start_processes(
        worker, (f"file://{folder}/store", queue), nprocs=SIZE, join=False, start_method="spawn"
    )
    found, done = defaultdict(dict), False
    while not done:
        done = processes.join(timeout=0.1)  # raises where a process died
        while not queue.empty():
            name, rank, answer = queue.get()
            found[name][rank] = answer
    (folder / "answers").write_bytes(pickle.dumps(found))


@pytest.fixture(scope="module")
def answers(once):
    """answers[name][rank]: what a function of WORK returned in each process."""
    return pickle.loads((once("distributed", work_of_two) / "answers").read_bytes())


def assert_as_alone(answers, want):
    """Every process has what one process with the whole batch has."""
    assert sorted(answers) == list(range(SIZE))
    for answer in answers.values():
        assert isinstance(answer, dict), answer
        assert {"conv.weight", "gate_weight"} & answer.keys()
        for name, got in answer.items():
            torch.testing.assert_close(torch.from_numpy(got), want[name], msg=name)


@pytest.mark.parametrize("i", range(len(TENSORS)))
@pytest.mark.parametrize("backend", BACKENDS)
def test_distributed_tensor(answers, backend, i):
    need(backend)
    assert_as_alone(answers[f"tensor {backend} {i}"], alone(order=TENSORS[i][0], bias=True))


def test_distributed_x_wants_distributed_parameters(answers):
    for message in answers["mixed"].values():
        assert "all parameters must be DTensors where x is one, got a Parameter" in message


@pytest.mark.parametrize("each_convolution", [False, True])
def test_fully_shard(answers, each_convolution):
    assert_as_alone(answers[f"fully_shard {each_convolution}"], alone())


@pytest.mark.parametrize("originals", [False, True])
@pytest.mark.parametrize("least", [1, 9, 1000])
def test_fully_sharded_data_parallel(answers, least, originals):
    net = layer()
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    x, dy = batch()
    for _ in range(2):
        optimizer.zero_grad()
        net(x).backward(dy)
        optimizer.step()
    want = {name: p.detach() for name, p in net.named_parameters()}
    got = answers[f"fsdp {least} {originals}"]
    if least != 9:  # parameters are flattened: what was wrapped is one vector
        assert all(isinstance(one, dict) for one in got.values()), got
        flat = [
            torch.cat([torch.from_numpy(t).flatten() for t in one.values()]) for one in got.values()
        ]
        wanted = torch.cat([t.flatten() for t in want.values()])
        for one in flat:
            torch.testing.assert_close(one.sort().values, wanted.sort().values)
        return
    assert_as_alone(got, want)


@pytest.mark.parametrize("as_view", [False, True])
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_distributed_data_parallel(answers, backend, layout, as_view):
    """Gradients have their parameters' strides, and no warning says otherwise."""
    need(backend)
    assert_as_alone(answers[f"ddp {backend} {layout} {as_view}"], alone(bias=True))


@pytest.mark.parametrize("how", NETWORKS)
def test_a_network_with_fused_blocks(fused_cpu, answers, how):
    """Each process has what it has where the blocks are not fused."""
    fused, plain = (answers[f"network {how} {fused}"] for fused in (True, False))
    for rank in range(SIZE):
        assert isinstance(fused[rank], dict), fused[rank]
        assert fused[rank].keys() == plain[rank].keys()
        for name, want in plain[rank].items():
            torch.testing.assert_close(
                torch.from_numpy(fused[rank][name]), torch.from_numpy(want), msg=name
            )
