"""MIDI files written by hand."""

import struct


def midi_bytes(events, ticks_per_quarter=480):
    """A file of one track from (tick, message); 480 ticks are half a second until a tempo says else."""
    track = bytearray()
    now = 0
    for tick, message in sorted(events, key=lambda event: event[0]):
        track += _variable(tick - now) + bytes(message)
        now = tick
    track += b"\x00\xff\x2f\x00"
    header = struct.pack(">4sIHHH", b"MThd", 6, 0, 1, ticks_per_quarter)
    return header + struct.pack(">4sI", b"MTrk", len(track)) + bytes(track)


def note(start, end, pitch, velocity=64):
    """The two messages of a note, times in ticks."""
    return [(start, (0x90, pitch, velocity)), (end, (0x80, pitch, 0))]


def pedal(tick, value):
    """The sustain pedal."""
    return [(tick, (0xB0, 64, value))]


def tempo(tick, microseconds):
    """Microseconds a quarter."""
    return [(tick, (0xFF, 0x51, 3, *microseconds.to_bytes(3, "big")))]


def _variable(number):
    digits = [number & 0x7F]
    while number := number >> 7:
        digits.append(0x80 | number & 0x7F)
    return bytes(reversed(digits))
