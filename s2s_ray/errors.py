"""Every error raised on purpose, with the exit code a job ends with, and the reasons a single row may fail for.

Exit codes: 0 clean, 2 plan or usage error, 3 done with error rows within the allowed rate, 4 error rate exceeded, 5
fingerprint mismatch, 6 owned by another job, 7 preset integrity, 8 output does not verify, 75 retryable infrastructure.
"""

from enum import StrEnum

EXIT_OK = 0
EXIT_DONE_WITH_ERROR_ROWS = 3


class S2SRayError(Exception):
    """Base of all errors raised on purpose. The message says what must hold, what was received, and what to do."""

    exit_code = 2


class SettingsError(S2SRayError, ValueError):
    """A setting is unknown, of the wrong type, or out of range."""


class LanguageError(SettingsError):
    """A language that the preset does not know, or a preset that knows no languages."""


class InputError(S2SRayError, ValueError):
    """The input dataset cannot be used as it is: nothing found, unreadable footer, missing or clashing columns."""


class PresetError(S2SRayError, ValueError):
    """A preset handle is malformed, names nothing, or names a directory that holds no usable preset."""


class UnsupportedModelError(PresetError):
    """The preset's model type or one of its options has no implementation here."""


class ErrorRateExceededError(S2SRayError):
    """More rows failed than `max_error_rate` allows."""

    exit_code = 4


class FingerprintError(S2SRayError):
    """The output belongs to a run with other settings; the message names the fields that differ."""

    exit_code = 5


class OwnedElsewhereError(S2SRayError):
    """Another live job holds the lease on this output."""

    exit_code = 6


class PresetIntegrityError(PresetError):
    """A preset's files are not the ones its manifest, or the pinned version, names."""

    exit_code = 7


class VerificationError(S2SRayError):
    """An output does not match its manifest."""

    exit_code = 8


class InfrastructureError(S2SRayError):
    """Storage or the cluster failed in a way that a rerun may cure; committed work is kept."""

    exit_code = 75


class RowErrorReason(StrEnum):
    """Why one row has no output. Stored in the `reason` column of the errors dataset."""

    NULL_TEXT = "NULL_TEXT"
    INVALID_UTF8 = "INVALID_UTF8"
    TOO_LONG = "TOO_LONG"
    TOKENIZER_FAILED = "TOKENIZER_FAILED"
    UNKNOWN_LANGUAGE = "UNKNOWN_LANGUAGE"
    UNREADABLE = "UNREADABLE"
    OOM_SINGLE_ROW = "OOM_SINGLE_ROW"
    NONFINITE = "NONFINITE"
    CRASHED_WORKER = "CRASHED_WORKER"
    INTERNAL = "INTERNAL"
