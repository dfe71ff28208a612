"""A donor's own tokens of the text so far, kept up while the host's tokens come in: exact where a vocabulary map is not.

After every host token the donor holds the tokens that its tokenizer gives for the text up to there, as it was trained to see
text. A longer text may be split otherwise at its end; then the tokens that are no longer right *die*. They stay in the donor's
cache, hidden from whatever comes later, and others take their positions. So caches are only ever appended to, rows of a batch
do not get in each other's way, and what a host position sees is a function of the host ids up to it: nothing leaks.

    B, T       rows, and host positions of a call; step: the number of a host position, over all calls, from 0
    slot       a place in the donor's cache; rows have different numbers of tokens, so some are padding, behind a call's tokens
    S, N       slots before a call, and of it
    position   of a live token among the live ones: what the donor takes for its place in the text

Text is that of one segment: control tokens end it and begin another. Where a tokenizer puts a space in front of a text, the
host's is taken off and the donor's is put on. A character of which bytes are missing waits for them; bytes that cannot become
a character stand alone, as byte tokens.

Reading a text again from its beginning for each token would take time quadratic in its length. A text is *cut* where

    encode(a + b) = encode(a) + encode(b)    whatever b goes on with,

so that tokens before a cut are final and only what follows the last one is read again. Two characters are such a cut if no
token holds them side by side and the steps before the merges split on either side of it as they would without the other side.

    byte fallback    merges run over the whole text, so every pair of characters that is inside no piece of the vocabulary is
                     a cut, among them a letter before a space, if no piece has a space in it behind something else
    byte-level       a regular expression splits the text, and nothing merges across. In those of KNOWN_ALTERNATIVES no match
                     goes from anything but white space to a space, or from a letter to a punctuation mark (but "'"), and
                     none looks back or, but from white space, ahead: these two are cuts. Of others nothing is known
    else             there is no cut, and the segment is read again with every token

This file is copied next to the weights of fused models: it imports nothing of the package but its siblings.
"""

import copy
import json
import re
import unicodedata
from codecs import utf_8_decode
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from .byte_tables import ByteTable, text_encoder
from .errors import FusionError
from .vocabulary import vocabulary_map

NEVER = torch.iinfo(torch.int64).max
REMEMBERED = 1 << 16  # texts whose tokens are remembered; most are words, and words come again
LONGEST_REMEMBERED = 64  # characters; longer ones are texts without cuts, which do not come again
KNOWN_ALTERNATIVES = (  # of GPT-2, of Llama-3 and Qwen, and of tekken and GPT-4o; none needs what is before its match
    *("'s", "'t", "'re", "'ve", "'m", "'ll", "'d", r" ?\p{L}+", r" ?\p{N}+", r" ?[^\s\p{L}\p{N}]+"),
    *(r"(?i:'s|'t|'re|'ve|'m|'ll|'d)", r"[^\r\n\p{L}\p{N}]?\p{L}+", r"\p{N}{1,3}", r"\p{N}"),
    *(r" ?[^\s\p{L}\p{N}]+[\r\n]*", r" ?[^\s\p{L}\p{N}]+[\r\n/]*", r"\s*[\r\n]+", r"\s+(?!\S)", r"\s+"),
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
)
LOCAL_STEPS = ("Metaspace", "Digits", "Punctuation")  # they split by what a character is, not by what is around it

_KNOWN = "|".join(re.escape(alternative) for alternative in KNOWN_ALTERNATIVES)
_KNOWN_SPLIT = re.compile(rf"(?:(?:{_KNOWN})\|)*\\s\+")  # white space is always matched, so that no gap goes over a space
_ESCAPED = re.compile("([\udc80-\udcff])")  # what Python makes of a byte that belongs to no character

Cut = Callable[[str], bool]
"""Whether a text may be cut between these two characters."""


class Retokenizer:
    """What rows have in common: from a host's ids to a donor's tokens.

    host, donor    their tables
    tokenizer      the donor's
    control        other rows for host control tokens, of donor control tokens; bos goes to bos and eos to eos

    Raises:
        FusionError: as `text_encoder` and `vocabulary_map`.
    """

    def __init__(
        self,
        host: ByteTable,
        donor: ByteTable,
        tokenizer: PreTrainedTokenizerBase,
        *,
        control: Mapping[int, Sequence[int]] | None = None,
    ) -> None:
        textless = replace(host, content=(b"",) * len(host))
        rows = vocabulary_map(textless, donor, control=control)
        self.control = {index: tuple(rows.row(index)) for index in host.control}
        absent = bytes(byte for byte in range(256) if bytes([byte]) not in donor.ids)
        # the tokenizer leaves them out as well; here, so that the encoder never meets a text that it cannot spell
        self.content = tuple(data.translate(None, absent) for data in host.content) if absent else host.content
        self.host_space = host.leading_space
        probe = tokenizer(" x", add_special_tokens=False)["input_ids"]
        self.spaces = (" " if donor.leading_space else "", " " if donor.join(probe).startswith(b"  ") else "")
        self.cut = find_cuts(tokenizer, donor)
        self._donor = donor
        self._encode = text_encoder(tokenizer, donor)
        self._remembered = lru_cache(REMEMBERED)(self._tokens)

    def __deepcopy__(self, memo: Any) -> "Retokenizer":
        return self  # what rows have in common does not change; caches, which hold it, are copied

    def tokens(self, part: str) -> tuple[int, ...]:
        """The donor's ids of a text, or of one byte that belongs to no character."""
        return self._remembered(part) if len(part) <= LONGEST_REMEMBERED else self._tokens(part)

    def last_cut(self, text: str, start: int) -> int:
        """The last place where `text` may be cut, from `start` on; 0 if there is none."""
        return next((at for at in range(len(text) - 1, max(start, 1) - 1, -1) if self.cut(text[at - 1 : at + 1])), 0)

    def _tokens(self, part: str) -> tuple[int, ...]:
        if _ESCAPED.match(part):
            return tuple(self._donor.longest_match(part.encode(errors="surrogateescape")))
        return tuple(self._encode([part])[0]) if part else ()


class Step(NamedTuple):
    """What one host token does to the donor's row.

    ids          new tokens
    positions    theirs
    dead         slots of tokens that die
    last         slot of the last live token; -1: there is none
    """

    ids: tuple[int, ...]
    positions: range
    dead: tuple[int, ...]
    last: int


class PrefixTokens:
    """The state of one row: what the donor holds, as far as it may still change.

    slots    slots so far, dead ones and padding included
    last     slot of the last live token; -1: there is none
    """

    def __init__(self, rules: Retokenizer) -> None:
        self.slots = 0
        self.last = -1
        self._rules = rules
        self._settled = 0  # number of live tokens that are final
        self._text = ""  # behind the last cut; its tokens and their slots
        self._ids: tuple[int, ...] = ()
        self._at: tuple[int, ...] = ()
        self._waiting = b""  # the beginning of a character
        self._fresh = True  # the segment has no bytes yet
        self._bare = True  # the segment has no text yet

    def push(self, host_ids: Iterable[int]) -> list[Step]:
        """Reads host tokens, any ids below V; one step for each."""
        return [self._push(index) for index in host_ids]

    def copy(self) -> "PrefixTokens":
        """The same state, which goes on by itself; costs nothing, whatever has been read."""
        return copy.copy(self)  # all that it holds is immutable, but for the rules, which are common

    def _push(self, index: int) -> Step:
        rules = self._rules
        row = rules.control.get(index)
        if row is None:
            new = self._read(rules.content[index])
            if not new:
                return Step((), range(0), (), self.last)
            *closed, text = _ESCAPED.split(self._text + new)
            at = rules.last_cut(text, 0 if closed else len(self._text))
            final = [token for part in (*closed, text[:at]) for token in rules.tokens(part)]
            return self._replace(final, rules.tokens(text[at:]), text[at:])
        closed = _ESCAPED.split(self._text + self._waiting.decode(errors="surrogateescape"))
        self._waiting, self._fresh, self._bare = b"", True, True
        return self._replace([*(token for part in closed for token in rules.tokens(part)), *row], (), "")

    def _read(self, data: bytes) -> str:
        """The text that is complete with these bytes; bytes that belong to no character are escaped in it."""
        if data and self._fresh:
            data = data.removeprefix(b" ") if self._rules.host_space else data
            self._fresh = False
        data = self._waiting + data
        text, read = utf_8_decode(data, "surrogateescape", False)
        self._waiting = data[read:]
        if text and self._bare:
            text = self._rules.spaces[text[0] == " "] + text
            self._bare = False
        return text

    def _replace(self, final: Sequence[int], ids: tuple[int, ...], text: str) -> Step:
        """Puts tokens that are final, and then those of the open text, in the place of those of the text before."""
        whole = (*final, *ids)
        same = 0
        while same < len(self._ids) and same < len(whole) and self._ids[same] == whole[same]:
            same += 1
        new = whole[same:]
        slots = (*self._at[:same], *range(self.slots, self.slots + len(new)))
        positions = range(self._settled + same, self._settled + len(whole))
        dead = self._at[same:]
        self.slots += len(new)
        self.last = slots[-1] if slots else self.last
        self._settled += len(final)
        self._text, self._ids, self._at = text, ids, slots[len(final) :]
        return Step(new, positions, dead, self.last)


@dataclass(frozen=True)
class Nodes:
    """The donor's tokens of a batch so far, dead ones included: `ids` of one call, S + N slots of all.

    ids          [B, N]
    positions    [B, S + N]
    birth        [B, S + N] the step with which a token came
    death        [B, S + N] the step from which on it is hidden; NEVER while it lives, before all steps for padding
    last         [B, T] slot of the last live token at every host position; -1: there is none
    steps        host positions so far, those of the call included
    even         no slot is padding and no token has died, so that causality alone hides what has to be hidden
    """

    ids: torch.Tensor
    positions: torch.Tensor
    birth: torch.Tensor
    death: torch.Tensor
    last: torch.Tensor
    steps: int
    even: bool

    @property
    def before(self) -> int:
        """S."""
        return self.death.shape[1] - self.ids.shape[1]

    @property
    def valid(self) -> torch.Tensor:
        """Which of the call's slots are tokens: bool [B, N]."""
        return self.death[:, self.before :] >= 0

    @property
    def ends(self) -> torch.Tensor:
        """[B, T] slots of the call up to and with the last live one; 0: the last one before the call is still the last."""
        return (self.last - self.before + 1).clamp(min=0)

    def visible(self, window: int | None = None) -> torch.Tensor:
        """What the call's tokens see of all slots, each what is its own past: bool [B, N, S + N].

        window    how many live tokens back a donor's layer looks, the token itself among them
        """
        slot = torch.arange(self.death.shape[1], device=self.death.device)
        seen = (slot <= slot[self.before :, None]) & (self.death[:, None] > self.birth[:, self.before :, None])
        if window is None:
            return seen
        return seen & (self.positions[:, self.before :, None] - self.positions[:, None] < window)

    def alive(self) -> torch.Tensor:
        """What the call's host positions see of all slots: bool [B, T, S + N]."""
        step = torch.arange(self.steps - self.last.shape[1], self.steps, device=self.death.device)[:, None]
        return (self.birth[:, None] <= step) & (self.death[:, None] > step)

    def select(self, rows: torch.Tensor) -> "Nodes":
        """Rows of the batch in another order, some more than once."""
        names = ("ids", "positions", "birth", "death", "last")
        return replace(self, **{name: getattr(self, name)[rows] for name in names})


def expand_rows(rows: Sequence[PrefixTokens], ids: torch.Tensor, mask: torch.Tensor, before: Nodes | None = None) -> Nodes:
    """The donor tokens of host ids [B, T]; those outside `mask` [B, T] have none.

    rows      the states of the batch, which go on; all have the same number of slots afterwards, padding included
    before    what the call before gave

    Raises:
        FusionError: rows and `before` are not of the same calls.
    """
    old, first = (0, 0) if before is None else (before.death.shape[1], before.steps)
    if [row.slots for row in rows] != [old] * len(ids):
        raise FusionError(
            f"rows have {[row.slots for row in rows]} slots; expected {len(ids)} rows of {old}, as the call before left them"
        )
    last_step = first + ids.shape[1] - 1
    dead: list[tuple[int, int, int]] = []  # row, slot, step
    found = [
        _expand_row(number, *one, first, dead) for number, one in enumerate(zip(rows, ids.tolist(), mask.tolist(), strict=True))
    ]
    longest, shortest = max(len(one.ids) for one in found), min(len(one.ids) for one in found)
    for row in rows:
        row.slots = old + longest

    def padded(several: Iterable[list[int]], fill: int) -> torch.Tensor:
        return torch.tensor([one + [fill] * (longest - len(one)) for one in several], dtype=torch.long, device=ids.device)

    new = {
        "positions": padded((one.positions for one in found), 0),
        "birth": padded((one.birth for one in found), last_step),  # padding sees what is alive: softmax has no empty rows
        "death": padded(([NEVER] * len(one.ids) for one in found), -1),
    }
    if before is not None:
        new = {name: torch.cat([getattr(before, name), value], 1) for name, value in new.items()}
    if dead:
        row, slot, step = torch.tensor(dead, device=ids.device).T
        new["death"][row, slot] = step
    return Nodes(
        ids=padded((one.ids for one in found), 0),
        last=torch.tensor([one.last for one in found], dtype=torch.long, device=ids.device),
        steps=last_step + 1,
        even=(before is None or before.even) and longest == shortest and not dead,
        **new,
    )


class _Row(NamedTuple):
    ids: list[int]
    positions: list[int]
    birth: list[int]
    last: list[int]


def _expand_row(
    number: int, row: PrefixTokens, ids: list[int], mask: list[int], first: int, dead: list[tuple[int, int, int]]
) -> _Row:
    """One row's new tokens; those that die are added to `dead`."""
    found = _Row([], [], [], [])
    for step, (index, there) in enumerate(zip(ids, mask, strict=True), first):
        if there:
            (change,) = row.push([index])
            found.ids.extend(change.ids)
            found.positions.extend(change.positions)
            found.birth.extend([step] * len(change.ids))
            dead += [(number, slot, step) for slot in change.dead]
        found.last.append(row.last)
    return found


def find_cuts(tokenizer: PreTrainedTokenizerBase, table: ByteTable) -> Cut:
    """Where texts may be cut for a tokenizer with this table; derived at the head of this file."""
    backend: Any = tokenizer.backend_tokenizer
    steps = [step for part in (backend.normalizer, backend.pre_tokenizer) if part is not None for step in _flat(part)]
    added = [token for token in backend.get_added_tokens_decoder().values() if not token.special]
    if any(token.single_word for token in added):  # whether it is one depends on the text on either side
        return _nowhere
    held = {pair for token in added for pair in _pairs(token.content)}
    if table.fallback:
        if backend.model.ignore_merges or not all(map(_is_local, steps)):
            return _nowhere
        pieces = (data for index, data in enumerate(table.content) if index not in table.fallback)
        held |= {pair for data in pieces for pair in _pairs(data.decode())}
        return lambda pair: pair not in held
    *splits, level = [step for step in steps if step["type"] != "NFC"]  # which the encoder leaves out
    known = [step for step in splits if _is_known(step)]
    if level["type"] != "ByteLevel" or not all(_is_local(step) or step in known for step in splits):
        return _nowhere
    if not known and not level.get("use_regex"):
        return _nowhere
    return lambda pair: _is_split(pair) and pair not in held


def _nowhere(pair: str) -> bool:
    return False


def _flat(part: Any) -> list[dict[str, Any]]:
    """The steps of a normalizer or pre-tokenizer, in order, out of whatever sequences they stand in."""

    def flat(node: dict[str, Any]) -> list[dict[str, Any]]:
        inner = node.get("normalizers", node.get("pretokenizers"))
        return [node] if inner is None else [step for child in inner for step in flat(child)]

    return flat(json.loads(part.__getstate__()))


def _pairs(text: str) -> Iterable[str]:
    """All two characters that stand side by side."""
    return (text[at : at + 2] for at in range(len(text) - 1))


def _is_local(step: Mapping[str, Any]) -> bool:
    """Splits, if at all, by what the characters on either side are; or rewrites single characters only."""
    one = len(step.get("pattern", {}).get("String", "")) == 1
    return step["type"] in (*LOCAL_STEPS, "Prepend") or (one and step["type"] in ("Split", "Replace"))


def _is_known(step: Mapping[str, Any]) -> bool:
    """Splits by one of the regular expressions of which the head of this file speaks."""
    pattern = step.get("pattern", {}).get("Regex", "")
    whole = step["type"] == "Split" and step["behavior"] == "Isolated" and not step["invert"]
    return whole and _KNOWN_SPLIT.fullmatch(pattern) is not None


def _is_split(pair: str) -> bool:
    """Whether every known expression splits between the two characters, whatever is around them."""
    left, right = pair[0], pair[1]
    if right == " ":
        return not left.isspace()
    # what an old version and this one agree on is so in the tokenizer's
    letter = left.isalpha() and unicodedata.ucd_3_2_0.category(left)[0] == "L"
    return letter and right != "'" and unicodedata.ucd_3_2_0.category(right)[0] == "P"
