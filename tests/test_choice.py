"""Which backend "auto" takes, what it says of that, and what the environment chooses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import da_ops
from da_ops.backends import unserved

ROOT = Path(__file__).resolve().parents[1]

# Says which backend "auto" takes for two calls, and what it logged.
CHOOSE = """
import json, logging, torch
logs = []
handler = logging.Handler()
handler.emit = lambda record: logs.append((record.levelname, record.getMessage()))
logging.getLogger("da_ops").addHandler(handler)
logging.getLogger("da_ops").setLevel(logging.DEBUG)
import da_ops
from da_ops.backends import select
layer, error = da_ops.DAModule(4), None
try:
    for _ in range(2):
        layer(torch.ones(1, 4, 3, 3))
        da_ops.DAModule(4)(torch.ones(1, 4, 3, 3))
    chosen = select("auto", "cpu")
    layer(torch.ones(1, 4, 3, 3, device="cpu"))
except Exception as caught:
    chosen, error = None, [type(caught).__name__, str(caught)]
print(json.dumps({"chosen": chosen, "logs": logs, "error": error}))
"""


def choose(wish):
    environment = {k: v for k, v in os.environ.items() if k != "DA_OPS_BACKEND"}
    if wish is not None:
        environment["DA_OPS_BACKEND"] = wish
    done = subprocess.run(
        [sys.executable, "-c", CHOOSE],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    return json.loads(done.stdout)


class TestAuto:
    @pytest.mark.parametrize("wish", [None, "auto", ""])
    def test_takes_the_best_usable(self, wish):
        answer = choose(wish)
        usable = [name for name in ("cpu", "eager") if da_ops.backends()[name] is None]
        assert answer["chosen"] == usable[0]
        [(level, message)] = answer["logs"]  # once
        assert level == "INFO"
        assert repr(usable[0]) in message
        assert "not 'cuda': " in message  # and why not the better ones

    @pytest.mark.parametrize("wish", ["eager", "cpu"])
    def test_obeys_the_environment(self, wish):
        if da_ops.backends()[wish] is not None:
            pytest.skip(da_ops.backends()[wish])
        answer = choose(wish)
        assert answer["chosen"] == wish
        [(level, message)] = answer["logs"]
        assert level == "INFO"
        assert repr(wish) in message
        assert "DA_OPS_BACKEND" in message

    def test_environment_with_an_unknown_name(self):
        error, message = choose("tpu")["error"]
        assert error == "ValueError"
        assert message.startswith("da_attention: ")
        assert "'tpu'" in message
        assert "DA_OPS_BACKEND" in message  # nobody wrote backend="tpu"

    def test_environment_with_an_unusable_name(self):
        unusable = [name for name, reason in da_ops.backends().items() if reason is not None]
        if not unusable:
            pytest.skip("every backend is usable here")
        error, message = choose(unusable[0])["error"]
        assert error == "RuntimeError"
        assert message.startswith("da_attention: ")
        assert unserved(unusable[0], "cpu") in message
        assert "DA_OPS_BACKEND" in message
