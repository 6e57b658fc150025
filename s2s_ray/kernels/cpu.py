"""Generation's costly operations on a CPU, in C: products in fp32 and int8, attention of one new position.

torch's own int8 product (`quantized.linear_dynamic`) has one scale for all rows, so that a row's result would depend on
its neighbours. The source is compiled once per machine, by the C compiler found there, into the user's cache folder;
without one, or with S2S_RAY_CPU_KERNELS=0, everything runs on plain torch and gives the same tokens.

Dimensions: N rows, I inputs, O outputs.
"""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_LOG = logging.getLogger(__name__)
_SOURCE = Path(__file__).with_name("cpu.c")
_FLAGS = ("-O3", "-march=native", "-fPIC", "-fopenmp", "-std=gnu11")
_PANEL, _PAIR = 32, 2  # outputs and units of 4 bytes; as in cpu.c
_ACTIVATIONS = {"none": 0, "relu": 1, "gelu": 2, "gelu_tanh": 3, "silu": 4}


class Part(ctypes.Structure):
    """As in cpu.c; see `part`."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("keys", "values", "lengths", "places")),
        *((name, ctypes.c_int64) for name in ("rows", "width", "capacity", "age")),
    )


class _Attention(ctypes.Structure):
    _fields_ = (
        ("parts", ctypes.POINTER(Part)),
        *((name, ctypes.c_int) for name in ("part_count", "heads", "size")),
        ("scale", ctypes.c_float),
        *((name, ctypes.c_void_p) for name in ("query", "key", "value")),
        ("stride", ctypes.c_long),
        ("table", ctypes.c_void_p),
        ("table_length", ctypes.c_int),
        ("out", ctypes.c_void_p),
    )


class _Linear(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("panels", "scales", "bias")),
        *((name, ctypes.c_int) for name in ("width", "outputs", "activation")),
    )


@functools.cache
def library() -> Any | None:
    """The compiled functions, or None where they cannot be had; says why once, in the log."""
    if os.environ.get("S2S_RAY_CPU_KERNELS") == "0":
        return None
    try:
        found = ctypes.CDLL(str(_built()))
    except (OSError, subprocess.SubprocessError) as error:
        _LOG.warning("the CPU kernels could not be built, so generation runs on plain torch: %s", error)
        return None
    pointer = ctypes.c_void_p
    found.add_norm.argtypes = (*[pointer] * 5, ctypes.c_long, ctypes.c_long, ctypes.c_float)
    if found.has_float():
        product = (ctypes.POINTER(_Linear), pointer, ctypes.c_long, ctypes.c_long)
        found.linear.argtypes = (*product, pointer)
        found.linear_best.argtypes = (*product, ctypes.c_int, pointer, pointer, pointer)
    return found


def _built() -> Path:
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise OSError("no C compiler (cc, gcc or $CC) was found")
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True, timeout=60).stdout
    described = (_SOURCE.read_bytes(), version, " ".join(_FLAGS).encode(), _processor().encode())
    digest = hashlib.sha256(b"\0".join(described)).hexdigest()[:16]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "s2s_ray" / "kernels"
    target = folder / f"cpu-{digest}.so"
    if target.exists():
        return target
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        # Linked without -fopenmp, so that the functions share the threads of the OpenMP that torch has loaded.
        steps = (
            [compiler, *_FLAGS, "-c", str(_SOURCE), "-o", f"{scratch}/cpu.o"],
            [compiler, "-shared", f"{scratch}/cpu.o", "-lm", "-o", f"{scratch}/cpu.so"],
        )
        for step in steps:
            done = subprocess.run(step, capture_output=True, text=True, timeout=120)
            if done.returncode:
                raise OSError(f"{' '.join(step)}: {done.stderr.strip()[-400:]}")
        Path(f"{scratch}/cpu.so").replace(target)  # another process may have been as fast: both are the same
    return target


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.machine())


@functools.cache
def keep_memory() -> None:
    """Let this process keep the memory that it frees, up to 1 GiB: a step's buffers then come without page faults."""
    if (found := library()) is not None:
        found.keep_memory()


def use_threads(count: int) -> None:
    """How many threads the operations of the calling thread use from now on: torch's, MKL's and ours. It leaves alone
    what torch.set_num_threads would set for the whole process.
    """
    torch.get_num_threads()  # a thread's first question sets its number to the process's
    library().use_threads(count)  # type: ignore[union-attr]
    if (mkl := _mkl()) is not None:
        mkl(count)


@functools.cache
def _mkl() -> Any | None:
    found = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        return ctypes.CDLL(str(found)).MKL_Set_Num_Threads_Local
    except (OSError, AttributeError):  # another system, or a torch without MKL
        return None


@functools.cache
def has_float() -> bool:
    """Whether `pack_float` can be called."""
    found = library()
    return found is not None and bool(found.has_float())


@functools.cache
def _has_int8() -> bool:
    found = library()
    return found is not None and bool(found.has_int8())


def pack_float(weight: Tensor, bias: Tensor | None, *, activation: str = "none") -> Callable[[Tensor], Tensor]:
    """A projection fp32 `[..., I]` to `[..., O]`, weight `[O, I]`, whose sums run over the inputs in their order."""
    return Product(_panels(weight, 1), None, bias, weight.shape, activation)


def pack_int8(weight: Tensor, bias: Tensor | None, *, activation: str = "none") -> Callable[[Tensor], Tensor]:
    """A projection fp32 `[..., I]` to `[..., O]` in int8: weight `[O, I]` with a scale per output, the input with one
    per row (both symmetric, 127 levels to each side), sums in int32, bias and activation in fp32.
    """
    scales = weight.abs().amax(dim=1).clamp(min=1e-12) / 127.0
    codes = (weight / scales[:, None]).round().to(torch.int8)
    bias = None if bias is None else bias.float().contiguous()
    if not _has_int8():
        return functools.partial(_int8_in_torch, codes=codes.t(), scales=scales, bias=bias, activation=activation)
    unsigned = (_panels(codes, 4).to(torch.int16) + 128).to(torch.uint8)
    return Product(unsigned, scales.contiguous(), bias, weight.shape, activation)


def _panels(weight: Tensor, together: int) -> Tensor:
    """`[O, I]` to `[O / 32, I / together, 32, together]`, padded with zeros."""
    outputs, inputs = weight.shape
    padded = torch.nn.functional.pad(weight, (0, -inputs % (_PAIR * together), 0, -outputs % _PANEL))
    return padded.unflatten(1, (-1, together)).unflatten(0, (-1, _PANEL)).transpose(1, 2).contiguous()


class Product:
    """A compiled projection; holds what the C side points to."""

    def __init__(
        self, panels: Tensor, scales: Tensor | None, bias: Tensor | None, shape: Sequence[int], activation: str
    ) -> None:
        self._held = [panels, scales, None if bias is None else bias.contiguous()]
        pointers = (None if t is None else t.data_ptr() for t in self._held)
        self._outputs, self._inputs = shape
        self._linear = _Linear(*pointers, self._inputs, self._outputs, _ACTIVATIONS[activation])
        self._library: Any = library()

    def __call__(self, x: Tensor) -> Tensor:
        rows = x if x.dim() == 2 else x.reshape(-1, self._inputs)
        if rows.stride(1) != 1:
            rows = rows.contiguous()
        out = x.new_empty(*x.shape[:-1], self._outputs)
        self._library.linear(self._linear, rows.data_ptr(), rows.stride(0), rows.shape[0], out.data_ptr())
        return out

    def best(self, x: Tensor, count: int, *, normaliser: bool) -> tuple[Tensor, Tensor, Tensor | None]:
        """The greatest outputs of each row of x `[N, I]`: as `selection.best`, of equals the first; no row of all
        outputs is written. A NaN counts as infinity.
        """
        x, count = x.contiguous(), min(count, self._outputs)
        values, tokens = x.new_empty(len(x), count), x.new_empty(len(x), count, dtype=torch.int64)
        total = x.new_empty(len(x)) if normaliser else None
        pointers = (None if t is None else t.data_ptr() for t in (values, tokens, total))
        self._library.linear_best(self._linear, x.data_ptr(), x.stride(0), len(x), count, *pointers)
        return values, tokens, total


def _int8_in_torch(x: Tensor, *, codes: Tensor, scales: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    from s2s_ray.nn.linear import ACTIVATIONS  # it imports this module

    rows = x.reshape(-1, x.shape[-1])
    most = rows.abs().amax(dim=1, keepdim=True)
    inverse = torch.where(most > 0, torch.tensor(127.0) / most, 0.0)  # `127.0 / most` would round twice
    total = torch._int_mm((rows * inverse).round().to(torch.int8), codes)
    y = total.float() * (most / 127.0 * scales)
    y = y if bias is None else y + bias
    return ACTIVATIONS[activation](y).unflatten(0, x.shape[:-1])


def part(
    keys: Tensor,
    values: Tensor,
    *,
    rows: int,
    width: int,
    age: int = 0,
    lengths: Tensor | None = None,
    places: Tensor | None = None,
) -> Part:
    """One cohort's cache of one layer, keys and values `[rows x heads, capacity, size]`.

    Either lengths int32 `[rows]`: positions of each row; or a history of `age` positions, to which one is added, and
    places int32 `[rows, width, age + 1]` where width is not 1: which of a position's entries a sequence sees. The
    tensors must outlive the part.
    """
    pointers = (None if t is None else t.data_ptr() for t in (keys, values, lengths, places))
    return Part(*pointers, rows, width, keys.shape[1], age)


def attend(
    parts: Sequence[Part],
    query: Tensor,
    key: Tensor | None = None,
    value: Tensor | None = None,
    *,
    heads: int,
    scale: float,
    table: Tensor | None = None,
) -> Tensor:
    """query fp32 `[N, heads x size]` of the newest position to its attention output; key and value, of the same shape
    and strides, are first put into the parts. table `[heads, P]`: see `Backbone.position_tables`.
    """
    out = query.new_empty(query.shape)  # contiguous, which a slice of a wider product is not
    arguments = _Attention(
        (Part * len(parts))(*parts),
        len(parts),
        heads,
        query.shape[1] // heads,
        scale,
        query.data_ptr(),
        None if key is None else key.data_ptr(),
        None if value is None else value.data_ptr(),
        query.stride(0),
        None if table is None else table.data_ptr(),
        0 if table is None else table.shape[-1],
        out.data_ptr(),
    )
    library().attend(ctypes.byref(arguments))  # type: ignore[union-attr]
    return out


def add_norm(x: Tensor, y: Tensor, norm: torch.nn.LayerNorm) -> Tensor:
    """`norm(x + y)`, all fp32, x and y `[..., D]`."""
    x, y = x.contiguous(), y.contiguous()
    out = torch.empty_like(x)
    width = x.shape[-1]
    pointers = (None if t is None else t.data_ptr() for t in (x, y, norm.weight, norm.bias, out))
    library().add_norm(*pointers, x.numel() // width, width, norm.eps)  # type: ignore[union-attr]
    return out
