"""All that is to be done on a machine with a GPU, in one go and in minutes: build, test, measure.

    python -m benchmarks.gpu [--budget SECONDS] [--preset quick|full] [--out FOLDER] [--only PART]

Parts, in this order: build (and first calls of the CUDA kernels, under every plan), cuda and
onchip (the tests of the CUDA backend as it comes, and with DA_OPS_PLAN=onchip), gpu
(tests/test_gpu.py), sanitize (compute-sanitizer), op (the operator's benchmark), triton (the tests
of that backend), network (the other benchmark). Each part gets its share of the time that is left.
One that fails or takes too long stops no other, and what it did until then counts: its status is
then "cut".

The results, benchmarks/results/DEVICE.json with a chart, or only FOLDER with --only or --out, say
what passed in each part. They are written anew every few seconds, so that a run that is stopped
leaves what it had; also, with the logs, to the folder that the variable OUT names, if it is set.
"""
