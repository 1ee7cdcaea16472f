"""The demo's page shows no rude gestures, and otherwise the first pictures."""

from __future__ import annotations

from ldm.demo.shown import shown


def test_rude_gestures_are_left_out() -> None:
    captions = ["a red apple", "a middle finger, dark skin", "Middle Finger", "a finger pointing up", "a dog"]
    assert shown(captions, 40) == [0, 3, 4]
    assert shown(captions, 2) == [0, 3]
