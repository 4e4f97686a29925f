"""Piano notes as a sequence of 390 kinds of events, and back.

note-on 0–127, note-off 128–255, time-shift 256–355 (10 ms to 1 s), velocity 356–387 (a quarter of MIDI's), end 388,
padding 389 (Oore et al. 2018, "This time with feeling"; vocabulary of Huang et al.'s Music Transformer).

The order within one step of 10 ms is fixed: first the note-offs, then the note-ons, both by ascending pitch; a note-on
that differs in velocity from the one before it has its velocity first. Silence before the first note counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from jaxtyping import Float64, Int64
from torch import Tensor

from refluence.errors import DataError

NOTE_ON, NOTE_OFF, TIME_SHIFT, VELOCITY, END, PAD = 0, 128, 256, 356, 388, 389
VOCABULARY = 390
STEPS_PER_SECOND = 100
LONGEST_SHIFT = 100
_BIN = 4
Volume = TypeVar("Volume", int, np.ndarray)
_NAMES = ("C", "C♯", "D", "D♯", "E", "F", "F♯", "G", "G♯", "A", "A♯", "B")


@dataclass(frozen=True)
class Notes:
    """Notes of a performance: start and end in seconds, MIDI pitch and velocity in 0…127, all (n,)."""

    start: Float64[np.ndarray, " n"]
    end: Float64[np.ndarray, " n"]
    pitch: Int64[np.ndarray, " n"]
    velocity: Int64[np.ndarray, " n"]

    def __len__(self) -> int:
        return len(self.start)


def on_grid(notes: Notes) -> Notes:
    """The notes that the events can express, by start and then pitch; what a round trip through them gives.

    Times are rounded to 10 ms, a note lasts at least that long, velocities are the middle of their bin of four. A key
    sounds once at a time: of notes that start together at one pitch the longest stays (the loudest of those), and a
    note ends where its key is struck again.

    Raises:
        DataError: a pitch or velocity outside 0…127, a start that is negative or not a number.
    """
    _check(notes)
    start = np.rint(notes.start * STEPS_PER_SECOND).astype(np.int64)
    end = np.maximum(np.rint(notes.end * STEPS_PER_SECOND).astype(np.int64), start + 1)
    order = np.lexsort((-notes.velocity, -end, start, notes.pitch))
    start, end, pitch, velocity = start[order], end[order], notes.pitch[order], notes.velocity[order]
    again = (np.diff(pitch) == 0) & (np.diff(start) == 0)
    keep = np.concatenate([[True], ~again])[: len(start)]
    start, end, pitch, velocity = start[keep], end[keep], pitch[keep], velocity[keep]
    struck = np.append(np.where(np.diff(pitch) == 0, start[1:], np.iinfo(np.int64).max), np.iinfo(np.int64).max)
    end = np.minimum(end, struck[: len(end)])
    order = np.lexsort((pitch, start))
    return Notes(
        start[order] / STEPS_PER_SECOND, end[order] / STEPS_PER_SECOND, pitch[order], _middle(velocity[order] // _BIN)
    )


def encode(notes: Notes) -> Int64[np.ndarray, " t"]:
    """The events of some notes, in the order that the module states, without an end.

    Raises:
        DataError: as `on_grid`.
    """
    notes = on_grid(notes)
    n = len(notes)
    time = np.rint(np.concatenate([notes.start, notes.end]) * STEPS_PER_SECOND).astype(np.int64)
    off = np.repeat([False, True], n)
    pitch = np.concatenate([notes.pitch, notes.pitch])
    volume = np.concatenate([notes.velocity, notes.velocity]) // _BIN
    order = np.lexsort((pitch, ~off, time))
    time, off, pitch, volume = time[order], off[order], pitch[order], volume[order]
    louder = np.zeros(2 * n, dtype=bool)
    ons = np.flatnonzero(~off)
    louder[ons] = np.diff(volume[ons], prepend=-1) != 0
    gap = np.diff(time, prepend=0)
    whole, rest = gap // LONGEST_SHIFT, gap % LONGEST_SHIFT
    counts = whole + (rest > 0) + louder + 1
    last = np.cumsum(counts) - 1
    events = np.full(counts.sum(), TIME_SHIFT + LONGEST_SHIFT - 1, dtype=np.int64)
    events[last] = np.where(off, NOTE_OFF, NOTE_ON) + pitch
    events[(last - 1)[louder]] = VELOCITY + volume[louder]
    shifted = rest > 0
    events[(last - 1 - louder)[shifted]] = TIME_SHIFT + rest[shifted] - 1
    return events


def decode(events: Sequence[int] | np.ndarray | Tensor) -> Notes:
    """The notes of some events up to an end, by start and then pitch; of a stretch of a performance what it determines.

    Padding is skipped. A note-off without its note-on is passed over; a note that sounds at the end ends there; a
    velocity that was set before the stretch is taken for 66, the middle of MIDI's range.

    Raises:
        DataError: an event outside the vocabulary.
    """
    now, volume = 0, 16
    sounding: dict[int, tuple[int, int]] = {}
    notes: list[tuple[int, int, int, int]] = []

    def release(pitch: int) -> None:
        if pitch in sounding:
            start, loudness = sounding.pop(pitch)
            notes.append((start, pitch, max(now, start + 1), loudness))

    for event in map(int, events):
        _check_event(event)
        if event == END:
            break
        if event < NOTE_OFF:
            release(event - NOTE_ON)
            sounding[event - NOTE_ON] = (now, volume)
        elif event < TIME_SHIFT:
            release(event - NOTE_OFF)
        elif event < VELOCITY:
            now += event - TIME_SHIFT + 1
        elif event < END:
            volume = event - VELOCITY
    for pitch in sorted(sounding):
        release(pitch)
    table = np.array(sorted(notes), dtype=np.int64).reshape(-1, 4)
    return Notes(table[:, 0] / STEPS_PER_SECOND, table[:, 2] / STEPS_PER_SECOND, table[:, 1], _middle(table[:, 3]))


def describe(events: Sequence[int] | np.ndarray | Tensor) -> str:
    """Events as text: "velocity 66 · C4 on · 120 ms · C4 off". Neighbouring time-shifts are summed, C4 is pitch 60.

    Raises:
        DataError: an event outside the vocabulary.
    """
    words: list[str] = []
    steps = 0
    for event in map(int, events):
        _check_event(event)
        if TIME_SHIFT <= event < VELOCITY:
            steps += event - TIME_SHIFT + 1
            continue
        if steps:
            words.append(_duration(steps))
            steps = 0
        words.append(_word(event))
    return " · ".join([*words, _duration(steps)] if steps else words)


def pitch_name(pitch: int) -> str:
    """The name of a MIDI pitch, with its octave: 60 is C4."""
    return f"{_NAMES[pitch % 12]}{pitch // 12 - 1}"


def _word(event: int) -> str:
    if event < NOTE_OFF:
        return f"{pitch_name(event - NOTE_ON)} on"
    if event < TIME_SHIFT:
        return f"{pitch_name(event - NOTE_OFF)} off"
    if event < END:
        return f"velocity {_middle(event - VELOCITY)}"
    return "end" if event == END else "padding"


def _duration(steps: int) -> str:
    if steps < STEPS_PER_SECOND:
        return f"{1000 // STEPS_PER_SECOND * steps} ms"
    return f"{steps / STEPS_PER_SECOND:g} s"


def _middle(volume: Volume) -> Volume:
    return _BIN * volume + _BIN // 2


def _check(notes: Notes) -> None:
    for name, values in (("pitch", notes.pitch), ("velocity", notes.velocity)):
        wrong = values[(values < 0) | (values > 127)]
        if len(wrong):
            raise DataError(f"{name} {wrong[0]} of a note is outside 0…127")
    fine = np.isfinite(notes.start) & np.isfinite(notes.end) & (notes.start >= 0)
    if not fine.all():
        row = int(np.flatnonzero(~fine)[0])
        raise DataError(
            f"note {row} goes from {notes.start[row]} s to {notes.end[row]} s: "
            "times must be finite and start at 0 or later"
        )


def _check_event(event: int) -> None:
    if not 0 <= event < VOCABULARY:
        raise DataError(f"event {event} is outside the vocabulary: 0 to {VOCABULARY - 1}")
