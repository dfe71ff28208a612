"""Which prefixes requests share, and how to lay their rest out so that every token is computed once.

    input     token ids that go into the model for one request (context + continuation without its last token)
    first     index of the first scored position of an input: the logits there predict the continuation's first token
    cluster   inputs that share their first `depth` tokens; those are run once and kept as keys and values
    pack      the rest of some inputs of one cluster as a prefix tree, in depth-first order, in one row of S nodes; node j is
              an ancestor of node i exactly if j <= i < end[j], so the attention mask is one comparison

Works on whole sequences of token ids: the tokens of a text's parts are not the tokens of the text. Knows no torch.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

Tokens = Sequence[int]

UNLIMITED = 1 << 60
CLUSTER_OVERHEAD = 64  # tokens' worth of work that a separate prefix run costs (a call of its own, attention to the cache)


@dataclass(frozen=True)
class Limits:
    """What one pack may hold: `tokens` nodes, `inputs` that are not beginnings of each other, `scored` positions.

    An input that is larger than a limit by itself still gets a pack of its own.
    """

    tokens: int
    inputs: int = UNLIMITED
    scored: int = UNLIMITED


@dataclass
class Pack:
    """Nodes of a prefix tree in depth-first order.

    `depth[i]` is the absolute position of node i in its sequences; `paths[k]` lists the nodes whose logits are scored for
    input `inputs[k]`.
    """

    tokens: list[int] = field(default_factory=list)
    depth: list[int] = field(default_factory=list)
    end: list[int] = field(default_factory=list)
    inputs: list[int] = field(default_factory=list)
    paths: list[list[int]] = field(default_factory=list)


@dataclass(frozen=True)
class Cluster:
    """A shared prefix (possibly empty) and the packs that continue it."""

    prefix: tuple[int, ...]
    packs: tuple[Pack, ...]

    @property
    def num_tokens(self) -> int:
        """Tokens that the model runs on for this cluster."""
        return len(self.prefix) + sum(len(pack.tokens) for pack in self.packs)


def plan(inputs: Sequence[Tokens], first: Sequence[int], limits: Limits, overhead: int = CLUSTER_OVERHEAD) -> list[Cluster]:
    """Clusters that cover every input once, longest work first.

    Args:
        inputs: distinct sequences of token ids.
        first: for each, the index of its first scored position (0 <= first < length).
        limits: of each pack.
    """
    order = sorted(range(len(inputs)), key=lambda k: list(inputs[k]))
    shared = [_shared_length(inputs, first, order[i], order[i + 1]) for i in range(len(order) - 1)]
    result, covered = [], 0
    singles: list[int] = []
    for left, right, depth in choose_clusters(shared, overhead):
        singles += order[covered:left]
        covered = right
        members = order[left:right]
        prefix = tuple(inputs[members[0]][:depth])
        result.append(Cluster(prefix, tuple(pack(inputs, first, members, depth, limits))))
    singles += order[covered:]
    if singles:
        result.append(Cluster((), tuple(pack(inputs, first, singles, 0, limits))))
    return sorted(result, key=lambda cluster: -cluster.num_tokens)


def choose_clusters(shared: Sequence[int], overhead: int) -> list[tuple[int, int, int]]:
    """Disjoint ranges (left, right, depth) of sorted inputs that save the most: (right - left - 1) * depth - overhead each.

    `shared[i]` is the length of the prefix that sorted inputs i and i+1 have in common. Ranges with a common prefix are
    nested (the LCP-interval tree), so the best choice for each is either itself or the best choices inside it.
    """
    # Open intervals, from outer to inner: [depth, left, what the choices inside save, those choices].
    open_intervals: list[tuple[int, int, int, list[tuple[int, int, int]]]] = [(0, 0, 0, [])]
    for right, depth in enumerate([*shared, 0], start=1):
        left, saved = right - 1, 0
        chosen: list[tuple[int, int, int]] = []
        while open_intervals[-1][0] > depth:
            inner_depth, inner_left, inside, choices = open_intervals.pop()
            inside, choices = inside + saved, choices + chosen
            alone = (right - inner_left - 1) * inner_depth - overhead
            saved, chosen = (alone, [(inner_left, right, inner_depth)]) if alone > inside else (inside, choices)
            left = inner_left
        if open_intervals[-1][0] < depth:
            open_intervals.append((depth, left, saved, chosen))
        else:
            outer_depth, outer_left, inside, choices = open_intervals[-1]
            open_intervals[-1] = (outer_depth, outer_left, inside + saved, choices + chosen)
    return open_intervals[0][3]


def pack(inputs: Sequence[Tokens], first: Sequence[int], members: Sequence[int], depth: int, limits: Limits) -> list[Pack]:
    """The sorted `members` without their first `depth` tokens, as prefix trees within `limits`."""
    packs: list[Pack] = []
    count = scored = 0  # of the current pack
    path: list[int] = []  # nodes of the previous input
    before: Tokens = ()
    for member in members:
        tokens = inputs[member]
        common = _common_length(before, tokens) - depth if path else 0
        nodes = len(packs[-1].tokens) + len(tokens) - depth - common if packs else 0
        ends = 0 if path and common == len(path) else 1  # a longer version of the previous input adds no branch
        scores = len(tokens) - first[member]
        if not packs or nodes > limits.tokens or count + ends > limits.inputs or scored + scores > limits.scored:
            if packs:
                _close(packs[-1], path, 0)
            packs.append(Pack())
            path, common, count, scored, ends = [], 0, 0, 0, 1
        count, scored = count + ends, scored + scores
        current = packs[-1]
        _close(current, path, common)
        path = path[:common]
        for position in range(depth + common, len(tokens)):
            path.append(len(current.tokens))
            current.tokens.append(tokens[position])
            current.depth.append(position)
            current.end.append(0)
        current.inputs.append(member)
        current.paths.append(path[first[member] - depth :])
        before = tokens
    if packs:
        _close(packs[-1], path, 0)
    return packs


def _close(current: Pack, path: list[int], common: int) -> None:
    """The subtrees of the nodes of `path` beyond the first `common` are complete."""
    for node in path[common:]:
        current.end[node] = len(current.tokens)


def _shared_length(inputs: Sequence[Tokens], first: Sequence[int], one: int, two: int) -> int:
    """Tokens in common, short of every scored position: those are computed in packs, where logits are read."""
    return min(_common_length(inputs[one], inputs[two]), first[one], first[two])


def _common_length(one: Tokens, two: Tokens) -> int:
    """Length of the longest common prefix, by bisection on slices, which compare in C."""
    low, high = 0, min(len(one), len(two))
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == two[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
