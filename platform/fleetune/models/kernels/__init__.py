"""The operations between a block's linear layers, compiled by this machine's C compiler: each is one pass over memory.

PyTorch needs two to five passes for the same, and a small model spends more time in those than its products can make up for.
`use` chooses for this process; `fleetune.models.fused` asks `takes` for every tensor. The two round differently, so the choice
is part of a run's spec (``execution.kernels``). fp32 on the CPU only. docs/design/benchmarks.md says when to delete this folder.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from fleetune import files

FOLDER = Path(__file__).parent
SOURCES, HEADERS = (FOLDER / "kernels.c", FOLDER / "attention.c"), (FOLDER / "exponential.h",)
FLAGS = ("-O3", "-fopenmp-simd", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")
TARGET = "FLEETUNE_KERNELS_TARGET"
"""Environment variable: what to compile for, by the compiler's name for it (``x86-64-v3``); unset: this processor."""
COMPILER_SECONDS = 60
"""A compiler that takes longer hangs; one second is usual."""
ROWS_PER_THREAD, HEADS_PER_THREAD = 64, 8
"""Rows, and heads of attention, that are worth handing to another thread; with fewer it costs more than it saves."""
MAX_TOKENS = 512
"""Longest sequence for the compiled attention; PyTorch computes longer ones in blocks that stay in the cache."""

_library: ctypes.CDLL | None = None


class KernelsUnavailable(RuntimeError):
    """This machine cannot compile or load the kernels; the message says why."""


def use(folder: Path | None) -> None:
    """From now on this process uses the compiled kernels, kept in ``folder``; None: PyTorch. Raises KernelsUnavailable."""
    global _library
    _library = None if folder is None else load(folder)


def takes(*tensors: Tensor) -> bool:
    """True if the compiled kernels work on these tensors."""
    return _library is not None and all(t.dtype is torch.float32 and t.device.type == "cpu" for t in tensors)


def load(folder: Path) -> ctypes.CDLL:
    """The library, compiled if ``folder`` does not hold it for this source, processor, compiler and target.

    Raises KernelsUnavailable, and then does so at once for as long as this process lives.
    """
    compiler = shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise KernelsUnavailable("there is no C compiler (cc, gcc or clang)")
    found = _attempt(folder, compiler, os.environ.get(TARGET) or "native")
    if isinstance(found, str):
        raise KernelsUnavailable(f"{compiler} gave no library: {found}")
    return found


@functools.cache
def _attempt(folder: Path, compiler: str, target: str) -> ctypes.CDLL | str:
    """The library, or the reason why there is none. A failure is remembered too: a compiler is not tried twice."""
    command = (compiler, *FLAGS, f"{_target_flag()}={target}")
    texts = [path.read_text() for path in (*SOURCES, *HEADERS)]
    key = hashlib.sha256("\n".join([*texts, *command, _processor()]).encode()).hexdigest()[:16]
    path = folder / f"{key}.so"
    with contextlib.suppress(OSError, AttributeError):  # it is not there yet, or damaged
        return _opened(path)
    try:
        _compile(command, path)
        return _opened(path)
    except subprocess.CalledProcessError as error:
        return next((line for line in error.stderr.splitlines() if line.strip()), f"it ended with {error.returncode}")
    except subprocess.TimeoutExpired:
        return f"it took longer than {COMPILER_SECONDS} seconds"
    except (OSError, AttributeError) as error:
        return str(error)


def _opened(path: Path) -> ctypes.CDLL:
    """The library in a file. Raises OSError if it cannot be loaded or is damaged, AttributeError if it lacks a function."""
    try:  # a loader does not notice a library that was cut off
        files.read(path, holds="a compiled library", must_be_sealed=True)
    except files.Damaged as error:
        raise OSError(str(error)) from None
    library = ctypes.CDLL(str(path))
    for name, types in _SIGNATURES.items():
        function = getattr(library, name)
        function.argtypes, function.restype = [_SIZE, _SIZE, *types], None
    return library


def _compile(command: tuple[str, ...], path: Path) -> None:
    """Compile to a scratch file and rename it, as several processes may do this at once."""
    with files.replacing(path) as scratch:
        subprocess.run(
            [*command, "-o", str(scratch), *map(str, SOURCES), "-lm"],
            check=True,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=COMPILER_SECONDS,
        )
        # A loader does not look at what follows the library.
        files.write(scratch, scratch.read_bytes() + files.BLANK.encode(), lasting=False)


def _target_flag() -> str:
    """Elsewhere than on x86, ``-march`` names an instruction set, and not every compiler finds out this machine's."""
    return "-march" if platform.machine().lower() in ("x86_64", "amd64", "i386", "i686") else "-mcpu"


def _processor() -> str:
    """The instructions that ``native`` compiles for: part of the key, as different machines may share a folder."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line for line in lines if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        return f"{platform.machine()} {platform.processor()}"


_SIZE, _NUMBER, _DATA = ctypes.c_int64, ctypes.c_float, ctypes.c_void_p
_SIGNATURES = {
    "rms_norm": (_SIZE, _DATA, _DATA, _NUMBER, _DATA, _DATA),
    "rms_norm_backward": (_SIZE, *(6 * [_DATA])),
    "rotate": (_SIZE, _SIZE, _SIZE, _DATA, _SIZE, _SIZE, _SIZE, _DATA, _DATA, _SIZE, _NUMBER, _DATA),
    "attention": (*(4 * [_SIZE]), _NUMBER, *(6 * [_DATA]), _SIZE, *(3 * [_DATA])),
    "attention_backward": (*(4 * [_SIZE]), _NUMBER, *(6 * [_DATA]), _SIZE, *(6 * [_DATA])),
    "swiglu": (_SIZE, _DATA, _DATA, _DATA),
    "swiglu_backward": (_SIZE, *(5 * [_DATA])),
    "cross_entropy": (_SIZE, *(4 * [_DATA])),
    "cross_entropy_backward": (_SIZE, *(5 * [_DATA])),
}


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Normed x (…, D), and 1 / rms (…, 1)."""
    x = x.contiguous()
    y, inverse = torch.empty_like(x), x.new_empty(*x.shape[:-1], 1)
    _run(
        "rms_norm", inverse.numel(), x.shape[-1], x.data_ptr(), weight.data_ptr(), eps, y.data_ptr(), inverse.data_ptr()
    )
    return y, inverse


def rms_norm_backward(g: Tensor, x: Tensor, weight: Tensor, inverse: Tensor, through: Tensor | None) -> Tensor:
    """The gradient of x (…, D): that of its norm from g (…, D), plus ``through`` (…, D), the gradient of x as the residual."""
    g, x = g.contiguous(), x.contiguous()
    through = None if through is None else through.contiguous()
    dx, beside = torch.empty_like(x), None if through is None else through.data_ptr()
    pointers = (t.data_ptr() for t in (g, x, weight, inverse))
    _run("rms_norm_backward", inverse.numel(), x.shape[-1], *pointers, beside, dx.data_ptr())
    return dx


def rotate(x: Tensor, cos: Tensor, sin: Tensor, sign: float) -> Tensor:
    """x (B, heads, S, d), whose d are adjacent in memory, turned by cos, sin (B or 1, 1, S, d); laid out as (B, S, heads, d)."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    cos, sin = cos.contiguous(), sin.contiguous()
    batch, heads, tokens, size = x.shape
    y = x.new_empty(batch, tokens, heads, size)
    strides = (x.stride(0), x.stride(2), x.stride(1))
    table = cos.stride(0) if cos.shape[0] > 1 else 0
    args = (tokens, heads, size, x.data_ptr(), *strides, cos.data_ptr(), sin.data_ptr(), table, sign, y.data_ptr())
    _run("rotate", batch * tokens, *args)
    return y.transpose(1, 2)


def attention(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Causal attention of q (B, S, heads, d) over k, v (B, S, kv heads, d), q and k turned by cos, sin (B or 1, 1, S, d).

    Returns (B, S, heads, d), and each query's largest score and 1 / the sum of its exponentials, (B, heads, S) both.
    """
    q, k, v = _dense_heads(q), _dense_heads(k), _dense_heads(v)
    cos, sin = cos.contiguous(), sin.contiguous()
    batch, tokens, heads, _ = q.shape
    out = q.new_empty(q.shape)
    largest, inverse = q.new_empty(batch, heads, tokens), q.new_empty(batch, heads, tokens)
    given = _attention_arguments(q, k, v, cos, sin, scale)
    pointers = (t.data_ptr() for t in (out, largest, inverse))
    _run("attention", batch * k.shape[2], *given, *pointers, rows_per_thread=HEADS_PER_THREAD)
    return out, largest, inverse


def attention_backward(
    g: Tensor, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, scale: float, largest: Tensor, inverse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v."""
    q, k, v, g = _dense_heads(q), _dense_heads(k), _dense_heads(v), g.contiguous()
    cos, sin = cos.contiguous(), sin.contiguous()
    dq, dk, dv = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    given = _attention_arguments(q, k, v, cos, sin, scale)
    pointers = (t.data_ptr() for t in (g, largest, inverse, dq, dk, dv))
    _run("attention_backward", len(q) * k.shape[2], *given, *pointers, rows_per_thread=HEADS_PER_THREAD)
    return dq, dk, dv


def _dense_heads(x: Tensor) -> Tensor:
    """(B, S, heads, d) in which a token's heads follow one another; sequences and tokens may have any stride."""
    return x if x.stride(3) == 1 and x.stride(2) == x.shape[3] else x.contiguous()


def _attention_arguments(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, scale: float) -> tuple[object, ...]:
    tokens, heads, size = q.shape[1:]
    strides = (ctypes.c_int64 * 6)(*(stride for x in (q, k, v) for stride in x.stride()[:2]))
    table = cos.stride(0) if cos.shape[0] > 1 else 0
    sizes = (tokens, k.shape[2], heads // k.shape[2], size)
    return (*sizes, scale, *(x.data_ptr() for x in (q, k, v)), strides, cos.data_ptr(), sin.data_ptr(), table)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) up, of equal shapes (…, D)."""
    gate, up = gate.contiguous(), up.contiguous()
    y = torch.empty_like(gate)
    _run("swiglu", gate.numel() // gate.shape[-1], gate.shape[-1], *(t.data_ptr() for t in (gate, up, y)))
    return y


def swiglu_backward(g: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of gate and up."""
    g, gate, up = g.contiguous(), gate.contiguous(), up.contiguous()
    d_gate, d_up = torch.empty_like(gate), torch.empty_like(up)
    pointers = (t.data_ptr() for t in (g, gate, up, d_gate, d_up))
    _run("swiglu_backward", gate.numel() // gate.shape[-1], gate.shape[-1], *pointers)
    return d_gate, d_up


def cross_entropy(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Losses (M,) of logits (M, V) at targets (M,) int64, and the log of each row's sum of exponentials (M,)."""
    logits, targets = logits.contiguous(), targets.contiguous()
    losses, log_sums = logits.new_empty(len(logits)), logits.new_empty(len(logits))
    pointers = (t.data_ptr() for t in (logits, targets, losses, log_sums))
    _run("cross_entropy", *logits.shape, *pointers)
    return losses, log_sums


def cross_entropy_backward(g: Tensor, logits: Tensor, targets: Tensor, log_sums: Tensor) -> Tensor:
    """The logits' gradient (M, V) from the losses' (M,)."""
    g, logits, targets = g.contiguous(), logits.contiguous(), targets.contiguous()
    d_logits = torch.empty_like(logits)
    pointers = (t.data_ptr() for t in (g, logits, targets, log_sums, d_logits))
    _run("cross_entropy_backward", *logits.shape, *pointers)
    return d_logits


def _run(name: str, rows: int, *args: object, rows_per_thread: int = ROWS_PER_THREAD) -> None:
    """Call a kernel for all rows, shared out over the threads that PyTorch's products have. ctypes lets go of the GIL."""
    function: Callable[..., None] = getattr(_library, name)
    threads = min(torch.get_num_threads(), max(1, rows // rows_per_thread))
    if threads == 1:
        function(0, rows, *args)
        return
    bounds = [rows * n // threads for n in range(threads + 1)]
    list(_pool(threads).map(lambda n: function(bounds[n], bounds[n + 1], *args), range(threads)))


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="fleetune-kernels")
