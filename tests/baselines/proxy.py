"""libzmq's own C proxy between ROUTER and DEALER, as a process: `python proxy.py FRONT BACK`. Knows no protocol."""

import sys

import zmq


def main(front: str, back: str) -> None:
    context = zmq.Context()
    frontend, backend = context.socket(zmq.ROUTER), context.socket(zmq.DEALER)
    frontend.bind(front)
    backend.bind(back)
    zmq.proxy(frontend, backend)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
