"""What `torch.compile` would make of a decode step on this CPU, which Chorus does not use.

    python -m bench.compiled [--json] [--dtypes int8 bf16] [--rows 1 32]

Weights are random and of full size; 64 cached tokens, one thread. The transformer's whole pass is compiled for its
shapes, around products that stay as they are: the compiler cannot take packed weights that it did not pack itself, nor
FBGEMM's. Each layer has a cache of its own: of one tensor for all, what is compiled copies all of it at each layer.

`ms`, `ratio`: CPU time of a pass, both ways in turn, the least of the rounds; below 1 the compiled one is faster.
`compile_s`: by the wall, with nothing kept from before. `reload_s`: again, with what the compiler kept on the disk.
`error`: of the state, to the eager one's. `same_alone`: a row's bits are the same for each number of rows.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import torch
from torch import Tensor
from torch._inductor.cpp_builder import get_cpp_compiler
from torch._inductor.exc import InvalidCxxCompiler
from torch._inductor.utils import fresh_cache

from bench.engine import DTYPES, Dtype
from bench.report import metadata
from service.engines.chattts.checkpoint import SIZES, make_checkpoint
from service.engines.chattts.gpt import Gpt
from service.engines.chattts.linear import Linear
from service.engines.chattts.load import load_weights

ROWS = (1, 8, 32)
LENGTH, SPAN = 512, 64
ROUNDS, PASSES = 10, 3
LINEARS = ("qkv", "out", "gate_up", "down")

Pass = Callable[[], Tensor]
Figures = dict[str, Any]

_products: list[Linear] = []
_library = torch.library.Library("chorus_bench", "DEF")
_library.define("product(Tensor x, SymInt number, SymInt outputs) -> Tensor")
_library.impl("product", lambda x, number, outputs: _products[number](x), "CPU")
_library.impl("product", lambda x, number, outputs: x.new_empty(*x.shape[:-1], outputs), "Meta")


class _Opaque:
    """A product that the compiler calls as it is."""

    def __init__(self, product: Linear, inputs: int, dtype: torch.dtype) -> None:
        self._number = len(_products)
        self._outputs = product(torch.zeros(1, inputs, dtype=dtype)).shape[-1]
        _products.append(product)

    def __call__(self, x: Tensor) -> Tensor:
        y: Tensor = torch.ops.chorus_bench.product(x, self._number, self._outputs)
        return y


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=DTYPES)
    parser.add_argument("--rows", nargs="+", type=int, default=ROWS)
    parser.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if not has_compiler():
        parser.exit(1, "there is no C++ compiler, without which torch compiles nothing\n")
    torch.set_num_threads(1)
    weights = "tiny" if args.tiny else "full"
    with TemporaryDirectory() as folder, torch.inference_mode():
        make_checkpoint(Path(folder), SIZES[weights])
        measured = {dtype: measure(Path(folder), dtype, args.rows) for dtype in args.dtypes}
    report = metadata() | {"torch": torch.__version__, "threads": 1, "weights": weights} | measured
    print(json.dumps(report) if args.json else "\n".join(f"{key:<10} {value}" for key, value in report.items()))


def has_compiler() -> bool:
    """Whether torch finds what it needs."""
    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        return False
    return True


def measure(folder: Path, dtype: Dtype, rows: Sequence[int]) -> Figures:
    """A type's figures, by rows."""
    weights = load_weights(folder, "cpu", dtype, check_sums=False)
    hidden, most = weights.dimensions.hidden, max(rows)
    eager = Gpt(weights, most, LENGTH)
    eager._cache.normal_(generator=torch.Generator().manual_seed(0))
    opaque = _opaque(eager, dict.fromkeys(LINEARS, hidden) | {"down": _inner(eager, hidden, weights.dtype)})
    inputs = torch.randn(most, hidden, generator=torch.Generator().manual_seed(1)).to(weights.dtype)
    positions = SPAN - 1 - torch.arange(most) % 16
    figures: Figures = {}
    alone: list[tuple[Tensor, ...]] = []
    for count in rows:
        given = (inputs[:count], positions[:count], SPAN)
        with fresh_cache():
            compile_s, _ = _compiled(opaque, *given)
            reload_s, compiled = _compiled(opaque, *given)
            ms = _take_turns(lambda given=given: eager.decode(*given), compiled)  # type: ignore[misc]
            states = eager.decode(*given), compiled()
        alone.append(tuple(state[0] for state in states))
        figures[str(count)] = {
            "ms": [round(each, 2) for each in ms],
            "ratio": round(ms[1] / ms[0], 3),
            "compile_s": round(compile_s, 1),
            "reload_s": round(reload_s, 1),
            "error": float(f"{float((states[1] - states[0]).norm() / states[0].norm()):.1e}"),
        }
    same = [all(torch.equal(found, way[0]) for found in way) for way in zip(*alone, strict=True)]
    return figures | {"same_alone": dict(zip(("eager", "compiled"), same, strict=True))}


def _inner(gpt: Gpt, hidden: int, dtype: torch.dtype) -> int:
    """The gate's width."""
    return gpt._layers[0].gate_up(torch.zeros(1, hidden, dtype=dtype)).shape[-1] // 2


def _opaque(gpt: Gpt, inputs: dict[str, int]) -> Gpt:
    """The same, as the compiler can take it."""
    dtype = gpt._norm.dtype
    taken = copy.copy(gpt)
    taken._layers = []
    for layer in gpt._layers:
        products: Figures = {name: _Opaque(getattr(layer, name), inputs[name], dtype) for name in LINEARS}
        taken._layers.append(replace(layer, **products))
    taken._cache = cast(Tensor, [cache.clone() for cache in gpt._cache])
    return taken


def _compiled(gpt: Gpt, inputs: Tensor, positions: Tensor, span: int) -> tuple[float, Pass]:
    """Seconds of the first call, and what calls it again."""
    torch._dynamo.reset()
    decode = torch.compile(Gpt.decode, dynamic=False)
    began = time.monotonic()
    decode(gpt, inputs, positions, span)
    return time.monotonic() - began, lambda: decode(gpt, inputs, positions, span)


def _take_turns(*ways: Pass) -> list[float]:
    """Each way's milliseconds."""
    found: list[list[float]] = [[] for _ in ways]
    for _ in range(ROUNDS):
        for way, times in zip(ways, found, strict=True):
            for _ in range(PASSES):
                began = time.process_time()
                way()
                times.append(1e3 * (time.process_time() - began))
    return [min(times) for times in found]


if __name__ == "__main__":
    main()
