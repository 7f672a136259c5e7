"""Collect the freely licensed texts of the examples: training corpus, calibration and validation texts, general mix.

Needs nothing of cprune. Two kinds of source:

  this Python   the standard library's sources and docstrings, `pydoc_data.topics`
  --sources DIR packages unpacked under DIR/<package>, each by `dpkg -x` (Debian 12), `tar xzf` (sdist, npm tarball):
                  Debian  sword-text-web sword-text-sparv dict-devil dict-jargon wordnet-base metamath-databases
                          postgresql-15 postgresql-doc-15 nodejs-doc python3-sympy
                  PyPI    zstandard uvloop lupa hiredis          (the C libraries in their sdists)
                  npm     better-sqlite3 lodash underscore express three

A document falls by the hash of its name into exactly one of train, calib, val, general, general.val, so that the five
are disjoint by document whatever is collected; the code and the docstrings of one Python module share a name and so a
side.

    python collect_texts.py --sources DIR --corpus CORPUS --examples examples/texts --general python/cprune/measure/text

writes CORPUS/<domain>.txt (training, not committed), <domain>.{calib,val}.jsonl and general{,.val}.jsonl.
"""

from __future__ import annotations

import argparse
import ast
import gettext
import gzip
import hashlib
import html
import inspect
import json
import logging
import pydoc_data.topics
import re
import struct
import sys
import sysconfig
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

logger = logging.getLogger("collect_texts")

Documents = Iterator[tuple[str, str]]  # (name, text)

# Upper ends of the sides in the unit interval of a document's hash; above the last one: training.
SIDES = (("val", 0.06), ("calib", 0.18), ("general", 0.32), ("general.val", 0.36))
EXCERPT = 3000  # characters: the most that one document gives to calibration or validation
TRAIN_BYTES = 2_600_000  # per domain
CALIB_BYTES, VAL_BYTES = 80_000, 32_000  # per domain of the examples
GENERAL_BYTES, GENERAL_VAL_BYTES = 75_000, 7_500  # per domain of the general mix
LEFT_OUT = {
    "test",
    "tests",
    "site-packages",
    "encodings",
    "pydoc_data",
    "__pycache__",
    "idlelib",
    "turtledemo",
}


def place(domain: str, name: str) -> float:
    """A document's fixed place in [0, 1)."""
    return int.from_bytes(hashlib.sha256(f"{domain}/{name}".encode()).digest()[:8], "big") / 2**64


def side(position: float) -> str:
    return next((name for name, end in SIDES if position < end), "train")


def runs(items: list[str], name: str, size: int) -> Documents:
    """Neighbouring short entries as one document."""
    for i in range(0, len(items), size):
        yield f"{name}/{i}", "\n\n".join(items[i : i + size])


def source_files(root: Path, suffixes: tuple[str, ...], pattern: str = "") -> Documents:
    for path in sorted(
        p for p in root.rglob("*") if p.suffix in suffixes and p.is_file() and re.search(pattern, str(p))
    ):
        yield str(path.relative_to(root)), path.read_text(encoding="utf-8", errors="replace")


def stdlib() -> Documents:
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        if LEFT_OUT.isdisjoint(path.relative_to(root).parts):
            yield str(path.relative_to(root)), path.read_text(encoding="utf-8", errors="replace")


def docstrings(source: str) -> str:
    nodes = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = [
        (getattr(n, "name", ""), ast.get_docstring(n)) for n in ast.walk(ast.parse(source)) if isinstance(n, nodes)
    ]
    return "\n\n".join(f"{name}\n{doc}".strip() for name, doc in found if doc and len(doc) > 60)


def python_docs() -> Documents:
    for topic, text in pydoc_data.topics.topics.items():
        yield f"topics/{topic}", text
    for name in sorted(sys.builtin_module_names):
        module = __import__(name)
        docs = [
            f"{k}\n{inspect.getdoc(v)}" for k, v in sorted(vars(module).items()) if callable(v) and inspect.getdoc(v)
        ]
        yield f"builtin/{name}", "\n\n".join(docs)
    for name, source in stdlib():
        yield name, docstrings(source)


def sword(root: Path) -> Documents:
    """Chapters of a SWORD zText module: zlib blocks, one for each book, of OSIS markup."""
    for index in sorted(root.rglob("*.bzs")):
        blocks, data = index.read_bytes(), index.with_suffix(".bzz").read_bytes()
        for block in range(len(blocks) // 12):
            start, length, _ = struct.unpack_from("<III", blocks, 12 * block)
            book = zlib.decompress(data[start : start + length]).decode("utf-8", errors="ignore") if length else ""
            for match in re.finditer(r'<chapter [^>]*sID="([^"]+)"/>(.*?)<chapter eID', book, re.S):
                text = re.sub(r"<note.*?</note>|<title.*?</title>", "", match[2], flags=re.S)
                text = re.sub(r"<div [^>]*>|<l [^>]*>", "\n", text)
                text = html.unescape(re.sub(r"<[^>]+>", "", text))
                yield match[1], re.sub(r" *\n[\s]*", "\n", re.sub(r"[ \t\0]+", " ", text)).strip()


def dictd(path: Path, size: int) -> Documents:
    text = gzip.decompress(path.read_bytes()).decode("utf-8", errors="replace")
    entries = [re.sub(r"\n[ \t]+", "\n", e).strip() for e in re.split(r"\n(?=\S)", text) if len(e) > 150]
    return runs([e for e in entries if not e.startswith("00")], path.name.split(".")[0], size)


def english(sources: Path) -> Documents:
    yield from sword(sources / "sword-text-web")
    yield from dictd(next((sources / "dict-devil").rglob("*.dict.dz")), 8)
    yield from dictd(next((sources / "dict-jargon").rglob("*.dict.dz")), 5)


def wordnet(sources: Path) -> Documents:
    kinds = {"n": "noun", "v": "verb", "a": "adj.", "s": "adj.", "r": "adverb"}
    for path in sorted((sources / "wordnet-base").rglob("data.*")):
        entries = []
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            if not line.startswith(" ") and " | " in line:
                fields = line.split()
                words = [fields[4 + 2 * i].replace("_", " ") for i in range(int(fields[3], 16))]
                entries.append(f"{', '.join(words)} ({kinds[fields[2]]}): {line.split(' | ', 1)[1].strip()}")
        yield from runs(entries, path.name, 40)


def metamath(sources: Path) -> Documents:
    """Theorems of set.mm with their explanations, without the (compressed) proofs."""
    text = next((sources / "metamath-databases").rglob("set.mm")).read_text(encoding="utf-8", errors="replace")
    entries = []
    for match in re.finditer(r"\$\(\s((?:(?!\$\)).){40,900}?)\s\$\)\s+(\S+) \$([ap]) (.{10,600}?) \$[=.]", text, re.S):
        comment, label, _, statement = (re.sub(r"\s+", " ", g) for g in match.groups())
        entries.append(f"{label}: {comment}\n  {statement}")
    return runs(entries, "set", 12)


def c_sources(sources: Path) -> Documents:
    for name in ("zstandard", "uvloop", "lupa", "hiredis"):
        for path, text in source_files(
            sources / name, (".c", ".h"), r"^(?!.*(uvloop/loop\.c|_lupa|/test|lua5[1-4]|luajit))"
        ):
            if len(text) < 400_000 and "Generated by Cython" not in text[:200]:
                yield f"{name}/{path}", re.sub(r"\A\s*/\*.*?\*/", "", text, count=1, flags=re.S)
    amalgamation = next((sources / "better-sqlite3").rglob("sqlite3.c")).read_text(encoding="utf-8", errors="replace")
    for match in re.finditer(r"/\*{14} Begin file (\S+) \*+/(.*?)/\*{14} End of \1", amalgamation, re.S):
        text = match[2]
        for i in range(0, len(text), 24_000):  # the large ones are large enough to be several documents
            yield f"sqlite/{match[1]}/{i}", text[i : i + 24_000]


def javascript(sources: Path) -> Documents:
    for name in ("lodash", "underscore", "express", "three"):
        for path, text in source_files(
            sources / name, (".js", ".mjs"), r"^(?!.*(/build/|\.min\.|/esm/|/fp/|/libs/|/dist/))"
        ):
            yield f"{name}/{path}", text


def prose_docs(sources: Path) -> Documents:
    for path in sorted((sources / "nodejs-doc").rglob("*.md.gz")):
        yield path.name, gzip.decompress(path.read_bytes()).decode("utf-8", errors="replace")
    for path in sorted((sources / "postgresql-doc-15").rglob("*.html")):
        text = path.read_text(encoding="utf-8", errors="replace")
        text = re.sub(r'<div class="nav(header|footer)".*?</div>|<head>.*?</head>', "", text, flags=re.S)
        text = html.unescape(re.sub(r"<[^>]+>", "", re.sub(r"</(p|h\d|dt|dd|pre|tr|li)>", "\n", text)))
        yield path.name, re.sub(r"\n\s*\n\s*", "\n\n", text).strip()


def messages(language: str) -> Callable[[Path], Documents]:
    """The sentences of PostgreSQL's message catalogue in one language."""

    def collect(sources: Path) -> Documents:
        path = next((sources / "postgresql-15").rglob(f"{language}/LC_MESSAGES/postgres-15.mo"))
        with path.open("rb") as file:
            catalogue = gettext.GNUTranslations(file)._catalog
        return runs([t for t in catalogue.values() if len(t) > 40 and "POT-Creation" not in t], language, 30)

    return collect


def sympy(sources: Path) -> Documents:
    for name, source in source_files(sources / "python3-sympy", (".py",), r"^(?!.*/tests?/)"):
        yield name, docstrings(source)


TRAINED: dict[str, Callable[[Path], Documents]] = {
    "python": lambda _: stdlib(),
    "pydoc": lambda _: python_docs(),
    "english": english,
    "spanish": lambda sources: sword(sources / "sword-text-sparv"),
    "c": c_sources,
    "dictionary": wordnet,
    "math": metamath,
}
GENERAL_ONLY: dict[str, Callable[[Path], Documents]] = {
    "documentation": prose_docs,
    "javascript": javascript,
    "sympy": sympy,
    "german": messages("de"),
    "french": messages("fr"),
    "russian": messages("ru"),
}


def collect(domain: str, documents: Documents) -> dict[str, list[str]]:
    """The documents of a domain in hash order, by side. Code and docstrings of Python share their names' places."""
    salt = "python" if domain == "pydoc" else domain
    placed = sorted((place(salt, name), name, text.strip()) for name, text in documents if len(text.strip()) > 400)
    sides: dict[str, list[str]] = {name: [] for name in (*dict(SIDES), "train")}
    for position, _, text in placed:
        sides[side(position)].append(text)
    return sides


def excerpts(texts: list[str], budget: int) -> list[str]:
    """One excerpt of each document, from its middle, until `budget` bytes are met."""
    out, used = [], 0
    for text in texts:
        start = max(0, (len(text) - EXCERPT) // 2)
        start = text.find("\n", start) + 1 if start else 0
        excerpt = text[start : start + EXCERPT].strip()
        if used + len(excerpt.encode()) <= budget and len(excerpt) > 300:
            out.append(excerpt)
            used += len(excerpt.encode())
    return out


def write_jsonl(path: Path, rows: list[tuple[str, str]]) -> None:
    lines = [json.dumps({"text": text, "domain": domain}, ensure_ascii=False) for text, domain in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    logger.info("%s: %d documents, %d bytes", path, len(rows), path.stat().st_size)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name in ("sources", "corpus", "examples", "general"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for folder in (args.corpus, args.examples, args.general):
        folder.mkdir(parents=True, exist_ok=True)
    general: list[tuple[str, str]] = []
    general_val: list[tuple[str, str]] = []
    for domain, documents in {**TRAINED, **GENERAL_ONLY}.items():
        sides = collect(domain, documents(args.sources))
        general += [(text, domain) for text in excerpts(sides["general"], GENERAL_BYTES)]
        general_val += [(text, domain) for text in excerpts(sides["general.val"], GENERAL_VAL_BYTES)]
        if domain not in TRAINED:
            continue
        write_jsonl(
            args.examples / f"{domain}.calib.jsonl", [(t, domain) for t in excerpts(sides["calib"], CALIB_BYTES)]
        )
        write_jsonl(args.examples / f"{domain}.val.jsonl", [(t, domain) for t in excerpts(sides["val"], VAL_BYTES)])
        train, used = [], 0
        for text in sides["train"]:
            if used < TRAIN_BYTES:
                train.append(text[:60_000])
                used += len(train[-1].encode())
        (args.corpus / f"{domain}.txt").write_text("\f".join(t.replace("\f", "\n") for t in train), encoding="utf-8")
        logger.info("%s: %d training documents, %d bytes", domain, len(train), used)
    write_jsonl(args.general / "general.jsonl", general)
    write_jsonl(args.general / "general.val.jsonl", general_val)


if __name__ == "__main__":
    main()
