"""Every kind of NNX model, saved before each of its runs, and loaded where it is registered already."""

from __future__ import annotations

import pytest
import test_nnx_kinds as kinds
from reborn import Reborn
from test_nnx_kinds import *  # noqa: F403

# What stands in the call would move on twice.
del test_an_optimizer_and_a_metric_in_the_call_move_on_as_by_hand  # noqa: F821


pytestmark = [kinds.pytestmark, pytest.mark.saved, pytest.mark.usefixtures("unoptimised")]


@pytest.fixture
def session():
    session = Reborn(seed=0)
    return session
