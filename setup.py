"""Builds `hylo_ops._C` and the cubins through CMake; everything else is in pyproject.toml. torch is not needed."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
PACKAGE = "hylo_ops"


def find_tool(name: str) -> str:
    """cmake and ninja come from the build environment's own scripts folder before the system's."""
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])
    tool = shutil.which(name, path=path)
    if tool is None:
        raise SystemExit(f"error: {name} is needed to build {PACKAGE}._C and is not installed; try: pip install {name}")
    return tool


class CMakeBuild(build_ext):
    """Configures, builds and installs into the package's folder, in place for an editable install."""

    def run(self) -> None:
        super().run()
        built = Path(self.build_lib).resolve() / PACKAGE
        if self.inplace:
            replace_tree(built / "cubins", ROOT / PACKAGE / "cubins")
        else:
            copy_device_sources(built / "csrc")

    def build_extension(self, ext: Extension) -> None:
        import pybind11

        package = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build = Path(self.build_temp).resolve() / "cmake"
        cmake, ninja = find_tool("cmake"), find_tool("ninja")
        configure = [
            cmake, "-S", str(ROOT), "-B", str(build), "-G", "Ninja",
            f"-DCMAKE_MAKE_PROGRAM={ninja}",
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        ]  # fmt: skip
        subprocess.run(configure, check=True)
        subprocess.run([cmake, "--build", str(build)], check=True)
        shutil.rmtree(package / "cubins", ignore_errors=True)
        subprocess.run([cmake, "--install", str(build), "--prefix", str(package)], check=True)


def replace_tree(source: Path, target: Path) -> None:
    shutil.rmtree(target, ignore_errors=True)
    if source.is_dir():
        shutil.copytree(source, target)


def copy_device_sources(target: Path) -> None:
    """An installed package carries what NVRTC compiles; an editable one reads csrc/ of its checkout."""
    shutil.rmtree(target, ignore_errors=True)
    for source in (ROOT / "csrc").rglob("*"):
        if source.suffix in (".h", ".cuh"):
            copy = target / source.relative_to(ROOT / "csrc")
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, copy)


setup(ext_modules=[Extension(f"{PACKAGE}._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
