"""The error for what a user can mend."""


class InputError(ValueError):
    """A file, key or value given by the user is wrong; the message is one line that says which and what to change."""
