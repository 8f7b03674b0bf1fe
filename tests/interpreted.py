"""Triton as its interpreter, where there is no GPU.

It is read where functions are decorated, Triton's own among them: so this comes before anything else imports Triton.
"""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch

if not torch.cuda.is_available() and find_spec("triton") is not None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        import triton.language  # noqa: F401
