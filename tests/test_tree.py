"""Plans of shared prefixes: every input is covered once, masks see exactly an input's own tokens, and sharing is worth it."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eval.tree import UNLIMITED, Limits, choose_clusters, plan

tokens = st.lists(st.integers(0, 2), min_size=1, max_size=12)  # few symbols: many shared prefixes


@st.composite
def problems(draw):
    inputs = list(dict.fromkeys(tuple(one) for one in draw(st.lists(tokens, min_size=1, max_size=12))))
    return inputs, [draw(st.integers(0, len(one) - 1)) for one in inputs]


limits = st.builds(Limits, tokens=st.integers(1, 40), inputs=st.integers(1, 5), scored=st.integers(1, 20))


@given(problems(), limits, st.integers(0, 6))
def test_every_input_is_rebuilt_from_its_nodes(problem, limits, overhead):
    """The prefix and a node's ancestors are the input up to that node, and nothing else."""
    inputs, first = problem
    seen = []
    for cluster in plan(inputs, first, limits, overhead):
        for pack in cluster.packs:
            longest = max(len(inputs[k]) for k in pack.inputs) - len(cluster.prefix)
            assert len(pack.tokens) <= max(limits.tokens, longest)
            ends = [k for k in pack.inputs if not any(inputs[k] == inputs[o][: len(inputs[k])] for o in pack.inputs if o != k)]
            assert len(ends) <= limits.inputs
            assert len(pack.inputs) == 1 or sum(map(len, pack.paths)) <= limits.scored
            for index, path in zip(pack.inputs, pack.paths, strict=True):
                seen.append(index)
                assert len(path) == len(inputs[index]) - first[index]
                for node, position in zip(path, range(first[index], len(inputs[index])), strict=True):
                    ancestors = [j for j in range(node + 1) if node < pack.end[j]]
                    assert (*cluster.prefix, *(pack.tokens[j] for j in ancestors)) == inputs[index][: position + 1]
                    assert pack.depth[node] == position
    assert sorted(seen) == list(range(len(inputs)))


@given(problems())
def test_one_big_pack_is_the_minimum(problem):
    """Without clusters and limits, the tree has one node for every distinct prefix of any input."""
    inputs, first = problem
    minimum = len({one[:length] for one in inputs for length in range(1, len(one) + 1)})
    assert sum(cluster.num_tokens for cluster in plan(inputs, first, Limits(UNLIMITED), overhead=UNLIMITED)) == minimum


@given(st.lists(st.integers(0, 5), max_size=7), st.integers(0, 4))
def test_choice_is_the_best(shared, overhead):
    """Against recursion on the tree of common prefixes."""

    def best(left, right):
        """The most that [left, right) saves as one cluster, or split where its members share least."""
        if right - left < 2:
            return 0
        depth = min(shared[left : right - 1])
        cuts = [left, *(i + 1 for i in range(left, right - 1) if shared[i] == depth), right]
        return max((right - left - 1) * depth - overhead, sum(best(one, two) for one, two in itertools.pairwise(cuts)))

    chosen = choose_clusters(shared, overhead)
    assert all(left < right for left, right, _ in chosen)
    assert all(one[1] <= two[0] for one, two in itertools.pairwise(chosen))
    assert all(depth == min(shared[left : right - 1]) for left, right, depth in chosen)
    assert sum((right - left - 1) * depth - overhead for left, right, depth in chosen) == max(0, best(0, len(shared) + 1))


def test_scored_positions_are_never_in_a_prefix():
    """Logits are read in packs only, so a prefix ends before the first scored position of every member."""
    inputs = [(1, 2, 3, 4, 5), (1, 2, 3, 4, 6)]
    for cluster in plan(inputs, [2, 4], Limits(100), overhead=0):
        assert len(cluster.prefix) <= 2


@pytest.mark.parametrize("count", [5_000])
def test_many_nested_inputs(count):
    """Every input the beginning of the next: no recursion limit is met."""
    inputs = [tuple(range(length)) for length in range(1, 200)]
    clusters = plan(inputs, [len(one) - 1 for one in inputs], Limits(count))
    assert sum(len(pack.inputs) for cluster in clusters for pack in cluster.packs) == len(inputs)
