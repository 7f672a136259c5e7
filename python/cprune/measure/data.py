"""Text to calibrate and evaluate on: a spec names documents, documents become token sequences of one length."""

from __future__ import annotations

import hashlib
import json
import logging
import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib import resources
from itertools import islice, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from cprune.config import DEFAULT
from cprune.errors import CpruneError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LOG = logging.getLogger(__name__)

Split = Literal["calibration", "evaluation"]
BUNDLED = {"calibration": "general.jsonl", "evaluation": "general.val.jsonl"}
HUB_SPLITS = {"calibration": ("train",), "evaluation": ("test", "validation", "train")}
HUB_DOCUMENTS = 4096  # documents streamed from a hub dataset where the spec does not say how many
PIECE = 1 << 16  # characters tokenized at a time: a long document is read only as far as its tokens are wanted
PLENTY = 8  # characters for each token that is wanted, from which on a domain's documents are cut into passages
PASSAGE = 4  # characters of a passage for each token of a row: about a row
LEAST_TOKENS = 32  # fewer say nothing about an expert

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


@dataclass(frozen=True)
class Sequences:
    """N rows of S tokens, each of one domain."""

    input_ids: torch.Tensor  # [N, S] int64
    mask: torch.Tensor  # [N, S] bool, False on padding, which only the end of a row has
    domain: tuple[str, ...]  # [N]

    @property
    def tokens(self) -> int:
        """Tokens that are not padding."""
        return int(self.mask.sum())


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
                `domain` where it has one, else the file's name without its ending
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
    streams = [_token_stream(by_domain[name], tokenizer) for name in names]
    unit = seq_len if tokens >= seq_len * len(streams) else 1  # whole rows where there are enough of them: no padding
    shares = dict(zip(names, _equal_shares(streams, tokens // unit * unit, least, unit), strict=True))
    rows = [
        [(ids[at : at + seq_len], name) for at in range(0, len(ids), seq_len) if len(ids) - at >= 2]
        for name, ids in ((name, shares[name]) for name in by_domain)
    ]
    ordered = [row for turn in zip_longest(*rows) for row in turn if row is not None]
    total = sum(len(ids) for ids, _ in ordered)
    if total < least:
        raise CpruneError(f"the text must give at least {least} tokens, got {total}")
    if sum(map(len, shares.values())) < tokens // unit * unit:
        LOG.warning("the text gives %d tokens of the %d asked for", total, tokens)
    return _as_tensors(ordered, seq_len, _first_id(tokenizer.pad_token_id, tokenizer.eos_token_id, 0))


def _as_tensors(rows: list[tuple[list[int], str]], seq_len: int, pad: int) -> Sequences:
    input_ids = torch.full((len(rows), seq_len), pad, dtype=torch.int64)
    mask = torch.zeros(len(rows), seq_len, dtype=torch.bool)
    for row, (ids, _) in enumerate(rows):
        input_ids[row, : len(ids)] = torch.tensor(ids)
        mask[row, : len(ids)] = True
    return Sequences(input_ids, mask, tuple(name for _, name in rows))


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


def _token_stream(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[int]:
    """The tokens of the texts, one after another, with the marks of a document's begin and end."""

    def encode(text: str, special: bool = False) -> list[int]:
        return tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]  # type: ignore[return-value]

    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    adds_bos = bos is not None and encode("a", special=True)[:1] == [bos]
    for text in texts:
        if adds_bos:
            yield bos
        for piece in _pieces(text, PIECE):
            yield from encode(piece)
        if eos is not None:
            yield eos


def _pieces(text: str, size: int) -> Iterator[str]:
    """The text in pieces of at most `size` characters, cut before white space where there is any."""
    at = 0
    while len(text) - at > size:
        cut = max(text.rfind("\n", at + 1, at + size), text.rfind(" ", at + 1, at + size))
        cut = cut if cut > at else at + size
        yield text[at:cut]
        at = cut
    yield text[at:]


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
        yield from reader(path, domain or path.stem)
    except OSError as error:
        raise CpruneError(f"the text must be readable, got {path} ({error.strerror or error})") from error


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
