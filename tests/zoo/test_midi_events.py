"""Notes to events and back."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refluence.errors import DataError
from refluence.zoo.midi_events import END, PAD, VOCABULARY, Notes, decode, describe, encode, on_grid, pitch_name

ON, OFF, SHIFT, VELOCITY = 0, 128, 256, 356


def notes(*rows):
    """Notes from (start, end, pitch, velocity)."""
    start, end, pitch, velocity = zip(*rows, strict=True) if rows else ((), (), (), ())
    times = (np.array(column, dtype=np.float64) for column in (start, end))
    return Notes(*times, *(np.array(column, dtype=np.int64) for column in (pitch, velocity)))


def rows(of):
    return list(zip(of.start.tolist(), of.end.tolist(), of.pitch.tolist(), of.velocity.tolist(), strict=True))


performances = st.lists(
    st.tuples(st.floats(0, 30), st.floats(0, 6), st.integers(0, 127), st.integers(0, 127)).map(
        lambda note: (note[0], note[0] + note[1], *note[2:])
    ),
    max_size=40,
)


@given(performances)
def test_a_round_trip_gives_the_notes_on_the_grid(played):
    played = notes(*played)
    assert rows(decode(encode(played))) == rows(on_grid(played))


@given(performances)
def test_notes_on_the_grid_stay_as_they_are(played):
    grid = on_grid(notes(*played))
    assert rows(on_grid(grid)) == rows(grid)


@given(performances)
def test_the_grid_moves_a_note_by_half_a_step_and_its_velocity_by_half_a_bin(played):
    grid = on_grid(notes(*played))
    for start, end, pitch, velocity in rows(grid):
        assert end >= start + 0.01 - 1e-9
        assert any(
            abs(start - s) <= 0.005 + 1e-9 and pitch == p and abs(velocity - v) <= 2 and end <= max(e, s) + 0.0151
            for s, e, p, v in played
        )


@given(st.lists(st.tuples(st.floats(0, 30), st.floats(0.01, 6), st.integers(1, 31)), max_size=30))
def test_notes_of_different_keys_are_all_kept_to_half_a_step(played):
    played = notes(*((start, start + length, 30 + key, 4 * v) for key, (start, length, v) in enumerate(played)))
    grid = on_grid(played)
    order = np.argsort(grid.pitch)
    np.testing.assert_allclose(grid.start[order], played.start, atol=0.005001, rtol=0)
    np.testing.assert_allclose(grid.end[order], played.end, atol=0.010001, rtol=0)
    np.testing.assert_array_equal(grid.velocity[order] // 4, played.velocity // 4)


@given(performances)
def test_events_are_in_the_vocabulary_and_velocities_only_where_they_change(played):
    events = encode(notes(*played)).tolist()
    assert all(0 <= event < END for event in events)
    velocities = [event for event in events if event >= VELOCITY]
    assert all(first != second for first, second in pairwise(velocities))
    assert all(after < OFF for before, after in pairwise(events) if before >= VELOCITY)


def test_the_events_of_two_notes():
    assert encode(notes((0.5, 0.75, 60, 80), (0.5, 2.75, 64, 81))).tolist() == [
        SHIFT + 49,
        VELOCITY + 20,
        ON + 60,
        ON + 64,
        SHIFT + 24,
        OFF + 60,
        SHIFT + 99,
        SHIFT + 99,
        OFF + 64,
    ]


def test_within_one_step_offs_come_first_and_both_by_pitch():
    played = notes((1, 2, 70, 40), (1, 2, 50, 40), (2, 3, 60, 40), (2, 3, 40, 48))
    assert encode(played).tolist() == [
        SHIFT + 99,
        VELOCITY + 10,
        ON + 50,
        ON + 70,
        SHIFT + 99,
        OFF + 50,
        OFF + 70,
        VELOCITY + 12,
        ON + 40,
        VELOCITY + 10,
        ON + 60,
        SHIFT + 99,
        OFF + 40,
        OFF + 60,
    ]


def test_a_key_struck_again_ends_its_note():
    played = notes((0, 3, 60, 40), (1, 2, 60, 40))
    assert rows(on_grid(played)) == [(0, 1, 60, 42), (1, 2, 60, 42)]


def test_of_notes_at_one_time_and_pitch_the_longest_stays_then_the_loudest():
    assert rows(on_grid(notes((0, 1, 60, 90), (0, 2, 60, 40), (0, 2, 60, 50)))) == [(0, 2, 60, 50)]


def test_a_note_lasts_one_step_at_least():
    assert rows(on_grid(notes((1, 1.001, 60, 0)))) == [(1, 1.01, 60, 2)]


def test_no_notes_are_no_events():
    assert encode(notes()).tolist() == []
    assert len(decode([])) == 0


def test_a_stretch_out_of_a_performance():
    stretch = [OFF + 50, ON + 60, SHIFT + 9, ON + 60, PAD, SHIFT + 9, VELOCITY + 3, ON + 61, SHIFT + 4, END, ON + 62]
    assert rows(decode(stretch)) == [(0, 0.1, 60, 66), (0.1, 0.25, 60, 66), (0.2, 0.25, 61, 14)]


def test_events_as_text():
    assert describe([VELOCITY + 16, 60, SHIFT + 11, OFF + 60]) == "velocity 66 · C4 on · 120 ms · C4 off"
    assert describe([SHIFT + 99, SHIFT + 49, 61, SHIFT + 0]) == "1.5 s · C♯4 on · 10 ms"
    assert describe([END, PAD]) == "end · padding"
    assert (pitch_name(21), pitch_name(69), pitch_name(108), pitch_name(0)) == ("A0", "A4", "C8", "C-1")


@pytest.mark.parametrize("event", [-1, VOCABULARY])
def test_an_event_outside_the_vocabulary(event):
    for read in (decode, describe):
        with pytest.raises(DataError, match=f"event {event} is outside the vocabulary: 0 to 389"):
            read([60, event])


@pytest.mark.parametrize(
    ("note", "message"),
    [
        ((0, 1, 128, 40), "pitch 128"),
        ((0, 1, 60, -1), "velocity -1"),
        ((-0.5, 1, 60, 40), "note 0 goes from -0.5 s to 1"),
        ((0, float("nan"), 60, 40), "finite"),
    ],
)
def test_notes_that_cannot_be(note, message):
    with pytest.raises(DataError, match=message):
        encode(notes(note))
