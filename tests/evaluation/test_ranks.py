"""Shares of the work; two real processes meet in test_protocol.py."""

import pytest

from scamo.errors import ScaMoError
from scamo.evaluation.ranks import Ranks


def test_alone_without_a_launcher(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    ranks = Ranks.join()
    assert (ranks.rank, ranks.size, ranks.main, ranks.made) == (0, 1, True, False)
    assert ranks.gather(ranks.share([3, 1, 2])) == [3, 1, 2]
    assert ranks.device("auto") == "auto"
    ranks.leave()


@pytest.mark.parametrize("size", [2, 3, 5])
def test_shares_are_the_whole_work_once(size):
    work = list(range(13))
    parts = [Ranks(rank, size).share(work) for rank in range(size)]
    assert sorted(piece for part in parts for piece in part) == work
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_a_launcher_with_nonsense_is_named(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(ScaMoError, match="WORLD_SIZE and RANK"):
        Ranks.join()
