"""What a user can mend, as exceptions. Anything else that goes wrong is our fault and stays a traceback.

    S2LError
    ├── ConfigError      a key or value in a config, or an argument, cannot be used
    ├── DataError        the corpus or the trajectories lack what the recipe needs
    └── ArtifactError    a stage is missing, stale (another recipe), unfinished or damaged

Every message says what, where, what was found, and what to do. The command line prints it and exits with 2.
"""

from __future__ import annotations

import errno


class S2LError(Exception):
    """Something that the user can mend.

    The message is the only argument and goes to ``super().__init__``, so that it survives the trip from a worker
    process to the driver.
    """


class ConfigError(S2LError):
    """A key or value in a config, or an argument, cannot be used."""


class DataError(S2LError):
    """The corpus or the trajectories lack what the recipe needs."""


class ArtifactError(S2LError):
    """A stage's directory is missing, stale, unfinished or damaged."""


def cause_of(error: BaseException | None) -> S2LError | None:
    """What the user must mend behind an error that Ray wrapped on its way from a worker, None if it is something else."""
    while error is not None:
        inner = getattr(error, "cause", None)
        # Ray's wrapper is of the wrapped error's class, too, but its text is a worker's traceback.
        if isinstance(error, S2LError) and not isinstance(inner, S2LError):
            return error
        error = inner or error.__cause__
    return None


def disk_problem(error: OSError) -> str | None:
    """What the user must mend where writing failed, None for any other operating-system error."""
    kinds = {
        errno.ENOSPC: "the disk is full. Free some space; the same command goes on.",
        errno.EDQUOT: "the disk quota is used up. Free some space; the same command goes on.",
        errno.EACCES: "may not be written or read. Check its permissions.",
        errno.EROFS: "is on a read-only filesystem. Give another directory.",
        errno.EISDIR: "is a directory where a file is needed. Give the path of a file.",
        errno.ENOTDIR: "has a file where a directory is needed. Give another directory.",
        errno.EEXIST: "is a file where a directory is needed. Give another directory.",
    }
    if error.errno is None and "AWS Error" in str(error):
        return f"object storage: {str(error).splitlines()[0]} Check the bucket, its region and your credentials."
    reason = kinds.get(error.errno or 0)
    return None if reason is None else f"{error.filename or 'writing'}: {reason}"
