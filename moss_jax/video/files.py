"""Checks that a path names a file that can be read, before it is opened as video or picture."""

import os
import stat


class VideoError(ValueError):
    """A file that cannot be read as video; the message is one sentence with its name and the reason."""


def check_file(path: str | os.PathLike) -> None:
    """Checks that a path names a regular file that is readable and not empty.

    Raises:
      VideoError: it does not; its cause is the FileNotFoundError if nothing is there.
    """
    try:
        status = os.stat(path)
        if stat.S_ISREG(status.st_mode):
            with open(path, "rb"):
                pass
    except (FileNotFoundError, NotADirectoryError) as error:
        raise VideoError(f"{path} does not exist; give the path of a video or an image") from error
    except PermissionError as error:
        raise VideoError(f"{path} is not readable by this user; change its permissions") from error
    except OSError as error:  # a name that is too long, a loop of links, a stale network mount
        reason = (error.strerror or type(error).__name__).lower()
        raise VideoError(f"{path} cannot be read ({reason}); give the path of a video or an image") from error
    except ValueError as error:  # a null byte, or half a surrogate pair
        name = repr(os.fspath(path))
        raise VideoError(f"{name} cannot be a file; give the path of a video or an image") from error
    if not stat.S_ISREG(status.st_mode):
        kind = "a directory" if stat.S_ISDIR(status.st_mode) else "not a regular file"
        raise VideoError(f"{path} is {kind}; give the path of a video or an image")
    if status.st_size == 0:
        raise VideoError(f"{path} is empty (0 bytes); copy or download it again")


def damaged(path: str | os.PathLike) -> VideoError:
    """The error for a file in which nothing can be decoded."""
    return VideoError(f"{path} has no frame that can be decoded; copy or download it again")
