"""Builds the compiled extension. LTP_SPARSE_EXT=auto|cpu|cuda|off; everything else stands in pyproject.toml."""

import os
import platform
import sys
from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension
from setuptools import setup
from setuptools.command.build_ext import build_ext

# No fused multiply-add: every instruction set gives the same bits. The next two let square roots and selects vectorise.
FLAGS = ["-O3", "-Wall", "-Wextra", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-pthread"]
ISA_FLAGS = {
    "kernels_avx2": ["-mavx2", "-mbmi", "-mbmi2", "-mpopcnt"],
    "kernels_avx512": [
        *["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vbmi", "-mavx512vbmi2"],
        *["-mbmi", "-mbmi2", "-mpopcnt", "-mprefer-vector-width=512"],
        "-Wno-maybe-uninitialized",  # GCC 12 gives it for its own intrinsics
    ],
}
X86 = platform.machine().lower() in ("x86_64", "amd64")
ROOT = Path(__file__).parent


class BuildExtension(build_ext):
    """Compiles the kernels of each instruction set with its own flags."""

    def build_extension(self, ext):
        compile_one = self.compiler._compile

        def compile_with_isa_flags(obj, source, extension, cc_args, extra_postargs, pp_opts):
            flags = [*extra_postargs, *ISA_FLAGS.get(Path(source).stem, [])]
            compile_one(obj, source, extension, cc_args, flags, pp_opts)

        self.compiler._compile = compile_with_isa_flags
        try:
            super().build_extension(ext)
        finally:
            self.compiler._compile = compile_one


def extensions():
    wanted = os.environ.get("LTP_SPARSE_EXT", "auto")
    if wanted == "off":
        return []
    if wanted == "cuda":
        sys.exit("LTP_SPARSE_EXT=cuda: this version has no CUDA extension; use auto, cpu or off")
    if wanted not in ("auto", "cpu"):
        sys.exit(f"LTP_SPARSE_EXT must be auto, cpu, cuda or off, got {wanted!r}")
    sources = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").glob("cpu/*.cpp"))
    return [
        Pybind11Extension(
            "ltp_sparse._C",
            ["csrc/bindings.cpp", *(s for s in sources if X86 or Path(s).stem not in ISA_FLAGS)],
            depends=sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.h")),
            cxx_std=17,
            extra_compile_args=FLAGS,
            extra_link_args=["-pthread"],
            # auto: without a compiler the library installs and runs on its other backends; setuptools says so.
            optional=wanted == "auto",
        )
    ]


setup(ext_modules=extensions(), cmdclass={"build_ext": BuildExtension})
