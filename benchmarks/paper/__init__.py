"""The paper's experiments in miniature, on generated data.

`python -m benchmarks.paper.ablation`   Tables I, II and III: orders of DA's halves, and its rivals
`python -m benchmarks.paper.demo`       from nothing to a picture of what two small detectors find
"""
