"""Compile a JAX function for an NVIDIA GPU on a machine that has none, and say what would run.

XLA's CUDA plug-in serves as a compile-only client: the optimised HLO, the list of what the host
submits (with loops, their turns and CUDA graphs), temporary memory, and what ptxas says of each
kernel (registers, spills) are real; nothing is executed. It needs the optional dependencies
`gpu-check`, in an environment of their own (`make gpu-check` makes one): with the plug-in
installed, JAX complains of missing CUDA wherever it looks for devices.

    prepare()  # before pararnn is imported
    report = gpu_compile(f, *args)  # arrays or ShapeDtypeStructs, any pytrees
    print(report.summary())

Reading the figures: *device operations* are kernels, copies and library calls; *submissions* are
what the host launches one by one (a CUDA graph is one), which is what bounds small steps. For a
loop without a known number of turns, the host also waits for the device in every turn, as it reads
the condition back. Counts differ between releases of JAX.

Limits: products are not tuned for the device here, so that their kernels are not to be judged. Of
a `cond` both branches count. A library call may be several kernels. Which loops become CUDA graphs
depends on `cuda`, the driver pretended. Callbacks to the host (`throw=True`, `verbose=True`,
`jax.debug.print`) cannot be lowered. `jax.default_backend()` is "cpu" while tracing: whatever asks
it must be told the platform. Pallas on JAX 0.11 needs `pallas=True`, with which nothing may run
eagerly while tracing.
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

from ._gpu_program import Block, Kernel, Totals, all_loops, read_program, totals

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
CHIPS = {
    "h100": {
        "name": "NVIDIA H100 80GB HBM3",
        "bandwidth": 3_352_320_000_000,
        "memory": 84_942_979_072,
    },
    "h200": {
        "name": "NVIDIA H200 141GB HBM3e",
        "bandwidth": 4_800_000_000_000,
        "memory": 151_397_597_184,
    },
}
ARCHITECTURE = "sm_90a"  # of both


def prepare() -> str | None:
    """Readies this process to compile for a GPU, and to run on it if there is one. To be called
    before JAX looks for its devices, which it does when `pararnn` is imported.

    **Returns:**

    The `chip` to compile for: `None`, that of this machine, or the default.

    **Raises:**

    `SystemExit`, which says what is missing.
    """
    # What is taken from the cache is not compiled, and tells nothing.
    jax.config.update("jax_enable_compilation_cache", False)
    if _has_driver():
        if jax.default_backend() != "gpu":
            raise SystemExit(
                "There is a GPU, but JAX does not use it: install the CUDA build of JAX, or set "
                "JAX_PLATFORMS=cpu to compile only."
            )
        return None
    if importlib.util.find_spec("jax_cuda12_plugin") is None:
        raise SystemExit("XLA's plug-in for CUDA is not installed: use `make gpu-check`.")
    jax.config.update("jax_platforms", "cpu")
    return "h200"


def _has_driver() -> bool:
    """Whether a driver for NVIDIA's GPUs runs here, and JAX may use it. JAX is not asked: without a
    driver the plug-in would complain, and JAX choose its platform for good."""
    return os.environ.get("JAX_PLATFORMS") != "cpu" and pathlib.Path("/dev/nvidiactl").exists()


@functools.cache
def _mesh(chip: str, cuda: str) -> jax.sharding.Mesh:
    """One pretended device."""
    major, minor = cuda.split(".")
    config = _TARGET.format(**CHIPS[chip], cuda=cuda, major=major, minor=minor)
    topology = topologies.get_topology_desc(
        "", platform="cuda", topology="1x1x1", target_config=config
    )
    return jax.sharding.Mesh(np.array(topology.devices), ("gpu",))


@dataclasses.dataclass
class Report:
    """What became of a compilation.

    - `error`: why it failed; empty if it did not.
    - `seconds`: of tracing, lowering and compiling.
    - `hlo`, `thunks`: the texts.
    - `memory`: the sizes in bytes that XLA tells.
    - `compiled`: what can be run, where the device is at hand.
    - `program`: what runs, with its loops; `totals` adds it up.
    - `kernels`: the device operations as they are listed.
    - `resources`: a dictionary per kernel from ptxas: registers, spills, stack, shared memory.
    - `ptx`: the kernels' texts.
    """

    error: str = ""
    seconds: float = 0.0
    hlo: str = ""
    thunks: str = ""
    memory: Any = None
    compiled: Any = None
    program: Block = dataclasses.field(default_factory=Block)
    kernels: list[Kernel] = dataclasses.field(default_factory=list)
    resources: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    ptx: list[str] = dataclasses.field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.error

    def most(self, resource: str) -> int | None:
        """The largest number of registers (`regs`), say, over the kernels."""
        found = [row[resource] for row in self.resources if resource in row]
        return max(found, default=None)

    def summary(self) -> str:
        """Totals, loops and spills, for a reader."""
        if not self.ok:
            return f"FAILED after {self.seconds:.1f} s: {self.error[:2000]}"
        sizes, per_run = self.memory, totals(self.program)
        lines = [
            f"compiled in {self.seconds:.1f} s; bytes: arguments "
            f"{sizes.argument_size_in_bytes:,}, results {sizes.output_size_in_bytes:,}, temporary "
            f"{sizes.temp_size_in_bytes:,}",
            f"{len(self.kernels)} device ops listed, {self.program.device_ops} of them outside "
            f"loops; per run {_described(per_run)} (nan: a loop without a static trip count)",
        ]
        for depth, loop in all_loops(self.program):
            # What is inside turns once, if it is not known how often.
            turn = totals(loop.condition, lambda _: 1).plus(totals(loop.body, lambda _: 1))
            lines.append(f"{'  ' * depth}loop {loop.name}: trip {loop.trip}; {_described(turn)}")
        for row in self.resources:
            if row.get("spill_stores") or "error" in row:
                lines.append("ptxas " + " ".join(f"{key}={value}" for key, value in row.items()))
        return "\n".join(lines)


def _described(found: Totals) -> str:
    return (
        f"{found.device_ops:,.0f} device ops, {found.submissions:,.0f} submissions, "
        f"{found.moved_bytes:,.0f} bytes moved"
    )


def gpu_compile(
    function: Callable[..., Any],
    *args: Any,
    chip: str | None = "h200",
    cuda: str = "12.9",
    options: dict[str, Any] | None = None,
    pallas: bool = False,
    ptxas: bool = True,
) -> Report:
    """Compiles `jax.jit(function)(*args)`.

    **Arguments:**

    - `function`, `args`: only the shapes and dtypes of `args` matter.
    - `chip`: a key of `CHIPS`, which need not be there; `None` is the GPU of this machine.
    - `cuda`: the version of the pretended driver.
    - `options`: of the compiler.
    - `pallas`: whether to tell the pretended device to what is traced.
    - `ptxas`: whether to ask it for the resources of the kernels.
    """
    mesh = None if chip is None else _mesh(chip, cuda)
    with _dumps() as folder:
        dumps = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True, **(options or {})}
        report, start = Report(), time.perf_counter()
        try:
            lowered = _lowered(function, args, mesh, pallas)
            report.compiled = lowered.compile(compiler_options=dumps)
        except Exception as error:  # whatever it is, it belongs in the report
            report.error = f"{type(error).__name__}: {error}"
        report.seconds = time.perf_counter() - start
        if report.ok:
            _read(report, folder, ptxas)
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


def _lowered(function: Any, args: Any, mesh: jax.sharding.Mesh | None, pallas: bool) -> Any:
    if mesh is None:
        shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(np.shape(a), a.dtype), args)
        return jax.jit(function).lower(*shapes)
    there = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    shapes = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(np.shape(a), a.dtype, sharding=there), args
    )
    told = jax.sharding.use_abstract_mesh(mesh.abstract_mesh)
    with told if pallas else contextlib.nullcontext():
        return jax.jit(function).trace(*shapes).lower(lowering_platforms=("cuda",))


def _read(report: Report, folder: str, ptxas: bool) -> None:
    def dumped(pattern: str) -> str:
        found = sorted(glob.glob(os.path.join(folder, pattern)))
        return pathlib.Path(found[0]).read_text() if found else ""

    report.hlo, report.memory = report.compiled.as_text(), report.compiled.memory_analysis()
    # The passes put what they can into CUDA graphs.
    report.thunks = dumped("*thunk_sequence_after_thunk_passes.txt") or dumped(
        "*thunk_sequence.txt"
    )
    metadata = dumped("*thunk_metadata.txt")
    report.program, report.kernels = read_program(report.thunks, metadata, report.hlo)
    paths = [f for f in sorted(glob.glob(os.path.join(folder, "*.ptx"))) if os.path.getsize(f)]
    report.ptx = [pathlib.Path(path).read_text() for path in paths]
    if ptxas:
        report.resources = [row for path in paths for row in _resources(path)]


# --- ptxas ------------------------------------------------------------------------------------


@functools.cache
def _ptxas() -> str:
    """The newest that there is."""
    wheels = [os.path.join(path, "nvidia", "*", "bin", "ptxas") for path in sys.path]
    places = [*wheels, "/usr/local/cuda*/bin/ptxas"]
    found = [path for place in places for path in glob.glob(place)]
    found += filter(None, [shutil.which("ptxas")])
    if not found:
        raise FileNotFoundError("there is no ptxas: install nvidia-cuda-nvcc-cu12")

    def version(path: str) -> tuple[int, ...]:
        said = subprocess.run([path, "--version"], capture_output=True, text=True).stdout
        match = re.search(r"release (\d+)\.(\d+)", said)
        return tuple(map(int, match.groups())) if match else (0,)

    return max(found, key=version)


def _resources(path: str) -> list[dict[str, Any]]:
    command = [_ptxas(), "-v", f"-arch={ARCHITECTURE}", path, "-o", path + ".cubin"]
    run = subprocess.run(command, capture_output=True, text=True)
    rows: list[dict[str, Any]] = []
    for line in (run.stderr + run.stdout).splitlines():
        if match := re.search(r"Compiling entry function '(\S+)' for", line):
            rows.append({"kernel": match[1]})
        elif rows and (
            match := re.search(
                r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line
            )
        ):
            keys = ("stack", "spill_stores", "spill_loads")
            rows[-1].update(zip(keys, map(int, match.groups()), strict=True))
        elif rows and (match := re.search(r"Used (\d+) registers", line)):
            shared = re.search(r"(\d+) bytes smem", line)
            rows[-1].update(regs=int(match[1]), shared=int(shared[1]) if shared else 0)
        elif "error" in line.lower() or "fatal" in line.lower():
            rows.append({"error": line})
    return rows
