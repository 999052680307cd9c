"""Corpora, their tokens and the word swap, against plain loops over words and bytes.

No test needs data or a network: files are written here under checksums of their own, and a server is a
file:// URL.
"""

import codecs
import hashlib
import importlib.metadata
import inspect
import os
import subprocess
import sys
import zipfile
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_study import study
from moe_study.data import ROOT, DataError, text
from moe_study.data.text import CORPORA, STOPWORDS, Text, head, load, swap_words
from moe_study.experiments import experiment_of

PUBLISHED = [name for name, info in CORPORA.items() if info.files]
PROSE = """The quick brown fox jumps over the lazy dog , and 42 dogs <unk> .
 = Senjō no Valkyria =\x20

A fox 's den isn't a dog's house ; « naïve » 戦場 “the foxes” know it .
\tThe brown dog sleeps .   It dreams of the quick fox .
"""


@pytest.fixture
def prose(tmp_path):
    path = tmp_path / "prose.txt"
    path.write_bytes((PROSE * 20).encode())
    return str(path)


@pytest.fixture
def servers(tmp_path, monkeypatch):
    """The downloaded corpus in small, behind file:// URLs with checksums to match."""
    server = tmp_path / "server"
    server.mkdir()
    files: dict[str, bytes] = {}
    for name in PUBLISHED:
        own = {path: f"{path}\nsecond line\n".encode() * 15 for path in CORPORA[name].files}
        with zipfile.ZipFile(server / f"{name}.zip", "w") as archive:
            for path, content in own.items():
                archive.writestr(path, content)
        sha256 = {path: hashlib.sha256(content).hexdigest() for path, content in own.items()}
        fake = replace(CORPORA[name], archive=(server / f"{name}.zip").as_uri(), files=sha256)
        monkeypatch.setitem(text.CORPORA, name, fake)
        files |= own
    return files


# ---------------------------------------------------------------------------------- embedded corpus


def test_the_embedded_corpus():
    corpus = load("docs")
    assert (corpus.name, corpus.num_tokens) == ("docs", 256)
    parts = [corpus.train, corpus.validation, corpus.test]
    num_bytes = sum(map(len, parts))
    assert 150_000 < num_bytes < 400_000
    for part, share in zip(parts, (0.9, 0.05, 0.05), strict=True):
        assert len(part) / num_bytes == pytest.approx(share, abs=0.002)
        assert part.tokens_N.dtype == torch.int64
        assert bytes(part.tokens_N.tolist()) == part.raw.encode()
        assert part.raw.endswith("\n")
    assert "Breast cancer Wisconsin" in corpus.train.raw[:100]
    assert "K-Means clustering." in corpus.train.raw


DOCS_SHA256 = {"1.9.1": "f654fe55fed5068d093df6fd2141ced5967d09d7451253c89c81e6cb33a2840a"}  # by scikit-learn


def test_the_embedded_corpus_is_the_known_one_for_the_locked_version():
    """Letter for letter the text for which the notebooks' checked cells hold."""
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    [pinned] = [line.split()[0] for line in lines if line.startswith("scikit-learn==")]
    version = pinned.removeprefix("scikit-learn==")
    assert version in DOCS_SHA256
    if importlib.metadata.version("scikit-learn") == version:
        assert hashlib.sha256(text._docs().encode()).hexdigest() == DOCS_SHA256[version]


# ---------------------------------------------------------------------------------- tokens and splits


def test_a_file_is_split_in_order_and_nothing_is_lost(prose):
    corpus = load(prose)
    raw = PROSE * 20
    parts = [corpus.train.raw, corpus.validation.raw, corpus.test.raw]
    assert "".join(parts) == raw
    assert all(part.endswith("\n") for part in parts)
    longest = max(map(len, PROSE.splitlines())) + 1
    for cut, share in ((len(parts[0]), 0.9), (len(parts[0] + parts[1]), 0.95)):
        assert 0 <= cut - share * len(raw) <= longest
    for part in (corpus.train, corpus.validation, corpus.test):
        assert len(part) == len(part.raw.encode())


def test_a_text_of_one_line_is_split_between_words(tmp_path):
    raw = " ".join(f"word{i}" for i in range(300))
    (tmp_path / "line.txt").write_text(raw)
    corpus = load(str(tmp_path / "line.txt"))
    parts = [corpus.train.raw, corpus.validation.raw, corpus.test.raw]
    assert "".join(parts) == raw
    assert [word for part in parts for word in part.split()] == raw.split()


# ------------------------------------------------------------------------------------- names and paths


def test_names_and_paths(prose, tmp_path, servers):
    assert tuple(CORPORA) == ("docs", "wikitext2")
    assert all(text.is_corpus(name) for name in (*CORPORA, prose, "here.txt", "folder/here"))
    assert not any(text.is_corpus(name) for name in ("mnist", "digits", "", "wikitext3"))
    assert text.present("docs")
    assert text.present(prose)
    assert not text.present(str(tmp_path / "absent.txt"))
    for name in PUBLISHED:
        assert not text.present(name, root=tmp_path)
        load(name, root=tmp_path)
        assert text.present(name, root=tmp_path)
    with pytest.raises(DataError, match="'wikitext3'"):
        text.present("wikitext3")


def test_a_relative_path_is_of_the_current_folder_else_of_the_project(prose, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load("prose.txt").train.raw == load(prose).train.raw
    monkeypatch.setattr(text, "ROOT", tmp_path)
    (tmp_path / "notebooks").mkdir()
    monkeypatch.chdir(tmp_path / "notebooks")
    assert load("prose.txt").train.raw == load(prose).train.raw


@pytest.mark.parametrize("name", ["wikitext3", "", "DOCS"])
def test_an_unknown_name_is_answered_with_the_known_ones(name):
    with pytest.raises(DataError, match=f"{name!r}.*docs, wikitext2.*path"):
        load(name)


def test_files_that_cannot_serve(tmp_path):
    path = tmp_path / "bad.txt"
    with pytest.raises(DataError, match=r"bad\.txt.*No such file"):
        load(str(path))
    with pytest.raises(DataError, match="cannot be read"):
        load(str(tmp_path))
    for empty in (b"", b" \n\n"):
        path.write_bytes(empty)
        with pytest.raises(DataError, match=r"bad\.txt.*empty"):
            load(str(path))
    for short in (b"x", b"one\ntwo\n", b"a\n" + b"b" * 100):
        path.write_bytes(short)
        with pytest.raises(DataError, match=rf"bad\.txt.*{len(short)} characters.*too few lines"):
            load(str(path))
    path.write_bytes("é".encode() * 10 + b"\xff\n")
    with pytest.raises(DataError, match=r"bad\.txt is not UTF-8: byte 0xff at offset 20"):
        load(str(path))


def test_what_is_no_regular_file_is_named(tmp_path):
    """A FIFO would be read forever; a link to itself has no content."""
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "loop.txt").symlink_to(tmp_path / "loop.txt")
    with pytest.raises(DataError, match=r"pipe\.txt cannot be read \(not a regular file"):
        load(str(tmp_path / "pipe.txt"))
    with pytest.raises(DataError, match=r"loop\.txt cannot be read"):
        load(str(tmp_path / "loop.txt"))


def test_a_byte_order_mark_is_no_part_of_the_first_word(prose, tmp_path):
    marked = tmp_path / "marked.txt"
    marked.write_bytes(codecs.BOM_UTF8 + Path(prose).read_bytes())
    assert load(str(marked)).train.raw == load(prose).train.raw


def test_results_of_a_text_stay_in_the_study_and_apart(tmp_path, monkeypatch):
    """A file called "...txt" has the stem "..", and docs.txt that of a corpus."""
    monkeypatch.setenv("MOE_RESULTS_DIR", str(tmp_path / "results"))
    planned = study.runs("digits", "ac-language", "docs")[:1]
    folders = {planned[0].path.parent}
    for name in ("...txt", "docs.txt", "a/same.txt", "b/same.txt", "<b>&.txt"):
        path = tmp_path / "texts" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(f"{name} line {i}\n" for i in range(100)))
        [run] = study.with_text(planned, str(path))
        assert run.path.parent.parent == planned[0].path.parent.parent
        assert not set(run.path.parent.name) & set("<>&./")
        folders.add(run.path.parent)
    assert len(folders) == 6


def test_a_text_that_changes_after_its_runs_were_planned_is_refused(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text("".join(f"line {i}\n" for i in range(1000)))
    [run] = study.with_text(study.runs("digits", "ac-language", "docs")[:1], str(path))
    path.write_text(path.read_text() + "one more\n")
    with pytest.raises(DataError, match=rf"book.txt has changed.*planned run {run.text_digest}; plan"):
        experiment_of(run, "cpu")


# ------------------------------------------------------------------------------------------ downloads


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_corpus_is_fetched_once(name, servers, tmp_path, monkeypatch):
    root = tmp_path / "data"
    first = load(name, root=root)
    raws = [servers[path].decode() for path in text.CORPORA[name].files]
    parts = [first.train.raw, first.validation.raw, first.test.raw]
    assert parts == raws
    assert not list(root.rglob("*.partial"))

    def refuse(*args, **kwargs):
        raise AssertionError("fetched again")

    monkeypatch.setattr(text, "urlopen", refuse)
    assert load(name, root=root).test.raw == first.test.raw


@pytest.mark.parametrize("name", PUBLISHED)
def test_missing_files_without_a_network(name, tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("no network in tests")

    monkeypatch.setattr(text, "urlopen", refuse)
    monkeypatch.setenv("MOE_DATA_DIR", str(tmp_path / "folder"))
    with pytest.raises(DataError) as caught:
        load(name)
    paths = text.CORPORA[name].files
    for wanted in (name, str(tmp_path / "folder"), "MOE_DATA_DIR", "no network in tests", *paths):
        assert wanted in str(caught.value)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_damaged_file_is_named(name, servers, tmp_path):
    load(name, root=tmp_path)
    for path in text.CORPORA[name].files:
        original = (tmp_path / path).read_bytes()
        (tmp_path / path).write_bytes(original[:-1])
        with pytest.raises(DataError, match=f"{path} is damaged.*delete"):
            load(name, root=tmp_path)
        (tmp_path / path).write_bytes(original)


# ------------------------------------------------------------------------------------------ word swap


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def may_be_swapped(word):
    if word == "<unk>" or not any(character.isalpha() for character in word):
        return False
    while word and not word[0].isalnum():
        word = word[1:]
    while word and not word[-1].isalnum():
        word = word[:-1]
    return word.lower().replace("’", "'") not in STOPWORDS


def aligned_by_loop(clean, swapped):
    """Positions of kept bytes, by walking both texts word for word, space for space; the pairs of words.

    Of the bytes behind a swapped word the first is not kept.
    """
    clean_positions, swapped_positions, pairs = [], [], []
    just_swapped = False
    i = j = at_clean = at_swapped = 0
    while i < len(clean):
        if clean[i].isspace():
            assert clean[i] == swapped[j]
            size = len(clean[i].encode())
            clean_positions += range(at_clean + just_swapped, at_clean + size)
            swapped_positions += range(at_swapped + just_swapped, at_swapped + size)
            just_swapped = False
            at_clean, at_swapped = at_clean + size, at_swapped + size
            i, j = i + 1, j + 1
            continue
        before, after = clean[i:].split(maxsplit=1)[0], swapped[j:].split(maxsplit=1)[0]
        pairs.append((before, after))
        sizes = [len(word.encode()) for word in (before, after)]
        just_swapped = before != after
        if before == after:
            clean_positions += range(at_clean, at_clean + sizes[0])
            swapped_positions += range(at_swapped, at_swapped + sizes[1])
        i, j = i + len(before), j + len(after)
        at_clean, at_swapped = at_clean + sizes[0], at_swapped + sizes[1]
    assert j == len(swapped)
    return clean_positions, swapped_positions, pairs


@pytest.mark.parametrize("share", [0.0, 0.015, 0.1, 0.5, 1.0])
def test_the_swap_against_a_loop(prose, share):
    split = load(prose).train
    swapped = swap_words(split, share, generator())
    clean_positions, swapped_positions, pairs = aligned_by_loop(split.raw, swapped.text)
    assert swapped.clean_positions_U.tolist() == clean_positions
    assert swapped.swapped_positions_U.tolist() == swapped_positions
    assert torch.equal(
        split.tokens_N[swapped.clean_positions_U], swapped.tokens_M[swapped.swapped_positions_U]
    )
    changed = [(before, after) for before, after in pairs if before != after]
    candidates = [before for before, _ in pairs if may_be_swapped(before)]
    assert len(changed) == swapped.num_swapped == round(share * len(candidates))
    assert all(after == "<unk>" and may_be_swapped(before) for before, after in changed)
    assert bytes(swapped.tokens_M.tolist()).decode() == swapped.text


def test_a_swap_known_by_hand():
    raw = "the fox, 42 <unk> isn't é\n"
    swapped = swap_words(as_text(raw), 1.0, generator())
    assert swapped.text == "the <unk> 42 <unk> isn't <unk>\n"
    assert swapped.num_swapped == 2
    assert swapped.clean_positions_U.tolist() == [
        *range(4),
        *range(9, 24),
    ]  # not the bytes behind the swapped
    assert swapped.swapped_positions_U.tolist() == [*range(4), *range(10, 25)]


def as_text(raw):
    content = raw.encode()
    return Text(torch.tensor(list(content), dtype=torch.int64), raw)


def test_a_larger_share_swaps_all_that_a_smaller_one_does(prose):
    corpus = load(prose)
    kept = [
        set(swap_words(corpus.train, share, generator(3)).clean_positions_U.tolist())
        for share in (0.015, 0.025, 0.05, 0.1, 1.0)
    ]
    assert all(larger < smaller for smaller, larger in pairwise(kept))


def test_the_swap_depends_on_the_generator_alone(prose):
    corpus = load(prose)
    torch.manual_seed(0)
    first = swap_words(corpus.train, 0.1, generator(1))
    torch.manual_seed(1)
    again, other = (swap_words(corpus.train, 0.1, generator(seed)) for seed in (1, 2))
    assert first.text == again.text != other.text


def test_words_that_are_never_swapped():
    raw = "The THE, the. <unk> 42 3.14 ... isn't 's n't\n"
    assert swap_words(as_text(raw), 1.0, generator()).num_swapped == 0


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_a_share_out_of_range(prose, share):
    corpus = load(prose)
    with pytest.raises(ValueError, match=f"share.*{share}"):
        swap_words(corpus.test, share, generator())


PIECES = ["the", "fox", "<unk>", "é", "戦場", "don’t", "42", ",", " ", " ", "\n", "\t", "\u3000"]
RAW = st.lists(st.sampled_from(PIECES) | st.text(max_size=3), max_size=30).map("".join)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(raw=RAW, share=st.floats(0, 1))
def test_any_text_is_aligned(raw, share):
    split = as_text(raw)
    swapped = swap_words(split, share, generator())
    clean_positions, swapped_positions, _ = aligned_by_loop(raw, swapped.text)
    assert swapped.clean_positions_U.tolist() == clean_positions
    assert swapped.swapped_positions_U.tolist() == swapped_positions
    assert torch.equal(split.tokens_N[clean_positions], swapped.tokens_M[swapped_positions])


# ------------------------------------------------------------------------------------- the first tokens


@pytest.mark.parametrize("num_tokens", [1, 2, 35, 150, 180, 181, 182, 183, 184, 10**6])
def test_the_first_bytes_of_a_text_are_whole_characters(prose, num_tokens):
    corpus = load(prose)
    found = head(corpus.train, num_tokens)
    kept = ""
    for character in corpus.train.raw:
        if len((kept + character).encode()) > num_tokens:
            break
        kept += character
    assert found.raw == kept
    assert bytes(found.tokens_N.tolist()) == kept.encode()
    assert len(found) == len(kept.encode())


def test_a_head_longer_than_the_text_is_the_text(prose):
    corpus = load(prose)
    assert head(corpus.test, len(corpus.test)) is corpus.test
    assert len(head(corpus.test, len(corpus.test) - 1)) == len(corpus.test) - 1


@pytest.mark.parametrize("num_tokens", [0, -3])
def test_a_head_of_nothing_is_named(prose, num_tokens):
    corpus = load(prose)
    with pytest.raises(ValueError, match=f"num_tokens.*{num_tokens}"):
        head(corpus.test, num_tokens)


def test_docstrings_are_those_that_python_sees():
    source = '"""Module.\n\n  indented\n"""\nclass A:\n    """A.\n\n    Text\n        code\n    """\n'
    source += "class B:\n    pass\n"
    scope = {}
    exec(source, scope)
    found = [docstring.strip() for docstring in text._docstrings(source)]
    assert found == ["Module.\n\n  indented", inspect.getdoc(scope["A"])]
    assert found[1] == "A.\n\nText\n    code"


def test_only_what_is_missing_is_fetched(servers, tmp_path):
    load("wikitext2", root=tmp_path)
    kept, gone = tmp_path / "wikitext-2/wiki.train.tokens", tmp_path / "wikitext-2/wiki.test.tokens"
    before = kept.stat().st_mtime_ns
    gone.unlink()
    load("wikitext2", root=tmp_path)
    assert kept.stat().st_mtime_ns == before
    assert gone.read_bytes() == servers["wikitext-2/wiki.test.tokens"]


def test_a_page_in_place_of_an_archive(servers, tmp_path):
    (tmp_path / "server" / "wikitext2.zip").write_text("<html>moved</html>")
    with pytest.raises(DataError, match="BadZipFile"):
        load("wikitext2", root=tmp_path / "data")


def test_a_data_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(DataError, match="file"):
        load("wikitext2", root=tmp_path / "file")


@pytest.mark.parametrize("name", PUBLISHED)
def test_another_file_from_the_server_is_refused(name, servers, tmp_path, monkeypatch):
    info = CORPORA[name]
    monkeypatch.setitem(text.CORPORA, name, replace(info, files=dict.fromkeys(info.files, "0" * 64)))
    with pytest.raises(DataError, match="delivered"):
        load(name, root=tmp_path / "data")
    assert not any(path.is_file() for path in (tmp_path / "data").rglob("*/*"))


@pytest.mark.slow
def test_the_embedded_corpus_is_the_same_in_another_process_and_imports_nothing():
    program = (
        "import hashlib, sys; from moe_study.data import text; raw = text._docs(); "
        "print('sklearn' in sys.modules, hashlib.sha256(raw.encode()).hexdigest())"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", hashlib.sha256(text._docs().encode()).hexdigest()]


def test_tokens_go_to_the_device(prose):
    corpus = load(prose, device="meta")
    assert {part.tokens_N.device.type for part in (corpus.train, corpus.validation, corpus.test)} == {"meta"}
