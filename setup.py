"""Compiles the native library while the package is built; everything declarative is in pyproject.toml.

Without a C++ compiler, ninja or torch at hand the package is built without the library, as pure Python (the
reference implementations run), and says so. With a compiler, a failure to compile is an error.
"""

import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

sys.path.insert(0, str(Path(__file__).resolve().parent))

from tokenmill import native_build
from tokenmill.errors import TokenmillError, UnsupportedError

#: The oldest Python's limited API: the wheel serves it and every later one (the library itself uses no Python API).
LIMITED_API = "cp311"


class NinjaBuild(build_ext):
    """Lets `native_build` make the one extension."""

    def build_extension(self, ext: Extension) -> None:
        """Builds into build_lib for a wheel, beside the sources for an editable install."""
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        try:
            toolchain = native_build.build(output, verbose=self.verbose > 1)
        except TokenmillError as error:
            raise SystemExit(f"tokenmill: {error}") from None
        print(f"tokenmill: {native_build.describe(toolchain)}")


def extensions() -> list[Extension]:
    """The native library, or nothing and one line that says why."""
    try:
        native_build.find_toolchain()
    except UnsupportedError as error:
        print(f"tokenmill: installing without native kernels: {error}", file=sys.stderr)
        return []
    except TokenmillError as error:
        raise SystemExit(f"tokenmill: {error}") from None
    return [Extension("tokenmill._C", sources=[], py_limited_api=True)]


setup(
    ext_modules=extensions(),
    cmdclass={"build_ext": NinjaBuild},
    options={"bdist_wheel": {"py_limited_api": LIMITED_API}},
)
