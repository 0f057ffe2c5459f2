"""PagePool: pages are conserved, handed out once, and released exactly as often as they are held."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from mixattn.kv.page_pool import OutOfPages, PagePool


@pytest.mark.parametrize(("num_pages", "page_size", "name"), [(0, 16, "num_pages"), (4, 0, "page_size")])
def test_pool_without_pages_or_tokens_is_refused(num_pages: int, page_size: int, name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be >= 1, got 0"):
        PagePool(num_pages, page_size)


def test_num_pages_for_rounds_up() -> None:
    pool = PagePool(4, 16)
    assert [pool.num_pages_for(n) for n in (0, 1, 16, 17, 32, 33)] == [0, 1, 1, 2, 2, 3]


def test_allocate_gives_distinct_pages_of_the_pool() -> None:
    pool = PagePool(8, 16)
    pages = pool.allocate(3) + pool.allocate(5)
    assert sorted(pages) == list(range(8))
    assert (pool.num_free, pool.num_used) == (0, 8)


def test_allocate_more_than_free_takes_nothing() -> None:
    pool = PagePool(4, 16)
    pool.allocate(3)
    with pytest.raises(OutOfPages, match="2 pages asked for, 1 of 4 are free"):
        pool.allocate(2)
    assert pool.num_free == 1
    pool.check()


def test_retained_page_is_free_after_the_last_release() -> None:
    pool = PagePool(2, 16)
    pages = pool.allocate(1)
    pool.retain(pages)
    assert pool.refcount(pages[0]) == 2
    pool.release(pages)
    assert pool.num_free == 1
    pool.release(pages)
    assert pool.num_free == 2
    assert pool.refcount(pages[0]) == 0


def test_release_of_a_free_page_is_an_error() -> None:
    pool = PagePool(2, 16)
    pages = pool.allocate(1)
    pool.release(pages)
    with pytest.raises(RuntimeError, match=f"page {pages[0]} released while free"):
        pool.release(pages)


def test_retain_of_a_free_page_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="page 1 retained while free"):
        PagePool(2, 16).retain([1])


@pytest.mark.parametrize(
    "damage",
    [
        lambda pool: pool._free.append(pool._free[0]),
        lambda pool: pool._free.pop(),
        lambda pool: pool._refcounts.__setitem__(pool._free[0], 1),
        lambda pool: pool._refcounts.__setitem__(0, -1),
    ],
    ids=["free-twice", "lost", "free-and-held", "negative"],
)
def test_check_finds_damage(damage: object) -> None:
    pool = PagePool(4, 16)
    pool.allocate(1)
    pool.check()
    damage(pool)  # type: ignore[operator]
    with pytest.raises(AssertionError, match="page"):
        pool.check()


class PoolMachine(RuleBasedStateMachine):
    """Random calls against a plain dict of page -> holders."""

    @initialize(num_pages=st.integers(1, 12))
    def start(self, num_pages: int) -> None:
        self.pool = PagePool(num_pages, page_size=4)
        self.holders: dict[int, int] = {}

    @rule(n=st.integers(0, 5))
    def allocate(self, n: int) -> None:
        if n > self.pool.num_pages - len(self.holders):
            with pytest.raises(OutOfPages):
                self.pool.allocate(n)
            return
        pages = self.pool.allocate(n)
        assert len(pages) == n and not self.holders.keys() & pages
        self.holders |= dict.fromkeys(pages, 1)

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def retain(self, data: st.DataObject) -> None:
        page = data.draw(st.sampled_from(sorted(self.holders)))
        self.pool.retain([page])
        self.holders[page] += 1

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        page = data.draw(st.sampled_from(sorted(self.holders)))
        self.pool.release([page])
        self.holders[page] -= 1
        if self.holders[page] == 0:
            del self.holders[page]

    @invariant()
    def agrees_with_the_model(self) -> None:
        if not hasattr(self, "pool"):
            return
        self.pool.check()
        assert self.pool.num_used == len(self.holders)
        assert self.pool.num_free + self.pool.num_used == self.pool.num_pages
        assert all(self.pool.refcount(page) == n for page, n in self.holders.items())


TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = settings(max_examples=100, stateful_step_count=30, deadline=None, derandomize=True)
