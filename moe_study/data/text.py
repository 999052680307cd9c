"""Text corpora as bytes that live on the device, and the word swap.

Shapes: N tokens of a text, M tokens of the same text after a swap, U tokens that the swap left alone,
C words that may be swapped, S segments of a text (a swapped word, or all between two of them).
"""

from __future__ import annotations

import ast
import codecs
import hashlib
import importlib.util
import io
import os
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from itertools import chain, pairwise
from pathlib import Path
from urllib.request import Request, urlopen

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor

from moe_study.data import ROOT, DataError, data_dir

UNKNOWN = "<unk>"  # what a swapped word becomes
SWAP_SHARES = (0.015, 0.025, 0.05, 0.1)  # of the words of a test text
TIMEOUT = 10  # seconds without an answer from a server


@dataclass(frozen=True)
class Text:
    tokens_N: Tensor  # int64, one a byte of `raw` in UTF-8
    raw: str

    def __len__(self) -> int:
        return len(self.tokens_N)


@dataclass(frozen=True)
class Corpus:
    name: str
    train: Text
    validation: Text
    test: Text
    num_tokens: int = 256  # kinds of token


@dataclass(frozen=True, kw_only=True)
class CorpusInfo:
    """All that the project knows of a corpus."""

    title: str  # in tables and figures
    train_bytes: int | None = None
    archive: str = ""  # address of a zip archive
    # Training, validation and test text: path in the archive and in the data folder -> SHA-256.
    files: Mapping[str, str] = field(default_factory=dict)
    download_mb: int = 0
    unpacked_mb: int = 0


def load(name: str, root: str | Path | None = None, device: str | torch.device = "cpu") -> Corpus:
    """Load a corpus whole; a byte is a token.

    Args:
        name: "docs" (embedded: descriptions and docstrings of the installed scikit-learn), "wikitext2", or
            the path of a UTF-8 file (taken from the current folder, else from the project's). What has no
            split of its own is cut into 90/5/5 % in order, at line ends.
        root: data folder; see `data_dir`. Missing corpora are downloaded into it.
        device: where the tokens live.

    Raises:
        DataError: the name is unknown; files are missing or damaged and cannot be fetched; a file is empty,
            too short to split or not UTF-8.
    """
    train, validation, test = (Text(_tokens(raw).to(device), raw) for raw in _texts(name, data_dir(root)))
    return Corpus(name, train, validation, test)


def head(split: Text, num_tokens: int) -> Text:
    """The whole characters within the first `num_tokens` bytes of a text, or all of it.

    Raises:
        ValueError: num_tokens < 1.
    """
    if num_tokens < 1:
        raise ValueError(f"num_tokens must be at least 1, got {num_tokens}")
    if num_tokens >= len(split):
        return split
    raw = split.raw.encode()[:num_tokens].decode(errors="ignore")
    return Text(split.tokens_N[: len(raw.encode())], raw)


def is_corpus(name: str) -> bool:
    """Whether `name` is one of `CORPORA` or reads as a path: it has a separator or a suffix."""
    return name in CORPORA or _is_path(name)


def present(name: str, root: str | Path | None = None) -> bool:
    """Whether a corpus's files seem to be there already (they are checked when loaded)."""
    if _is_path(name):
        return _path(name).is_file()
    if name not in CORPORA:
        raise DataError(_unknown(name))
    return all((data_dir(root) / path).is_file() for path in CORPORA[name].files)


def file_digest(name: str) -> str:
    """Ten hexadecimal digits that name the content of the file at a path.

    Raises:
        DataError: it cannot be read.
    """
    return hashlib.sha256(_read(name)).hexdigest()[:10]


def folder_name(name: str, digest: str) -> str:
    """A folder for the results of the text at a path: apart from every corpus and every other text."""
    stem = re.sub(r"[^\w-]+", "_", Path(name).stem).strip("_")
    return f"{stem or 'text'}-{digest}"


def fetch(name: str, root: str | Path | None = None) -> None:
    """Download what is missing of a corpus.

    Raises:
        DataError: it cannot be fetched.
    """
    if not _is_path(name) and not present(name, root):
        _files(name, data_dir(root))


# ------------------------------------------------------------------------------------------- word swap


@dataclass(frozen=True)
class Swapped:
    """A text with some words replaced by "<unk>".

    Clean tokens_N[clean_positions_U] equals tokens_M[swapped_positions_U]: scored there, both texts are
    asked to predict the same. The byte right behind a swapped word is not among them: behind "<unk>" it is
    all but certain to be white space, so that every swap would look harmless.
    """

    text: str
    tokens_M: Tensor  # int64
    clean_positions_U: Tensor  # int64, of every token outside the swapped words but the one behind each
    swapped_positions_U: Tensor  # int64, of the same tokens in the swapped text
    num_swapped: int


def swap_words(split: Text, share: float, generator: torch.Generator) -> Swapped:
    """Replace words of `split` by "<unk>", at random without replacement.

    Stopwords, words without a letter and "<unk>" stay. Of the C other words round(share * C) are replaced:
    the first of one permutation, so that from equal generators a larger share swaps all that a smaller one
    does.

    Args:
        share: within [0, 1].

    Raises:
        ValueError: share is outside [0, 1].
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share must be within [0, 1], got {share}")
    spans_C = [match.span() for match in re.finditer(r"\S+", split.raw) if _swappable(match[0])]
    num_swapped = round(share * len(spans_C))
    order_C = torch.randperm(len(spans_C), generator=generator, device=generator.device)
    chosen = sorted(spans_C[i] for i in order_C[:num_swapped].tolist())
    # kept, swapped, kept, ..., swapped, kept; a kept segment may be empty
    bounds = [0, *chain.from_iterable(chosen), len(split.raw)]
    clean_S = [split.raw[start:end] for start, end in pairwise(bounds)]
    swapped_S = [UNKNOWN if i % 2 else segment for i, segment in enumerate(clean_S)]
    device = split.tokens_N.device
    text = "".join(swapped_S)
    return Swapped(
        text,
        _tokens(text).to(device),
        _kept_positions(clean_S).to(device),
        _kept_positions(swapped_S).to(device),
        num_swapped,
    )


def _swappable(word: str) -> bool:
    if word == UNKNOWN or not any(character.isalpha() for character in word):
        return False
    bare = re.sub(r"^[\W_]+|[\W_]+$", "", word)  # without punctuation around it
    return bare.lower().replace("’", "'") not in STOPWORDS


def _kept_positions(segments_S: list[str]) -> Tensor:
    """Positions (U,) of the bytes of every other segment, from the first on, without the first byte of
    those that follow a swapped word."""
    length_S = torch.tensor([len(segment.encode()) for segment in segments_S])
    kept_S = torch.arange(len(segments_S)) % 2 == 0
    kept_N = kept_S.repeat_interleave(length_S)
    start_S = length_S.cumsum(0) - length_S
    behind_S = start_S[(torch.arange(len(segments_S)) > 0) & kept_S & (length_S > 0)]
    kept_N[behind_S] = False
    return kept_N.nonzero().flatten()


def _tokens(raw: str) -> Tensor:
    return torch.from_numpy(np.frombuffer(raw.encode(), dtype=np.uint8).astype(np.int64))


# ----------------------------------------------------------------------------------------------- texts


def _texts(name: str, root: Path) -> tuple[str, str, str]:
    """Training, validation and test text."""
    if name == "docs":
        return _split(_docs(), name)
    if _is_path(name):
        return _split(_decode(_read(name), _path(name)), str(_path(name)))
    if name not in CORPORA:
        raise DataError(_unknown(name))
    texts = [_decode(content, root / path) for path, content in _files(name, root).items()]
    train, validation, test = texts
    return train, validation, test


def _is_path(name: str) -> bool:
    return "/" in name or os.sep in name or Path(name).suffix != ""


def _path(name: str) -> Path:
    path = Path(os.path.expanduser(name))
    if not path.exists() and (ROOT / path).exists():  # a notebook's current folder is not the project's
        return ROOT / path
    return Path(os.path.abspath(path))  # resolve() would raise on a symbolic link to itself


def _read(name: str) -> bytes:
    path = _path(name)
    if path.exists() and not path.is_file():  # reading a FIFO would wait forever
        raise DataError(
            f"corpus {name!r}: {path} cannot be read (not a regular file); give the path of a UTF-8 text"
        )
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"corpus {name!r}: {path} cannot be read ({error})") from error


def _unknown(name: str) -> str:
    return f"unknown corpus {name!r}; known: {', '.join(CORPORA)}, or the path of any UTF-8 file, as ./{name}"


def _decode(content: bytes, path: Path) -> str:
    try:
        return content.removeprefix(codecs.BOM_UTF8).decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8: byte 0x{content[error.start]:02x} at offset {error.start} "
            f"({error.reason}); convert it, with iconv say"
        ) from error


def _split(raw: str, name: str) -> tuple[str, str, str]:
    """90/5/5 % in order, each cut moved on to the next line end; a text of one line is cut between words."""
    if not raw.strip():
        raise DataError(f"corpus {name!r} is empty")
    separator = "\n" if "\n" in raw.strip() else " "
    first, second = (raw.find(separator, len(raw) * percent // 100) + 1 for percent in (90, 95))
    parts = raw[:first], raw[first:second], raw[second:]
    if not (0 < first < second and all(part.strip() for part in parts)):
        raise DataError(
            f"corpus {name!r} has {len(raw)} characters: too few lines to split into 90/5/5 % at line ends"
        )
    return parts


@cache
def _docs() -> str:
    """scikit-learn's data set descriptions, then docstrings of modules and classes, in order of path.

    Read from the sources: nothing is imported.
    """
    spec = importlib.util.find_spec("sklearn")
    assert spec is not None
    assert spec.origin is not None
    package = Path(spec.origin).parent
    parts = [path.read_text("utf-8") for path in sorted((package / "datasets" / "descr").glob("*.rst"))]
    for folder in DOCS_FOLDERS:
        for path in sorted((package / folder).glob("*.py")):
            parts += _docstrings(path.read_text("utf-8"))
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _docstrings(source: str) -> list[str]:
    """Of a module and its classes; what `ast.get_docstring` cleans differs between versions of Python."""
    found = []
    tree = ast.parse(source)
    for node in (tree, *tree.body):
        if isinstance(node, ast.Module | ast.ClassDef):
            docstring = ast.get_docstring(node, clean=False) or ""
            found.append(docstring.replace("\n    ", "\n") if isinstance(node, ast.ClassDef) else docstring)
    return [docstring for docstring in found if docstring]


# ------------------------------------------------------------------------------------------- downloads


def _files(name: str, root: Path) -> dict[str, bytes]:
    """Checked contents of a corpus's files by path, downloaded first if need be."""
    info = CORPORA[name]
    try:
        if not present(name, root):
            root.mkdir(parents=True, exist_ok=True)
            with FileLock(root / f".{name}.lock"):  # parallel runs: one downloads, the others wait
                _download(info, root)
        contents = {path: (root / path).read_bytes() for path in info.files}
    except Exception as error:
        raise DataError(
            f"corpus {name!r} is missing under {root} and could not be fetched "
            f"({type(error).__name__}: {error}). Without a network put {', '.join(info.files)} there, "
            f"or point MOE_DATA_DIR at a folder that has them."
        ) from error
    for path, content in contents.items():
        if (digest := hashlib.sha256(content).hexdigest()) != info.files[path]:
            raise DataError(
                f"{root / path} is damaged: its sha256 is {digest} instead of {info.files[path]}; "
                f"delete it first, then it is fetched again, or put the original there"
            )
    return contents


def _download(info: CorpusInfo, root: Path) -> None:
    """Fetch the files that are missing; each appears whole and checked, or not at all."""
    missing = [path for path in info.files if not (root / path).is_file()]
    if not missing:
        return
    # wikitext.smerity.com refuses urllib's own agent
    request = Request(info.archive, headers={"User-Agent": "Mozilla/5.0 (moe-collapse)"})
    with urlopen(request, timeout=TIMEOUT) as response:
        archive = zipfile.ZipFile(io.BytesIO(response.read()))
    for path in missing:
        content = archive.read(path)
        if (digest := hashlib.sha256(content).hexdigest()) != info.files[path]:
            raise ValueError(
                f"{info.archive} delivered {path} with sha256 {digest} instead of {info.files[path]}"
            )
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        partial = root / f"{path}.partial"
        partial.write_bytes(content)
        os.replace(partial, root / path)


WIKITEXT2 = {
    "wikitext-2/wiki.train.tokens": "9e9fa1ad55b1c2c95b08e37dd8e653f638fac2c6de904b79e813611eefbc985f",
    "wikitext-2/wiki.valid.tokens": "f0737ed31fc1329026e95cb8b98e19c2a182c39c240ab909dc31abf2f8af58e8",
    "wikitext-2/wiki.test.tokens": "d790b833ef8cf03a90db7bf1271b7520b83c45ce07ba3c1a9699df81e239eca0",
}
CORPORA: dict[str, CorpusInfo] = {
    "docs": CorpusInfo(title="scikit-learn's descriptions (bytes)"),
    "wikitext2": CorpusInfo(
        title="WikiText-2 (bytes)",
        train_bytes=10_797_148,
        archive="https://wikitext.smerity.com/wikitext-2-v1.zip",  # its author's; the first is dead
        files=WIKITEXT2,
        download_mb=5,
        unpacked_mb=13,
    ),
}

DOCS_FOLDERS = ("cluster", "decomposition", "manifold", "neighbors", "neural_network", "tree")

# English function words, with the pieces into which corpora split contractions.
STOPWORDS = frozenset(
    """
    a about above after again against all also am an and any are aren't as at be because been before being
    below between both but by can can't cannot could couldn't did didn't do does doesn't doing don't down
    during each few for from further had hadn't has hasn't have haven't having he her here hers herself him
    himself his how i if in into is isn't it its itself just may me might more most must my myself no nor
    not now of off on once only or other our ours ourselves out over own same shall she should shouldn't so
    some such than that the their theirs them themselves then there these they this those through to too
    under until up upon us very was wasn't we were weren't what when where which while who whom why will
    with won't would wouldn't you your yours yourself yourselves i'm i've i'll i'd it's he's she's that's
    there's we're we've we'll they're they've you're s t d m ll re ve n't ca wo
    """.split()  # noqa: SIM905
)
