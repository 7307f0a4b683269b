"""What a user can fix, as exceptions. Anything else that goes wrong is our fault and stays a traceback.

    S2LError
    ├── ConfigError      a key or value in a config, or an argument, cannot be used
    ├── DataError        the corpus or the trajectories lack what the recipe needs
    ├── ArtifactError    a stage is missing, stale (another recipe), unfinished or damaged
    └── StorageError     a disk, a shared filesystem or object storage does not let us read or write

Every message states what is wrong, where, what was found, and what to do. The command line prints it and exits with 2.
"""

from __future__ import annotations

import errno
import re
import socket


def printable(text: str) -> str:
    """A text without what a terminal would obey: names of files, fields and ids are somebody's."""
    return "".join(one if one.isprintable() or one in "\n\t" else one.encode("unicode_escape").decode() for one in text)


class S2LError(Exception):
    """Something that the user can fix.

    The message is the only argument and goes to ``super().__init__``, so that it survives the trip from a worker
    process to the driver.
    """


class ConfigError(S2LError):
    """A key or value in a config, or an argument, cannot be used."""


class DataError(S2LError):
    """The corpus or the trajectories lack what the recipe needs."""


class ArtifactError(S2LError):
    """A stage's directory is missing, stale, unfinished or damaged."""


class StorageError(S2LError):
    """A disk, a shared filesystem or object storage does not let us read or write. What was finished stays."""

    @property
    def is_transient(self) -> bool:
        """Whether it may be over in a minute, without any action by the user."""
        return _UNREACHABLE in str(self) or _OVERLOADED in str(self)


def cause_of(error: BaseException | None) -> S2LError | None:
    """What the user must fix behind an error that Ray wrapped on its way from a worker, None if it is something else."""
    found, host = [error], socket.gethostname()
    while found:
        error = found.pop(0)
        if error is None:
            continue
        # Ray's wrapper is of the wrapped error's class, too, but its text is a worker's traceback. What a training worker
        # raised is in `worker_failures` by rank.
        inner = [getattr(error, name, None) for name in ("cause", "controller_failure")]
        inner += (getattr(error, "worker_failures", None) or {}).values()
        inner = [one for one in inner if isinstance(one, BaseException)]
        if not inner and isinstance(error, S2LError):
            return error
        problem = storage_problem(error, host=host) if not inner else None
        if problem is not None:
            return StorageError(problem)
        if inner:
            host = getattr(error, "ip", None) or "a worker"
        found += inner or [error.__cause__]
    return None


_UNREACHABLE, _OVERLOADED = "cannot be reached", "the store is overloaded or down"
_GOES_ON = "the same command goes on."
_ON_DISK = {
    errno.ENOSPC: f"the disk is full. Free some space; {_GOES_ON}",
    errno.EDQUOT: f"the disk quota is used up. Free some space; {_GOES_ON}",
    errno.EACCES: "may not be written or read. Check its permissions.",
    errno.EROFS: "is on a read-only filesystem. Give another directory.",
    errno.EISDIR: "is a directory where a file is needed. Give the path of a file.",
    errno.ENOTDIR: "has a file where a directory is needed. Give another directory.",
    errno.ENAMETOOLONG: "has a name that is too long. Give a shorter one.",
    errno.EEXIST: "is a file where a directory is needed. Give another directory.",
}
# What the stores' libraries report, in words instead of error numbers: the first pattern that matches counts.
_IN_OBJECT_STORAGE = (
    (
        r"NO_SUCH_BUCKET|specified bucket does not exist|Bucket '.*' not found",
        "there is no such bucket. Create it or give another; for a store that is not AWS's set AWS_ENDPOINT_URL.",
    ),
    (r"Expired|EXPIRED|TokenRefreshRequired", f"the credentials have expired. Renew them; {_GOES_ON}"),
    (r"TIME_TOO_SKEWED|TimeTooSkewed", "this machine's clock is wrong. Set it."),
    (
        r"INVALID_ACCESS_KEY|SIGNATURE|INVALID_CLIENT_TOKEN|InvalidToken|UNRECOGNIZED_CLIENT|MISSING_AUTH|UNAUTHENTICATED"
        r"|status 401",
        "the credentials are not valid there. Check them (AWS_ACCESS_KEY_ID, AWS_PROFILE, GOOGLE_APPLICATION_CREDENTIALS or "
        "the machine's role) and AWS_ENDPOINT_URL.",
    ),
    (
        r"status 30\d|PermanentRedirect|AuthorizationHeaderMalformed|IllegalLocationConstraint",
        "the bucket is in another region. Set AWS_DEFAULT_REGION to its region.",
    ),
    (
        r"ACCESS_DENIED|PERMISSION_DENIED|status 403|AllAccessDisabled",
        "access denied. The credentials must allow to list, read, write and delete there.",
    ),
    (r"NETWORK_CONNECTION|curlCode", f"{_UNREACHABLE}. Check AWS_ENDPOINT_URL and the network; {_GOES_ON}"),
    (
        r"SLOW_DOWN|THROTTL|UNAVAILABLE|INTERNAL_FAILURE|REQUEST_TIMEOUT|status 5\d\d|Retry policy exhausted",
        f"{_OVERLOADED}, also after several attempts. Wait; {_GOES_ON}",
    ),
)


def storage_problem(error: BaseException, place: str = "", host: str = "") -> str | None:
    """What the user must fix where reading or writing failed, None for anything else.

    `place` is what was read or written, for errors that do not name it; `host` is the machine, if not this one: any node's
    disk may be full.
    """
    host, text = host or socket.gethostname(), str(error).strip()
    if type(error).__name__ == "OutOfDiskError":  # Ray's, which is not imported here: its objects no longer fit
        return f"Ray's directory for objects, on {host} or another node: {_ON_DISK[errno.ENOSPC]}"
    if "No space left on device" in text:  # safetensors and others have errors of their own for it
        return f"{getattr(error, 'filename', None) or place or 'writing'} on {host}: {_ON_DISK[errno.ENOSPC]}"
    if not isinstance(error, OSError) or (isinstance(error, FileNotFoundError) and "specified bucket" not in text):
        return None
    if error.errno is None and text.endswith("is a directory"):  # Arrow's own
        return f"{place or text} on {host}: {_ON_DISK[errno.EISDIR]}"
    reported = re.search(r"AWS Error (.*)|google::cloud::Status\((.*?)(?: error_info|$)|(Bucket '.*' not found.*)", text)
    if reported is not None:
        detail = " ".join(next(filter(None, reported.groups())).split())
        named = re.search(r"key '(.*?)' in bucket '(.*?)'", text)
        place = place or (f"{named[2]}/{named[1]}" if named else "object storage")
        reasons = (reason for pattern, reason in _IN_OBJECT_STORAGE if re.search(pattern, detail))
        reason = next(reasons, "refused. Check the bucket, its region and the credentials.")
        return f"{place}: {reason} (Seen from {host}: {detail[:300].rstrip('.')}.)"
    # Without a place the path is not the user's, and the mistake may be ours.
    is_ours = not place and error.errno in (errno.EEXIST, errno.EISDIR, errno.ENOTDIR)
    reason = "" if is_ours else _ON_DISK.get(error.errno or 0, "")
    name = error.filename2 or error.filename or place or "writing"  # of a renaming the name that was wanted
    return f"{name} on {host}: {reason}" if reason else None


def has_credentials(text: str) -> bool:
    """Whether a text is a URI with `user:key@` (keys have slashes, too), `user@`, or a query that names a key."""
    return (
        re.match(r"[a-z0-9+.-]+://(([^/\s]*|[^\s@]*:[^\s@]*)@|\S*\?\S*(key|secret|token)\S*=)", text, re.IGNORECASE) is not None
    )
