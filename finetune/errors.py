"""What can go wrong in training and evaluation, as one tree; every message says what to do.

TrainingError
├── BadConfig      a setting is wrong or missing
├── BadDataset     a dataset's folder is not what it says it is
├── BadOutput      the output folder holds something else
└── Unreachable    the service that was to be measured does not answer
"""


class TrainingError(Exception):
    """A run that cannot be done; the message is for a person."""


class BadConfig(TrainingError):
    """A setting is wrong or missing."""


class BadDataset(TrainingError):
    """A dataset's folder is not what it says it is."""


class BadOutput(TrainingError):
    """The output folder holds something else."""


class Unreachable(TrainingError):
    """The service that was to be measured does not answer."""
