"""Methods that are replaced for the time of a trace."""

from __future__ import annotations

from typing import Any

import pytest
from together import on_threads

from flax_magics.models.base import replaced


class Base:
    def inherited(self) -> str:
        return "inherited"


class Owner(Base):
    def own(self, word: str = "own") -> str:
        return word

    @classmethod
    def made(cls) -> str:
        return cls.__name__


def louder(original: Any, *args: Any, **kwargs: Any) -> str:
    return f"{original(*args, **kwargs)}!"


METHODS = [(Owner, "own", louder), (Owner, "inherited", louder), (Owner, "made", louder)]


def words() -> list[str]:
    return [Owner().own(word="own"), Owner().inherited(), Owner.made()]


def test_a_replacement_is_for_the_calls_of_this_thread_alone():
    elsewhere: list[str] = []
    with replaced(*METHODS):
        assert words() == ["own!", "inherited!", "Owner!"]
        on_threads(lambda: elsewhere.extend(words()))
        assert Base().inherited() == "inherited"
    assert elsewhere == words() == ["own", "inherited", "Owner"]


def test_all_is_put_back_after_an_error_inside_and_within_another_replacement():
    before = dict(vars(Owner))

    def interrupted() -> None:
        with replaced(*METHODS):
            assert words() == ["own!!", "inherited!!", "Owner!!"]
            raise KeyboardInterrupt

    with replaced(*METHODS):
        with pytest.raises(KeyboardInterrupt):
            interrupted()
        assert words() == ["own!", "inherited!", "Owner!"]
    assert dict(vars(Owner)) == before
