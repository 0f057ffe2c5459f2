"""Who owns which page of the KV cache. Integers only: the tensors behind the pages are the executor's."""

from __future__ import annotations

from array import array
from collections.abc import Iterable


class OutOfPages(RuntimeError):  # noqa: N818
    """More pages were asked for than are free: a state to plan around, not a mistake."""


class PagePool:
    """A fixed number of pages, each free or held by ``refcount`` holders.

    A page that is freed last is handed out first: it is the likeliest to be in a cache, and the order is the same in
    every run.

    Args:
        num_pages: pages in the pool, ids 0 to num_pages - 1.
        page_size: tokens per page.
    Raises:
        ValueError: naming the argument.
    """

    def __init__(self, num_pages: int, page_size: int) -> None:
        if num_pages < 1:
            raise ValueError(f"num_pages must be >= 1, got {num_pages}")
        if page_size < 1:
            raise ValueError(f"page_size must be >= 1, got {page_size}")
        self.num_pages = num_pages
        self.page_size = page_size
        self._free = list(range(num_pages - 1, -1, -1))
        self._refcounts = array("i", bytes(array("i").itemsize * num_pages))

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_used(self) -> int:
        """Pages with a holder; num_free + num_used is num_pages at any time."""
        return self.num_pages - len(self._free)

    def num_pages_for(self, num_tokens: int) -> int:
        """Pages that hold ``num_tokens`` tokens."""
        return -(-num_tokens // self.page_size)

    def refcount(self, page: int) -> int:
        """How many hold ``page``; 0 when it is free."""
        return self._refcounts[page]

    def allocate(self, num_pages: int) -> list[int]:
        """``num_pages`` free pages, each now held once.

        Raises:
            OutOfPages: fewer are free; nothing was allocated.
        """
        if num_pages > len(self._free):
            raise OutOfPages(f"{num_pages} pages asked for, {len(self._free)} of {self.num_pages} are free")
        pages = [self._free.pop() for _ in range(num_pages)]
        for page in pages:
            self._refcounts[page] = 1
        return pages

    def retain(self, pages: Iterable[int]) -> None:
        """One more holder of each page.

        Raises:
            RuntimeError: a page is free; its content may be anybody's.
        """
        for page in pages:
            if self._refcounts[page] == 0:
                raise RuntimeError(f"page {page} retained while free")
            self._refcounts[page] += 1

    def release(self, pages: Iterable[int]) -> None:
        """One holder less of each page; a page without holders is free.

        Raises:
            RuntimeError: a page is free already: it was released twice.
        """
        for page in pages:
            count = self._refcounts[page]
            if count == 0:
                raise RuntimeError(f"page {page} released while free")
            self._refcounts[page] = count - 1
            if count == 1:
                self._free.append(page)

    def check(self) -> None:
        """Every page is either free, once, with no holder, or has a holder; an AssertionError says which is not."""
        free = set(self._free)
        assert len(free) == len(self._free), "a page is free twice"
        for page, count in enumerate(self._refcounts):
            assert count >= 0, f"page {page} has {count} holders"
            assert (count == 0) == (page in free), f"page {page} has {count} holders and is free: {page in free}"
