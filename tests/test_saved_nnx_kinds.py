"""Every kind of NNX model, saved and loaded before each of its runs."""

from __future__ import annotations

import pytest
import test_nnx_kinds as kinds
from reborn import Reborn
from test_nnx_kinds import *  # noqa: F403


@pytest.fixture(params=[True, False], ids=["registered before", "registered after"])
def session(request):
    session = Reborn(seed=0)
    session.register_first = request.param
    yield session
    assert session.times or request.node.originalname in FAIL


FAIL = ()
"""No run of theirs succeeds."""
assert all(hasattr(kinds, name) for name in FAIL)
