"""What the user can put right. Every other exception is a bug of ours and keeps its traceback."""


class LoraSurgeryError(Exception):
    """Message form: '<where>: <what is wrong, with the values>. <what to do>'."""

    exit_code = 1


class FormatError(LoraSurgeryError):
    """A file breaks its format's rules."""


class ShapeError(LoraSurgeryError):
    """A tensor's shape or dtype is not the one that its role asks for."""


class MatchError(LoraSurgeryError):
    """An adapter's part belongs to nothing in the base, or is not understood."""


class UnknownNameError(LoraSurgeryError):
    """No variant, format, codec or command goes by this name."""


class OutputError(LoraSurgeryError):
    """The output exists, lies inside the input, or does not fit on the disk."""


class ValueRangeError(LoraSurgeryError):
    """A weight is nan or infinite, or an option is out of its range."""


class UsageError(LoraSurgeryError):
    """Options that do not go together."""

    exit_code = 2


class VerificationError(LoraSurgeryError):
    """The files do not hold what they should, or a threshold is missed."""

    exit_code = 3
