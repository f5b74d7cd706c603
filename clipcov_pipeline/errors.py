"""The one error that is the user's to mend: it is shown as a single line, with exit code 2."""


class InputError(ValueError):
    """Something the user gave is unusable.

    The message names the thing, the value found, the value expected and what to do, in one line.
    """
