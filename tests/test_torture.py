"""A sample of what `python -m tests.torture` tries for twenty minutes."""

from .torture import KINDS, torture


def test_every_kind(tmp_path):
    bench = torture(tmp_path, seconds=1, seed=2)  # one case of each
    assert len(bench.tried) == len(KINDS)
    assert bench.cases == []
