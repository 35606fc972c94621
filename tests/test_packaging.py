"""The wheel, built offline by pip with and without a C++ compiler: its tag, contents, metadata, and that it runs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LIBRARY_SUFFIX = {"darwin": ".dylib", "win32": ".dll"}.get(sys.platform, ".so")
LIBRARY = f"memsave/_libmemsave{LIBRARY_SUFFIX}"
COMPILERS = [os.environ.get("CXX", ""), sysconfig.get_config_var("CXX") or "", "c++", "g++", "clang++"]
needs_compiler = pytest.mark.skipif(
    not any(shutil.which(command.split()[0]) for command in COMPILERS if command), reason="no C++ compiler here"
)


def copy_sources(target: Path) -> Path:
    """What a fresh clone holds of the files that a build reads: nothing that an earlier build left behind."""
    target.mkdir()
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, target)
    leftovers = shutil.ignore_patterns("__pycache__", "*.so", "*.dylib", "*.dll", "*.o")
    for name in ("memsave", "csrc"):
        shutil.copytree(ROOT / name, target / name, ignore=leftovers)
    return target


def run(*arguments: str | Path, cwd: Path, **environment: str) -> str:
    """Runs Python and returns what it printed; a failure shows all of its output."""
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def build_wheel(folder: Path, **environment: str) -> Path:
    """Builds as ``pip install .`` does, but with the build tools installed here, since tests use no network."""
    sources = copy_sources(folder / "sources")
    pip = (
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-index",
        "--no-build-isolation",
        "--wheel-dir",
        folder / "wheels",
        ".",
    )
    run(*pip, cwd=sources, **environment)
    (wheel,) = (folder / "wheels").glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def native_wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(tmp_path_factory.mktemp("native"))


@pytest.fixture(scope="module")
def pure_wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    no_compiler = shutil.which("false") or "false"
    return build_wheel(tmp_path_factory.mktemp("pure"), CC=no_compiler, CXX=no_compiler)


def tag(wheel: Path) -> tuple[str, ...]:
    return tuple(wheel.stem.split("-")[2:])


def names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def dist_info(wheel: Path, file: str) -> Message:
    (name,) = (name for name in names(wheel) if name.endswith(f".dist-info/{file}"))
    with zipfile.ZipFile(wheel) as archive:
        return Parser().parsestr(archive.read(name).decode())


def report_of(wheel: Path, folder: Path) -> dict:
    """What ``python -m memsave --json`` prints when only this wheel's files can be found."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return json.loads(run("-m", "memsave", "--json", cwd=folder, PYTHONPATH=str(folder / "site")))


@needs_compiler
def test_with_a_compiler_the_wheel_serves_every_python_on_this_platform(native_wheel: Path) -> None:
    python, abi, platform = tag(native_wheel)
    assert (python, abi) == ("py3", "none")
    assert platform == sysconfig.get_platform().replace("-", "_").replace(".", "_")
    assert LIBRARY in names(native_wheel)
    assert dist_info(native_wheel, "WHEEL")["Root-Is-Purelib"] == "false"


def test_without_a_compiler_the_wheel_is_pure_python(pure_wheel: Path) -> None:
    assert tag(pure_wheel) == ("py3", "none", "any")
    assert not {name for name in names(pure_wheel) if "_libmemsave" in name}
    assert dist_info(pure_wheel, "WHEEL")["Root-Is-Purelib"] == "true"


def test_the_wheel_holds_the_package_and_nothing_else(pure_wheel: Path) -> None:
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "memsave").rglob("*.py")}
    packaged = {name for name in names(pure_wheel) if ".dist-info/" not in name}
    assert packaged == sources | {"memsave/py.typed"}
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names(pure_wheel))


def test_metadata(pure_wheel: Path) -> None:
    metadata = dist_info(pure_wheel, "METADATA")
    required = metadata.get_all("Requires-Dist") or []
    assert {line for line in required if "extra ==" not in line} == {"torch>=2.10", "einops"}
    assert set(metadata.get_all("Provides-Extra") or []) == {"hf", "plot", "triton", "test", "bench", "encoder"}
    assert metadata["Requires-Python"] == ">=3.10"
    assert metadata["License-Expression"] == "Apache-2.0"
    (triton,) = (line for line in required if line.startswith("triton"))
    assert 'platform_system == "Linux"' in triton.replace("'", '"')
    classifiers = metadata.get_all("Classifier") or []
    for minor in range(10, 14):
        assert f"Programming Language :: Python :: 3.{minor}" in classifiers
    assert (pure_wheel.stem.split("-")[1]) == metadata["Version"] == "0.1.0"


def test_building_needs_no_torch(tmp_path: Path) -> None:
    sources = copy_sources(tmp_path / "sources")
    block_torch = "import sys; sys.modules['torch'] = None; from setuptools.build_meta import build_wheel as build; "
    run("-c", f"{block_torch} build({str(tmp_path)!r})", cwd=sources)
    assert list(tmp_path.glob("memsave-*.whl"))


def test_the_source_archive_holds_all_that_a_build_reads(tmp_path: Path) -> None:
    sources = copy_sources(tmp_path / "sources")
    run("-c", f"from setuptools.build_meta import build_sdist; build_sdist({str(tmp_path)!r})", cwd=sources)
    (archive,) = tmp_path.glob("memsave-*.tar.gz")
    shutil.unpack_archive(archive, tmp_path / "unpacked")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    for path in (ROOT / "csrc").iterdir():
        assert (unpacked / "csrc" / path.name).is_file()


@needs_compiler
def test_the_native_wheel_loads_its_library(native_wheel: Path, tmp_path: Path) -> None:
    assert report_of(native_wheel, tmp_path)["native"]["loaded"] is True


def test_the_pure_wheel_runs_and_says_why_it_has_no_library(pure_wheel: Path, tmp_path: Path) -> None:
    report = report_of(pure_wheel, tmp_path)
    assert report["native"]["loaded"] is False
    assert "_libmemsave" in report["native"]["state"]
