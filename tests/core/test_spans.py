from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from stemloop.core.spans import Spans

pairs = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 8)), max_size=15)


@given(pairs, st.tuples(st.integers(0, 40), st.integers(0, 12)))
def test_spans_are_a_set_of_numbers(added, asked):
    spans, numbers = Spans(), set()
    for first, n in added:
        new = spans.add(first, first + n)
        fresh = set(range(first, first + n)) - numbers
        assert {k for a, b in new for k in range(a, b)} == fresh
        numbers |= fresh
    assert len(spans) == len(numbers)
    assert {k for a, b in spans for k in range(a, b)} == numbers
    assert {k for a, b in spans.gaps() for k in range(a, b)} == set(range(max(numbers, default=-1) + 1)) - numbers
    first, n = asked
    assert spans.covers(first, first + n) == (set(range(first, first + n)) <= numbers)
    listed = list(spans)
    assert all(b < c for (_, b), (c, _) in pairwise(listed))  # disjoint and not touching
