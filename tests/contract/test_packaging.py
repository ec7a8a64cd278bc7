"""setup.cfg is the one source of metadata, and a wheel built from it carries every file. Offline."""

from __future__ import annotations

import configparser
import email
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

import hf_effi
from bench import tables
from tests.contract._sources import PACKAGE, ROOT, committed_files
from tests.helpers.distributed import child_environment


@pytest.fixture(scope="module")
def setup_cfg() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg", encoding="utf-8")
    return parser


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    """Build from a copy of what is committed: a build leaves `build/` and `*.egg-info` where it runs."""
    copy = tmp_path_factory.mktemp("source")
    for path in committed_files():
        target = copy / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, target)
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "--quiet"]
    done = subprocess.run(
        [*command, "--wheel-dir", str(out), str(copy)],
        cwd=out,
        env=child_environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"pip wheel failed:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    (built,) = out.glob("*.whl")
    with zipfile.ZipFile(built) as archive:
        yield archive


def metadata_of(wheel: zipfile.ZipFile) -> email.message.Message:
    (name,) = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
    return email.message_from_bytes(wheel.read(name))


def test_pyproject_has_build_and_tools_only():
    assert set(tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))) <= {"build-system", "tool"}


def test_no_second_source_of_metadata():
    assert not (ROOT / "setup.py").exists()
    assert [path.name for path in ROOT.glob("requirements*.txt")] == []


@pytest.mark.parametrize("name", tables.MATRIX)
def test_the_range_of_a_package_is_what_was_run(name):
    """From the oldest to the newest release in the committed result, and none beyond: not even the next minor."""
    (allowed,) = (SpecifierSet(package.accepted) for package in tables.packages(ROOT) if package.name == name)
    versions = [Version(text) for text in tables.versions_run(tables.compatibility_result(ROOT))[name]]
    bounds = {part.operator: Version(part.version) for part in allowed}
    assert set(bounds) == {">=", "<"}, f"{name}: give a lower and an upper bound"
    rerun = "run `make compat`, then commit its result"
    assert bounds[">="] == versions[0], f"the oldest {name} that was run is {versions[0]}: {rerun}"
    cap = Version(f"{versions[-1].major}.{versions[-1].minor + 1}")
    assert bounds["<"] == cap, f"the newest {name} that was run is {versions[-1]}, so the cap is {cap}: {rerun}"
    assert all(version in allowed for version in versions)


def test_torch_is_accepted_from_the_oldest_release_that_was_run():
    (allowed,) = (SpecifierSet(p.accepted) for p in tables.packages(ROOT) if p.name == "torch")
    (bound,) = allowed
    versions = tables.versions_run(tables.compatibility_result(ROOT))["torch"]
    assert bound.operator == ">=" and Version(bound.version) == Version(Version(versions[0]).public)


def test_constraints_satisfy_the_requirements(setup_cfg):
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if "==" in line)
    texts = [setup_cfg["options"]["install_requires"], *setup_cfg["options.extras_require"].values()]
    seen = set()
    for line in "\n".join(texts).splitlines():
        line = line.split("#")[0].strip()
        if not line or line.startswith("hf_effi["):
            continue
        requirement = Requirement(line)
        seen.add(requirement.name)
        if requirement.name in pins:
            assert Version(pins[requirement.name]) in requirement.specifier, f"{requirement} against constraints.txt"
    core = {Requirement(line).name for line in texts[0].splitlines() if line.strip() and not line.startswith("#")}
    assert core <= set(pins), f"constraints.txt does not pin {sorted(core - set(pins))}"
    assert core <= seen


def test_optional_packages_are_extras(setup_cfg):
    from hf_effi._compat import OPTIONAL_PACKAGES

    for package, (distribution, extra) in OPTIONAL_PACKAGES.items():
        listed = setup_cfg["options.extras_require"].get(extra, "")
        assert distribution in listed, (
            f"_compat.py sends users of {package} to hf_effi[{extra}], which lacks {distribution}"
        )


def test_wheel_carries_every_file_of_the_package(wheel):
    source = {str(path.relative_to(ROOT)) for path in committed_files() if PACKAGE in path.parents}
    inside = set(wheel.namelist())
    assert source <= inside, f"missing in the wheel: {sorted(source - inside)}"
    assert "hf_effi/py.typed" in inside


def test_wheel_carries_nothing_else(wheel):
    tops = {Path(name).parts[0] for name in wheel.namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"hf_effi"}


def test_wheel_version_licence_and_readme(wheel):
    metadata = metadata_of(wheel)
    assert metadata["Version"] == hf_effi.__version__
    assert metadata["Name"].replace("-", "_") == "hf_effi"
    # setuptools writes the SPDX id of setup.cfg under the old name, that of pyproject.toml under the new one.
    assert (metadata["License-Expression"] or metadata["License"]) == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.11"
    licences = [name for name in wheel.namelist() if name.endswith("LICENSE")]
    assert licences and wheel.read(licences[0]) == (ROOT / "LICENSE").read_bytes()
    # As bytes: the e-mail parser does not give back what is not ASCII.
    (name,) = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
    assert (ROOT / "README.md").read_bytes().strip() in wheel.read(name).replace(b"\r\n", b"\n")


def test_wheel_has_the_console_script(wheel):
    (name,) = [name for name in wheel.namelist() if name.endswith("entry_points.txt")]
    parser = configparser.ConfigParser()
    parser.read_string(wheel.read(name).decode())
    assert dict(parser["console_scripts"]) == {"hf-effi": "hf_effi.cli:main"}


def test_console_script_target_exists():
    from hf_effi.cli import main

    assert callable(main)


def test_wheel_is_imported_from_where_it_was_unpacked(wheel, tmp_path):
    wheel.extractall(tmp_path)
    code = "import hf_effi, hf_effi.methods; print(hf_effi.__file__, hf_effi.__version__)"
    env = {**child_environment(), "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == [str(tmp_path / "hf_effi" / "__init__.py"), hf_effi.__version__]


def test_changelog_and_citation_know_the_version():
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"version: {hf_effi.__version__}" in citation.replace('"', "").replace("'", "")
    assert "## [Unreleased]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_only_the_first_set_up_needs_a_network():
    """`[test]` brings what every target needs, so that `make test`, `make demo` and `make docs` then work offline."""
    targets = (ROOT / "Makefile").read_text(encoding="utf-8").split("\n\n")
    assert [text.split(":")[0] for text in targets if " pip install " in text] == ["$(STAMP)"]
