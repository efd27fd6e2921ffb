"""Beside the real cache-dit (extra `cache-dit`): refused while it caches, welcome once it is off."""

from __future__ import annotations

import pytest

import families
from flowaccel import RecipeConflictError
from flowaccel.hooks import close_session, open_session

cache_dit = pytest.importorskip("cache_dit", reason="the extra cache-dit is not installed")


@pytest.mark.parametrize("name", ["sd3", "flux", "wan21"])
def test_a_network_that_cache_dit_caches_is_refused(name: str) -> None:
    pipe = families.CASES[name].make()
    cache_dit.enable_cache(pipe)
    with pytest.raises(RecipeConflictError, match=r"cache_dit\.disable_cache"):
        open_session(pipe)
    untouched = families.CASES[name].make()
    open_session(untouched)
    close_session(untouched)
    cache_dit.disable_cache(pipe)
    open_session(pipe)
    close_session(pipe)
