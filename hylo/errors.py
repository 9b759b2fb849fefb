"""The one error type that stands for a mistake of the person who called, not of the program."""


class UserError(ValueError):
    """A wrong input; the message is one sentence that quotes it. The command line prints it and exits with 2."""
