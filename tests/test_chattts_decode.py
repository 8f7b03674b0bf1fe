"""The decode loop against unmodified upstream, and rows against each other."""

from __future__ import annotations

import random
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from batcher.engine import EndReason
from service.engines.chattts.decode import (
    ATTEMPTS,
    LOOSE_STEPS,
    PROMPT_TOKENS,
    TEXT_ROWS,
    Decoder,
    Drawing,
    Kind,
    Row,
)
from service.engines.chattts.load import Weights, load_weights
from service.engines.chattts.prompt import Prompt, Prompter
from service.engines.chattts.sample import NO_TOKEN, WINDOW, Sampling, process
from service.engines.chattts.upstream import import_chattts
from tests.recording import Recorder
from tests.test_chattts_sample import p_value

GREEDY = 1e-5
TIE = 1e-4
STEPS = 200
LENGTH = 640
TEXTS = (
    "hello world",
    "你好，世界。",
    "[uv_break]a somewhat longer text, so that prompts differ in length[laugh]",
    "四川美食确实以辣闻名，但也有不辣的选择。",
    "no",
    "one two three four five six seven eight nine ten",
)


@pytest.fixture(scope="module")
def weights(tiny_checkpoint: Path) -> Weights:
    return load_weights(tiny_checkpoint, "cpu", "fp32", check_sums=False)


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the engine does for bits that depend on nothing
    with torch.inference_mode():
        yield
    torch.set_num_threads(threads)


@dataclass
class Reference:
    """What upstream makes of a text alone."""

    text: str
    tokens: NDArray[np.int64]
    hidden: Tensor
    drawing: Drawing
    ended: bool


class Asker:
    """Asks upstream, and gives rows that ask the same of ours."""

    def __init__(self, chat: Any) -> None:
        self.chat = chat
        vector = torch.randn(chat.speaker.dim, generator=torch.Generator().manual_seed(8)).half()
        self._code = chat.speaker._encode(vector)
        self._speaker = torch.nn.functional.normalize(vector, dim=0)

    def speak(self, text: str, penalty: float = 1.05, min_steps: int = STEPS, max_steps: int = STEPS) -> Reference:
        parameters = import_chattts().Chat.InferCodeParams(
            temperature=GREEDY,
            repetition_penalty=penalty,
            min_new_token=min_steps,
            max_new_token=max_steps,
            spk_emb=self._code,
            show_tqdm=False,
        )
        (result,) = self.chat._infer_code([text], False, self.chat.device, True, parameters)
        drawing = Drawing(temperature=GREEDY, penalty=penalty, min_steps=min_steps, max_steps=max_steps)
        (ids,), (hidden,) = result.ids, result.hiddens
        return Reference(text, ids.numpy(), hidden, drawing, len(ids) < max_steps)

    def refine(self, text: str, min_steps: int = STEPS, max_steps: int = STEPS) -> Reference:
        parameters = import_chattts().Chat.RefineTextParams(
            temperature=GREEDY, min_new_token=min_steps, max_new_token=max_steps, show_tqdm=False
        )
        result = self.chat._refine_text([text], self.chat.device, parameters)
        drawing = Drawing(temperature=GREEDY, penalty=1.0, min_steps=min_steps, max_steps=max_steps)
        tokens = result.ids[0].numpy()
        return Reference(text, tokens, torch.empty(0), drawing, len(tokens) < max_steps)

    def row(self, text: str, drawing: Drawing) -> Row:
        (decorated,) = self.chat.speaker.decorate_code_prompts([text], "[speed_5]", None, self._code)
        ids = self._ids(decorated)
        return Row(Prompt(ids, ids.index(self.chat.tokenizer.spk_emb_ids)), self._speaker, drawing)

    def text_row(self, text: str, drawing: Drawing) -> Row:
        (decorated,) = self.chat.speaker.decorate_text_prompts([text], "")
        return Row(Prompt(self._ids(decorated)), None, drawing, Kind.TEXT)

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self.chat.tokenizer.encode([text], 4)[0][0, :, 0].tolist()
        return ids


@pytest.fixture(scope="module")
def asker(upstream: Any) -> Asker:
    with torch.inference_mode():
        return Asker(upstream)


@pytest.fixture(scope="module")
def references(asker: Asker) -> list[Reference]:
    """The texts, each alone, with different penalties."""
    torch.manual_seed(0)  # decides upstream's ties
    with torch.inference_mode():
        return [asker.speak(text, (1.05, 1.0, 1.5)[number % 3]) for number, text in enumerate(TEXTS)]


class Follower:
    """Compares rows with references while they run, and counts ties."""

    def __init__(self, weights: Weights, decoder: Decoder) -> None:
        self.decoder = decoder
        self.tokens = self.ties = 0
        self._head = weights.head_audio

    def follow(self, row: Row, reference: Reference) -> None:
        """Checks the row's last step. At a tie it goes on with the reference's token."""
        step = row.done - 1
        ours, theirs = row.tokens[-1], reference.tokens[step]
        self.tokens += len(ours)
        for codebook in np.flatnonzero(ours != theirs):
            gap = self._gap(reference, step, int(codebook), int(ours[codebook]))
            assert gap <= TIE, f"{reference.text}: step {step}, codebook {codebook}: {gap}"
            self.ties += 1
        if not row.over:
            self.decoder.force(row, theirs)

    def _gap(self, reference: Reference, step: int, codebook: int, token: int) -> float:
        """By how much the reference preferred its own token."""
        logits = self._head[codebook] @ reference.hidden[step]
        recent = torch.full((1, 1, WINDOW), NO_TOKEN)
        past = torch.from_numpy(reference.tokens[max(0, step - WINDOW) : step, codebook])
        recent[0, 0, WINDOW - len(past) :] = past
        sampling = _sampling(replace(reference.drawing, temperature=1.0, top_p=1.0, top_k=625))
        scores = process(logits[None, None], recent, torch.tensor([step]), sampling, 625)[0, 0]
        return float(scores.max() - scores[token])

    def conclude(self) -> None:
        """Ties are rare."""
        print(f"{self.ties} ties in {self.tokens} tokens")
        assert self.ties <= 0.001 * self.tokens


def _sampling(drawing: Drawing) -> Sampling:
    def column(value: float) -> Tensor:
        return torch.tensor([value])

    zero = column(0)
    tail, least = column(1 - drawing.top_p), column(drawing.min_steps)
    return Sampling(
        column(drawing.temperature), tail, column(drawing.top_k), column(drawing.penalty), least, zero, zero, zero
    )


def new_decoder(
    weights: Weights,
    slots: int,
    length: int = LENGTH,
    *,
    deterministic: bool = False,
    recorder: Recorder | None = None,
) -> Decoder:
    end = Prompter(weights.tokenizer).refine_end
    return Decoder(weights, slots, length, end, deterministic=deterministic, recorder=recorder)


def run(decoder: Decoder, groups: Iterable[Sequence[Row]], steps: int = 1) -> None:
    """To the end of all rows."""
    decoder.advance(groups, steps)
    while decoder.rows:
        decoder.advance([], steps)


# -- against upstream -------------------------------------------------------------------------------------------------


def test_alone_by_teacher_forcing(weights: Weights, asker: Asker, references: list[Reference]) -> None:
    """Each step from upstream's own tokens before it: the states are upstream's."""
    decoder = new_decoder(weights, 1)
    for reference in references:
        row = asker.row(reference.text, reference.drawing)
        decoder.advance([[row]], 0)
        for tokens in reference.tokens[: STEPS - 1]:
            decoder.force(row, tokens)
            decoder.advance([], 1)
        assert row.done == STEPS
        assert row.ended is EndReason.LENGTH
        assert torch.allclose(row.hidden(0, STEPS), reference.hidden, rtol=0, atol=2e-5)


def test_free_running_alone(weights: Weights, asker: Asker, references: list[Reference]) -> None:
    decoder = new_decoder(weights, 1)
    follower = Follower(weights, decoder)
    for reference in references:
        row = asker.row(reference.text, reference.drawing)
        decoder.advance([[row]], 0)
        follower.follow(row, reference)
        while decoder.rows:
            decoder.advance([], 1)
            follower.follow(row, reference)
        assert row.done == STEPS
    assert follower.tokens == 4 * STEPS * len(references)
    follower.conclude()


def test_free_running_in_one_batch_of_mixed_lengths(
    weights: Weights, asker: Asker, references: list[Reference]
) -> None:
    decoder = new_decoder(weights, len(references))
    follower = Follower(weights, decoder)
    rows = [asker.row(reference.text, reference.drawing) for reference in references]
    assert len({row.prompt_tokens for row in rows}) > 3
    decoder.advance([rows], 0)
    assert (decoder.prefill_calls, decoder.step_calls) == (1, 0)
    for step in range(STEPS):
        for row, reference in zip(rows, references, strict=True):
            follower.follow(row, reference)
        decoder.advance([], 1)
        assert decoder.step_calls == min(step + 1, STEPS - 1), "one call for all rows"
    assert not decoder.rows
    follower.conclude()


@pytest.mark.parametrize(("seed", "recorded"), [(0, False), (1, False), (2, False), (0, True)])
def test_free_running_with_rows_that_join_and_leave_at_random(
    weights: Weights, asker: Asker, references: list[Reference], seed: int, recorded: bool
) -> None:
    chance = random.Random(seed)
    decoder = new_decoder(weights, 5, recorder=Recorder() if recorded else None)
    follower = Follower(weights, decoder)
    waiting = [*references, *(chance.choice(references) for _ in range(6))]
    running: dict[Row, Reference] = {}
    finished, leaves = 0, 6
    while waiting or running:
        groups: list[list[Row]] = []
        while waiting and len(running) < 5 and chance.random() < 0.5:
            count = min(chance.randint(1, 5 - len(running)), len(waiting))
            group = {asker.row(r.text, r.drawing): r for r in (waiting.pop() for _ in range(count))}
            running |= group
            groups.append(list(group))
        if leaves and chance.random() < 0.02 and running and not groups:
            leaves -= 1
            left = chance.choice(list(running))
            waiting.append(running.pop(left))
            decoder.leave(left)
            decoder.leave(left)
        joined = [row for group in groups for row in group]
        for row in decoder.advance(groups, 0):
            follower.follow(row, running[row])
        assert [row.place for row in decoder.rows] == list(range(len(decoder.rows)))
        assert set(joined) <= set(decoder.rows)
        for row in decoder.advance([], 1):
            follower.follow(row, running[row])
            if row.over:
                assert row.done == STEPS
                assert torch.allclose(row.hidden(0, STEPS), running.pop(row).hidden, rtol=0, atol=1e-4)
                finished += 1
    assert finished == len(references) + 6
    follower.conclude()


def test_rows_end_where_upstream_ends_them(weights: Weights, asker: Asker) -> None:
    """Any codebook's end token ends the row, and the step that has it is not kept."""
    references = [asker.speak(text, 1.05, min_steps=0, max_steps=500) for text in TEXTS]
    assert any(reference.ended for reference in references)
    rows = [asker.row(reference.text, reference.drawing) for reference in references]
    run(new_decoder(weights, len(rows)), [rows], steps=5)
    for row, reference in zip(rows, references, strict=True):
        assert row.done == len(reference.tokens)
        assert (row.tokens == reference.tokens).all()
        assert row.ended is (EndReason.COMPLETE if reference.ended else EndReason.LENGTH)
        assert torch.allclose(row.hidden(0, row.done), reference.hidden, rtol=0, atol=1e-4)


def test_refined_text_is_upstreams_also_beside_speech(
    weights: Weights, asker: Asker, references: list[Reference]
) -> None:
    refined = [asker.refine(text, steps, steps) for text, steps in zip(TEXTS, (STEPS, 40, 20), strict=False)]
    texts = [asker.text_row(reference.text, reference.drawing) for reference in refined]
    spoken = [asker.row(reference.text, reference.drawing) for reference in references[:2]]
    run(new_decoder(weights, 5), [[texts[0], spoken[0], texts[1]], [spoken[1], texts[2]]])
    for row, reference in zip(texts, refined, strict=True):
        assert (row.tokens == reference.tokens[:, None]).all()
    for row, reference in zip(spoken, references, strict=False):
        assert (row.tokens == reference.tokens).all()


def test_refining_takes_a_repetition_penalty_which_upstream_cannot(weights: Weights, asker: Asker) -> None:
    gpt_parameters = import_chattts().Chat.RefineTextParams(repetition_penalty=1.5, max_new_token=8, show_tqdm=False)
    with pytest.raises(RuntimeError):
        asker.chat._refine_text(["hello"], asker.chat.device, gpt_parameters)
    plain, penalised = (
        asker.text_row("hello", Drawing(temperature=GREEDY, penalty=penalty, min_steps=60, max_steps=60))
        for penalty in (1.0, 2.0)
    )
    run(new_decoder(weights, 2), [[plain, penalised]])
    assert plain.done == penalised.done == 60
    assert _repeats(penalised) < _repeats(plain) or _repeats(plain) == 0


def _repeats(row: Row) -> int:
    """Tokens that are among the 16 before them."""
    tokens = row.tokens[:, 0].tolist()
    return sum(token in tokens[max(0, place - WINDOW) : place] for place, token in enumerate(tokens))


def test_first_tokens_follow_upstreams_distribution(weights: Weights, asker: Asker) -> None:
    """At normal temperature, 2,048 rows with seeds of their own."""
    decoder, count = new_decoder(weights, 128, 64), 2048
    drawn = []
    for first in range(0, count, 128):
        rows = [asker.row("hello", Drawing(seed=seed, max_steps=1)) for seed in range(first, first + 128)]
        decoder.advance([rows], 0)
        drawn += [row.tokens[0] for row in rows if not row.empty]
    reference = asker.speak("hello", min_steps=1, max_steps=1)
    logits = torch.einsum("cvh,h->cv", weights.head_audio, reference.hidden[0])
    (warpers, processors) = import_chattts().model.gen_logits(625, 0.7, 20, 1.05)
    scores = logits / torch.full((4, 1), 0.3)
    for processor in (*processors, *warpers):
        scores = processor(torch.empty(4, 0, dtype=torch.int64), scores)
    tokens = torch.from_numpy(np.stack(drawn))
    for codebook in range(4):
        assert scores[codebook, 625] == -torch.inf, "this text cannot end at once"
        assert p_value(tokens[:, codebook], scores[codebook].softmax(-1)) > 1e-4


# -- rows among themselves --------------------------------------------------------------------------------------------


def lively(seed: int, max_steps: int = 60, min_steps: int = 0) -> Drawing:
    """At a temperature at which each token is a choice."""
    return Drawing(temperature=0.8, top_p=0.9, seed=seed, min_steps=min_steps, max_steps=max_steps)


def test_in_deterministic_mode_a_row_is_the_same_bit_for_bit_in_any_company(weights: Weights, asker: Asker) -> None:
    def row(number: int) -> Row:
        return asker.row(TEXTS[number], lively(number))

    alone = []
    for number in range(len(TEXTS)):
        alone.append(row(number))
        run(new_decoder(weights, 8, deterministic=True), [[alone[-1]]])
    decoder = new_decoder(weights, 8, deterministic=True)
    for order in ([0, 1, 2, 3, 4, 5], [5, 3, 1, 4, 2, 0]):
        together = {number: row(number) for number in order}
        joined = iter(together.values())
        decoder.advance([[next(joined)], [next(joined), next(joined)]], 7)
        decoder.advance([[asker.text_row("beside", lively(9, max_steps=20))]], 3)
        run(decoder, [list(joined)], steps=4)
        for number, other in together.items():
            assert other.done == alone[number].done
            assert (other.tokens == alone[number].tokens).all()
            assert other.ended == alone[number].ended
            assert torch.equal(other.hidden(0, other.done), alone[number].hidden(0, other.done))


def test_steps_in_one_call_or_in_many_are_the_same(weights: Weights, asker: Asker) -> None:
    def rows() -> list[Row]:
        return [asker.row(text, lively(number, 40 + number)) for number, text in enumerate(TEXTS)]

    by_one, by_seven = rows(), rows()
    run(new_decoder(weights, 6), [by_one], steps=1)
    run(new_decoder(weights, 6), [by_seven], steps=7)
    for one, seven in zip(by_one, by_seven, strict=True):
        assert (one.tokens == seven.tokens).all()
        assert one.ended == seven.ended


def test_every_row_draws_by_its_own_parameters(weights: Weights, asker: Asker) -> None:
    drawings = [
        lively(1),
        lively(2),
        replace(lively(1), segment=1),
        Drawing(temperature=GREEDY, max_steps=60),
        Drawing(top_k=1, top_p=0.01, max_steps=60),
    ]
    rows = [asker.row("hello", drawing) for drawing in (*drawings, drawings[0])]
    run(new_decoder(weights, len(rows)), [rows])
    spoken = [row.tokens.tobytes() for row in rows]
    assert len(set(spoken[:5])) == 5
    assert spoken[0] == spoken[5], "the same row twice"


def test_a_row_that_would_end_at_once_is_tried_again_alone(weights: Weights, asker: Asker) -> None:
    """With one chance in two to end at each draw of the first step, rows fail three times in a row now and then."""
    reference = asker.speak("hello", min_steps=1, max_steps=1)
    inclined = weights.head_audio.clone()
    scores = inclined @ reference.hidden[0]
    inclined[0, 625] = reference.hidden[0] * (scores[0].max() + 0.25) / reference.hidden[0].square().sum()
    decoder = new_decoder(replace(weights, head_audio=inclined), 200, 64)
    drawing = Drawing(temperature=1.0, top_p=1.0, top_k=3, max_steps=2)
    rows = [asker.row("hello", replace(drawing, seed=seed)) for seed in range(200)]
    decoder.advance([rows], 0)
    attempts = decoder._places.sampling.attempt[: len(decoder.rows)]
    assert sum(row.empty for row in rows) == 200 - len(decoder.rows)
    assert 0 < sum(row.empty for row in rows) < 40
    assert set(attempts.tolist()) == set(range(ATTEMPTS)), "of those that were given a token"
    again = [asker.row("hello", row.drawing) for row in rows]
    for row in again:
        new_decoder(replace(weights, head_audio=inclined), 1, 64).advance([[row]], 0)
    assert [row.empty for row in again] == [row.empty for row in rows], "others play no part"
    assert all((a.tokens == b.tokens).all() for a, b in zip(rows, again, strict=True) if not a.empty)


def test_a_row_that_always_ends_at_once_fails_alone(weights: Weights, asker: Asker) -> None:
    row, other = asker.row("hello", Drawing(max_steps=9)), asker.row("you", Drawing(min_steps=9, max_steps=9))
    stubborn = weights.head_audio.clone()
    stubborn[:, 625] = 0
    decoder = new_decoder(replace(weights, head_audio=stubborn), 2, 64)
    decoder._speech = replace(decoder._speech, end=int(_first_token(weights, row)))
    row = replace(row, drawing=replace(row.drawing, top_k=1, temperature=GREEDY))
    run(decoder, [[row, other]])
    assert row.empty
    assert row.done == 0
    assert not other.empty
    assert other.done == 9


def _first_token(weights: Weights, row: Row) -> int:
    probe = Row(row.prompt, row.speaker, Drawing(temperature=GREEDY, top_k=1, min_steps=1, max_steps=1))
    run(new_decoder(weights, 1, 64), [[probe]])
    return int(probe.tokens[0, 0])


# -- failures ---------------------------------------------------------------------------------------------------------


def test_of_a_call_that_fails_nothing_was_done(weights: Weights, asker: Asker, monkeypatch: pytest.MonkeyPatch) -> None:
    def rows() -> list[Row]:
        return [asker.row(text, lively(number)) for number, text in enumerate(TEXTS)]

    undisturbed, disturbed = rows(), rows()
    run(new_decoder(weights, 6), [undisturbed[:3]])
    decoder = new_decoder(weights, 6)
    decoder.advance([disturbed[:3]], 4)
    decode, calls = decoder._gpt.decode, 0

    def failing(*args: Any) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise torch.OutOfMemoryError("injected")
        return decode(*args)

    monkeypatch.setattr(decoder._gpt, "decode", failing)
    done = [row.done for row in disturbed]
    with pytest.raises(torch.OutOfMemoryError):
        decoder.advance([disturbed[3:5], disturbed[5:]], 5)
    assert [row.done for row in disturbed] == done
    assert decoder.rows == disturbed[:3]
    assert [row.place for row in disturbed] == [0, 1, 2, -1, -1, -1]
    run(decoder, [])
    for row, other in zip(disturbed[:3], undisturbed, strict=False):
        assert (row.tokens == other.tokens).all()


def test_hidden_states_outlive_the_slot_until_they_are_dropped(weights: Weights, asker: Asker) -> None:
    row, reference = asker.row("hello", lively(3)), asker.row("hello", lively(3))
    decoder = new_decoder(weights, 1)
    run(decoder, [[reference]], steps=3)
    whole = reference.hidden(0, reference.done)
    run(decoder, [[row]], steps=3)
    assert row.place == -1
    run(decoder, [[asker.row("another", lively(4))]])
    assert torch.equal(row.hidden(0, 20), whole[:20])
    row.drop_hidden(7)
    assert torch.equal(row.hidden(7, 20), whole[7:20])
    row.drop_hidden(20)
    assert torch.equal(row.hidden(20, row.done), whole[20:])


def test_states_are_gathered_before_other_rows_memory_is_held_for_long(weights: Weights, asker: Asker) -> None:
    """A row whose listener is slow keeps no other row's states; what is kept is right."""
    rows = [asker.row(text, lively(number, min_steps=STEPS, max_steps=STEPS)) for number, text in enumerate(TEXTS[:3])]
    alone = asker.row(TEXTS[0], rows[0].drawing)
    run(new_decoder(weights, 1), [[alone]], steps=8)
    decoder = new_decoder(weights, 3)
    decoder.advance([rows], 0)
    while decoder.rows:
        decoder.advance([], 8)
        rows[1].drop_hidden(max(0, rows[1].done - 52))
        assert rows[1].over or not rows[1].loose, "it is vocoded in time"
        assert rows[0]._loose <= LOOSE_STEPS + 8
    decoder.advance([], 0)
    assert not any(row.loose for row in rows)
    assert sum(piece.untyped_storage().nbytes() for piece in rows[0]._hidden) == 4 * STEPS * decoder.hidden_size
    assert torch.allclose(rows[0].hidden(0, STEPS), alone.hidden(0, STEPS), rtol=0, atol=1e-4)


# -- launched before the last is done, and recorded -------------------------------------------------------------------


def test_work_is_launched_before_the_last_is_taken_in(weights: Weights, asker: Asker) -> None:
    """Rows join and end meanwhile, one leaves, and each gets what it gets alone."""

    def rows() -> list[Row]:
        lengths = (20, 33, 90, 47, 60, 25)
        return [
            asker.row(text, lively(number, min_steps=steps, max_steps=steps))
            for number, (text, steps) in enumerate(zip(TEXTS, lengths, strict=True))
        ]

    alone, together = rows(), rows()
    for row in alone:
        run(new_decoder(weights, 6), [[row]])
    decoder = new_decoder(weights, 6)
    under_way = deque([decoder.launch([together[:2]], 5)])
    joining = deque([[together[2]], [together[3], together[4]], [together[5]]])
    ticks = 0
    while decoder.rows:
        ticks += 1
        under_way.append(decoder.launch([joining.popleft()] if joining and ticks % 2 else [], 5))
        if ticks == 4:
            decoder.leave(together[3])
            assert together[3].done < 20
        news = decoder.settle(under_way.popleft())
        assert together[3] not in news or ticks < 4
    for number, (row, other) in enumerate(zip(together, alone, strict=True)):
        if number != 3:
            assert (row.tokens == other.tokens).all()
            assert row.ended is other.ended is EndReason.LENGTH


def test_recorded_passes_are_replayed_for_rows_of_all_kinds(
    weights: Weights, asker: Asker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside a decoder that calls: any number of rows, refined texts, more of them than is recorded, a long prompt."""

    def rows() -> list[list[Row]]:
        def row(number: int, text: str) -> Row:
            return asker.row(text, lively(number, min_steps=30, max_steps=30 + number))

        texts = [asker.text_row(text, lively(number, max_steps=12 + number)) for number, text in enumerate(TEXTS)]
        many = [asker.text_row(TEXTS[n % 3], lively(20 + n, max_steps=6)) for n in range(TEXT_ROWS)]
        long = row(9, "long " * 150)
        assert long.prompt_tokens > PROMPT_TOKENS[-1]
        return [[row(0, TEXTS[0])], [row(n, TEXTS[n]) for n in (1, 2)], texts, [row(5, TEXTS[5])], many, [long]]

    def speak(decoder: Decoder) -> list[Row]:
        groups = rows()
        for group in groups:
            decoder.advance([group], 3)
        run(decoder, [], steps=3)
        return [row for group in groups for row in group]

    called = speak(new_decoder(weights, 24))
    recorder = Recorder()
    decoder = new_decoder(weights, 24, recorder=recorder)
    calls = noted_calls(monkeypatch, decoder)
    before = recorder.replayed
    replayed = speak(decoder)
    assert recorder.replayed - before > 30
    assert calls["decode"] < decoder.step_calls / 3, "only with more text rows than are recorded"
    assert calls["prefill"] == 3, "two with texts, and a long one"
    for row, other in zip(replayed, called, strict=True):
        assert (row.tokens == other.tokens).all()


def test_what_is_recorded_never_waits_for_the_device(weights: Weights) -> None:
    with pytest.raises(RuntimeError, match="would wait"):
        Recorder()(lambda: (torch.ones(1)[: int(torch.ones(1, dtype=torch.int64).item())],))
    assert new_decoder(weights, 1, 64, recorder=Recorder()).rows == []


def noted_calls(monkeypatch: pytest.MonkeyPatch, decoder: Decoder) -> Counter[str]:
    """How often Python runs the transformer."""
    calls: Counter[str] = Counter()
    for name in ("decode", "prefill"):
        monkeypatch.setattr(decoder._gpt, name, _noted(calls, name, getattr(decoder._gpt, name)))
    return calls


def _noted(calls: Counter[str], name: str, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def noted(*args: Any) -> Tensor:
        calls[name] += 1
        return function(*args)

    return noted
