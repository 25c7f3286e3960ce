"""The tests that compare numbers, at each level of instructions that this processor has.

PyTorch, oneDNN and MKL choose their kernels by what the processor can do; here they are held to less than that, one level after
the other. The compiled pieces (fleetune/models/kernels/) are built for older processors than this one. A level that the
processor lacks would end in an illegal instruction, so it is named and left out.

    python tests/processors.py            all of both: seven minutes on two cores
    python tests/processors.py --short    few tests at each level: three minutes
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

TESTS = Path(__file__).parent
NUMERIC = (
    "tests/cost/test_trace.py",
    "tests/methods",
    *(
        f"tests/models/test_{name}.py"
        for name in ("kernels", "network", "peft_format", "precision", "quantize", "submodel")
    ),
    "tests/test_tensors.py",
    "tests/training/test_optimizer.py",
    "tests/training/test_trainer.py",
)
# Products in fp32, bf16 and four bits, attention, norms and the loss, forward and backward.
SHORT = (
    "tests/models/test_kernels.py",
    "tests/models/test_network.py",
    "tests/training/test_trainer.py",
    "tests/models/test_quantize.py",
    "tests/models/test_precision.py::test_no_more_is_lost_than_by_transformers_under_autocast",
    "tests/cost/test_trace.py::test_storage_precision_optimizer_and_adapters_show[bf16, head norms]",
    "tests/cost/test_trace.py::test_storage_precision_optimizer_and_adapters_show[nf4]",
)
AVX2 = ("avx2", "fma", "bmi2", "f16c")
AVX512 = (*AVX2, "avx512f", "avx512dq", "avx512bw", "avx512vl")


class Level(NamedTuple):
    """What the libraries are told, and the processor's flags that they then take for granted."""

    name: str
    settings: dict[str, str]
    flags: tuple[str, ...]


def libraries(name: str, pytorch: str, onednn: str, mkl: str, flags: tuple[str, ...]) -> Level:
    """A level by the names that each library has for it."""
    settings = {"ATEN_CPU_CAPABILITY": pytorch, "ONEDNN_MAX_CPU_ISA": onednn, "MKL_ENABLE_INSTRUCTIONS": mkl}
    return Level(name, settings, flags)


def compiled(target: str, *flags: str) -> Level:
    """The compiled pieces for a processor by the compiler's name for it."""
    return Level(f"compiled for {target}", {"FLEETUNE_KERNELS_TARGET": target}, flags)


LIBRARIES = (
    libraries("plain", "default", "SSE41", "SSE4_2", ()),
    libraries("AVX2", "avx2", "AVX2", "AVX2", AVX2),
    # Not AVX512_CORE: whether int8 products are left to oneDNN, PyTorch decides by the processor and not by what oneDNN is held
    # to, and without VNNI oneDNN's overflow.
    libraries("AVX-512", "avx512", "AVX512_CORE_VNNI", "AVX512", (*AVX512, "avx512_vnni")),
    libraries("AVX-512 with bf16", "avx512", "AVX512_CORE_BF16", "AVX512", (*AVX512, "avx512_vnni", "avx512_bf16")),
    libraries(
        "AMX", "avx512", "AVX512_CORE_AMX", "AVX512", (*AVX512, "avx512_bf16", "amx_tile", "amx_bf16", "amx_int8")
    ),
)
COMPILED = (
    compiled("x86-64-v2", "sse4_2", "ssse3", "popcnt"),
    compiled("x86-64-v3", *AVX2, "bmi1", "movbe", "abm"),
    compiled("x86-64-v4", *AVX512, "avx512cd"),
    compiled("native"),
)


def flags_of_this_processor() -> set[str]:
    """As Linux names them; elsewhere none are known, and only what needs none is run."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    return {flag for line in lines if line.startswith("flags") for flag in line.partition(":")[2].split()}


def passes(level: Level, tests: tuple[str, ...]) -> bool:
    """Whether the tests pass at this level, in a process of their own; libraries compiled before are not used."""
    with tempfile.TemporaryDirectory(prefix="fleetune-cache-") as cache:
        environment = {**os.environ, "FLEETUNE_CACHE": cache, **level.settings}
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests]
        began = time.monotonic()
        done = subprocess.run(command, cwd=TESTS.parent, env=environment, check=False)
    result = "passed" if done.returncode == 0 else "FAILED"
    print(f"{level.name}: {result} after {time.monotonic() - began:.0f} s", flush=True)
    return done.returncode == 0


def main() -> int:
    """0 if all that could be run has passed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="few tests at each level")
    short = parser.parse_args().short
    plan = [(level, SHORT if short else NUMERIC) for level in LIBRARIES]
    plan += [
        (level, ("tests/models/test_kernels.py",)) for level in COMPILED if not short or level.flags
    ]  # native: make test
    present, failed = flags_of_this_processor(), 0
    for level, tests in plan:
        lacking = [flag for flag in level.flags if flag not in present]
        if lacking:
            print(f"{level.name}: left out, this processor lacks {', '.join(lacking)}", flush=True)
        else:
            failed += not passes(level, tests)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
