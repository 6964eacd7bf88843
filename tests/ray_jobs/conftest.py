"""For tests of commands in this process."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _ray_starts_where_it_is_needed(request, monkeypatch):
    """Not in advance of what is going to be refused: a start takes seconds. Its own tests: launch/test_ahead.py."""
    if request.node.get_closest_marker("cluster") is None and request.path.name != "test_ahead.py":
        monkeypatch.setattr("ray_jobs.launch.ahead.plausible", lambda config: False)
