"""
What `accelerate launch` starts on each rank: `accelerate launch ... -m tests.engines.launched ENGINE FOLDER CASE...`.
"""

from __future__ import annotations

import os
import pickle
import sys
from pathlib import Path

from tests.engines.runs import run_cases

if __name__ == "__main__":
    engine, folder, *names = sys.argv[1:]
    outcomes = run_cases(engine, names, str(Path(folder) / "runs"), launched=True)
    (Path(folder) / f"rank{os.environ['RANK']}.pickle").write_bytes(pickle.dumps(outcomes))
