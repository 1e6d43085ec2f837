"""The one error that users' input raises, and its kinds that end training on purpose; every other exception is a fault of ours."""


class InputError(ValueError):
    """Bad input. The message names the field as the user typed it, its value and the fix.

    The `p3o` command prints it as one line and exits with 2; in user code it is an ordinary `ValueError`.
    """


class Stopped(InputError):
    """Training stopped on purpose, at the same point on every rank.

    Args:
        message: what was found, and the fix.
        save: whether weights and progress are as the last update left them and worth saving: `LastCheckpoint` then saves them.
    """

    def __init__(self, message: str, *, save: bool = False) -> None:
        super().__init__(message)
        self.save = save


class Diverged(Stopped):
    """Training stopped because a number was NaN or infinite, so that nothing more can be said of this run."""
