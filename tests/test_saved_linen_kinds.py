"""Every kind of linen model, saved and loaded before each of its runs."""

from __future__ import annotations

import pytest
import test_linen_kinds as kinds
from reborn import Reborn
from test_linen_kinds import *  # noqa: F403


@pytest.fixture(params=[True, False], ids=["registered before", "registered after"])
def session(request):
    session = Reborn(seed=0)
    session.register_first = request.param
    yield session
    assert session.times or request.node.originalname in FAIL


FAIL = ("test_a_stream_that_a_transform_keeps_out_is_one_message",)
"""No run of theirs succeeds."""
assert all(hasattr(kinds, name) for name in FAIL)
