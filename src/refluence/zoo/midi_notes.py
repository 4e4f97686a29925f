"""The notes of a MIDI file as they sound: with the tempo and the sustain pedal applied."""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Float64, Int64

from refluence.errors import DataError
from refluence.zoo.midi_events import Notes

SUSTAIN, PEDAL_DOWN = 64, 64


def symusic() -> Any:
    """The module that reads MIDI.

    Raises:
        DataError: it is not installed.
    """
    try:
        import symusic as module
    except ImportError as error:
        raise DataError("reading MIDI needs symusic: `pip install refluence[music]`") from error
    return module


def read_notes(content: bytes, name: str) -> Notes:
    """The notes of all tracks of a MIDI file, by start and then pitch; `name` is what errors call it.

    A key that is released while the sustain pedal is down (controller 64 at 64 or above) sounds until the pedal comes
    up, or to the end of the piece if it never does.

    Raises:
        DataError: not a MIDI file, or symusic is not installed.
    """
    reader = symusic()
    try:
        score = reader.Score.from_midi(content)
    except (RuntimeError, ValueError) as error:
        raise DataError(f"{name} cannot be read as a MIDI file: {error}") from error
    parts = [_track_notes(track, score) for track in score.tracks]
    if not parts:
        return Notes(np.empty(0), np.empty(0), np.empty(0, np.int64), np.empty(0, np.int64))
    start, end, pitch, velocity = (np.concatenate(column) for column in zip(*parts, strict=True))
    order = np.lexsort((pitch, start))
    return Notes(start[order], end[order], pitch[order], velocity[order])


def sustained(
    end: Float64[np.ndarray, " n"],
    times: Float64[np.ndarray, " p"],
    down: np.ndarray,
    last: float,
) -> Float64[np.ndarray, " n"]:
    """Where notes end with a pedal that goes down or up at `times` (ascending) and comes up at `last` at the latest."""
    if len(times) == 0:
        return end
    state = np.searchsorted(times, end, side="right") - 1
    held = (state >= 0) & down[np.maximum(state, 0)]
    lifts = np.append(times[~down], last)
    return np.where(held, np.maximum(lifts[np.searchsorted(times[~down], end, side="right")], end), end)


def _track_notes(track: Any, score: Any) -> tuple[np.ndarray, ...]:
    notes, controls = track.notes.numpy(), track.controls.numpy()
    pedal = controls["number"] == SUSTAIN
    ticks = controls["time"][pedal]
    order = np.argsort(ticks, kind="stable")
    start = _seconds(notes["time"], score)
    end = _seconds(notes["time"] + notes["duration"], score)
    last = float(_seconds(np.array([score.end()]), score)[0])
    held = sustained(end, _seconds(ticks[order], score), controls["value"][pedal][order] >= PEDAL_DOWN, last)
    return start, held, notes["pitch"].astype(np.int64), notes["velocity"].astype(np.int64)


def _seconds(ticks: Int64[np.ndarray, " n"] | np.ndarray, score: Any) -> Float64[np.ndarray, " n"]:
    """Seconds from the start of the file; 120 beats a minute until the first tempo."""
    changes = [(0, 500_000), *((tempo.time, tempo.mspq) for tempo in score.tempos)]
    at = np.array([time for time, _ in changes], dtype=np.float64)
    seconds_per_tick = np.array([tempo for _, tempo in changes]) / 1e6 / score.ticks_per_quarter
    passed = np.concatenate([[0.0], np.cumsum(np.diff(at) * seconds_per_tick[:-1])])
    part = np.searchsorted(at, ticks, side="right") - 1
    return passed[part] + (ticks - at[part]) * seconds_per_tick[part]
