"""The operator's parameters as one value."""

# Annotations are no strings here: TorchScript reads them.

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

# The six parameters in the order of Parameters, without names. They travel so where every call
# passes, since making a named tuple takes a percent of a small call.
_P = Tensor | None
Unnamed = tuple[_P, _P, _P, _P, _P, _P]
Gradients = tuple[Tensor | None, ...]


class Parameters(NamedTuple):
    """The six parameters, in the order of the registered operators.

    None stands where the order or the gate has no such parameter; shapes and dtypes are those of
    :func:`da_ops.da_attention`.
    """

    conv_weight: Tensor | None
    dilated_weight: Tensor | None
    merge_weight: Tensor | None
    spatial_bias: Tensor | None
    gate_weight: Tensor | None
    gate_bias: Tensor | None

    def each(self, function: Callable[[Any], Any]) -> "Parameters":
        """``function`` of each parameter, None where there is none."""
        return Parameters(*[None if p is None else function(p) for p in self])


# Their part of an operator's schema.
SCHEMA = ", ".join(f"Tensor? {name}" for name in Parameters._fields)
