"""Becomes another program, which ends when a given process dies, and which need not run as root.

`python -I -S launch.py PARENT SIGNAL IDENTITY program argument ...`: SIGNAL reaches the program when PARENT dies, also
by kill -9. IDENTITY is `same`, `namespace` (an ordinary account within a user namespace, where it still owns our files)
or, for root, `nobody` (uid 65534). A script of its own because a fork with code between it and the exec is not safe in
a process that has threads, and ours have gRPC's. It imports nothing but the standard library.
"""

from __future__ import annotations

import ctypes
import os
import pwd
import sys

NOBODY = 65534
CLONE_NEWUSER = 0x10000000
PR_SET_PDEATHSIG = 1


def enter_user_namespace(libc: ctypes.CDLL) -> None:
    """Becomes an ordinary account in a namespace of its own; files of ours stay ours. Raises OSError where forbidden.

    The account is one that the system knows by name, since initdb asks for its own; `nobody` if there is one.
    """
    uid, gid = os.getuid(), os.getgid()
    accounts = {entry.pw_uid for entry in pwd.getpwall()} - {0}
    inside = NOBODY if NOBODY in accounts or not accounts else min(accounts)
    if libc.unshare(CLONE_NEWUSER):
        raise OSError(ctypes.get_errno(), "unshare(CLONE_NEWUSER)")
    for name, text in (("setgroups", "deny"), ("uid_map", f"{inside} {uid} 1"), ("gid_map", f"{inside} {gid} 1")):
        with open(f"/proc/self/{name}", "w", encoding="ascii") as file:
            file.write(text)


def main(parent: int, death_signal: int, identity: str, command: list[str]) -> None:
    """Does what the module's text says and becomes the program."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        if identity == "namespace":
            enter_user_namespace(libc)
        elif identity == "nobody":
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
        # Last, since a change of identity forgets it. The parent may have died before it was set.
        libc.prctl(PR_SET_PDEATHSIG, death_signal)
        if os.getppid() != parent:
            raise SystemExit("the parent is gone")
    os.execv(command[0], command)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4:])
