"""What the leader checks before a sequence takes any memory: its prompt, and the index that it wants to ask."""

import asyncio

import numpy as np

from ...client.client import REQUEST_DEADLINE, Client
from ...schema.errors import Refused
from ..base import Request
from ..params import Retrieval, Task
from .weights import Loaded

FRESH = 5.0  # seconds for which what an index said of itself is believed


def prompt_of(request: Request, task: Task, loaded: Loaded) -> list[int]:
    """The prompt's ids.

    Raises:
        Refused: no prompt, ids outside the vocabulary, or more than the context holds.
    """
    config = loaded.config
    if len(request.tensors) != 1 + config.crossed:
        raise Refused(f"{len(request.tensors)} tensors came with the request: send one, the prompt's ids, int32 [n]")
    ids = request.tensors[0].numpy()
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise Refused(f"the prompt is {ids.dtype} {list(ids.shape)}: send ids, int32 [n]")
    least = 2 if task.mode == "score" else 1
    if len(ids) < least:
        raise Refused(f"the prompt has {len(ids)} tokens: give at least {least}")
    if int(ids.min()) < 0 or int(ids.max()) >= config.vocab:
        raise Refused(f"the prompt has ids outside 0..{config.vocab - 1}: use the tokenizer of this model")
    room = config.context if task.mode == "score" else config.context - 1
    if (over := len(ids) - (task.mode == "score") - room) > 0:  # a new token needs room, too
        raise Refused(
            f"the prompt has {len(ids)} tokens, the model's context holds {config.context}: "
            f"shorten it by at least {over}"
        )
    if task.prompt is not None and task.prompt > len(ids):
        raise Refused(f"prompt={task.prompt} is more than the {len(ids)} tokens that came")
    if task.context >= (task.prompt or len(ids)):
        raise Refused(f"context={task.context} leaves nothing of the prompt's {task.prompt or len(ids)} tokens")
    if any(not 0 <= token < config.vocab for token in task.stop_ids):
        raise Refused(f"stop_ids has ids outside 0..{config.vocab - 1}: use those of this model's tokenizer")
    if any(not 0 <= token < config.vocab for token, _ in task.logit_bias):
        raise Refused(f"logit_bias has ids outside 0..{config.vocab - 1}: use those of this model's tokenizer")
    return [int(token) for token in np.asarray(ids)]


def own_tokens(task: Task, length: int) -> int:
    """How many tokens at the prompt's end are computed even where their keys and values are cached.

    One, for the first new token; all, where each token's hidden state is asked for; and in a replay with staleness
    those whose queries the next tokens still wait for.
    """
    if task.mode == "score":
        return length
    return 1 + (task.retrieve.staleness if task.retrieve is not None else 0)


class Indexes:
    """What the indexes say of themselves, asked before prefill so that a wrong one costs nothing."""

    def __init__(self, loaded: Loaded) -> None:
        self._loaded = loaded
        self._known: dict[tuple[str, bool], tuple[float, str]] = {}

    async def check(self, client: Client, retrieval: Retrieval, request: Request) -> str:
        """The index's metric.

        Raises:
            NoService: nobody serves it, for as long as the asker would wait.
            Refused: it was built with another model, or cannot do what the policy needs.
        """
        index, counts = retrieval.index, "ngram" in retrieval.parts
        now = asyncio.get_running_loop().time()
        known = self._known.get((index, counts))
        if known is not None and now - known[0] < FRESH:
            return known[1]
        info = (
            await client.request(
                f"search:{index}",
                {"info": True},
                parent=request.id,
                retries=3,
                wait_service=request.wait,
                deadline=max(REQUEST_DEADLINE, request.wait),
            )
        ).body
        if info.get("kind", "datastore") != "datastore":
            raise Refused(f"index {index} is no datastore of a model's states: ask for it with policy=context")
        model, width = self._loaded, self._loaded.config.hidden
        if info.get("fingerprint") != model.fingerprint or info.get("d") != width:
            raise Refused(
                f"index {index} was built with {info.get('model')} ({info.get('fingerprint')}, d={info.get('d')}), "
                f"not with this model ({model.fingerprint}, d={width}): build it anew with `ralmq index build`"
            )
        if counts:  # the first one to ask waits until they are counted, and not a row amid its text
            none = np.empty((0, 0), np.int32)
            await client.request(f"search:{index}", {"ngram": 1}, tensors=[none], parent=request.id, retries=3)
        self._known[index, counts] = (now, str(info.get("metric", "l2")))
        return self._known[index, counts][1]
