"""The bounds of everything that travels. Knows numbers only; who checks them is codec.py and tensor.py."""

from typing import Final

VERSION: Final = 1
FEATURES: Final = 0  # bits a peer may offer in HELLO; none is defined yet

HEAD: Final = 36  # prefix (32 bytes) and the two section lengths (2 x u16)
MAX_ROUTING: Final = 4 * 1024
MAX_BODY_INLINE: Final = 8 * 1024  # a longer body travels in a frame of its own
MAX_BODY: Final = 1024 * 1024
MAX_TENSORS_INLINE: Final = 8 * 1024  # all inline tensors of one message, padding included
MAX_FRAME_0: Final = HEAD + MAX_ROUTING + MAX_BODY_INLINE + MAX_TENSORS_INLINE + 16
ALIGNMENT: Final = 16  # of inline tensors within frame 0

MAX_FRAMES: Final = 64
MAX_MESSAGE: Final = 256 * 1024 * 1024
MAX_TENSORS: Final = 1024
MAX_DIMS: Final = 8

# What a section of msgpack may unfold to: an empty map is one byte here and 64 in memory.
MAX_ENTRIES: Final = 65_536  # of one array or map
MAX_CONTAINERS: Final = 32_768  # arrays and maps in one section, counted where it has more than MAX_BODY_INLINE bytes

MAX_NAME: Final = 128  # characters in the name of a service, a model or a worker
MAX_REASON: Final = 800  # bytes of UTF-8 that say why; longer text is cut
MAX_ERROR_TEXT: Final = 3200  # the same of an ERROR, so that it always fits the routing section
MAX_SERVICES: Final = 32
MAX_ROWS: Final = 4096  # rows of one STEP
MAX_ACTIVE: Final = 128  # attempts listed in one BEAT

MAX_ATTEMPT: Final = 0xFFFF
MAX_DEADLINE_MS: Final = 0xFFFF_FFFF
NO_ID: Final = bytes(16)
MAX_TOKEN_ID: Final = 0x7FFF_FFFF  # token ids travel as int32
LOSSES: Final = 3  # of whoever serves a request, without progress between them; then it is given up
