"""Benchmarks of the fused layer against what PyTorch offers, on the user's own machine.

`python -m benchmarks.op`        one layer, and the tail of a residual block: time, memory and
                                 correctness, over shapes and layouts
`python -m benchmarks.network`   training steps and inference of a ResNet-50 on photographs
`python -m benchmarks.gpu`       on a machine with a GPU: build, test and measure in one go
`python -m benchmarks.report`    tables, charts, README.md's and docs/benchmarks.md's blocks, from
                                 results files alone
"""

import os

# Benchmarks measure the library as it comes, without plans that somebody tuned.
os.environ["DA_OPS_CACHE"] = os.devnull
