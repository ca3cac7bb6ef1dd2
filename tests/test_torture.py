from .torture import KINDS, torture


def test_a_sample(tmp_path):
    """Of what `python -m tests.torture` tries for twenty minutes."""
    bench = torture(tmp_path, seconds=25, seed=2)
    assert len(bench.tried) == len(KINDS) and not bench.cases, bench.cases
