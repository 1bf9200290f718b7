"""The one exception for wrong input, as the library defines it."""

from soups.errors import InterruptedBySignalError, UserError

__all__ = ["InterruptedBySignalError", "UserError"]
