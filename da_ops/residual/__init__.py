"""The residual tail: batch norm, attention, shortcut and ReLU as one operator."""
