"""Every kind of linen model, saved and loaded before each of its runs, and registered after that."""

from __future__ import annotations

import pytest
from reborn import Reborn
from test_linen_kinds import *  # noqa: F403

pytestmark = [pytest.mark.saved, pytest.mark.usefixtures("unoptimised")]


@pytest.fixture
def session():
    session = Reborn(seed=0)
    session.register_first = False
    return session
