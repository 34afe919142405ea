"""Every error that Tersor raises on purpose. All derive from :class:`TersorError`.

A message says what was given and what is allowed. Errors about a value also derive from :class:`ValueError`, errors about a
file from :class:`OSError`-free plain exceptions, so that ``except tersor.TersorError`` catches all of them and nothing else.
"""


class TersorError(Exception):
    """Base of all errors raised by Tersor and its methods."""


class ConfigError(TersorError, ValueError):
    """A configuration value or key is not allowed."""


class InputError(TersorError, ValueError):
    """The data given to a method is not of its domain (shape, dtype, range, NaN)."""


class CalibrationError(TersorError, ValueError):
    """Calibration data is missing, or does not fit the data it goes with."""


class ExportError(TersorError, ValueError):
    """A format cannot hold a model as it is; the message names the tensors and the property."""


class UnknownMethodError(TersorError, LookupError):
    """No installed distribution offers a method of that name."""


class ConflictError(TersorError):
    """Two installed distributions offer a method of the same kind and name."""


class PluginError(TersorError):
    """A plugin was found but cannot be used: failing import, misspelt hook, wrong signature, wrong version range."""


class MissingLibraryError(TersorError, ImportError):
    """An optional library is needed for this and is not installed."""


class StateError(TersorError):
    """A state file does not fit the method, or is not a state file."""


class MissingStateError(StateError):
    """A fitted method is used without a state, or a payload names a state that is not here."""


class FileError(TersorError):
    """Base of the errors about a ``.tsr`` file or payload."""


class NotTersorFileError(FileError):
    """The bytes do not begin like a ``.tsr`` file."""


class UnsupportedVersionError(FileError):
    """The file was written in a format version, or a method configuration version, newer than this installation."""


class TruncatedFileError(FileError):
    """The file ends before, or goes on after, what its header says."""


class ChecksumError(FileError):
    """The checksum does not match: the bytes were changed since they were written."""


class LimitError(FileError):
    """The header asks for more memory than the stated limit allows."""


class CorruptPayloadError(FileError):
    """The container is sound but its contents do not decode."""


class ClaimError(TersorError):
    """A claim cannot be run: the data or the library that it needs is not installed."""
