"""Errors that a user can act on. Each message is one sentence: the key or file, what was wrong, what is valid.

Entry scripts print the message alone; anything else that escapes is a bug and keeps its traceback.
"""

from __future__ import annotations


def reason(error: BaseException) -> str:
    """What an error says, in one line: of one of the system's its words, without its number and the path."""
    words = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(words.split())[:300] or type(error).__name__


class ForgeError(Exception):
    """Base of every error whose message is written for the user.

    `every_rank`: raised on all ranks of a distributed run together, so that none is left waiting for the others.
    """

    def __init__(self, message: str, *, every_rank: bool = False) -> None:
        super().__init__(message)
        self.every_rank = every_rank
        self.said = False  # to the user


class ConfigError(ForgeError, ValueError):
    """A key, a value, or a combination of values that cannot be run."""


class DataError(ForgeError):
    """A data set that is missing, empty, inconsistent or unreadable."""


class CheckpointError(ForgeError):
    """A checkpoint that is missing, truncated, of another model, or that could not be written."""


class FolderError(ForgeError):
    """A run's folder, or a file in it, that is damaged or cannot be written."""


class TrainingError(ForgeError):
    """A run that cannot go on: its loss stays non-finite, or the device is out of memory."""
