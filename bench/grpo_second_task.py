"""The second task of `bench.grpo_selection`, on which nothing was tuned: `python -m bench.grpo_second_task`.

The same as `python -m bench.grpo_selection --task second`, which writes `bench/results/grpo_second_task.json`.
"""

from __future__ import annotations

import sys

from bench.grpo_selection import main

if __name__ == "__main__":
    main(["--task", "second", *sys.argv[1:]])
