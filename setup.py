"""Everything static stands in pyproject.toml; here the native kernels are built, where torch and a compiler are."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent


def torch_root() -> Path:
    """The folder of the torch that is installed; also where the build is isolated from it and cannot import it."""
    folders = [Path(sysconfig.get_path(name)) for name in ("purelib", "platlib")] + [Path(path) for path in sys.path]
    for folder in folders:
        if (folder / "torch" / "include" / "torch" / "csrc" / "stable").is_dir():
            return folder / "torch"
    raise CompileError("torch must be installed first for the native kernels, got none with a stable ABI")


class CMakeBuild(build_ext):
    """CMake and Ninja in place of distutils; after a CompileError the package goes without, since it is optional."""

    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", os.sep) + ".so"  # a library of operators for any Python, not a module

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name))
        target.unlink(missing_ok=True)  # rather none than one of other sources
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
        cmake, folder = shutil.which("cmake", path=path) or "cmake", str(Path(self.build_temp).resolve())
        configure = [cmake, "-G", "Ninja", "-S", str(ROOT), "-B", folder, f"-DTORCH_ROOT={torch_root()}"]
        try:
            for command in (configure, [cmake, "--build", folder]):
                subprocess.run(command, check=True, env=os.environ | {"PATH": path})
        except (OSError, subprocess.CalledProcessError) as error:
            raise CompileError(f"the native kernels could not be built: {error}") from error
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(Path(folder) / "_C.so", target)


setup(
    ext_modules=[Extension("cprune_kernels._C", sources=[], optional=True)],
    cmdclass={"build_ext": CMakeBuild},
)
