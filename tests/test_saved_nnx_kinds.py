"""Every kind of NNX model, saved before each of its runs, and loaded where it is registered already."""

from __future__ import annotations

import pytest
import test_nnx_kinds as kinds
from reborn import Reborn
from test_nnx_kinds import *  # noqa: F403

NO_RUN = ()
"""None of theirs succeeds."""
assert all(hasattr(kinds, name) for name in NO_RUN)
pytestmark = kinds.pytestmark


@pytest.fixture
def session(request):
    session = Reborn(seed=0)
    yield session
    assert session.times or request.node.originalname in NO_RUN
