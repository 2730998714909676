"""Compile a JAX function for an NVIDIA GPU on a machine that has none, and list what would run.

XLA's CUDA plug-in serves as a compile-only client: the optimised HLO, the list of the host's
submissions (with loops, their trip counts and CUDA graphs), temporary memory, and the resources
that ptxas reports for each kernel (registers, spills) are real; nothing is executed. It needs the
optional dependencies `gpu-check`, in an environment of their own (`make gpu-check` creates one):
with the plug-in installed, JAX complains of missing CUDA wherever it looks for devices.

    prepare()  # before pararnn is imported
    report = gpu_compile(f, *args)  # arrays or ShapeDtypeStructs, any pytrees

*Device operations* are kernels, copies and library calls; *submissions* are launches by the host (a
CUDA graph is one), which bound small steps. In a loop without a static trip count the host also
waits for the device in every iteration, as it reads the condition back.

Limits: matrix products are not tuned for the device here. Of a `cond` both branches count. A
library call may be several kernels. Which loops become CUDA graphs depends on the driver's version.
Callbacks to the host (`throw=True`, `verbose=True`, `jax.debug.print`) cannot be lowered.
`jax.default_backend()` is "cpu" while tracing, so code that asks it must be told the platform.
"""

import contextlib
import dataclasses
import functools
import glob
import importlib.util
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies

from ._program import Block, read_program

_TARGET = """
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448
  core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  memory_bandwidth: {bandwidth} l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: {memory}
  cuda_compute_capability {{ major: 9 minor: 0 feature_extension: ACCELERATED_FEATURES }}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  driver_version: "{cuda}.0" runtime_version: "{cuda}.0" compile_time_toolkit_version: "{cuda}.0"
  dnn_version: "9.10.0" name: "{name}"
}}
platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 }}
runtime_version {{ major: {major} minor: {minor} }} device_description_str: "{name}"
"""
CHIP = {
    "name": "NVIDIA H200 141GB HBM3e",
    "bandwidth": 4_800_000_000_000,
    "memory": 151_397_597_184,
}
ARCHITECTURE = "sm_90a"
CUDA = "12.9"  # of the driver that is pretended


def prepare() -> bool:
    """Configures this process to compile for a GPU. Call it before JAX looks for its devices, which
    it does when `pararnn` is imported.

    Returns whether there is a GPU here, for which programs are then compiled and on which they can
    be measured. Raises SystemExit with what is missing.
    """
    # Programs from the cache are not compiled, and have no dumps.
    jax.config.update("jax_enable_compilation_cache", False)
    # JAX is not asked: without a driver the plug-in would complain, and JAX would choose its
    # platform for good.
    if os.environ.get("JAX_PLATFORMS") != "cpu" and pathlib.Path("/dev/nvidiactl").exists():
        if jax.default_backend() != "gpu":
            raise SystemExit(
                "There is a GPU, but JAX does not use it: install the CUDA build of JAX, or set "
                "JAX_PLATFORMS=cpu to compile only."
            )
        return True
    if importlib.util.find_spec("jax_cuda12_plugin") is None:
        raise SystemExit("XLA's plug-in for CUDA is not installed: use `make gpu-check`.")
    jax.config.update("jax_platforms", "cpu")
    return False


@functools.cache
def _mesh() -> jax.sharding.Mesh:
    """One pretended device."""
    major, minor = CUDA.split(".")
    config = _TARGET.format(**CHIP, cuda=CUDA, major=major, minor=minor)
    topology = topologies.get_topology_desc(
        "", platform="cuda", topology="1x1x1", target_config=config
    )
    return jax.sharding.Mesh(np.array(topology.devices), ("gpu",))


@dataclasses.dataclass
class Report:
    """The result of a compilation.

    - `error`: why it failed; empty if it did not.
    - `seconds`: to trace, lower and compile.
    - `memory`: XLA's sizes in bytes.
    - `compiled`: the executable, which runs where the device is at hand.
    - `program`: the operations with their loops; `totals` sums them.
    - `resources`: a dictionary per kernel from ptxas: registers, spills, stack, shared memory.
    """

    error: str = ""
    seconds: float = 0.0
    memory: Any = None
    compiled: Any = None
    program: Block = dataclasses.field(default_factory=Block)
    resources: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    def most(self, resource: str) -> int | None:
        """The largest number of registers (`regs`), say, over the kernels."""
        return max((row[resource] for row in self.resources if resource in row), default=None)


def gpu_compile(function: Callable[..., Any], *args: Any, has_gpu: bool = False) -> Report:
    """Compiles `jax.jit(function)(*args)`, of which only shapes and dtypes of `args` matter, for
    the pretended `CHIP`, or for the GPU of this machine if it `has_gpu`."""
    report, start = Report(), time.perf_counter()
    with _dumps() as folder:
        try:
            dumps: dict[str, Any] = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
            report.compiled = _lowered(function, args, has_gpu).compile(compiler_options=dumps)
        except Exception as error:  # any failure belongs in the report
            report.error = f"{type(error).__name__}: {error}"
        report.seconds = time.perf_counter() - start
        if not report.error:
            _read(report, folder)
    return report


@contextlib.contextmanager
def _dumps() -> Iterator[str]:
    """A folder for what XLA and Mosaic write, as long as it is needed."""
    mosaic = {"MOSAIC_GPU_DUMP_TO": "", "MOSAIC_GPU_DUMP_PTX": "1"}
    before = {name: os.environ.get(name) for name in mosaic}
    with tempfile.TemporaryDirectory(prefix="gpu_compile_") as folder:
        os.environ.update(mosaic | {"MOSAIC_GPU_DUMP_TO": folder})
        try:
            yield folder
        finally:
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value


def _lowered(function: Any, args: Any, has_gpu: bool) -> Any:
    if has_gpu:
        shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(np.shape(a), a.dtype), args)
        return jax.jit(function).lower(*shapes)
    there = jax.sharding.NamedSharding(_mesh(), jax.sharding.PartitionSpec())
    shapes = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(np.shape(a), a.dtype, sharding=there), args
    )
    return jax.jit(function).trace(*shapes).lower(lowering_platforms=("cuda",))


def _read(report: Report, folder: str) -> None:
    def dumped(pattern: str) -> str:
        found = sorted(pathlib.Path(folder).glob(pattern))
        return found[0].read_text() if found else ""

    report.memory = report.compiled.memory_analysis()
    # The later passes put what they can into CUDA graphs.
    thunks = dumped("*thunk_sequence_after_thunk_passes.txt") or dumped("*thunk_sequence.txt")
    report.program = read_program(thunks, dumped("*thunk_metadata.txt"), report.compiled.as_text())
    kernels = [path for path in sorted(pathlib.Path(folder).glob("*.ptx")) if path.stat().st_size]
    report.resources = [row for path in kernels for row in _resources(path)]


# --- ptxas ------------------------------------------------------------------------------------


@functools.cache
def _ptxas() -> str:
    """The newest that is installed."""
    wheels = [os.path.join(path, "nvidia", "*", "bin", "ptxas") for path in sys.path]
    patterns = [*wheels, "/usr/local/cuda*/bin/ptxas"]
    found = [path for pattern in patterns for path in glob.glob(pattern)]
    found += filter(None, [shutil.which("ptxas")])
    if not found:
        raise FileNotFoundError("there is no ptxas: install nvidia-cuda-nvcc-cu12")

    def version(path: str) -> tuple[int, ...]:
        output = subprocess.run([path, "--version"], capture_output=True, text=True).stdout
        match = re.search(r"release (\d+)\.(\d+)", output)
        return tuple(map(int, match.groups())) if match else (0,)

    return max(found, key=version)


def _resources(path: pathlib.Path) -> list[dict[str, Any]]:
    command = [_ptxas(), "-v", f"-arch={ARCHITECTURE}", path, "-o", path.with_suffix(".cubin")]
    run = subprocess.run(command, capture_output=True, text=True)
    rows: list[dict[str, Any]] = []
    for line in (run.stderr + run.stdout).splitlines():
        if match := re.search(r"Compiling entry function '(\S+)' for", line):
            rows.append({"kernel": match[1]})
        elif match := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores", line):
            if rows:  # functions without an entry come first
                rows[-1].update(stack=int(match[1]), spill_stores=int(match[2]))
        elif match := re.search(r"Used (\d+) registers", line):
            if rows:
                rows[-1]["regs"] = int(match[1])
    return rows
