from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from jaxserve.engine.pages import PagePool


def check(pool, owned):
    """Every page has as many users as owners, and stands in exactly one place."""
    owners = Counter(owned)
    assert owners[0] == 0, "page 0 is for padding"
    assert [owners[page] for page in range(pool.count)] == pool.users
    places = [*pool.blank, *pool.cached, *owners]
    assert sorted(places) == list(range(1, pool.count))
    assert pool.free == pool.count - 1 - len(owners)
    assert not set(pool.blank) & set(pool.entry_of) and set(pool.cached) <= set(pool.entry_of)
    assert {key: page for page, (_, key) in pool.entry_of.items()} == pool.page_of
    assert len({chain for chain, _ in pool.entry_of.values()}) == len(pool.entry_of)


def fill(pool, tokens, root=None):
    """What a request does with the pages of its prompt: share, take, remember."""
    pages, chain = pool.share(tokens, root)
    hits = len(pages)
    pages += pool.take(-(-len(tokens) // pool.size) - hits)
    for i in range(hits, len(tokens) // pool.size):
        chain = pool.remember(chain, tokens[i * pool.size : (i + 1) * pool.size], pages[i])
    return pages, hits


def test_page_0_is_never_given_out():
    pool = PagePool(8, 4)
    assert sorted(pool.take(7)) == list(range(1, 8))
    assert pool.free == 0
    with pytest.raises(AssertionError):
        pool.take(1)
    with pytest.raises(ValueError, match="not 1"):
        PagePool(1, 4)


def test_full_pages_are_shared_short_of_the_last_token():
    pool = PagePool(16, 4)
    first, hits = fill(pool, [*range(10)])
    assert hits == 0 and len(first) == 3
    again, hits = fill(pool, [*range(10)])
    assert hits == 2 and again[:2] == first[:2] and again[2] != first[2]
    third, hits = fill(pool, [*range(8)])
    assert hits == 1  # its last token must be computed, so the page that ends with it is not shared
    check(pool, first + again + third)
    assert pool.users[first[0]] == 3


def test_a_page_is_found_only_after_its_own_prefix():
    pool = PagePool(16, 2)
    fill(pool, [1, 2, 3, 4, 5])
    assert fill(pool, [9, 9, 3, 4, 5])[1] == 0
    assert fill(pool, [1, 2, 9, 9, 5])[1] == 1
    assert fill(pool, [1, 2, 3, 4, 9])[1] == 2


@pytest.mark.parametrize("other", [0, 1, "a", ("root", None), (None,)])
def test_only_equal_roots_share(other):
    pool = PagePool(16, 2)
    fill(pool, [1, 2, 3, 4, 5])  # root None; its entries have the ids 0 and 1
    assert fill(pool, [3, 4, 5], other)[1] == 0
    assert fill(pool, [1, 2, 3], other)[1] == 0
    assert fill(pool, [1, 2, 3], other)[1] == 1


def test_blank_pages_go_first_then_the_tails_of_the_oldest():
    pool = PagePool(7, 2)
    old, _ = fill(pool, [1, 2, 3, 4])
    new, _ = fill(pool, [5, 6, 7, 8])
    pool.release(old)
    pool.release(new)
    assert len(pool.blank) == 2
    assert set(pool.take(2)).isdisjoint(old + new)
    assert pool.take(4) == [old[1], old[0], new[1], new[0]]
    check(pool, range(1, 7))
    assert not pool.page_of


def test_using_a_prefix_keeps_it():
    pool = PagePool(5, 2)
    old, _ = fill(pool, [1, 2, 3, 4])
    pool.release(old)
    new, _ = fill(pool, [5, 6, 7, 8])
    pool.release(new)
    shared, _ = pool.share([1, 2, 3, 4, 5], None)
    assert shared == old
    pool.release(shared)
    assert pool.take(2) == new[::-1]


def test_a_page_computed_twice_is_remembered_once_and_its_prefix_goes_on():
    pool = PagePool(16, 2)
    chain = pool.share([1, 2], None)[1]
    first, second, after = pool.take(3)
    one = pool.remember(chain, [1, 2], first)
    assert pool.remember(chain, [1, 2], second) == one
    pool.remember(one, [3, 4], after)
    assert pool.share([1, 2, 3, 4, 5], None)[0] == [first, after]
    pool.release([second])
    assert second in pool.blank


def test_evicted_ids_are_not_used_again():
    pool = PagePool(3, 1)
    pages, _ = fill(pool, [1, 2])
    chain = pool.entry_of[pages[0]][0]
    pool.release(pages)
    pages = pool.take(2)
    for token, page in zip([7, 8], pages, strict=True):
        assert pool.remember(("root", None), [token], page) > chain
    assert pool.share([1, 2, 3], None)[0] == []


def test_forget():
    pool = PagePool(8, 2)
    held, _ = fill(pool, [1, 2, 3])
    freed, _ = fill(pool, [5, 6])
    pool.release(freed)
    pool.forget([*held, *freed])
    check(pool, held)
    assert pool.share([1, 2, 3], None)[0] == [] and not pool.cached
    pool.release(held)
    check(pool, [])


class PoolMachine(RuleBasedStateMachine):
    """Requests over an alphabet of two tokens come and go; what they share must be what they would have computed."""

    def __init__(self):
        super().__init__()
        self.pool = PagePool(10, 2)
        self.held = []  # pages of each request
        self.content = {}  # page -> (root, prefix that it ends)

    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=14), root=st.integers(0, 1))
    def arrive(self, tokens, root):
        shared, chain = self.pool.share(tokens, root)
        assert [self.content[page] for page in shared] == [
            (root, tuple(tokens[: 2 * i + 2])) for i in range(len(shared))
        ]
        assert len(shared) <= (len(tokens) - 1) // 2
        new = -(-len(tokens) // 2) - len(shared)
        if new > self.pool.free:
            self.pool.release(shared)
            return
        pages = shared + self.pool.take(new)
        for i in range(len(shared), len(tokens) // 2):
            chain = self.pool.remember(chain, tokens[2 * i : 2 * i + 2], pages[i])
            self.content[pages[i]] = root, tuple(tokens[: 2 * i + 2])
        self.held.append(pages)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def leave(self, data):
        pages = data.draw(st.sampled_from(self.held))
        self.held.remove(pages)
        self.pool.release(pages)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def fail(self, data):
        pages = data.draw(st.sampled_from(self.held))
        self.held.remove(pages)
        self.pool.forget(pages)
        self.pool.release(pages)

    @invariant()
    def sound(self):
        check(self.pool, [page for pages in self.held for page in pages])


PoolMachine.TestCase.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
test_random_use = PoolMachine.TestCase
