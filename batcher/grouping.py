"""Groups joining rows by length, so that a prefill's padding stays small."""

from __future__ import annotations

from collections.abc import Sequence

from batcher.request import Row

MAX_PADDING = 0.1
"""The share of a group's tokens that may be padding for its shortest row."""


def group_by_length(rows: Sequence[Row]) -> list[list[Row]]:
    """Splits rows into groups of similar prompt length, shortest first.

    Within a group the shortest prompt is at least `1 - MAX_PADDING` of the longest.
    """
    groups: list[list[Row]] = []
    for row in sorted(rows, key=lambda row: row.prediction.prompt_tokens):
        shortest = groups[-1][0].prediction.prompt_tokens if groups else 0
        if groups and shortest >= (1 - MAX_PADDING) * row.prediction.prompt_tokens:
            groups[-1].append(row)
        else:
            groups.append([row])
    return groups


def padding(group: Sequence[Row]) -> int:
    """Tokens that a group's prompts are padded with, to the longest of them."""
    lengths = [row.prediction.prompt_tokens for row in group]
    return max(lengths) * len(lengths) - sum(lengths)
