"""`examples/scale_out/launch.sh` with the real vLLM for CPUs: `make test-vllm`."""

from __future__ import annotations

import os
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.engines._vllm_runs import REAL_URL, note, tiny_model
from tests.engines.test_scale_out import UPDATES, furnish, said, started
from tests.helpers.vllm_real import ENVIRONMENT

pytestmark = pytest.mark.skipif(REAL_URL not in os.environ, reason="needs vLLM for CPUs: run `make test-vllm`")

#: for a CPU; of two values of an option the second counts
OPTIONS = (
    "--host 127.0.0.1 --dtype float32 --max-model-len 256 --enforce-eager --gpu-memory-utilization 0.1 "
    '--weight-transfer-config {"backend":"gloo"}'
)


def test_the_launch_file_starts_a_vllm_that_follows_the_weights_and_ends_with_them(tmp_path: Path) -> None:
    place = furnish(tmp_path, {"hf-effi": f'exec {shlex.quote(sys.executable)} -m hf_effi "$@"'})
    with started(place, "real", "fsdp2", SERVER_OPTIONS=OPTIONS, **ENVIRONMENT) as process:
        assert process.wait(1200) == 0, said(place, "real")[-6000:]
    differences = re.findall(r"'sampling/sampling_logp_difference/max': '([^']+)'", said(place, "real"))
    assert len(differences) == UPDATES and max(map(float, differences)) < 1e-4
    weights, start = load_file(place / "real" / "model.safetensors"), tiny_model().state_dict()
    assert not [name for name, weight in weights.items() if torch.equal(weight, start[name])]
    note(what="launch.sh, FSDP2, 2 processes: |log p(vLLM) - log p(transformers)|", each_update=differences)
