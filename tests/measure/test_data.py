"""Specs, files of every kind, faults named in one sentence, and packing counted token by token."""

from __future__ import annotations

import json
import logging
import sys
from importlib import resources
from pathlib import Path
from types import SimpleNamespace

import pyarrow
import pytest
import torch
from pyarrow import parquet
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from cprune.errors import CpruneError
from cprune.measure import data
from cprune.measure.data import Document, Sequences, Source, fingerprint_documents, pack, parse_spec, read_documents

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


def write_jsonl(path: Path, *records: object) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


# --- specs


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("default", [Source("default")]),
        ("../a b/c-d.v1.jsonl", [Source("../a b/c-d.v1.jsonl")]),
        ("a.jsonl:12, b.txt", [Source("a.jsonl", count=12), Source("b.txt")]),
        ("org/set[en](train):50", [Source("org/set", "en", "train", 50)]),
        ("org/set(train[:10%])", [Source("org/set", None, "train[:10%]")]),
        ("set[a,b],c:1", [Source("set", "a,b"), Source("c", count=1)]),
        ("copy (1).jsonl:3", [Source("copy (1).jsonl", count=3)]),
    ],
)
def test_specs(spec: str, expected: list[Source]) -> None:
    assert parse_spec(spec) == expected


@pytest.mark.parametrize(
    ("spec", "part"),
    [
        ("", "''"),
        ("a.jsonl,,b", "''"),
        ("a.jsonl,", "''"),
        ("b,a.jsonl:x", "'a.jsonl:x'"),
        ("a.jsonl:-1", "'a.jsonl:-1'"),
        ("a.jsonl:0", "'a.jsonl:0'"),
        ("a.jsonl:", "'a.jsonl:'"),
        ("set[en", "'set[en'"),
        ("set(train", "'set(train'"),
        ("set](train)", "'set](train)'"),
        (":5", "':5'"),
    ],
)
def test_faulty_specs_name_the_part(spec: str, part: str) -> None:
    with pytest.raises(CpruneError, match=r"must be given as name\[subset\]\(split\):n") as raised:
        parse_spec(spec)
    assert f"got {part} in" in str(raised.value)


# --- files


@pytest.mark.parametrize(
    ("record", "text"),
    [
        ({"text": "a", "content": "b"}, "a"),
        ({"content": "b"}, "b"),
        ({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "r"}]}, "q\nr"),
        ({"messages": [{"content": [{"type": "text", "text": "q"}, {"type": "image"}]}, {"content": None}]}, "q"),
        ({"prompt": "p", "completion": "c"}, "p\nc"),
        ({"prompt": [{"role": "user", "content": "p"}], "completion": [{"content": "c"}]}, "p\nc"),
        ({"instruction": "i", "output": "o"}, "i\no"),
        ({"instruction": "i", "input": "n", "output": "o"}, "i\nn\no"),
        ({"instruction": "i", "input": "", "output": "o"}, "i\no"),
    ],
)
def test_forms_of_a_record(tmp_path: Path, record: dict[str, object], text: str) -> None:
    path = write_jsonl(tmp_path / "some.kind.jsonl", record, {**record, "domain": "own"})
    assert read_documents(str(path)) == [Document(text, "some.kind"), Document(text, "own")]


def test_jsonl_skips_blank_lines_and_empty_texts_and_mends_lone_surrogates(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(
        b'\xef\xbb\xbf{"text": "\xc3\xa9\\u2028x"}\n\n{"text": "  "}\n{"text": null}\r\n{"text": "\\ud800"}'
    )
    assert [document.text for document in read_documents(str(path))] == ["\u00e9\u2028x", "?"]


def test_parquet(tmp_path: Path) -> None:
    path = tmp_path / "table.parquet"
    columns = {"id": [1, 2, 3], "content": ["a", None, "c"], "domain": ["x", "x", None]}
    parquet.write_table(pyarrow.table(columns), path)
    assert read_documents(str(path)) == [Document("a", "x"), Document("c", "table")]


def test_a_folder_is_its_files_in_order(tmp_path: Path) -> None:
    folder = tmp_path / "books"
    (folder / "sub").mkdir(parents=True)
    (folder / "b.txt").write_text("second\n\nstill second")
    (folder / "sub" / "c.TXT").write_text("third")
    (folder / "notes.md").write_text("not read")
    write_jsonl(folder / "a.jsonl", {"text": "first"})
    expected = [Document("first", "a"), Document("second\n\nstill second", "books"), Document("third", "books")]
    assert read_documents(str(folder)) == expected
    assert read_documents(f"{folder / 'b.txt'}, {folder / 'a.jsonl'}") == [
        Document("second\n\nstill second", "b"),
        Document("first", "a"),
    ]


def test_n_draws_without_replacement_and_keeps_the_order(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", *({"text": str(number)} for number in range(300)))
    drawn = [int(document.text) for document in read_documents(f"{path}:131", seed=1)]
    assert len(drawn) == 131
    assert drawn == sorted(set(drawn))
    assert drawn != list(range(131))
    assert drawn == [int(document.text) for document in read_documents(f"{path}:131", seed=1)]
    assert drawn != [int(document.text) for document in read_documents(f"{path}:131", seed=2)]
    assert len(read_documents(f"{path}:1000")) == 300


@pytest.mark.parametrize("split", ["calibration", "evaluation"])
def test_the_bundled_text_has_domains(split: data.Split) -> None:
    if not (resources.files("cprune.measure") / "text" / data.BUNDLED[split]).is_file():
        pytest.skip("the bundled text is not there")
    documents = read_documents("default", split=split)
    assert len({document.domain for document in documents}) >= 2
    assert all(document.text.strip() for document in documents)


def test_bundled_calibration_and_evaluation_differ() -> None:
    if not all((resources.files("cprune.measure") / "text" / name).is_file() for name in data.BUNDLED.values()):
        pytest.skip("the bundled text is not there")
    texts = {document.text for document in read_documents("default", split="calibration")}
    assert not texts & {document.text for document in read_documents("default", split="evaluation")}


# --- faults


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"", r"a\.jsonl must hold at least one document with text, got none"),
        ("a.jsonl", b'{"text": " "}\n', r"a\.jsonl must hold at least one document with text, got none"),
        ("a.txt", b"\n \n", r"a\.txt must hold at least one document with text, got none"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "b"\n', r"a\.jsonl:2 must be a JSON object in UTF-8, got Expecting"),
        ("a.jsonl", b'{"text": "a"}\n\n[1]\n', r"a\.jsonl:3 must be a JSON object, got list"),
        ("a.jsonl", b'{"text": "\xff\xfe"}\n', r"a\.jsonl:1 must be a JSON object in UTF-8, got .*decode"),
        ("a.jsonl", b'{"body": "a", "id": 3}\n', r"a\.jsonl:1 must have text, content, .* got body, id"),
        ("a.jsonl", b'{"text": 5}\n', r"a\.jsonl:1 must hold text as a string or as messages, got int"),
        ("a.txt", b"\xff\xfe\x00", r"a\.txt must be UTF-8 text, got .*decode"),
        ("a.parquet", b"PAR1 or not", r"a\.parquet must be a parquet file, got"),
        ("a.docx", b"x", r"a text must be a \.jsonl, \.txt, \.parquet file or a folder of those, got .*a\.docx"),
    ],
)
def test_faulty_files_are_refused_in_one_sentence(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CpruneError, match=message) as raised:
        read_documents(str(tmp_path / name))
    assert "\n" not in str(raised.value)


def test_parquet_without_text_and_folders_without_files_are_refused(tmp_path: Path) -> None:
    parquet.write_table(pyarrow.table({"id": [1]}), tmp_path / "a.parquet")
    with pytest.raises(CpruneError, match=r"a\.parquet must have text, content, .* got id"):
        read_documents(str(tmp_path / "a.parquet"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(CpruneError, match=r"the folder .*empty must hold \.jsonl, \.txt, \.parquet files, got none"):
        read_documents(str(tmp_path / "empty"))
    path = write_jsonl(tmp_path / "a.jsonl", {"text": "a"})
    with pytest.raises(CpruneError, match=r"\[subset\] and \(split\) must be of a hub dataset, got them with .*a\.j"):
        read_documents(f"{path}(train)")


@pytest.mark.parametrize("name", ["missing.jsonl", "./missing", "/no/such/folder", "a/b/c"])
def test_missing_paths_are_refused_without_asking_the_hub(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace())
    with pytest.raises(CpruneError, match=f"the text must exist, got {name}, which is no file or folder"):
        read_documents(name)


# --- the hub, as its library answers


class Stream(list):  # type: ignore[type-arg]
    def shuffle(self, *, seed: int, buffer_size: int) -> Stream:
        assert buffer_size > 0
        return Stream(self[seed:] + self[:seed])


def fake_hub(monkeypatch: pytest.MonkeyPatch, splits: list[str]) -> list[tuple[object, ...]]:
    calls: list[tuple[object, ...]] = []

    def load_dataset(name: str, subset: str | None, *, split: str, streaming: bool) -> Stream:
        calls.append((name, subset, split, streaming))
        if split not in splits:
            raise ValueError(f"Unknown split {split!r}.\nIt is one of many.")
        return Stream({"content": f"{split} {number}"} for number in range(9))

    library = SimpleNamespace(load_dataset=load_dataset, get_dataset_split_names=lambda name, subset: splits)
    monkeypatch.setitem(sys.modules, "datasets", library)
    return calls


def test_a_hub_dataset_is_streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = fake_hub(monkeypatch, ["validation", "train"])
    assert read_documents("org/set[en]:2", seed=3) == [Document("train 3", "set"), Document("train 4", "set")]
    assert len(read_documents("org/set", split="evaluation")) == 9
    assert read_documents("org/set(validation):1") == [Document("validation 0", "set")]
    assert calls == [
        ("org/set", "en", "train", True),
        ("org/set", None, "validation", True),
        ("org/set", None, "validation", True),
    ]


def test_an_unreachable_hub_dataset_is_refused_in_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_hub(monkeypatch, ["train"])
    with pytest.raises(CpruneError, match="reachable hub dataset, got org/set, .*: Unknown split") as raised:
        read_documents("org/set(dev)")
    assert "\n" not in str(raised.value)

    def offline(*_: object, **__: object) -> None:
        raise ConnectionError("no route to the hub")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(get_dataset_split_names=offline))
    with pytest.raises(CpruneError, match="got org/set, .*and the hub says: no route to the hub"):
        read_documents("org/set")


def test_without_the_hub_library_the_refusal_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(CpruneError, match="got org/set, which is no file or folder, .*`pip install datasets`"):
        read_documents("org/set")


# --- packing


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
    assert sum(seen) <= 3 * (data.PIECE + 1)


def test_pieces_join_to_the_text_and_are_cut_before_white_space() -> None:
    words = "lorem ipsum\n" * 20_000
    for text in (words, "x" * 200_000, "", " " + "x" * data.PIECE, words + "x" * 100_000):
        pieces = list(data._pieces(text))
        assert "".join(pieces) == text
        assert max(map(len, pieces)) <= data.PIECE
    assert all(piece[0] in " \n" for piece in list(data._pieces(words))[1:])


def test_pieces_of_a_document_do_not_end_it() -> None:
    length = 2 * data.PIECE + 5
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


# --- fingerprint


def test_fingerprint_tells_texts_domains_and_order_apart() -> None:
    lists = [
        [],
        [Document("a", "x")],
        [Document("a", "y")],
        [Document("x", "a")],
        [Document("ax", "")],
        [Document("a", "x"), Document("b", "x")],
        [Document("b", "x"), Document("a", "x")],
        [Document("ab", "xx")],
    ]
    prints = [fingerprint_documents(documents) for documents in lists]
    assert len(set(prints)) == len(lists)
    assert all(len(value) == 64 for value in prints)
    assert prints[5] == fingerprint_documents(iter(lists[5]))
