"""Compiled kernels beside PyTorch's, and layers that share an input beside the same layers one by one."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fleetune.engine.launch.resolve import resolve_execution
from fleetune.errors import UserError
from fleetune.models import kernels
from fleetune.models.config import LoRAConfig
from fleetune.models.decoder import Linear
from fleetune.models.fused import attention, cross_entropy, rms_norm, rotary, swiglu
from fleetune.models.lora import AdaptedLinear, linears
from fleetune.models.network import Network
from fleetune.models.project import Projection, project
from fleetune.models.submodel import Submodel
from fleetune.spec.run_config import ExecutionConfig
from fleetune.training import device
from support import random_models as models
from support import runs, tiny

PIECES: dict[str, Callable[..., tuple[Tensor, ...]]] = {
    "rms_norm": lambda x, gain: rms_norm(x, gain, 1e-6),
    "rotary": lambda *given: (rotary(*given),),
    "swiglu": lambda *given: (swiglu(*given),),
    "cross_entropy": lambda *given: (cross_entropy(*given),),
    "attention": lambda *given: (attention(*given, scale=0.3),),
}
LEAVES = {"swiglu": 2, "attention": 3}
"""How many of a piece's inputs have a gradient; the others have one such input."""
BY_ROW = ("rms_norm", "rotary", "swiglu")
"""Pieces without differences of near numbers, so that every row is right by itself, however small."""
TOKENS_AND_SIZES = ((1, 2), (7, 10), (16, 16), (40, 34), (130, 64))


@pytest.fixture
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where kernels are compiled; afterwards PyTorch is used again."""
    path = device.default_cache_dir() / "kernels"
    try:
        kernels.load(path)
    except kernels.KernelsUnavailable as error:
        pytest.skip(str(error))
    yield path
    kernels.use(None)


def inputs(piece: str, *, tokens: int = 7, size: int = 10, seed: int = 0) -> list[Tensor]:
    """Odd sizes, so that vectors have a rest; heads as a projection lays them out."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return 3 * torch.randn(*shape, generator=generator)

    if piece == "rms_norm":
        return [random(2, tokens, size + 9), random(size + 9)]
    if piece == "swiglu":  # rows of gates between 0.3 and 30: bent, and as good as straight
        magnitudes = 10.0 ** torch.randint(-1, 2, (2, tokens, 1), generator=generator)
        return [magnitudes * random(2, tokens, size + 9), random(2, tokens, size + 9)]
    if piece == "cross_entropy":
        return [random(2 * tokens, size + 9), torch.randint(size + 9, (2 * tokens,), generator=generator)]
    angle = random(1, 1, tokens, size // 2).repeat(1, 1, 1, 2)
    if piece == "attention":  # four heads to two of keys and values, which lie beside each other
        keys, values = random(9, tokens, 2, 2 * size).chunk(2, -1)
        return [random(9, tokens, 4, size), keys, values, angle.cos(), angle.sin()]
    return [random(2, tokens, 3, size).transpose(1, 2), angle.cos(), angle.sin()]


def worked_out(piece: str, given: list[Tensor], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Outputs and gradients of a piece, all its outputs being used, in this type."""
    given = [t.to(dtype, copy=True) if t.is_floating_point() else t for t in given]
    leaves = given[: LEAVES.get(piece, 1)]
    for leaf in leaves:
        leaf.requires_grad_()
    out = PIECES[piece](*given)
    generator = torch.Generator().manual_seed(1)
    grads = [torch.randn(o.shape, generator=generator).to(dtype) for o in out]
    return [*(o.detach() for o in out), *torch.autograd.grad(out, leaves, grads)]


def errors(found: Tensor, exact: Tensor, *, by_row: bool = False) -> Tensor:
    """The largest error and the error's norm, in fp32's last places of the largest entry (of the row) and of the norm.

    Entries and norms count as a tenth at least: over one token, attention's gradients are zero.
    """
    error = found - exact
    if by_row:
        largest = (error.abs().amax(-1) / exact.abs().amax(-1).clamp_min(0.1)).max()
    else:
        largest = error.abs().max() / exact.abs().max().clamp_min(0.1)
    return torch.stack([largest, error.norm() / exact.norm().clamp_min(0.1)]) / torch.finfo(torch.float32).eps


def as_near_as_pytorch(
    ours: list[Tensor], torchs: list[Tensor], exact: list[Tensor], *, by_row: bool = False, message: str = ""
) -> None:
    """Ours are off the fp64 values by twice as much as PyTorch's in fp32 and eight last places at most.

    Which of two fp32 results comes nearer is chance, and PyTorch's is another one at each of a processor's instruction levels.
    """
    for found, theirs, right in zip(ours, torchs, exact, strict=True):
        most = 2 * errors(theirs, right, by_row=by_row) + 8
        assert (errors(found, right, by_row=by_row) <= most).all(), message


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("piece", PIECES)
def test_compiled_pieces_are_as_near_to_the_exact_ones_as_pytorchs(piece: str, seed: int, folder: Path):
    for tokens, size in TOKENS_AND_SIZES:
        given = inputs(piece, tokens=tokens, size=size, seed=seed)
        kernels.use(None)
        torchs, exact = worked_out(piece, given), worked_out(piece, given, torch.float64)
        kernels.use(folder)
        ours = worked_out(piece, given)
        as_near_as_pytorch(ours, torchs, exact, by_row=piece in BY_ROW, message=f"{tokens} tokens of {size}")


@pytest.mark.parametrize("piece", PIECES)
def test_threads_do_not_change_a_bit(piece: str, folder: Path):
    kernels.use(folder)
    given = inputs(piece, tokens=3 * kernels.ROWS_PER_THREAD + 1)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = worked_out(piece, given)
        torch.set_num_threads(3)
        three = worked_out(piece, given)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(one, three, strict=True))


def test_the_gate_far_from_zero(folder: Path):
    """silu(x) -> x and -> 0; what is not a number stays so, and infinity too."""
    gate = torch.tensor([[-1e30, -200.0, -80.0, 0.0, 80.0, 200.0, 1e30, float("nan"), float("inf")]])
    expected = worked_out("swiglu", [gate, torch.ones_like(gate)])
    kernels.use(folder)
    ours = worked_out("swiglu", [gate, torch.ones_like(gate)])
    torch.testing.assert_close(ours[0][:, :7], expected[0][:, :7], rtol=1e-6, atol=1e-8)
    assert ours[0][0, 7].isnan()
    assert ours[0][0, 8].isinf()


@pytest.mark.parametrize("tokens", [1, 16, 40, kernels.MAX_TOKENS, kernels.MAX_TOKENS + 1])
def test_attention_of_any_length(tokens: int, folder: Path):
    """One token, whole tiles and not, and longer than the compiled one takes."""
    given = inputs("attention", tokens=tokens, size=8)
    torchs, exact = worked_out("attention", given), worked_out("attention", given, torch.float64)
    kernels.use(folder)
    as_near_as_pytorch(worked_out("attention", given), torchs, exact)


def test_attention_sees_nothing_that_comes_later(folder: Path):
    """To the bit; and scores thousands apart do no harm."""
    kernels.use(folder)
    q, k, v, cos, sin = inputs("attention", tokens=21)
    before = attention(1000 * q, k, v, cos, sin, 1.0)
    k[:, 13:], v[:, 13:] = 1e3, -1e3
    after = attention(1000 * q, k, v, cos, sin, 1.0)
    assert before.isfinite().all()
    assert torch.equal(before[:, :13], after[:, :13])
    assert not torch.equal(before[:, 13:], after[:, 13:])


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_a_network_gives_the_same_with_either(architecture: str, folder: Path):
    """Logits and the embeddings' gradient: biases, head norms, heads that share keys."""
    base = models.base_of(architecture)
    wide = replace(base, weights={name: weight.double() for name, weight in base.weights.items()})
    results = []
    for choice, of in ((folder, base), (None, base), (None, wide)):
        kernels.use(choice)
        network = Network(of, Submodel.prefix(of.num_layers), LoRAConfig(rank=2))
        h = network.embed(models.random_ids(2, 9)).requires_grad_()
        logits = network.logits(network.blocks(h))
        (gradient,) = torch.autograd.grad(logits.mean(), h)
        results.append([logits.detach(), gradient])
    as_near_as_pytorch(*results)


@pytest.mark.usefixtures("folder")
def test_a_run_learns_the_same_with_either():
    """Three rounds of fedit by SGD: the global adapter to a few roundings, and not to the bit, or nothing was compiled."""
    sgd = {"local.optimizer": "sgd", "local.learning_rate": 0.5}
    compiled, torchs = (
        runs.run(tiny.spec({**sgd, "execution.kernels": choice})).state.tensors for choice in ("compiled", "torch")
    )
    runs.close_tensors(compiled, torchs, rtol=1e-4, atol=1e-6)
    assert any(not torch.equal(compiled[name], torchs[name]) for name in torchs)


# -- layers that share an input ---------------------------------------------------------------------------------------
SIZES = (6, 4, 5)


def layers_of(ranks: tuple[int, ...], *, num_clients: int = 2, size: int = 8) -> list[nn.Module]:
    """Linear layers of unequal outputs with biases and adapters of these ranks (0: none)."""
    generator = torch.Generator().manual_seed(1)
    out: list[nn.Module] = []
    for num_out, rank in zip(SIZES, ranks, strict=True):
        base = Linear(
            *(torch.randn(*s, generator=generator, dtype=torch.float64) for s in ((num_out, size), (num_out,)))
        )
        layer: nn.Module = base
        if rank:
            layer = AdaptedLinear(base, scaling=0.5)
            for name, shape in (("lora_A", (num_clients, rank, size)), ("lora_B", (num_clients, num_out, rank))):
                factor = torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()
                setattr(layer, name, factor)
        out.append(layer)
    return out


def factors_of(layers: list[nn.Module]) -> list[Tensor]:
    adapted = [layer for layer in layers if isinstance(layer, AdaptedLinear)]
    return [t for layer in adapted for t in (layer.lora_A, layer.lora_B) if t is not None]


@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("ranks", [(2, 0, 3), (0, 0, 0), (1, 1, 1), (0, 4, 0)])
@pytest.mark.parametrize("reads_gradient", [True, False])
def test_together_as_one_by_one(ranks: tuple[int, ...], with_residual: bool, reads_gradient: bool):
    """Outputs and all gradients, by clients of unequal adapters, with and without a residual and a gradient of the input."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(4, 3, 8, generator=generator, dtype=torch.float64, requires_grad=reads_gradient)
    residual = (
        torch.randn(4, 3, 6, generator=generator, dtype=torch.float64, requires_grad=True) if with_residual else None
    )
    results = []
    for together in (True, False):
        layers = layers_of(ranks)
        if together:
            ys = linears(x, layers, residual)
        else:
            first, *others = (layer(x) for layer in layers)
            ys = (first if residual is None else residual + first, *others)
        leaves = [t for t in (x, residual, *factors_of(layers)) if t is not None and t.requires_grad]
        loss = sum((n + 1) * (y * y).sum() for n, y in enumerate(ys))
        grads = torch.autograd.grad(loss, leaves) if leaves else ()
        results.append(([y.detach() for y in ys], grads, [y.requires_grad for y in ys]))
    assert results[0][2] == results[1][2]
    for ours, plain in zip(results[0][0] + list(results[0][1]), results[1][0] + list(results[1][1]), strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-12)


def test_an_output_that_nobody_reads_has_no_gradient():
    """A loss over one of two adapted layers: the other's factors get zeros."""
    x = torch.ones(1, 2, 3, requires_grad=True)
    a, b = (torch.ones(*shape, requires_grad=True) for shape in ((1, 1, 3), (1, 2, 1)))
    layers = [Projection(torch.eye(3)[:2], None, a, b), Projection(torch.eye(3)[:2], None, a, b)]
    project(x, layers)[1].sum().backward()
    assert x.grad is not None
    assert b.grad is not None
    assert x.grad.flatten().tolist() == [3.0, 3.0, 2.0] * 2  # 1 of the eye, and 1 from each row of B
    assert b.grad.flatten().tolist() == [6.0, 6.0]  # two tokens, x A^T = 3


# -- the choice ---------------------------------------------------------------------------------------------------------
def resolved(**execution: str) -> ExecutionConfig:
    spec = tiny.spec({f"execution.{name}": value for name, value in {"kernels": "auto", **execution}.items()})
    return resolve_execution(spec, node_cores=[2], node_gpus=[0]).execution


def test_auto_is_what_the_machine_can(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    assert resolved().kernels == "compiled"
    assert resolved(precision="bf16").kernels == "torch"
    assert resolved(kernels="torch").kernels == "torch"
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("FLEETUNE_CACHE", str(tmp_path))
    assert resolved().kernels == "torch"
    with pytest.raises(UserError, match=r"no C compiler.*\n?.*execution.kernels"):
        device.set_up("cpu", "compiled")


def test_compiled_kernels_are_refused_where_they_are_of_no_use():
    with pytest.raises(UserError, match="fp32 on processors"):
        resolved(kernels="compiled", precision="bf16")


UNHELPFUL = {
    "rejects a flag": ("echo \"error: bad value 'native' for '-march='\" >&2; exit 1", "bad value 'native'"),
    "fails without a word": ("echo >&2; exit 3", "it ended with 3"),
    "says what is no text": ("printf '\\377\\376' >&2; exit 1", "gave no library"),
    "is killed": ("kill -9 $$", "it ended with -9"),
    "writes nothing": ("exit 0", "No such file"),
    "writes no library": ('while [ "$1" != -o ]; do shift; done; echo nonsense > "$2"', "gave no library"),
    "leaves everything out": ('while [ "$1" != -o ]; do shift; done; REAL -shared -o "$2" -x c /dev/null', "rms_norm"),
    "hangs": ("exec sleep 60", "took longer than 0.2 seconds"),
}


def compiler(folder: Path, script: str) -> Path:
    """A program that stands for the C compiler."""
    path = folder / "fake-cc"
    path.write_text(f"#!/bin/sh\n{script.replace('REAL', shutil.which('cc') or 'cc')}\n")
    path.chmod(0o755)
    return path


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("fault", UNHELPFUL)
def test_whatever_the_compiler_does_pytorchs_operators_are_there(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """auto goes on with them; who asks for compiled ones is told the compiler and why."""
    script, reason = UNHELPFUL[fault]
    monkeypatch.setenv("CC", str(compiler(tmp_path, script)))
    monkeypatch.setenv("FLEETUNE_CACHE", str(tmp_path))
    if fault == "hangs":
        monkeypatch.setattr(kernels, "COMPILER_SECONDS", 0.2)
    assert resolved().kernels == "torch"
    with pytest.raises(kernels.KernelsUnavailable, match=f"fake-cc gave no library.*{reason}|fake-cc {reason}"):
        kernels.load(tmp_path / "kernels")
    with pytest.raises(UserError, match=r"execution\.kernels"):
        device.set_up("cpu", "compiled")
    assert not list((tmp_path / "kernels").iterdir()) or fault in ("writes no library", "leaves everything out")


@pytest.mark.parametrize(
    ("machine", "flag"),
    [("x86_64", "-march=native"), ("AMD64", "-march=native"), ("aarch64", "-mcpu=native"), ("arm64", "-mcpu=native")],
)
def test_a_machine_is_asked_for_by_its_own_flag(
    machine: str, flag: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """-march=native is x86's; on Arm not every compiler knows it."""
    monkeypatch.setenv("CC", str(compiler(tmp_path, 'echo "$@" >&2; exit 1')))
    monkeypatch.setattr(kernels.platform, "machine", lambda: machine)
    monkeypatch.delenv(kernels.TARGET, raising=False)
    with pytest.raises(kernels.KernelsUnavailable) as refused:
        kernels.load(tmp_path / "kernels")
    assert [word for word in str(refused.value).split() if word.startswith("-m")] == [flag]


def test_a_target_has_a_library_of_its_own(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """What was compiled for another processor is not taken for this one's; an unknown one is refused by the compiler."""
    made = {}
    for target in ("native", ""):
        monkeypatch.setenv(kernels.TARGET, target)
        made[target] = kernels.load(tmp_path)
    assert made["native"] is made[""]
    assert len(list(tmp_path.glob("*.so"))) == 1
    monkeypatch.setenv(kernels.TARGET, "x86-64-v9")
    with pytest.raises(kernels.KernelsUnavailable, match="x86-64-v9"):
        kernels.load(tmp_path)


@pytest.mark.parametrize("content", [b"", b"no library"])
def test_a_damaged_library_is_compiled_again(content: bytes, folder: Path, tmp_path: Path):
    kernels.load(folder)
    for library in folder.glob("*.so"):
        (tmp_path / library.name).write_bytes(content)
    kernels.load(tmp_path)
    assert any(library.read_bytes() != content for library in tmp_path.glob("*.so"))


def test_pytorch_computes_at_the_level_that_it_is_held_to():
    """tests/processors.py asks for one."""
    told = os.environ.get("ATEN_CPU_CAPABILITY")
    assert told is None or torch.backends.cpu.get_cpu_capability() == told.upper()
