"""Every kind of linen model, saved and loaded before each of its runs, and registered after that."""

from __future__ import annotations

import pytest
import test_linen_kinds as kinds
from reborn import Reborn
from test_linen_kinds import *  # noqa: F403

NO_RUN = ("test_a_stream_that_a_transform_keeps_out_is_one_message",)
"""None of theirs succeeds."""
assert all(hasattr(kinds, name) for name in NO_RUN)


@pytest.fixture
def session(request):
    session = Reborn(seed=0)
    session.register_first = False
    yield session
    assert session.times or request.node.originalname in NO_RUN
