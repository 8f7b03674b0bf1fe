"""What the tests share."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from tests import interpreted  # noqa: F401 (before anything imports Triton)
from tests.stack import Server, Stack, running_stack
from tests.valkey import Valkey, running_valkey

os.environ.setdefault("NUMBA_DISABLE_JIT", "1")  # ChatTTS would compile for ten seconds, to replace a few characters


@pytest.fixture
async def stack(tmp_path: Path) -> AsyncIterator[Stack]:
    """Processes of one test alone."""
    async with running_stack(tmp_path) as stack:
        yield stack


@pytest.fixture
async def valkey(tmp_path: Path) -> AsyncIterator[Valkey]:
    """A store of one test alone, which keeps nothing on disk."""
    folder = tmp_path / "valkey"
    folder.mkdir()
    async with running_valkey(folder) as server:
        yield server


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def module_stack(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Stack]:
    """Processes that the tests of a module share."""
    async with running_stack(tmp_path_factory.mktemp("stack")) as stack:
        yield stack


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def pair(module_stack: Stack) -> tuple[Server, Server]:
    """A tone service without costs and a gateway in front of it, for tests that leave them as they were."""
    return await module_stack.pair()


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny ChatTTS checkpoint with random weights, which no test may change."""
    from service.engines.chattts.checkpoint import SIZES, make_checkpoint

    folder = tmp_path_factory.mktemp("tiny-checkpoint")
    make_checkpoint(folder, SIZES["tiny"])
    return folder


@pytest.fixture(scope="session")
def upstream(tiny_checkpoint: Path) -> Any:
    """Unmodified upstream with the tiny checkpoint, which no test may change."""
    from service.engines.chattts.upstream import load_upstream

    return load_upstream(tiny_checkpoint)
