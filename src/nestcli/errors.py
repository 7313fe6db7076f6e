"""What can go wrong for a user, as exceptions whose text is the whole message.

Every message says what is wrong, where (file, line, key), and what to do about it. `nestcli.cli.app` prints it
as it stands; anything that is not a `NestError` is a bug of ours.
"""


class NestError(Exception):
    """A mistake in the call, its input or its surroundings. The command ends with `exit_code`."""

    exit_code = 2


class ConfigError(NestError):
    """A configuration key, value, preset or file that cannot be used."""


class DataError(NestError):
    """A manifest or an audio file that cannot be used."""


class CheckpointError(NestError):
    """A checkpoint that cannot be read, written or fitted to the model."""


class MissingDependencyError(NestError):
    """An optional package or program that this action needs and this machine lacks."""


class RunFailedError(NestError):
    """The command ran and the answer is no: training failed, or inputs were rejected under --strict."""

    exit_code = 1
