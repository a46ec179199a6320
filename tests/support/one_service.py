"""What s6-supervise is, but for several directories: supervises each until it is told to leave."""

from __future__ import annotations

import sys

import etcdinit


def main(*directories: str) -> None:
    supervisor = etcdinit.Supervisor("", "")
    supervisor.catch_signals()
    services = [etcdinit.Service(directory.rsplit("/", 1)[-1], directory, directory) for directory in directories]
    for service in services:
        if not supervisor.supervise(service):
            sys.exit(100)
        service.asked = True  # nobody returns to duty after x
        supervisor.step(service, "timeout")
    while any(service.state != etcdinit.GONE for service in services):
        supervisor.turn()


if __name__ == "__main__":
    main(*sys.argv[1:])
