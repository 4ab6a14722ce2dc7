"""The style, colours and size of every picture, for pictures of your own."""

from hvpkit.results.drawing import BELOW, COLORS, ENDS, HEIGHT, INK, STYLE, WIDTH, in_words, styled

__all__ = ["BELOW", "COLORS", "ENDS", "HEIGHT", "INK", "STYLE", "WIDTH", "in_words", "styled"]
