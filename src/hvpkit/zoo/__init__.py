"""Small models and data to try things on."""

from hvpkit.zoo.digits import digits, digits_cnn

__all__ = ["digits", "digits_cnn"]
