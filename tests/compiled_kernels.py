"""Compiles every kernel to machine code for an H100, whether there is one or not, and prints their names.

The kernels' own wrappers are called, with a driver that only says what GPU it is.
"""

from __future__ import annotations

from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from service.engines.chattts import draw_kernel, kernels
from service.engines.chattts.sample import WINDOW, Sampling

H100 = GPUTarget("cuda", 90, 32)
ROWS, HEADS, SIZE, LENGTH = 4, 12, 64, 128


class Driver:
    """Of a GPU that nothing can run on."""

    def get_current_target(self) -> Any:
        return H100

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_only(function: Any, *args: Any, grid: Any, warmup: bool, **named: Any) -> None:
    kernel = run(function, *args, grid=grid, warmup=True, **named)
    assert len(kernel.asm["cubin"]) > 0
    print(function.__name__)


def compile_step(dtype: torch.dtype) -> None:
    x, weight = torch.zeros(ROWS, HEADS * SIZE, dtype=dtype), torch.zeros(HEADS * SIZE, dtype=dtype)
    kernels.norm(x, weight, 1e-5)
    kernels.add_norm(x, x, weight, 1e-5)
    kernels.gate(x)
    table, cache = torch.zeros(LENGTH, SIZE, dtype=dtype), torch.zeros(ROWS, HEADS, LENGTH, SIZE, dtype=dtype)
    positions = torch.zeros(ROWS, dtype=torch.int64)
    qkv = torch.zeros(ROWS, 3 * HEADS * SIZE, dtype=dtype)
    q = kernels.rotate_and_store(qkv, table, table, positions, cache, cache)
    for splits in (1, None):
        kernels.attend(q, cache, cache, positions, splits)


def compile_draw() -> None:
    numbers, factors = torch.zeros(ROWS, dtype=torch.int64), torch.ones(ROWS)
    given = Sampling(factors, factors, numbers, factors, numbers, numbers, numbers, numbers)
    recent = torch.zeros(ROWS, 4, WINDOW, dtype=torch.int64)
    draw_kernel.draw(torch.zeros(ROWS, 4, 626), recent, numbers, given, 625)


if __name__ == "__main__":
    run, JITFunction.run = JITFunction.run, compile_only
    driver.set_active(Driver())
    compile_step(torch.bfloat16)
    compile_draw()
