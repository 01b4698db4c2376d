"""The one exception that the commands turn into a one-line message."""


class ScaMoError(ValueError):
    """Bad input of the user: the message names the file, field or index and what was expected.

    `scamo` and `train.py` print it as one line and exit with status 2; any other exception is a fault of ours
    and keeps its traceback.
    """
