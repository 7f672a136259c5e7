"""Text to calibrate and evaluate on: a spec names files, folders and hub datasets, which hold documents."""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib import resources
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from cprune.config import DEFAULT
from cprune.errors import CpruneError

Split = Literal["calibration", "evaluation"]
BUNDLED = {"calibration": "general.jsonl", "evaluation": "general.val.jsonl"}
HUB_SPLITS = {"calibration": ("train",), "evaluation": ("test", "validation", "train")}
HUB_DOCUMENTS = 4096  # documents streamed from a hub dataset where the spec does not say how many
SPLITS = ("train", "calib", "calibration", "val", "valid", "validation", "dev", "eval", "test")  # of one domain's text

FORMS = (  # what a record's text is made of; the first that it has
    ("text",),
    ("content",),
    ("messages",),
    ("prompt", "completion"),
    ("instruction", "input", "output"),
    ("instruction", "output"),
)

_PART = re.compile(r"(?P<name>.+?)(?:\[(?P<subset>[^\[\]]+)\])?(?:\((?P<split>[^()]+)\))?(?::(?P<count>[0-9]+))?")


@dataclass(frozen=True)
class Source:
    """One part of a spec, `name[subset](split):count`."""

    name: str  # a file, a folder, "default", or the id of a hub dataset
    subset: str | None = None  # of a hub dataset
    split: str | None = None  # of a hub dataset
    count: int | None = None  # documents


@dataclass(frozen=True)
class Document:
    """A text and the kind of text it is."""

    text: str
    domain: str


def parse_spec(spec: str) -> list[Source]:
    """`"a.jsonl:100,org/set[en](train):50"` -> its sources.

    Commas inside brackets belong to the name. Raises CpruneError with the part that is not `name[subset](split):n`.
    """
    sources = []
    for part in re.split(r",(?![^\[\]]*\])(?![^()]*\))", spec):
        part = part.strip()
        found = _PART.fullmatch(part)
        if found is None or ":" in found["name"] or not _balanced(found["name"]) or found["count"] == "0":
            raise CpruneError(f"a text must be given as name[subset](split):n, n at least 1, got {part!r} in {spec!r}")
        count = int(found["count"]) if found["count"] else None
        sources.append(Source(found["name"].strip(), found["subset"], found["split"], count))
    return sources


def _balanced(name: str) -> bool:
    return name.count("[") == name.count("]") and name.count("(") == name.count(")")


def read_documents(spec: str, *, split: Split = "calibration", seed: int = 0) -> list[Document]:
    """The documents that a spec names, in the order of their files.

    A part is `default` (the text that comes with the package, another one for each `split`), a file, a folder of files,
    or else the id of a hub dataset (needs the library `datasets`; its train split for calibration and test, validation
    or train for evaluation unless the spec says; 4096 documents of the shuffled stream unless the spec says).
      .jsonl    a JSON object a line: text, content, messages, prompt + completion or instruction (+ input) + output;
                `domain` where it has one, else the file's name without its ending (and without .train, .val, ...)
      .parquet  the same as columns
      .txt      one document; in a folder its domain is the folder's name
    With `:n`, n documents of that part are drawn without replacement, the same for a seed, and keep their order.

    Raises CpruneError, one sentence with the file and line, on what is missing, empty, unreadable or has no text.
    """
    documents: list[Document] = []
    for source in parse_spec(spec):
        found = list(_read_source(source, split, seed))
        if not found:
            raise CpruneError(f"{source.name} must hold at least one document with text, got none")
        if source.count is not None and source.count < len(found):
            kept = sorted(random.Random(f"{seed}/{source.name}").sample(range(len(found)), source.count))
            found = [found[index] for index in kept]
        documents += found
    return documents


def fingerprint_documents(documents: Iterable[Document]) -> str:
    """SHA-256, as hexadecimal, of texts and domains in order."""
    digest = hashlib.sha256()
    for document in documents:
        for value in (document.domain, document.text):
            encoded = value.encode("utf-8", "surrogatepass")
            digest.update(len(encoded).to_bytes(8, "little") + encoded)
    return digest.hexdigest()


def _read_source(source: Source, split: Split, seed: int) -> Iterator[Document]:
    if source.name == DEFAULT:
        with resources.as_file(resources.files("cprune.measure") / "text" / BUNDLED[split]) as path:
            yield from _read_file(path)
        return
    path = Path(source.name).expanduser()
    if not path.exists():
        yield from _read_hub(source, split, seed)
        return
    if source.subset or source.split:
        raise CpruneError(f"[subset] and (split) must be of a hub dataset, got them with the file or folder {path}")
    if not path.is_dir():
        yield from _read_file(path)
        return
    files = sorted(file for file in path.rglob("*") if file.suffix.lower() in _READERS and file.is_file())
    if not files:
        raise CpruneError(f"the folder {path} must hold {', '.join(_READERS)} files, got none")
    for file in files:
        yield from _read_file(file, domain=path.resolve().name if file.suffix.lower() == ".txt" else None)


def _read_file(path: Path, domain: str | None = None) -> Iterator[Document]:
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise CpruneError(f"a text must be a {', '.join(_READERS)} file or a folder of those, got {path}")
    try:
        yield from reader(path, domain or _domain_of(path))
    except OSError as error:
        raise CpruneError(f"the text must be readable, got {path} ({error.strerror or error})") from error


def _domain_of(path: Path) -> str:
    """The file's name without its ending, nor that of a split: code.val.jsonl is of the domain of code.jsonl."""
    name, _, split = path.stem.rpartition(".")
    return name if name and split.lower() in SPLITS else path.stem


def _read_jsonl(path: Path, domain: str) -> Iterator[Document]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError as error:  # not JSON, or not UTF-8
                raise CpruneError(f"{path}:{number} must be a JSON object in UTF-8, got {error}") from error
            if not isinstance(record, dict):
                raise CpruneError(f"{path}:{number} must be a JSON object, got {type(record).__name__}")
            yield from _read_record(record, domain, f"{path}:{number}")


def _read_txt(path: Path, domain: str) -> Iterator[Document]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise CpruneError(f"{path} must be UTF-8 text, got {error}") from error
    yield from _read_record({"text": text}, domain, str(path))


def _read_parquet(path: Path, domain: str) -> Iterator[Document]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise CpruneError(f"pyarrow must be installed to read {path} (pip install pyarrow), got none") from error
    wanted = {"domain", *(key for form in FORMS for key in form)}
    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            _form(dict.fromkeys(names), str(path))
            number = 0
            for batch in file.iter_batches(batch_size=1024, columns=[name for name in names if name in wanted]):
                for record in batch.to_pylist():
                    number += 1
                    yield from _read_record(record, domain, f"{path} row {number}")
    except pyarrow.ArrowException as error:
        raise CpruneError(f"{path} must be a parquet file, got {error}") from error


_READERS: dict[str, Callable[[Path, str], Iterator[Document]]] = {
    ".jsonl": _read_jsonl,
    ".txt": _read_txt,
    ".parquet": _read_parquet,
}


def _read_hub(source: Source, split: Split, seed: int) -> Iterator[Document]:
    name = source.name
    if Path(name).suffix.lower() in _READERS or name.startswith(("/", ".", "~")) or name.count("/") > 1:
        raise CpruneError(f"the text must exist, got {name}, which is no file or folder")
    try:
        import datasets
    except ImportError as error:
        raise CpruneError(
            f"the text must be a file, a folder or a hub dataset, got {name}, which is no file or folder, "
            "and for hub datasets `pip install datasets` is needed"
        ) from error
    count = source.count or HUB_DOCUMENTS
    try:
        chosen = source.split
        if chosen is None:
            present = datasets.get_dataset_split_names(name, source.subset)
            chosen = next((want for want in HUB_SPLITS[split] if want in present), present[0])
        stream = datasets.load_dataset(name, source.subset, split=chosen, streaming=True)
        records = list(islice(stream.shuffle(seed=seed, buffer_size=HUB_DOCUMENTS), count))
    except (OSError, ValueError, RuntimeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CpruneError(
            f"the text must be a file, a folder or a reachable hub dataset, got {name}, which is no file or folder, "
            f"and the hub says: {reason}"
        ) from error
    for number, record in enumerate(records):
        yield from _read_record(record, name.rpartition("/")[2], f"{name} record {number}")


def _read_record(record: Mapping[str, Any], domain: str, where: str) -> Iterator[Document]:
    """The document in a record; nothing where its text is empty."""
    parts = [_plain_text(record[key], where) for key in _form(record, where)]
    text = "\n".join(part for part in parts if part)
    if text.strip():
        own = record.get("domain")
        # A lone surrogate, which JSON can hold, is no text and no tokenizer takes it.
        yield Document(text.encode("utf-8", "replace").decode(), domain if own in (None, "") else str(own))


def _form(record: Mapping[str, Any], where: str) -> tuple[str, ...]:
    """The keys of a record that hold its text."""
    for form in FORMS:
        if all(key in record for key in form):
            return form
    raise CpruneError(
        f"{where} must have text, content, messages, prompt and completion, or instruction and output, "
        f"got {', '.join(map(str, record)) or 'nothing'}"
    )


def _plain_text(value: object, where: str) -> str:
    """A string as it is; of a list of chat messages or message parts, what they say."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        return "\n".join(filter(None, (_plain_text(item, where) for item in value)))
    if isinstance(value, dict) and ("content" in value or "text" in value):
        return _plain_text(value.get("content", value.get("text")), where)
    if isinstance(value, dict):
        return ""  # a picture, a call of a tool
    raise CpruneError(f"{where} must hold text as a string or as messages, got {type(value).__name__}")
