"""Weights of torchvision, timm or this library for a network with attention."""

from __future__ import annotations

import argparse
import logging
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torchvision.models import WeightsEnum, get_model_weights

Weights: TypeAlias = WeightsEnum | Mapping[str, Tensor] | str | os.PathLike[str] | None

logger = logging.getLogger("da_ops")

_ADDED = ("attention", "transformer")  # what keys are called of that torchvision's lack
_WRAPPERS = ("state_dict", "model")  # keys under which training scripts keep a state dict
_COMPILED = re.compile(r"(?<![^.])_orig_mod\.")  # torch.compile's prefix, anywhere in a key
_PARALLEL = "module."  # DistributedDataParallel's and averaged models' prefix of each key
_COUNTER = "n_averaged"  # a key of averaged models
_TEXT = re.compile(rb"[\t\n\r\x20-\x7e\x80-\xff]+")  # without control characters
# Types of mere data that training scripts keep beside the weights. Other versions of Python have
# other names for paths; a path of another system is read as a pure one.
_HARMLESS: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
    argparse.Namespace,
    *((PurePosixPath, f"pathlib{part}.PosixPath") for part in ("", "._local")),
    *((PureWindowsPath, f"pathlib{part}.WindowsPath") for part in ("", "._local")),
]


def load_weights(model: nn.Module, weights: Weights, name: str, *, head: bool = True) -> None:
    """Load ``weights`` into ``model``, torchvision's network ``name`` with or without attention.

    Accepts what :func:`da_ops.models.resnet50` does, and changes nothing unless all of it fits.
    Without ``head``, ``fc`` stays as it is, whatever the weights have there.

    Raises:
        ValueError: something other than all parameters of the attention, or all of the
            transformer, is missing, superfluous or of another shape.
        FileNotFoundError: ``weights`` is neither a name of torchvision's nor a file.
    """
    state, source = _state_dict(weights, name)
    own = dict(model.state_dict())
    if not head:
        for key in ("fc.weight", "fc.bias"):
            state.pop(key, None)
            own.pop(key, None)
    # Counters of batches came to batch norms late; PyTorch loads checkpoints without them.
    required = {key for key in own if not key.endswith(".num_batches_tracked")}
    missing = required - state.keys()
    added = {part: {key for key in own if f".{part}." in key} for part in _ADDED}
    fresh = {part: keys for part, keys in added.items() if keys and keys <= missing}
    differ = [
        f"{key} is {list(state[key].shape)} and should be {list(tensor.shape)}"
        for key, tensor in own.items()
        if key in state and state[key].shape != tensor.shape
    ]
    problems = {
        "missing": [key for key in own if key in missing.difference(*fresh.values())],
        "unexpected": [key for key in state if key not in own],
        "of another shape": differ,
    }
    if any(problems.values()):
        told = "; ".join(f"{what}: {_some(keys)}" for what, keys in problems.items() if keys)
        raise ValueError(f"{name}: {source} does not fit, {told}{_advice(problems, state)}")
    model.load_state_dict(state, strict=False)
    for part, keys in fresh.items():
        logger.warning(
            "da_ops: %s: %s has no %s, its %d parameters keep their initial values",
            name,
            source,
            part,
            len(keys),
        )


def _state_dict(weights: Weights, name: str) -> tuple[dict[str, Tensor], str]:
    """The state dict, without wrapper and prefix, and where it is from."""
    known = get_model_weights(name)
    if isinstance(weights, WeightsEnum):
        if not isinstance(weights, known):
            raise ValueError(f"{name}: weights must be one of {known.__name__}, got {weights}")
        return dict(weights.get_state_dict(progress=True, check_hash=True)), str(weights)
    if isinstance(weights, Mapping):
        return _unwrapped(weights, f"{name}: weights"), "the given state dict"
    if not isinstance(weights, (str, os.PathLike)):
        raise TypeError(
            f"{name}: weights must be None, one of {known.__name__}, a path or a state dict, got "
            f"{type(weights).__name__}"
        )
    member = str(weights).removeprefix(f"{known.__name__}.")
    if member in known.__members__:
        return _state_dict(known[member], name)
    path = Path(weights)
    if not path.is_file():
        raise FileNotFoundError(
            f"{name}: weights must be one of {', '.join(known.__members__)} or a file, got "
            f"{os.fspath(weights)!r}, which is neither"
        )
    return _unwrapped(read(path), str(path)), str(path)


def read(path: Path, *, mmap: bool = False) -> Any:
    """The contents of a file of torch.save or safetensors, on the CPU: tensors and plain
    data, which may be in an ``argparse.Namespace``; nothing in the file is run.

    Args:
        mmap: leave tensors on the disk until they are looked at.

    Raises:
        ValueError: it is no such file, or holds more than that.
        OSError: it cannot be opened.
    """
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        with torch.serialization.safe_globals(_HARMLESS):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except OSError:
        raise
    except Exception as error:  # of many kinds, none of which names the file
        raise ValueError(
            f"{path}: expected a checkpoint, got a file that cannot be read as one:"
            f" {_why(error, path)}"
        ) from error


def _why(error: Exception, path: Path) -> str:
    text = str(error)
    if found := re.search(r"GLOBAL (\S+)", text):
        return (
            f"it holds a {found[1]}, and reading that could run code. If you trust the file, load"
            " it with torch.load(..., weights_only=False) and save its state dict by itself"
        )
    with path.open("rb") as file:
        start = file.read(256)
    if not start:
        return "it is empty; write or download it again"
    if start.startswith(b"version https://git-lfs"):
        return "it is Git LFS's pointer to the file; fetch that with `git lfs pull`"
    if _TEXT.fullmatch(start):
        return "it is text, perhaps a web page instead of a download; look into it"
    if "weights_only" in text:  # PyTorch's advice would run whatever the file holds
        return "its bytes are not what torch.save writes of tensors and plain data"
    return text.partition("\n")[0] or type(error).__name__


def _unwrapped(checkpoint: Any, source: str) -> dict[str, Tensor]:
    for wrapper in _WRAPPERS:
        if isinstance(checkpoint, Mapping) and isinstance(checkpoint.get(wrapper), Mapping):
            checkpoint = checkpoint[wrapper]
    if not isinstance(checkpoint, Mapping) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in checkpoint.items()
    ):
        raise ValueError(
            f"{source}: expected a state dict of tensors, or one under 'state_dict' or 'model', "
            f"got {_kind(checkpoint)}"
        )
    return unprefixed(checkpoint, source)


def unprefixed(state: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """The state dict without the prefixes of torch.compile, DistributedDataParallel and torch's
    averaging of weights, in whatever order they wrapped the module; logs what it takes off."""
    plain = {_COMPILED.sub("", key): value for key, value in state.items()}
    taken = [] if plain.keys() == state.keys() else ["_orig_mod."]
    counted = {key: value for key, value in plain.items() if key != _COUNTER}
    while counted and all(key.startswith(_PARALLEL) for key in counted):
        plain = counted = {key.removeprefix(_PARALLEL): value for key, value in counted.items()}
        taken.append(_PARALLEL)
    if taken:
        told = " and ".join(map(repr, dict.fromkeys(taken)))  # each once
        logger.info("da_ops: %s: %s taken off the keys", source, told)
    return plain


def _kind(checkpoint: Any) -> str:
    if isinstance(checkpoint, Mapping):
        return f"a mapping of {_some([str(key) for key in checkpoint])}"
    return f"a {type(checkpoint).__name__}"


def _advice(problems: Mapping[str, list[str]], state: Mapping[str, Tensor]) -> str:
    if any(key.startswith("fc.weight ") for key in problems["of another shape"]):
        classes = len(state["fc.weight"])
        return f"; for another head, load with num_classes={classes} and replace fc afterwards"
    return ""


def _some(keys: list[str], most: int = 6) -> str:
    rest = len(keys) - most
    return ", ".join(keys[:most]) + (f" and {rest} more" if rest > 0 else "")
