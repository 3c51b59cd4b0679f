"""One process at a time trains in a run folder: two would write its rows twice and remove each other's checkpoints."""

import errno
import fcntl
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from lit_rlhf.errors import UserError
from lit_rlhf.preemption import Preempted, asked_to_stop
from lit_rlhf.run_folder import writing

log = logging.getLogger(__name__)

LOCK = ".lock"  # in the run folder while it trains; what a kill leaves of it is not locked
#: Seconds. What is left of a run whose parent was killed first finishes its step and writes a checkpoint.
PATIENCE = 60.0


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Inside, no other process trains in ``folder``, which is made; the system ends this when the process ends.

    A POSIX lock, because workers that are forked do not keep it, and because NFS has it. Where the file system has no
    locks, there is none.

    Raises:
        UserError: another process trains there, also after a minute; or nothing can be written there.
        Preempted: a signal came while waiting for it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"paths.output_dir={folder} cannot be made: {error.strerror}") from error
    file = _locked(folder)
    try:
        yield
    finally:
        (folder / LOCK).unlink(missing_ok=True)  # before others can have it
        file.close()


def _locked(folder: Path) -> TextIO:
    path, until = folder / LOCK, None
    while True:
        with writing(path):
            file = open(path, "a+", encoding="utf-8")
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                return file
        else:
            if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
                with writing(path):
                    file.truncate(0)
                    file.write(f"process {os.getpid()} on {socket.gethostname()}")
                    file.flush()
                return file
            file.close()
            continue  # its owner has removed it meanwhile
        file.seek(0)
        owner = file.read() or "another process"
        file.close()
        if until is None:
            until = time.monotonic() + PATIENCE
            log.warning("%s: %s trains there; waiting up to a minute for its end", folder, owner)
        if asked_to_stop():
            raise Preempted
        if time.monotonic() > until:
            raise UserError(
                f"paths.output_dir={folder}: {owner} trains there. Let it end, or choose another folder"
            )
        time.sleep(0.2)
