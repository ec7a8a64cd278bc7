"""
A training script of a user, unchanged, on CPUs: `accelerate launch ... -m tests.engines.on_cpu ENGINE SCRIPT ...`.

Replaced is what `tests/helpers/cpu_engines.py` and `tests/helpers/vllm_gloo.py` name, and nothing else. Ends with a
line that tells how the script was distributed.
"""

from __future__ import annotations

import json
import os
import runpy
import sys

import torch
from accelerate.state import AcceleratorState

from tests.helpers.cpu_engines import run_on_cpu
from tests.helpers.vllm_gloo import trl_client_on_cpu

if __name__ == "__main__":
    engine, *sys.argv = sys.argv[1:]
    run_on_cpu(engine)
    with trl_client_on_cpu():
        runpy.run_path(sys.argv[0], run_name="__main__")
    state = AcceleratorState()
    if state.is_main_process:
        stage = state.deepspeed_plugin.zero_stage if state.deepspeed_plugin else None
        here = int(os.environ["LOCAL_WORLD_SIZE"])
        print(json.dumps({"kind": state.distributed_type.value, "zero_stage": stage, "processes_here": here}))
    if torch.distributed.is_initialized():
        # Leave together: a rank whose peer closes the connection first can abort in its own tear-down.
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
