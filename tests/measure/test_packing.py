"""Packing counted token by token."""

from __future__ import annotations

import logging

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from cprune.errors import CpruneError
from cprune.measure import packing
from cprune.measure.documents import Document
from cprune.measure.packing import Sequences, pack, passages

BOS, EOS = 256, 257


def byte_tokenizer(*, bos: bool = False, eos: bool = True) -> PreTrainedTokenizerFast:
    """One token a byte of UTF-8; adds a bos by itself where asked to."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: index for index, letter in enumerate(letters)} | {"<s>": BOS, "</s>": EOS}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>" if eos else None, model_max_length=64
    )


def rows_of(sequences: Sequences, tokenizer: PreTrainedTokenizerFast) -> list[tuple[str, str]]:
    """(domain, text without padding) per row."""
    return [
        (domain, tokenizer.decode(ids[mask]))
        for ids, mask, domain in zip(sequences.input_ids, sequences.mask, sequences.domain, strict=True)
    ]


def test_documents_of_a_domain_fill_rows_in_turn() -> None:
    tokenizer = byte_tokenizer()
    documents = [Document("abc", "x"), Document("de", "x"), Document("f", "x"), Document("ghijk", "x")]
    packed = pack(documents, tokenizer, tokens=100, seq_len=4, seed=0)
    assert packed.input_ids.dtype == torch.int64
    assert packed.mask.dtype == torch.bool
    assert packed.input_ids.shape == packed.mask.shape == (4, 4)
    assert packed.tokens == 15  # 11 letters and an end for each document
    text = "".join(row for _, row in rows_of(packed, tokenizer))
    assert sorted(text.split("</s>")) == ["", "abc", "de", "f", "ghijk"]
    assert packed.mask.tolist()[:3] == [[True] * 4] * 3
    assert packed.mask.tolist()[3] == [True, True, True, False]


def test_the_order_of_documents_is_drawn_from_the_seed_alone() -> None:
    tokenizer = byte_tokenizer()
    documents = [Document(f"<{number}>", "x") for number in range(131)]
    first, again, other = (pack(documents, tokenizer, tokens=300, seq_len=17, seed=seed) for seed in (5, 5, 6))
    assert torch.equal(first.input_ids, again.input_ids)
    assert not torch.equal(first.input_ids, other.input_ids)
    assert first.input_ids.shape == (17, 17)  # whole rows only: 300 tokens would end in a padded one
    assert first.tokens == 17 * 17
    more = pack([*documents, Document("y" * 300, "y")], tokenizer, tokens=600, seq_len=17, seed=5)
    rows = [row for domain, row in rows_of(more, tokenizer) if domain == "x"]
    assert rows[:17] == [row for _, row in rows_of(first, tokenizer)]


@pytest.mark.parametrize(("bos", "eos"), [(False, False), (False, True), (True, False), (True, True)])
def test_marks_of_a_document(bos: bool, eos: bool) -> None:
    packed = pack([Document("ab", "x")] * 2, byte_tokenizer(bos=bos, eos=eos), tokens=64, seq_len=4)
    expected = ([BOS] if bos else []) + [64, 65] + ([EOS] if eos else [])
    ids = packed.input_ids[packed.mask].tolist()
    assert [value in (BOS, EOS) for value in ids] == [value in (BOS, EOS) for value in expected * 2]
    assert packed.tokens == 2 * len(expected)


def test_every_token_knows_its_document() -> None:
    texts = {"x": ["a" * 5, "b" * 70, "", "c" * 20, "d" * 40], "y": ["e" * 33, "f" * 9]}
    documents = [Document(text, domain) for domain, own in texts.items() for text in own]
    packed = pack(documents, byte_tokenizer(eos=True), tokens=400, seq_len=16)
    assert packed.document.shape == packed.input_ids.shape
    seen: dict[int, list[int]] = {}
    for row in sorted(range(len(packed.domain)), key=packed.domain.__getitem__):
        counts = packed.mask[row]
        for token, number in zip(packed.input_ids[row][counts], packed.document[row][counts], strict=True):
            seen.setdefault(int(number), []).append(int(token))
    for ids in seen.values():
        assert len(set(ids)) <= 2 and ids.count(EOS) <= 1 and (EOS not in ids or ids[-1] == EOS)
    assert sorted(map(len, seen.values())) == sorted(len(document.text) + 1 for document in documents)


def test_domains_give_equal_shares_and_a_small_one_leaves_its_rest_to_the_others() -> None:
    tokenizer = byte_tokenizer(eos=False)
    documents = [Document("a" * 1000, "x"), Document("b" * 10, "small"), Document("c" * 1000, "z")]
    packed = pack(documents, tokenizer, tokens=301, seq_len=32, seed=0)
    given = dict.fromkeys(("x", "small", "z"), 0)
    for domain, row in rows_of(packed, tokenizer):
        assert set(row) == {{"x": "a", "small": "b", "z": "c"}[domain]}
        given[domain] += len(row)
    # nine rows, three of each; the small one lacks 86 tokens, of which another gives two rows, as far as wanted
    assert given["small"] == 10
    assert sorted((given["x"], given["z"])) == [96 + 22, 96 + 64]
    assert packed.domain[:4] == ("x", "small", "z", "x")


def test_a_row_of_one_token_is_left_out() -> None:
    packed = pack([Document("a" * 100, "x")], byte_tokenizer(eos=False), tokens=65, seq_len=32)
    assert packed.input_ids.shape == (2, 32)
    assert packed.mask.all()


def test_only_rows_of_the_asked_tokens_are_given_and_long_documents_are_read_no_further(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tokenizer = byte_tokenizer()
    seen: list[int] = []
    call = PreTrainedTokenizerFast.__call__

    def counted(self: PreTrainedTokenizerFast, text: str, **options: object) -> object:
        seen.append(len(text))
        return call(self, text, **options)

    monkeypatch.setattr(PreTrainedTokenizerFast, "__call__", counted)
    documents = [Document("word " * 1_000_000, domain) for domain in "xyz"]
    packed = pack(documents, tokenizer, tokens=300, seq_len=131)
    assert packed.tokens == 300
    assert packed.input_ids.shape == (3, 131)
    assert sum(seen) <= 3 * (packing.PIECE + 1)


def test_pieces_join_to_the_text_and_are_cut_before_white_space() -> None:
    words = "lorem ipsum\n" * 20_000
    for text in (words, "x" * 200_000, "", " " + "x" * packing.PIECE, words + "x" * 100_000):
        pieces = list(packing._pieces(text, packing.PIECE))
        assert "".join(pieces) == text
        assert max(map(len, pieces)) <= packing.PIECE
    assert all(piece[0] in " \n" for piece in list(packing._pieces(words, packing.PIECE))[1:])


def test_passages_are_of_many_documents_where_a_domain_has_plenty() -> None:
    plenty = [Document(" ".join([f"w{number}"] * 400), "plenty") for number in range(40)]  # 48,000 characters
    scarce = [Document(" ".join([f"s{number}"] * 400), "scarce") for number in range(2)]
    cut = passages(plenty + scarce, tokens=2048, seq_len=64)
    assert cut[-2:] == scarce  # wanted nearly whole, so left whole
    assert "".join(passage.text for passage in cut[:-2]) == "".join(document.text for document in plenty)
    assert max(len(passage.text) for passage in cut[:-2]) <= packing.PASSAGE * 64
    packed = pack(cut, byte_tokenizer(), tokens=2048, seq_len=64)
    whole = pack(plenty + scarce, byte_tokenizer(), tokens=2048, seq_len=64)
    met, before = (
        {word for domain, row in rows_of(rows, byte_tokenizer()) if domain == "plenty" for word in row.split()[1:-1]}
        for rows in (packed, whole)
    )
    assert len(before) <= 2
    assert len(met) >= 4


def test_passages_of_little_text_are_the_documents() -> None:
    documents = [Document("a b " * 100, "x"), Document("c", "y")]
    assert passages(documents, tokens=200, seq_len=8) == documents


def test_passages_leave_blank_ones_out() -> None:
    cut = passages([Document("ab " * 50 + " " * 200 + "cd" * 5, "x")], tokens=8, seq_len=8)
    assert all(passage.text.strip() for passage in cut)
    assert "".join(passage.text for passage in cut).split() == ["ab"] * 50 + ["cd" * 5]


def test_pieces_of_a_document_do_not_end_it() -> None:
    length = 2 * packing.PIECE + 5
    packed = pack([Document("a" * length, "x")], byte_tokenizer(bos=True), tokens=10 * length, seq_len=length + 2)
    assert packed.input_ids.shape == (1, length + 2)
    assert packed.mask.all()
    marks = (packed.input_ids[0] == BOS) | (packed.input_ids[0] == EOS)
    assert marks.nonzero().flatten().tolist() == [0, length + 1]


def test_too_many_domains_for_a_share_each_are_drawn_from() -> None:
    documents = [Document("a" * 100, f"domain {number}") for number in range(131)]
    packed, other = (pack(documents, byte_tokenizer(), tokens=320, seq_len=64, seed=seed) for seed in (0, 1))
    assert packed.tokens == 320
    assert len(set(packed.domain)) == 10
    assert (packed.mask.sum(1) == 32).all()
    assert set(packed.domain) != set(other.domain)


def test_many_tiny_domains_together_give_what_is_asked() -> None:
    documents = [Document("aaa", f"domain {number}") for number in range(131)]
    packed = pack(documents, byte_tokenizer(), tokens=300, seq_len=64)
    assert packed.tokens == 300
    assert packed.input_ids.shape == (75, 64)


def test_less_text_is_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        pack([Document("a" * 99, "x")], byte_tokenizer(), tokens=1000, seq_len=32)
        pack([Document("a" * 99, "x")], byte_tokenizer(), tokens=100, seq_len=32)
    assert [record.getMessage() for record in caplog.records] == ["the text gives 100 tokens of the 1000 asked for"]


@pytest.mark.parametrize(
    ("text", "tokens", "seq_len", "message"),
    [
        ("a" * 30, 1000, 512, "at least 32 tokens, got 31"),
        ("a" * 6, 1000, 8, "at least 8 tokens, got 7"),
        ("a" * 14, 16, 512, "at least 16 tokens, got 15"),
        ("", 1000, 512, "at least 32 tokens, got 0"),
        ("a" * 99, 1, 512, "tokens and seq_len must be at least 2, got 1 and 512"),
        ("a" * 99, 100, 1, "tokens and seq_len must be at least 2, got 100 and 1"),
    ],
)
def test_too_little_text_is_refused(text: str, tokens: int, seq_len: int, message: str) -> None:
    with pytest.raises(CpruneError, match=message):
        pack([Document(text, "x")], byte_tokenizer(), tokens=tokens, seq_len=seq_len)
    with pytest.raises(CpruneError):
        pack([], byte_tokenizer(), tokens=tokens, seq_len=seq_len)
