"""Exceptions for users' mistakes. The text of each is the complete message.

Every message says what is wrong, where (file, line, key), and how to fix it. `nestcli.cli.app` prints it unchanged.
Any exception that is not a `NestError` is a bug in nest.
"""


class NestError(Exception):
    """A mistake in the call, its input or its environment. The command ends with `exit_code`."""

    exit_code = 2


class ConfigError(NestError):
    """A configuration key, value, preset or file that cannot be used."""


class DataError(NestError):
    """A manifest or an audio file that cannot be used."""


class CheckpointError(NestError):
    """A checkpoint that cannot be read or written, or does not fit the model."""


class MissingDependencyError(NestError):
    """An optional package or program that this action needs and that is not installed."""


class RunFailedError(NestError):
    """The command ran and the answer is no: training failed, or inputs were rejected under --strict."""

    exit_code = 1
