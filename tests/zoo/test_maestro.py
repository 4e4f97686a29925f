"""MAESTRO as windows of events, from a folder or from the official archive."""

import csv
import io
import zipfile

import numpy as np
import pytest
import torch

from refluence.errors import DataError
from refluence.zoo import load_dataset, maestro, token_cache
from refluence.zoo.availability import availability
from refluence.zoo.midi_events import decode, encode, on_grid
from refluence.zoo.midi_notes import read_notes
from refluence.zoo.official_files import locate
from support.midi import midi_bytes, note
from support.official import knowing, put

pytest.importorskip("symusic")
HERE = pytest.mark.skipif(locate(maestro.MAESTRO) is None, reason="MAESTRO is not on this machine")


def piece(seed, notes):
    """Notes one after another, each of its own velocity: 4 events a note."""
    generator = np.random.default_rng(seed)
    volume = [20, 60] * notes
    return midi_bytes(
        [
            message
            for k in range(notes)
            for message in note(960 * k, 960 * k + 480, int(generator.integers(30, 90)), volume[k])
        ]
    )


# The names are in another order with their folders than without.
PIECES = {
    "2004/c.midi": ("train", piece(0, 100)),
    "2006/a.midi": ("train", piece(1, 60)),
    "2008/b.midi": ("train", piece(2, 200)),
    "2008/d.midi": ("validation", piece(3, 80)),
    "2009/e.midi": ("test", piece(4, 140)),
    "2009/f.midi": ("test", piece(5, 70)),
}


def table_bytes():
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["canonical_composer", "split", "year", "midi_filename"])
    writer.writerows(["A. Composer", split, name[:4], name] for name, (split, _) in PIECES.items())
    return text.getvalue().encode()


@pytest.fixture
def root(tmp_path, monkeypatch, cache):
    monkeypatch.setenv("REFLUENCE_DATA", str(tmp_path / "data"))
    return tmp_path / "data"


def unpacked(root, folder="maestro-v2.0.0", without=()):
    put(root / folder, {maestro.TABLE: table_bytes()})
    for name, (_, content) in PIECES.items():
        if name not in without:
            put((root / folder / name).parent, {(root / folder / name).name: content})
    return locate(knowing(maestro.MAESTRO, {maestro.TABLE: table_bytes()}))


def archived(root):
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr(f"maestro-v2.0.0/{maestro.TABLE}", table_bytes())
        for name, (_, content) in PIECES.items():
            file.writestr(f"maestro-v2.0.0/{name}", content)
    contents = {maestro.ARCHIVE: packed.getvalue()}
    put(root / "maestro", contents)
    return locate(knowing(maestro.MAESTRO, contents))


def events_of(name):
    return encode(read_notes(PIECES[name][1], name))


@pytest.mark.parametrize("form", [unpacked, archived, lambda root: unpacked(root, "maestro")])
def test_windows_of_the_files_in_the_order_of_their_own_names(root, form):
    music = maestro.load(form(root), 5, 2, progress=False)
    x, y = music.train
    expected = []
    for name in ("2006/a.midi", "2008/b.midi", "2004/c.midi"):
        events = events_of(name).tolist()
        expected += [events[k : k + 257] for k in range(0, len(events) - 256, 256)]
    assert x.tolist() == [row[:-1] for row in expected[:5]]
    assert y.tolist() == [row[1:] for row in expected[:5]]
    assert x.dtype == y.dtype == torch.int64
    assert x[0].tolist() == events_of("2006/a.midi")[:256].tolist()
    assert music.test[0].tolist() == [events_of("2009/e.midi")[k : k + 256].tolist() for k in (0, 256)]
    assert music.present == {
        "train": "3 of its 3 performances are here",
        "validation": "1 of its 1 performances are here",
        "test": "2 of its 2 performances are here",
    }


def test_a_part_of_the_files_is_enough_and_is_told(root):
    files = unpacked(root, without=("2006/a.midi", "2009/e.midi"))
    music = maestro.load(files, 2, 1, progress=False)
    assert music.train[0][0].tolist() == events_of("2008/b.midi")[:256].tolist()
    assert music.present["train"] == "2 of its 3 performances are here"
    assert files.verify() == "4 of 6 performances; checksum of the table verified"


def test_a_table_without_music_is_not_enough(root):
    files = unpacked(root, without=("2009/e.midi", "2009/f.midi"))
    with pytest.raises(DataError, match="no MIDI file of the test split"):
        files.verify()


def test_more_windows_than_there_are(root):
    files = unpacked(root)
    total = sum((len(events_of(name)) - 1) // 256 for name, (split, _) in PIECES.items() if split == "train")
    assert maestro.load(files, total, 1, progress=False).train[0].shape == (total, 256)
    for rows in (total + 1, 0, -1):
        with pytest.raises(DataError, match=rf"maestro train has {total} windows.*; {rows} cannot be taken"):
            maestro.load(files, rows, 1, progress=False)


def test_a_damaged_file_is_named(root):
    files = unpacked(root)
    path = files.folder / "2006" / "a.midi"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(DataError, match=r"2006/a\.midi cannot be read as a MIDI file"):
        maestro.load(files, 5, 1, progress=False)


def test_a_changed_table_is_an_error(root):
    files = unpacked(root)
    (files.folder / maestro.TABLE).write_bytes(table_bytes() + b"more")
    with pytest.raises(DataError, match=r"maestro-v2\.0\.0\.csv is not the published file"):
        maestro.load(files, 5, 1, progress=False)


def test_events_that_took_long_come_from_the_cache_until_a_file_changes(root, cache, monkeypatch):
    monkeypatch.setattr(token_cache, "SLOW_SECONDS", -1.0)
    files = unpacked(root)
    first = maestro.load(files, 5, 2, progress=False)
    kept = sorted((cache / "tokens").iterdir())
    assert [path.name.rsplit("-", 1)[0] for path in kept] == ["maestro-test", "maestro-train"]

    monkeypatch.setattr(maestro, "read_notes", lambda *_: pytest.fail("a file was read again"))
    second = maestro.load(files, 5, 2, progress=False)
    assert torch.equal(first.train[0], second.train[0])
    assert torch.equal(first.test[1], second.test[1])
    monkeypatch.undo()

    monkeypatch.setenv("REFLUENCE_CACHE", str(cache))
    put(files.folder / "2006", {"a.midi": piece(9, 60)})
    changed = maestro.load(files, 5, 2, progress=False)
    assert not torch.equal(changed.train[0], first.train[0])


def test_a_damaged_cache_is_made_again(root, cache, monkeypatch):
    monkeypatch.setattr(token_cache, "SLOW_SECONDS", -1.0)
    files = unpacked(root)
    first = maestro.load(files, 5, 2, progress=False)
    for path in (cache / "tokens").iterdir():
        path.write_bytes(path.read_bytes()[:-20])
    with pytest.warns(UserWarning, match="is damaged"):
        again = maestro.load(files, 5, 2, progress=False)
    assert torch.equal(first.train[0], again.train[0])
    maestro.load(files, 5, 2, progress=False)


def test_what_is_quick_is_not_kept(root, cache):
    maestro.load(unpacked(root), 1, 1, progress=False)
    assert not (cache / "tokens").exists()


@pytest.mark.data
@HERE
def test_the_benchmarks_windows(cache):
    split = load_dataset("maestro")
    x, y = split.train
    assert x.shape == y.shape == (5000, 256)
    assert split.test[0].shape == (178, 256)
    assert split.tokens.vocabulary == 390
    assert split.tokens.length == 256
    assert (x >= 0).all()
    assert (x < 388).all()
    assert torch.equal(x[:, 1:], y[:, :-1])
    assert len(torch.unique(x, dim=0)) > 4990
    text = split.tokens.decode(x[0])
    assert " on · " in text
    assert " ms · " in text
    assert "not public" in split.provenance


@pytest.mark.data
@HERE
def test_the_official_files_come_back_from_their_events():
    parts = maestro.performances(locate(maestro.MAESTRO))
    for part in parts.values():
        for name in part.names[:2]:
            played = read_notes(part.read(name), name)
            back, grid = decode(encode(played)), on_grid(played)
            for field in ("start", "end", "pitch", "velocity"):
                np.testing.assert_array_equal(getattr(back, field), getattr(grid, field))
            assert len(back) > 0.99 * len(played)


@pytest.mark.data
@HERE
def test_it_is_listed_with_the_number_of_performances():
    found = availability("maestro")
    assert found.available
    assert "of 1,282 performances" in found.detail
    assert found.download == 59_243_107
