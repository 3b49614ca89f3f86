"""Fixtures: videos with a number in each frame, as in the tests of video reading."""

from video.conftest import draw, encode, number_of

__all__ = ["draw", "encode", "number_of"]
