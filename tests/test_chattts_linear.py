"""Products with packed weights, against the plain ones."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear

from service.engines.chattts.decode import Decoder, Drawing, Row
from service.engines.chattts.linear import WEIGHT_LEVELS, has_int8, pack
from service.engines.chattts.load import Weights, load_weights
from service.engines.chattts.prompt import Prompt, Prompter

needs_int8 = pytest.mark.skipif(not has_int8(), reason="FBGEMM is for x86 with AVX2")
STEPS = 48


@pytest.fixture(scope="module")
def weights(tiny_checkpoint: Path) -> Weights:
    return load_weights(tiny_checkpoint, "cpu", "fp32", check_sums=False)


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def relative_error(found: Tensor, true: Tensor) -> float:
    return float((found - true).norm() / true.norm())


@pytest.mark.parametrize("shape", [(1, 192), (7, 192), (3, 5, 192)])
def test_packing_changes_no_more_than_rounding(shape: tuple[int, ...]) -> None:
    weight, x = normal(80, 192), normal(*shape, seed=1)
    assert relative_error(pack(weight)(x), linear(x, weight)) < 1e-6


def test_formats_that_are_not_packed_are_multiplied_as_they_are() -> None:
    weight, x = normal(80, 192).bfloat16(), normal(2, 192, seed=1).bfloat16()
    assert torch.equal(pack(weight)(x), linear(x, weight))


@needs_int8
class TestInt8:
    """The integer products."""

    @pytest.mark.parametrize("shape", [(1, 192), (7, 192), (3, 5, 192)])
    def test_it_is_near(self, shape: tuple[int, ...]) -> None:
        weight, x = normal(80, 192), normal(*shape, seed=1)
        assert relative_error(pack(weight, int8=True)(x), linear(x, weight)) < 0.025

    def test_it_is_what_rounding_to_levels_comes_to(self) -> None:
        weight, x = normal(80, 192, seed=2), normal(5, 192, seed=3)
        scale, peak = weight.abs().amax(1, keepdim=True) / WEIGHT_LEVELS, x.abs().amax(1, keepdim=True)
        whole = (x / peak * 127).round() @ (weight / scale).round().T
        assert relative_error(pack(weight, int8=True)(x), whole * peak / 127 * scale.T) < 1e-5

    def test_the_greatest_numbers_do_not_overflow(self) -> None:
        weight, x = torch.ones(16, 192), torch.ones(1, 192)
        assert torch.allclose(pack(weight, int8=True)(x), linear(x, weight))
        assert torch.allclose(pack(-weight, int8=True)(x), linear(x, -weight))

    def test_a_row_is_the_same_bit_for_bit_in_any_company(self) -> None:
        product, x = pack(normal(80, 192), int8=True), normal(9, 192, seed=1)
        x[4] *= 1000
        assert torch.equal(product(x), torch.cat([product(row[None]) for row in x]))

    def test_nothing_stays_nothing(self) -> None:
        assert not pack(normal(80, 192), int8=True)(torch.zeros(2, 192)).any()
        assert not pack(torch.zeros(80, 192), int8=True)(normal(2, 192)).any()

    def test_the_model_says_much_the_same(self, weights: Weights) -> None:
        exact, rounded = (_decode(replace(weights, int8=int8)) for int8 in (False, True))
        first = np.concatenate([row.tokens[:1] for row in exact]) == np.concatenate([r.tokens[:1] for r in rounded])
        assert first.mean() > 0.7, "first tokens, greedily, before the two go different ways"
        for row, other in zip(exact, rounded, strict=True):
            assert 0 < relative_error(other.hidden(0, 1), row.hidden(0, 1)) < 0.05

    def test_all_but_the_products_is_fp32(self, tiny_checkpoint: Path) -> None:
        weights = load_weights(tiny_checkpoint, "cpu", "int8", check_sums=False)
        assert weights.int8
        assert weights.dtype is torch.float32
        assert weights.head_audio.dtype is torch.float32


def _decode(weights: Weights) -> list[Row]:
    decoder = Decoder(weights, 8, 128, Prompter(weights.tokenizer).refine_end)
    drawing = Drawing(temperature=1e-5, min_steps=STEPS, max_steps=STEPS)
    rows = [Row(Prompt(list(range(100 + n, 112 + n))), drawing=drawing) for n in range(8)]
    decoder.advance([rows], 0)
    while decoder.rows:
        decoder.advance([], 1)
    return rows
