"""libzmq's own C proxy between ROUTER and DEALER, as a process: `python proxy.py FRONT BACK`. Knows no protocol."""

import os
import sys

import zmq
from ralmq.workers.process import PARENT_PIPE, watch_parent


def main(front: str, back: str) -> None:
    context = zmq.Context()
    frontend, backend = context.socket(zmq.ROUTER), context.socket(zmq.DEALER)
    frontend.bind(front)
    backend.bind(back)
    zmq.proxy(frontend, backend)


if __name__ == "__main__":
    if PARENT_PIPE in os.environ:
        watch_parent(int(os.environ[PARENT_PIPE]), lambda: os._exit(0))
    main(sys.argv[1], sys.argv[2])
