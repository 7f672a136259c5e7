"""Documents packed into token sequences of one length, every domain equally."""

from __future__ import annotations

import logging
import random
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate, chain, islice, zip_longest
from typing import TYPE_CHECKING

import torch

from cprune.errors import CpruneError
from cprune.measure.documents import Document

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LOG = logging.getLogger(__name__)

PIECE = 1 << 16  # characters tokenized at a time: a long document is read only as far as its tokens are wanted
PLENTY = 8  # characters for each token that is wanted, from which on a domain's documents are cut into passages
PASSAGE = 4  # characters of a passage for each token of a row: about a row
LEAST_TOKENS = 32  # fewer say nothing about an expert


@dataclass(frozen=True)
class Sequences:
    """N rows of S tokens, each of one domain."""

    input_ids: torch.Tensor  # [N, S] int64
    mask: torch.Tensor  # [N, S] bool, False on padding, which only the end of a row has
    domain: tuple[str, ...]  # [N]
    document: torch.Tensor | None = None  # [N, S] int64: the number of the document that a token is of; where known

    @property
    def tokens(self) -> int:
        """Tokens that are not padding."""
        return int(self.mask.sum())


def passages(documents: list[Document], *, tokens: int, seq_len: int) -> list[Document]:
    """The documents, cut into passages of about a row where their domain has far more text than `tokens` asks of it.

    A few whole documents would be all that is seen of such a domain, and an expert that they happen not to ask for
    would look useless; passages of many documents tell more. Text that is wanted nearly whole stays whole.
    """
    characters = Counter[str]()
    for document in documents:
        characters[document.domain] += len(document.text)
    wanted = PLENTY * tokens / max(1, len(characters))  # of each domain
    cut: list[Document] = []
    for document in documents:
        plenty = characters[document.domain] > wanted
        texts = _pieces(document.text, PASSAGE * seq_len) if plenty else (document.text,)
        cut += [Document(text, document.domain) for text in texts if text.strip()]
    return cut


def pack(
    documents: list[Document], tokenizer: PreTrainedTokenizerBase, *, tokens: int, seq_len: int, seed: int = 0
) -> Sequences:
    """Tokenize documents and pack them into rows of `seq_len`, at most `tokens` tokens in all.

    Every domain gives the same number of tokens, or of whole rows where `tokens` allows a row for each; what a small
    one lacks the others give, and where there are too many domains for min(32, seq_len, tokens) tokens each, the seed
    says which give. Inside a domain, documents follow one another in an order drawn from the seed, each ended by the
    end-of-sequence token where the tokenizer has one, and begun by the beginning-of-sequence token where the tokenizer
    adds it by itself. A row holds one domain; the last row of a domain is padded, or left out where it would hold a
    single token. Rows of the domains alternate. Text is tokenized only as far as it is wanted.

    Less text than `tokens` is a warning. Raises CpruneError where it gives less than min(32, seq_len, tokens) tokens.
    """
    if tokens < 2 or seq_len < 2:
        raise CpruneError(f"tokens and seq_len must be at least 2, got {tokens} and {seq_len}")
    least = min(LEAST_TOKENS, seq_len, tokens)
    by_domain: dict[str, list[str]] = {}
    for document in documents:
        by_domain.setdefault(document.domain, []).append(document.text)
    for name, texts in by_domain.items():
        random.Random(f"{seed}/{name}").shuffle(texts)
    names = random.Random(seed).sample(list(by_domain), len(by_domain))
    begins: dict[str, list[int]] = {name: [] for name in names}  # where documents begin in the tokens of their domain
    streams = [_token_stream(by_domain[name], tokenizer, begins[name]) for name in names]
    unit = seq_len if tokens >= seq_len * len(streams) else 1  # whole rows where there are enough of them: no padding
    shares = dict(zip(names, _equal_shares(streams, tokens // unit * unit, least, unit), strict=True))
    rows = [
        [(ids[at : at + seq_len], name, at) for at in range(0, len(ids), seq_len) if len(ids) - at >= 2]
        for name, ids in ((name, shares[name]) for name in by_domain)
    ]
    ordered = [row for turn in zip_longest(*rows) for row in turn if row is not None]
    total = sum(len(ids) for ids, *_ in ordered)
    if total < least:
        raise CpruneError(f"the text must give at least {least} tokens, got {total}")
    if sum(map(len, shares.values())) < tokens // unit * unit:
        LOG.warning("the text gives %d tokens of the %d asked for", total, tokens)
    return _as_tensors(ordered, begins, seq_len, _first_id(tokenizer.pad_token_id, tokenizer.eos_token_id, 0))


def _as_tensors(
    rows: list[tuple[list[int], str, int]], begins: Mapping[str, list[int]], seq_len: int, pad: int
) -> Sequences:
    """Rows of (tokens, domain, place of the first one in its domain's) as tensors.

    Args:
        begins: where in a domain's tokens its documents begin.
    """
    input_ids = torch.full((len(rows), seq_len), pad, dtype=torch.int64)
    mask, document = torch.zeros(len(rows), seq_len, dtype=torch.bool), torch.zeros(len(rows), seq_len).long()
    starts = {name: torch.tensor(places) for name, places in begins.items()}
    numbers = dict(zip(begins, accumulate(map(len, begins.values()), initial=0), strict=False))
    for row, (ids, name, at) in enumerate(rows):
        input_ids[row, : len(ids)] = torch.tensor(ids)
        mask[row, : len(ids)] = True
        places = torch.arange(at, at + seq_len)
        document[row] = numbers[name] + torch.searchsorted(starts[name], places, right=True) - 1
    return Sequences(input_ids, mask, tuple(name for _, name, _ in rows), document)


def _first_id(*ids: int | None) -> int:
    return next(value for value in ids if value is not None)


def _equal_shares(streams: list[Iterator[int]], tokens: int, least: int, unit: int) -> list[list[int]]:
    """Take `tokens` from the streams, equally from those that still have some, but `least` at a time from the first.

    Shares are multiples of `unit`, of which `tokens` is one too, as far as the streams reach.
    """
    taken: list[list[int]] = [[] for _ in streams]
    active = list(range(len(streams)))
    while tokens > 0 and active:
        share, rest = (count * unit for count in divmod(-(-tokens // unit), len(active)))
        share, rest = (share, rest) if share >= least else (max(least, unit), 0)
        still = []
        for turn, index in enumerate(active):
            want = min(share + unit * (turn * unit < rest), tokens)
            ids = list(islice(streams[index], want))
            taken[index] += ids
            tokens -= len(ids)
            if len(ids) == want:
                still.append(index)
        active = still
    return taken


def _token_stream(texts: list[str], tokenizer: PreTrainedTokenizerBase, begins: list[int]) -> Iterator[int]:
    """The tokens of the texts, one after another, with the marks of a document's begin and end.

    Notes in `begins` where each text begins that the stream has reached.
    """

    def encode(text: str, special: bool = False) -> list[int]:
        return tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]  # type: ignore[return-value]

    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    adds_bos = bos is not None and encode("a", special=True)[:1] == [bos]
    given = 0
    for text in texts:
        begins.append(given)
        pieces = chain.from_iterable(map(encode, _pieces(text, PIECE)))
        for token in chain([bos] * adds_bos, pieces, [eos] * (eos is not None)):
            given += 1
            yield token


def _pieces(text: str, size: int) -> Iterator[str]:
    """The text in pieces of at most `size` characters, cut before white space where there is any."""
    at = 0
    while len(text) - at > size:
        cut = max(text.rfind("\n", at + 1, at + size), text.rfind(" ", at + 1, at + size))
        cut = cut if cut > at else at + size
        yield text[at:cut]
        at = cut
    yield text[at:]
