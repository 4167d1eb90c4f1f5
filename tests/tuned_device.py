"""A device with planted plans, for `da_ops.tuning.supervise`: its times are numbers of a table."""

from __future__ import annotations

import itertools
import os
import signal
import sys
import time

from da_ops.tuning.trial import read_job, say, serve

# Seconds in turn, by plan: the default's vary by a tenth.
TIMES = {
    "": (1.0, 1.1, 0.9),
    "fast": (0.5, 0.55, 0.45),
    "faster, now and then": (0.2, 1.5, 1.4),
    "slow": (2.0,),
    "as fast": (0.99, 1.09, 0.89),
}


class Device:
    """Plans named after what they do."""

    def __init__(self) -> None:
        self.turns = {plan: itertools.cycle(times) for plan, times in TIMES.items()}

    def check(self, plan, beat):
        if plan == "wrong":
            return "y is off"
        if plan == "does not launch":
            raise RuntimeError("no such launch\nand a long story")
        self.misbehave(plan)
        return None

    def sample(self, plan):
        self.misbehave(plan.removesuffix(" when timed"))
        return next(self.turns.get(plan, itertools.cycle(TIMES[""])))

    def misbehave(self, plan):
        if plan == "hangs":
            time.sleep(600)
        if plan == "crashes":
            os.kill(os.getpid(), signal.SIGKILL)
        if plan == "complains":
            sys.exit("the device is gone")


if __name__ == "__main__":
    job = read_job()
    print("a library's own words", flush=True)
    say()
    serve(Device(), job, say)
