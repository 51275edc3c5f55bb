"""The errors that this package adds to those of flashi2v-data."""

from flashi2v_data.errors import InputError as InputError


class SamplingError(RuntimeError):
    """Videos could not be sampled though all that was given could be used; the message is one line."""

    exit_code = 1
