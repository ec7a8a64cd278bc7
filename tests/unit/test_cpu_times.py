"""What `HF_EFFI_CPU_TIMES` writes counts children too, those that are still alive among them."""

from __future__ import annotations

import subprocess
import sys

from tests.helpers.cpu_times import descendants_seconds


def test_a_child_counts_while_it_lives_and_after_it():
    before = descendants_seconds()
    code = "import time\nwhile time.process_time() < 0.3: pass\nprint('done', flush=True)\ninput()"
    child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert child.stdout.readline().strip() == b"done"
    alive = descendants_seconds() - before
    child.communicate(b"\n")
    after = descendants_seconds() - before
    assert alive >= 0.25 and after >= 0.25


def test_a_process_without_children_has_none():
    code = (
        "import sys, time\nsys.path.insert(0, sys.argv[1])\nfrom tests.helpers.cpu_times import descendants_seconds\n"
        "while time.process_time() < 0.2: pass\nprint(descendants_seconds())"
    )
    out = subprocess.run([sys.executable, "-c", code, "."], capture_output=True, text=True, check=True)
    assert float(out.stdout) == 0.0
