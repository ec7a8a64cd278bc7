"""
A training script of a user, unchanged, on CPUs: `accelerate launch ... -m tests.engines.on_cpu ENGINE SCRIPT ...`.

Replaced is what `tests/helpers/cpu_engines.py` and `tests/helpers/vllm_gloo.py` name, and nothing else.
"""

from __future__ import annotations

import runpy
import sys

from tests.helpers.cpu_engines import run_on_cpu
from tests.helpers.vllm_gloo import trl_client_on_cpu

if __name__ == "__main__":
    engine, *sys.argv = sys.argv[1:]
    run_on_cpu(engine)
    with trl_client_on_cpu():
        runpy.run_path(sys.argv[0], run_name="__main__")
