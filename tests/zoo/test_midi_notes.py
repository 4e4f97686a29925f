"""What a MIDI file sounds like: 480 ticks are half a second, 960 one."""

import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refluence.errors import DataError
from refluence.zoo.midi_notes import read_notes, sustained
from support.midi import midi_bytes, note, pedal, tempo

pytest.importorskip("symusic")


def read(*events):
    notes = read_notes(midi_bytes([message for part in events for message in part]), "a piece")
    return list(
        zip(notes.start.tolist(), notes.end.tolist(), notes.pitch.tolist(), notes.velocity.tolist(), strict=True)
    )


def test_notes_by_start_and_pitch_in_seconds():
    assert read(note(960, 1440, 64, 80), note(960, 1920, 60, 20), note(0, 480, 70, 1)) == [
        (0, 0.5, 70, 1),
        (1, 2, 60, 20),
        (1, 1.5, 64, 80),
    ]


def test_a_key_released_on_the_pedal_sounds_until_it_comes_up():
    assert read(
        note(0, 480, 60),
        pedal(240, 64),
        note(480, 960, 62),
        note(960, 2880, 64),
        pedal(1920, 63),
        note(2400, 2880, 65),
    ) == [(0, 2, 60, 64), (0.5, 2, 62, 64), (1, 3, 64, 64), (2.5, 3, 65, 64)]


def test_the_pedal_is_down_from_64_on_and_may_be_moved_while_it_is():
    assert read(pedal(0, 127), note(0, 480, 60), pedal(700, 64), pedal(960, 0))[0][1] == 1
    assert read(pedal(0, 63), note(0, 480, 60), pedal(960, 0))[0][1] == 0.5


def test_other_controllers_are_no_pedal():
    assert read([(0, (0xB0, 67, 127))], note(0, 480, 60), note(480, 960, 62))[0][1] == 0.5


def test_a_pedal_that_never_comes_up_holds_to_the_end_of_the_piece():
    assert [end for _, end, _, _ in read(pedal(0, 127), note(0, 480, 60), note(960, 1920, 62))] == [2, 2]


def test_tempo_changes():
    assert read(tempo(480, 1_000_000), note(240, 480, 60), note(480, 960, 62), note(1440, 1920, 64)) == [
        (0.25, 0.5, 60, 64),
        (0.5, 1.5, 62, 64),
        (2.5, 3.5, 64, 64),
    ]


@given(
    st.lists(st.tuples(st.integers(0, 50), st.booleans()), max_size=8, unique_by=lambda change: change[0]),
    st.lists(st.integers(0, 50), min_size=1, max_size=8),
)
def test_sustained_against_a_loop_over_time(changes, ends):
    changes = sorted(changes)
    expected = []
    for end in ends:
        down = [state for time, state in changes if time <= end][-1:] == [True]
        lifts = [time for time, state in changes if time > end and not state]
        expected.append((lifts[0] if lifts else 60) if down else end)
    times, down = (np.array([change[k] for change in changes]) for k in (0, 1))
    end = np.array(ends, dtype=np.float64)
    got = sustained(end, times.astype(np.float64), down.astype(bool), 60.0)
    assert got.tolist() == expected


def test_a_file_without_notes():
    assert read() == []


@pytest.mark.parametrize("content", [b"", b"not music", midi_bytes(note(0, 480, 60))[:30]])
def test_a_damaged_file_is_named(content):
    with pytest.raises(DataError, match="a piece cannot be read as a MIDI file"):
        read_notes(content, "a piece")


def test_without_symusic_the_error_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "symusic", None)
    with pytest.raises(DataError, match=r"pip install refluence\[music\]"):
        read_notes(midi_bytes(note(0, 480, 60)), "a piece")
