"""Builds the compiled extensions, `_C` (CPU) and `_C_cuda`; everything else stands in pyproject.toml.

LTP_SPARSE_EXT=auto (what can be built) | cpu | cuda (both; an error without a CUDA toolkit) | cuda-only | off
LTP_SPARSE_CUDA_ARCH=80,90,100,120 (the default), or fewer in less time: 90 alone for compute capability 9.0
LTP_SPARSE_JOBS=how many C++ files to compile at once; by default as many as there are cores

The same sources, compilers and Python give the same bytes; of `_C_cuda` in the same folder, which its line table names.
"""

import os
import platform
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension
from setuptools import setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

# No fused multiply-add: every instruction set gives the same bits. The next two let square roots and selects vectorise.
# Debug information, which Python's own flags ask for, would hold the paths of this machine.
FLAGS = ["-O3", "-g0", "-Wall", "-Wextra", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-pthread"]
ISA_FLAGS = {
    "kernels_avx2": ["-mavx2", "-mbmi", "-mbmi2", "-mpopcnt"],
    "kernels_avx512": [
        *["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vbmi", "-mavx512vbmi2"],
        *["-mavx512vpopcntdq", "-mbmi", "-mbmi2", "-mpopcnt", "-mprefer-vector-width=512"],
        *["-Wno-maybe-uninitialized", "-Wno-uninitialized"],  # GCC 12 gives them for its own intrinsics
    ],
}
# IEEE arithmetic: the bits of the CPU kernels. Lines of the sources for profilers.
NVCC_FLAGS = [
    *["-std=c++17", "-O3", "--fmad=false", "-prec-div=true", "-prec-sqrt=true", "-ftz=false", "-Xcompiler=-fPIC"],
    "-lineinfo",
]
# `make asan` and `make tsan`: "address,undefined" or "thread"
SANITIZE = os.environ.get("LTP_SPARSE_SANITIZE", "")
SANITIZE_FLAGS = [f"-fsanitize={SANITIZE}", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-O1", "-g"]
X86 = platform.machine().lower() in ("x86_64", "amd64")
ROOT = Path(__file__).parent


def cuda_home():
    """The folder of a CUDA toolkit with compiler, headers and static runtime, or None."""
    named = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = shutil.which("nvcc")
    on_path = [Path(nvcc).resolve().parents[1]] if nvcc else []
    usual = [Path("/usr/local/cuda"), *sorted(Path("/usr/local").glob("cuda-*"), reverse=True)]
    needed = ("bin/nvcc", "include/cuda_runtime.h", "lib64/libcudart_static.a")
    homes = [Path(named)] if named else [*on_path, *usual]
    return next((home for home in homes if all((home / part).exists() for part in needed)), None)


def gencode():
    """Machine code for each architecture, and PTX of the last one for later GPUs."""
    wanted = os.environ.get("LTP_SPARSE_CUDA_ARCH", "80,90,100,120")
    numbers = wanted.split(",")
    if not all(number.isdigit() and int(number) >= 80 for number in numbers):
        sys.exit(f"LTP_SPARSE_CUDA_ARCH must be numbers as in 80,90, none below 80, got {wanted!r}")
    flags = [f"-gencode=arch=compute_{number},code=sm_{number}" for number in numbers]
    return [*flags, f"-gencode=arch=compute_{numbers[-1]},code=compute_{numbers[-1]}"]


class BuildExtension(build_ext):
    """Compiles the kernels of each instruction set with its own flags, and CUDA sources with nvcc."""

    def build_extensions(self):
        # A Python that is built as a shared library puts its folder on the search path of modules, which need none.
        for name in ("linker_so", "linker_so_cxx"):
            command = getattr(self.compiler, name, None) or []
            setattr(self.compiler, name, [part for part in command if not part.startswith("-Wl,-rpath")])
        super().build_extensions()

    def build_extension(self, ext):
        if ext.name.endswith("_C_cuda"):
            home, folder, code = cuda_home(), Path(self.build_temp), gencode()
            folder.mkdir(parents=True, exist_ok=True)

            def compile_cuda(source):
                name = Path(source).stem
                target = str(folder / f"{name}.cu.o")
                nvcc = [str(home / "bin" / "nvcc"), "--threads=0", *NVCC_FLAGS, *code, f"-frandom-seed={name}"]
                try:
                    subprocess.run([*nvcc, "-c", source, "-o", target], check=True)
                except (OSError, subprocess.CalledProcessError) as error:
                    raise CompileError(f"nvcc failed on {name}.cu: {error}") from error
                return target

            with ThreadPoolExecutor() as executor:
                ext.extra_objects += executor.map(compile_cuda, found_in("csrc/cuda", "*.cu"))
        compile_one = self.compiler._compile

        def compile_with_isa_flags(obj, source, extension, cc_args, extra_postargs, pp_opts):
            flags = [*extra_postargs, *ISA_FLAGS.get(Path(source).stem, [])]
            compile_one(obj, source, extension, cc_args, flags, pp_opts)

        self.compiler._compile = compile_with_isa_flags
        try:
            super().build_extension(ext)
        finally:
            self.compiler._compile = compile_one
        if not SANITIZE:  # which only a process with the runtime of the sanitizer can import
            self.check_import(Path(self.get_ext_fullpath(ext.name)))

    def check_import(self, path):
        """A linker lets symbols of a module be undefined: only an import, in another process, shows that none is."""
        name = path.name.split(".")[0]
        code = f"""
import importlib.util
spec = importlib.util.spec_from_file_location({name!r}, {str(path)!r})
spec.loader.exec_module(importlib.util.module_from_spec(spec))
"""
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        if run.returncode:
            path.unlink()
            raise CompileError(f"{path.name} was built and cannot be imported: {run.stderr.strip()}")


def found_in(folder, pattern):
    """The sources there, of which there must be some: a package without them would build a module without its code."""
    found = sorted(str(path.relative_to(ROOT)) for path in (ROOT / folder).glob(pattern))
    if not found:
        sys.exit(
            f"no {pattern} in {folder}: these sources are not complete; take all of the repository, or an sdist of it"
        )
    return found


def extensions():
    wanted = os.environ.get("LTP_SPARSE_EXT", "auto")
    if wanted == "off":
        return []
    if wanted not in ("auto", "cpu", "cuda", "cuda-only"):
        sys.exit(f"LTP_SPARSE_EXT must be auto, cpu, cuda, cuda-only or off, got {wanted!r}")
    home = cuda_home()
    if wanted.startswith("cuda") and home is None:
        sys.exit(f"LTP_SPARSE_EXT={wanted}: no CUDA toolkit; put nvcc on the PATH, or its folder into CUDA_HOME")
    found = [
        Pybind11Extension(
            "ltp_sparse._C",
            ["csrc/bindings.cpp", *(s for s in found_in("csrc/cpu", "*.cpp") if X86 or Path(s).stem not in ISA_FLAGS)],
            depends=found_in("csrc", "**/*.h"),
            cxx_std=17,
            extra_compile_args=FLAGS + (SANITIZE_FLAGS if SANITIZE else []),
            extra_link_args=["-pthread"] + (SANITIZE_FLAGS if SANITIZE else []),
            # auto: without a compiler the library installs and runs on its other backends; setuptools says so.
            optional=wanted == "auto",
        )
    ]
    if wanted == "cuda-only":
        found.clear()
    if home is not None and wanted != "cpu":
        found_in("csrc/cuda", "*.cu")
        found.append(
            Pybind11Extension(
                "ltp_sparse._C_cuda",
                ["csrc/bindings_cuda.cpp", "csrc/cuda/probe.cpp"],
                include_dirs=[str(home / "include")],
                depends=found_in("csrc", "**/*.*h"),
                cxx_std=17,
                # the static runtime: one module serves every torch, and imports where there is no driver
                # and without symbols: among them are names of nvcc's temporary files
                extra_link_args=["-Wl,-s", f"-L{home / 'lib64'}", "-lcudart_static", "-ldl", "-lrt", "-pthread"],
                optional=wanted == "auto",
            )
        )
    return found


if __name__ == "__main__":
    ParallelCompile("LTP_SPARSE_JOBS").install()
    setup(ext_modules=extensions(), cmdclass={"build_ext": BuildExtension})
