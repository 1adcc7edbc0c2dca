"""The one exception that means: what the user gave cannot be used."""


class InputError(ValueError):
    """Something the user gave is wrong: a configuration field, a dataset, a run folder.

    The message says what was given, what was expected and what to type. The command line prints it without a traceback
    and exits with 2.
    """
