"""Specs, files of every kind, faults named in one sentence, and fingerprints."""

from __future__ import annotations

import json
import sys
from importlib import resources
from pathlib import Path
from types import SimpleNamespace

import pyarrow
import pytest
from pyarrow import parquet

from cprune.errors import CpruneError
from cprune.measure import documents
from cprune.measure.documents import Document, Source, fingerprint_documents, parse_spec, read_documents


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


@pytest.mark.parametrize(
    ("name", "domain"),
    [("code", "code"), ("code.val", "code"), ("law.Train", "law"), ("v1.5", "v1.5"), ("val", "val"), (".val", ".val")],
)
def test_the_files_of_one_domain_are_of_that_domain(name: str, domain: str, tmp_path: Path) -> None:
    (tmp_path / f"{name}.jsonl").write_text('{"text": "a"}\n{"text": "b", "domain": "its own"}\n')
    found = read_documents(str(tmp_path / f"{name}.jsonl"))
    assert [document.domain for document in found] == [domain, "its own"]


@pytest.mark.parametrize("split", ["calibration", "evaluation"])
def test_the_bundled_text_has_domains(split: documents.Split) -> None:
    if not (resources.files("cprune.measure") / "text" / documents.BUNDLED[split]).is_file():
        pytest.skip("the bundled text is not there")
    found = read_documents("default", split=split)
    assert len({document.domain for document in found}) >= 2
    assert all(document.text.strip() for document in found)


def test_bundled_calibration_and_evaluation_differ() -> None:
    if not all((resources.files("cprune.measure") / "text" / name).is_file() for name in documents.BUNDLED.values()):
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
