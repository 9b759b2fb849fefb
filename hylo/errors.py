"""The one error type that stands for a mistake of the person who called, not of the program."""


class UserError(ValueError):
    """A wrong input; the message is one sentence that quotes it. The command line prints it and exits with 2."""


class ToldElsewhere(UserError):
    """What ends the other processes of a run where one of them has raised, and told, the error itself."""
