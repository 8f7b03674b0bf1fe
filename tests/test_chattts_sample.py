"""Sampling: upstream's processors on the same logits, its distribution, and noise that belongs to the row."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from service.engines.chattts.sample import NO_TOKEN, WINDOW, Sampling, absorb, draw, process, random_bits
from service.engines.chattts.upstream import import_chattts

CODEBOOKS = 4
TOKENS = 626
END = TOKENS - 1
MASK = (1 << 64) - 1

Draws = Callable[[Tensor, Tensor, int], Tensor]


def sampling(rows: int, **fields: float | Sequence[float]) -> Sampling:
    """Upstream's defaults, but for the fields named."""
    values: dict[str, float | Sequence[float]] = {
        "temperature": 0.3,
        "top_p": 0.7,
        "top_k": 20,
        "penalty": 1.05,
        "min_steps": 0,
        "seed": 0,
        "segment": 0,
        "attempt": 0,
        **fields,
    }
    tensors = {name: _column(rows, name, value) for name, value in values.items() if name != "top_p"}
    top_p = values["top_p"] if isinstance(values["top_p"], Sequence) else [values["top_p"]] * rows
    return Sampling(**tensors, tail=torch.tensor([1 - p for p in top_p]))


def _column(rows: int, name: str, value: float | Sequence[float]) -> Tensor:
    column = torch.tensor(value if isinstance(value, Sequence) else [value] * rows)
    return column.float() if name in ("temperature", "penalty") else column.long()


def windows(tokens: Sequence[Sequence[Sequence[int]]]) -> Tensor:
    """[R, C, W] from each row's and codebook's tokens so far."""
    return torch.tensor([[([NO_TOKEN] * WINDOW + list(c))[-WINDOW:] for c in row] for row in tokens])


def upstream(
    logits: Tensor,
    tokens: Sequence[Sequence[Sequence[int]]],
    step: int = 0,
    *,
    temperature: float = 0.3,
    top_p: float = 0.7,
    top_k: int = 20,
    penalty: float = 1.05,
    min_steps: int = 0,
) -> Tensor:
    """What upstream's own processors make of it, called as `GPT.generate` calls them."""
    gen_logits = import_chattts().model.gen_logits
    warpers, processors = gen_logits(num_code=END, top_P=top_p, top_K=top_k, repetition_penalty=penalty)
    rows, codebooks, vocabulary = logits.shape
    scores = logits.reshape(-1, vocabulary).clone()
    scores /= torch.full((rows * codebooks, 1), temperature)
    ids = torch.tensor(tokens).reshape(rows * codebooks, -1).long()
    for processor in (*processors, *warpers):
        scores = processor(ids, scores)
    if step < min_steps:
        scores[:, END] = -torch.inf
    return scores.view_as(logits)


def random_logits(seed: int, rows: int = 1, spread: float = 3.0) -> Tensor:
    return torch.randn(rows, CODEBOOKS, TOKENS, generator=torch.Generator().manual_seed(seed)) * spread


def random_tokens(seed: int, rows: int, length: int, kinds: int = 40) -> list[list[list[int]]]:
    generator = torch.Generator().manual_seed(seed)
    tokens: list[list[list[int]]] = torch.randint(kinds, (rows, CODEBOOKS, length), generator=generator).tolist()
    return tokens


def at(step: int, rows: int = 1) -> Tensor:
    return torch.full((rows,), step)


@pytest.mark.parametrize("length", [0, 1, 15, 16, 17, 40])
@pytest.mark.parametrize("penalty", [1.0, 1.05, 2.0])
def test_processed_logits_are_upstreams(length: int, penalty: float) -> None:
    logits, tokens = random_logits(length, rows=3), random_tokens(length, 3, length)
    ours = process(logits, windows(tokens), at(length, 3), sampling(3, penalty=penalty), END)
    assert torch.equal(ours, upstream(logits, tokens, penalty=penalty))


@pytest.mark.parametrize("temperature", [1e-5, 0.3, 2.0])
@pytest.mark.parametrize("top_p", [0.01, 0.7, 1.0])
@pytest.mark.parametrize("top_k", [1, 3, 20, 625])
def test_processed_logits_are_upstreams_at_the_ends_of_every_range(
    temperature: float, top_p: float, top_k: int
) -> None:
    logits, tokens = random_logits(7, spread=1.0), random_tokens(7, 1, 20)
    given = sampling(1, temperature=temperature, top_p=top_p, top_k=top_k)
    ours = process(logits, windows(tokens), at(20), given, END)
    assert torch.equal(ours, upstream(logits, tokens, temperature=temperature, top_p=top_p, top_k=top_k))


def test_every_row_has_its_own_parameters() -> None:
    each = [
        {"temperature": 0.3, "top_p": 0.7, "top_k": 20, "penalty": 1.05, "min_steps": 0},
        {"temperature": 1.7, "top_p": 0.2, "top_k": 3, "penalty": 1.0, "min_steps": 9},
        {"temperature": 1e-5, "top_p": 1.0, "top_k": 625, "penalty": 2.0, "min_steps": 3},
    ]
    logits, tokens = random_logits(1, rows=3), random_tokens(1, 3, 8)
    ours = process(
        logits, windows(tokens), at(8, 3), sampling(3, **{name: [e[name] for e in each] for name in each[0]}), END
    )
    for row, parameters in enumerate(each):
        alone = upstream(logits[row : row + 1], tokens[row : row + 1], 8, **parameters)  # type: ignore[arg-type]
        assert torch.equal(ours[row], alone[0])


TIES = {
    "all equal": torch.zeros(TOKENS),
    "two levels": torch.cat([torch.zeros(600), torch.ones(26)]),
    "two levels, mixed": (torch.arange(TOKENS) % 3 == 0).float(),
    "ties across the k-th place": torch.cat([torch.full((15,), 3.0), torch.full((10,), 2.0), torch.zeros(601)]),
    "one token has it all": torch.cat([torch.tensor([50.0]), torch.zeros(625)]),
    "three below two": torch.cat([torch.tensor([9.0, 9.0]), torch.full((3,), 1.0), torch.full((621,), -9.0)]),
}


@pytest.mark.parametrize("name", TIES)
@pytest.mark.parametrize("top_p", [0.01, 0.5, 0.7, 1.0])
@pytest.mark.parametrize("top_k", [1, 3, 20])
def test_ties_fall_as_upstreams(name: str, top_p: float, top_k: int) -> None:
    logits = TIES[name].expand(1, CODEBOOKS, TOKENS)
    none: list[list[list[int]]] = [[[]] * CODEBOOKS]
    given = sampling(1, temperature=1.0, top_p=top_p, top_k=top_k)
    ours = process(logits, windows(none), at(0), given, END)
    theirs = upstream(logits, none, temperature=1.0, top_p=top_p, top_k=top_k)
    assert torch.equal(ours, theirs)
    assert int((ours[0, 0] > -torch.inf).sum()) >= 3


def test_a_penalty_reaches_sixteen_tokens_back_in_its_own_codebook() -> None:
    logits = torch.ones(1, CODEBOOKS, TOKENS)
    logits[..., 5] = -1.0
    logits[..., 600] = -20.0  # what a top-K of 625 cuts
    tokens = [[[1, *[2] * 13, 5, 5, 3], [0] * 17, [4] * 17, list(range(17))]]
    given = sampling(1, temperature=1.0, top_p=1.0, top_k=625, penalty=1.5)
    ours = process(logits, windows(tokens), at(17), given, END)[0]
    assert ours[0, 1] == 1.0, "drawn 17 steps ago"
    assert math.isclose(ours[0, 2], 1.5**-13, rel_tol=1e-6)
    assert math.isclose(ours[0, 5], -(1.5**2), rel_tol=1e-6)
    assert ours[1, 0] == pytest.approx(1.5**-16)
    assert ours[1, 2] == 1.0, "another codebook's"
    assert ours[3, 0] == 1.0
    assert ours[3, 1] == pytest.approx(1 / 1.5)


def test_the_penalty_has_no_last_row() -> None:
    """Upstream compares rows with the vocabulary and leaves out those past the 156th."""
    rows = 200
    logits, tokens = random_logits(2).expand(rows, -1, -1), random_tokens(2, 1, 16, kinds=4) * rows
    ours = process(logits, windows(tokens), at(16, rows), sampling(rows, penalty=2.0), END)
    assert torch.equal(ours, ours[:1].expand_as(ours))
    theirs = upstream(logits, tokens, penalty=2.0)
    assert torch.equal(ours[:156], theirs[:156])
    assert not torch.equal(ours[157:], theirs[157:])


def test_a_row_cannot_end_before_its_least_steps() -> None:
    logits = random_logits(3, rows=2)
    logits[..., END] = 90.0
    tokens = random_tokens(3, 2, 4)
    ours = process(logits, windows(tokens), at(4, 2), sampling(2, min_steps=[5, 4]), END)
    assert (ours[0, :, END] == -torch.inf).all()
    assert (ours[1, :, END] > 0).all()
    assert torch.equal(ours[:1], upstream(logits[:1], tokens[:1], 4, min_steps=5))


# -- noise ------------------------------------------------------------------------------------------------------------


def test_the_random_bits_are_those_of_splitmix64() -> None:
    """The vectors are those of Vigna's splitmix64.c with the state 1234567."""
    bits = random_bits(torch.tensor(1234567), 5)
    published = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    assert bits.tolist() == [word >> 12 for word in published]


def test_hashing_equals_plain_integers() -> None:
    words = [0, 1, -1, 2**63 - 1, -(2**63), 0x0123456789ABCDEF]
    state, plain = torch.zeros(len(words), dtype=torch.int64), [0] * len(words)
    for turn in range(3):
        state = absorb(state, torch.tensor(words[turn:] + words[:turn]))
        plain = [_absorb(p, word) for p, word in zip(plain, words[turn:] + words[:turn], strict=True)]
    assert [word & MASK for word in state.tolist()] == plain


def _absorb(state: int, word: int) -> int:
    value = ((state + 0x9E3779B97F4A7C15) & MASK) ^ (word & MASK)
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & MASK
    return value ^ (value >> 31)


def test_a_draw_depends_on_its_row_alone() -> None:
    rows = 12
    logits = random_logits(4, rows, spread=0.3)
    given = sampling(rows, seed=list(range(rows)), segment=[i % 3 for i in range(rows)])
    together = draw(logits, torch.arange(rows), given)
    assert torch.equal(together, draw(logits, torch.arange(rows), given)), "it is deterministic"
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(0))
    permuted = draw(logits[order], torch.arange(rows)[order], given.at(order))
    assert torch.equal(permuted, together[order])
    for row in range(rows):
        alone = draw(logits[row : row + 1], torch.tensor([row]), given.at(slice(row, row + 1)))
        assert torch.equal(alone[0], together[row])


@pytest.mark.parametrize("field", ["seed", "segment", "attempt"])
def test_every_part_of_the_name_changes_the_draw(field: str) -> None:
    rows = 64
    logits = torch.zeros(rows, CODEBOOKS, TOKENS)
    same, other = sampling(rows), sampling(rows, **{field: 1})
    assert (draw(logits, torch.arange(rows), same) != draw(logits, torch.arange(rows), other)).float().mean() > 0.98
    assert (draw(logits, at(0, rows), same) == draw(logits, at(0, rows), same)[0]).all(), "equal names draw equally"
    later = draw(logits, torch.arange(rows), same)
    assert len(set(later[:, 0].tolist())) > 50, "steps differ"
    assert (later[:, 0] != later[:, 1]).float().mean() > 0.98, "codebooks differ"
    assert torch.equal(draw(logits[:, 1:], torch.arange(rows), same, codebook=1), later[:, 1:])


# -- distribution -----------------------------------------------------------------------------------------------------

DRAWS = 20_000
SIGNIFICANCE = 1e-4
WAYS: dict[str, Callable[[int], dict[str, Tensor]]] = {
    "seeds": lambda n: {"seed": torch.arange(n)},
    "steps": lambda n: {"step": torch.arange(n)},
}


@pytest.mark.parametrize("way", WAYS)
def test_draws_follow_the_softmax_of_the_processed_logits(way: str) -> None:
    """Pearson's test on 20,000 draws a codebook. `test_the_test_has_power` says what it would find."""
    logits, tokens = random_logits(5, spread=1.0), random_tokens(5, 1, 16)
    scores = process(logits, windows(tokens), at(16), sampling(1, temperature=0.5), END)
    drawn = _draws(scores, WAYS[way](DRAWS))
    expected = upstream(logits, tokens, temperature=0.5).softmax(-1)[0]
    for codebook in range(CODEBOOKS):
        assert p_value(drawn[:, codebook], expected[codebook]) > SIGNIFICANCE


def test_the_test_has_power() -> None:
    """A temperature that is wrong by 10 %, or a token too few, would be found in each of 20 trials."""
    logits, tokens = random_logits(5, spread=1.0), random_tokens(5, 1, 16)
    right = upstream(logits, tokens, temperature=0.5).softmax(-1)[0, 0]
    hotter = upstream(logits, tokens, temperature=0.55).softmax(-1)[0, 0]
    fewer = upstream(logits, tokens, temperature=0.5, top_k=19).softmax(-1)[0, 0]
    generator = torch.Generator().manual_seed(6)
    for wrong in (hotter, fewer):
        for _ in range(20):
            assert p_value(torch.multinomial(wrong, DRAWS, True, generator=generator), right) < SIGNIFICANCE
    values = [p_value(torch.multinomial(right, DRAWS, True, generator=generator), right) for _ in range(20)]
    assert min(values) > SIGNIFICANCE


def _draws(scores: Tensor, names: dict[str, Tensor]) -> Tensor:
    fields = {name: values.tolist() for name, values in names.items() if name != "step"}
    given, step = sampling(DRAWS, **fields), names.get("step", at(0, DRAWS))
    chunks = range(0, DRAWS, 1000)
    drawn = [draw(scores.expand(1000, -1, -1), step[i : i + 1000], given.at(slice(i, i + 1000))) for i in chunks]
    return torch.cat(drawn)


def p_value(drawn: Tensor, expected: Tensor) -> float:
    """Of Pearson's test; 0 where something was drawn that cannot be."""
    observed = torch.bincount(drawn, minlength=len(expected)).double()
    possible = expected > 0
    if observed[~possible].sum() > 0:
        return 0.0
    counts = expected[possible].double() * len(drawn)
    statistic = ((observed[possible] - counts) ** 2 / counts).sum()
    return float(torch.special.gammaincc((possible.sum() - 1).double() / 2, statistic / 2))
