"""Parameters and multiply-accumulates of networks, and the paper's Tables II and III."""

from .counter import Cost, count
from .tables import Row, render, rows

__all__ = ["Cost", "Row", "count", "render", "rows"]
