"""The one exception whose message is meant for the person at the keyboard."""


class UserError(Exception):
    """A mistake the user can mend.

    The message is one sentence that names the flag or the file and the remedy. The scripts print it without a stack
    trace and exit with status 2.
    """
