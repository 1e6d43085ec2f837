"""The one error that users' input raises; every other exception is a fault of ours."""


class InputError(ValueError):
    """Bad input. The message names the field as the user typed it, its value and the fix.

    The `p3o` command prints it as one line and exits with 2; in user code it is an ordinary `ValueError`.
    """
