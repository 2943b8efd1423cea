"""Every exception this package raises on purpose.

The command line turns each of them into one message on standard error and exit code 2.
"""


class ForgetFilterError(Exception):
    """Base of all errors below; the message says what is wrong, where, and what to do."""


class ConfigError(ForgetFilterError):
    """A setting is unknown, impossible, or contradicts another one."""


class DataError(ForgetFilterError):
    """A data set cannot be found, read or understood."""


class ModelError(ForgetFilterError):
    """A model or tokenizer cannot be loaded."""


class TrainingError(ForgetFilterError):
    """A training went wrong: its loss is NaN or infinite, or the memory does not hold a single row."""


class RunError(ForgetFilterError):
    """A run's folder is missing, busy, damaged, or belongs to another run."""
