"""Who owns which page, and which pages already hold a known prefix.

Knows integers only: what a page looks like on the device is the cache's business.  A full page is known by the tokens
in it and by the entry of the page before it, so an entry stands for one exact prefix: ids of entries are never used
again and keys are compared, not just hashed, so that no collision can share a wrong page, and a page costs the same
wherever in a prompt it stands.
"""

from array import array
from collections import OrderedDict
from collections.abc import Hashable, Iterable, Sequence
from itertools import count as count_up


class PagePool:
    """Pages 1 to count - 1 are given out; page 0 takes the writes of padding."""

    def __init__(self, count: int, size: int):
        if count < 2:
            raise ValueError(f"a pool needs at least 2 pages (page 0 takes the writes of padding), not {count}")
        self.count, self.size = count, size
        self.users = [0] * count  # requests that hold the page
        self.blank = list(range(count - 1, 0, -1))  # free, and nothing worth keeping in it
        self.cached: OrderedDict[int, None] = OrderedDict()  # free, but holding a known prefix; first to go first
        self.page_of: dict[tuple, int] = {}  # (chain before the page, its tokens) -> page
        self.entry_of: dict[int, tuple[int, tuple]] = {}  # page -> (its id as a chain, its key in page_of)
        self._ids = count_up()

    @property
    def free(self) -> int:
        """Pages that `take` can give out, cached ones included."""
        return len(self.blank) + len(self.cached)

    def take(self, count: int) -> list[int]:
        """`count` pages for one user; prefixes that nobody asked for in the longest time give way."""
        assert count <= self.free, f"{count} pages taken from {self.free} free ones"
        taken = []
        for _ in range(count):
            if self.blank:
                page = self.blank.pop()
            else:
                page, _ = self.cached.popitem(last=False)
                del self.page_of[self.entry_of.pop(page)[1]]
            self.users[page] = 1
            taken.append(page)
        return taken

    def release(self, pages: Sequence[int]) -> None:
        """Gives one user's pages back, in the order of its prefix, whose tail will be forgotten before its head."""
        for page in reversed(pages):
            self.users[page] -= 1
            assert self.users[page] >= 0, f"page {page} is released more often than it was taken"
            if self.users[page]:
                continue
            if page in self.entry_of:
                self.cached[page] = None
            else:
                self.blank.append(page)

    def share(self, tokens: Sequence[int], root: Hashable) -> tuple[list[int], Hashable]:
        """Pages that hold the start of `tokens`, now also the caller's, and the chain that the next page links to.

        They stop short of the last token, which has to be computed anyway.  Only prefixes remembered under an equal
        `root` are found.
        """
        shared: list[int] = []
        chain: Hashable = ("root", root)  # never equal to an id, whatever the root is
        for start in range(0, (len(tokens) - 1) // self.size * self.size, self.size):
            page = self.page_of.get((chain, _packed(tokens[start : start + self.size])))
            if page is None:
                break
            if not self.users[page]:
                del self.cached[page]
            self.users[page] += 1
            shared.append(page)
            chain = self.entry_of[page][0]
        return shared, chain

    def remember(self, chain: Hashable, tokens: Sequence[int], page: int) -> Hashable:
        """Notes that `page` holds exactly `tokens` after the prefix `chain`; returns the chain that ends with it."""
        assert len(tokens) == self.size and page not in self.entry_of
        key = (chain, _packed(tokens))
        known = self.page_of.setdefault(key, page)
        if known == page:
            self.entry_of[page] = next(self._ids), key
        return self.entry_of[known][0]

    def forget(self, pages: Iterable[int]) -> None:
        """Nobody will find these pages by their content any more; who holds them keeps them."""
        for page in pages:
            if entry := self.entry_of.pop(page, None):
                del self.page_of[entry[1]]
                if page in self.cached:
                    del self.cached[page]
                    self.blank.append(page)


def _packed(tokens: Sequence[int]) -> Hashable:
    """Tokens as a key: an eighth of the memory of a tuple, whose numbers are an object each."""
    try:
        return array("i", tokens).tobytes()
    except (TypeError, OverflowError):  # no tokens: their request fails when it is packed, and no other
        return tuple(tokens)
