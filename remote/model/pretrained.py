"""`from_pretrained`: a model's layers planned over workers and loaded there. Knows files and workers, no layer."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, overload

import torch

from ...schema.errors import Refused
from ...schema.plan.model import Model, model_of
from ...workers.engine.checkpoint import DTYPES, Checkpoint
from ...workers.engine.config import read_config
from ...workers.engine.cuts import span_tensors
from ...workers.engine.errors import CheckpointError
from ...workers.engine.fields import read_json
from ...workers.models import EMBEDDED, resolve
from ...workers.weigh import weighed
from ..home import home
from ..owner.pretrained import DTYPES as KNOWN
from ..peer import Handle, Peer
from ..proxy import RemoteModule, uploaded
from .language import TOKENIZER, RemoteLanguageModel
from .placing import Place, Workers, placed, slots_of

LOADING: Final = 3600.0  # seconds that a worker may take to read its layers
KV_TOKENS: Final = 2048


def from_pretrained(
    directory: str | Path,
    workers: Workers,
    *,
    balanced: bool = True,
    no_split: Sequence[tuple[int, int]] = (),
    dtype: str | torch.dtype = "fp32",
    kv_tokens: int = KV_TOKENS,
    broker: str | None = None,
) -> RemoteLanguageModel:
    """A language model of a Hugging Face directory with its layers on workers, in eval mode.

    A worker that has the same files (under `-o models=FOLDER`, by the name of the directory, told by their
    fingerprint) reads its own layers from them. Another one gets the tensors of its layers from here.

    Args:
        directory: here, "demo" for the embedded model, or the name alone of one that every worker has.
        workers: memory that each may take, or that of each of its devices: {"w1": {"cuda:0": "8GiB"}, "w2": "16GiB"}.
            Layers are in this order. Gradients and an optimizer's state are not counted.
        balanced: so that the slowest device is as fast as can be, by the bytes that it reads for a token; else each is
            filled before the next.
        no_split: runs of layers (first, last + 1) that stay on one device.
        dtype: fp32, bf16 or fp16.
        kv_tokens: tokens, of all rows together, whose keys and values are counted.

    Raises:
        Refused: the model does not fit, is of a family that is not on the list, or a worker lacks it.
        NoService: there is no such worker.
    """
    slots = slots_of(workers)
    dtype = next((name for name, kind in KNOWN.items() if kind is dtype), str(dtype))
    files = _Files(str(directory), dtype)
    peers = {slot.name: home(broker).peer(slot.name) for slot in slots}
    asked = {name: peer.ask("own", {"name": files.name, "dtype": dtype}) for name, peer in peers.items()}
    own = {name: pending.result()[0] for name, pending in asked.items()}
    model, fingerprint = files.known(own)
    places = placed(model, slots, kv_tokens, balanced=balanced, no_split=no_split)
    sent: dict[str, int] = {}
    proxies, loading, stagings = [], [], []
    for place in places:
        peer = peers[place.worker]
        handle = peer.handle()
        fields = {"first": place.first, "last": place.last, "dtype": dtype, "device": place.device}
        fields |= {"name": files.name, "out": handle.number}
        if own[place.worker]["fingerprint"] != fingerprint:
            stagings.append(files.send(peer, place, sent, fields))
        loading.append((handle, peer.ask("span", fields)))
    made = []
    for handle, pending in loading:
        told = pending.result(LOADING)[0]
        made.append(told)
        proxies.append(RemoteModule(handle, told))
    del stagings  # what was sent had to be there until here
    found = RemoteLanguageModel(proxies, made, places, files.config)
    found.sent = sent
    if files.path is not None:
        found.tokenizer = str(files.path / TOKENIZER)
    return found


class _Files:
    """The model's files, where they are here."""

    def __init__(self, directory: str, dtype: str) -> None:
        if dtype not in KNOWN:
            raise Refused(f"dtype {dtype} is unknown: give one of {', '.join(KNOWN)}")
        path = Path(directory).expanduser()
        self.path = path.resolve() if path.is_dir() else None
        self.name = path.name if self.path is None else self.path.name
        if directory == EMBEDDED:
            self.name, self.path = resolve(directory)
        self._directory = directory
        self._dtype = dtype
        self.config: dict[str, Any] = {}

    def known(self, own: dict[str, dict[str, Any]]) -> tuple[Model, str]:
        """Sizes and fingerprint of the model: of the files here, else of the workers' copies.

        Raises:
            Refused: nobody has it, or workers have different ones.
        """
        if self.path is not None:
            try:
                self.config = read_json(self.path / "config.json")
                return weighed(self.path, self.name, self._dtype), Checkpoint(self.path).fingerprint()
            except CheckpointError as error:
                raise Refused(str(error)) from None
        without = [name for name, told in own.items() if not told["fingerprint"]]
        if without:
            raise Refused(
                f"{self._directory}: no such directory here, and {without[0]} has no model {self.name}: give a "
                f"directory, or start the worker with -o models=FOLDER that holds it"
            )
        prints = {told["fingerprint"] for told in own.values()}
        if len(prints) > 1:
            raise Refused(f"the workers have different models called {self.name}: give the directory of the right one")
        first = next(iter(own.values()))
        self.config = dict(first["config"])
        return model_of(first["sizes"]), str(first["fingerprint"])

    def send(self, peer: Peer, place: Place, sent: dict[str, int], fields: dict[str, Any]) -> Handle:
        """Sends the tensors of some layers to a worker, each read when its turn comes, and adds what names them."""
        assert self.path is not None
        checkpoint = Checkpoint(self.path)
        names = span_tensors(checkpoint, read_config(self.path), place.first, place.last)
        entries = [checkpoint.entry(name) for name in names]
        specs = [[str(DTYPES[entry.dtype]).removeprefix("torch."), list(entry.shape)] for entry in entries]
        staging = uploaded(peer, _Read(checkpoint, names), specs)
        sent[peer.name] = sent.get(peer.name, 0) + sum(entry.end - entry.begin for entry in entries)
        fields |= {"staging": staging.number, "names": names, "config": self.config}
        return staging


class _Read(Sequence[torch.Tensor]):
    """Tensors of a checkpoint, of which the last that was asked for is held."""

    def __init__(self, checkpoint: Checkpoint, names: list[str]) -> None:
        self._checkpoint = checkpoint
        self._names = names
        self._held: tuple[int, torch.Tensor] | None = None

    def __len__(self) -> int:
        return len(self._names)

    @overload
    def __getitem__(self, index: int) -> torch.Tensor: ...

    @overload
    def __getitem__(self, index: slice) -> list[torch.Tensor]: ...

    def __getitem__(self, index: int | slice) -> torch.Tensor | list[torch.Tensor]:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        if self._held is None or self._held[0] != index:
            self._held = index, self._checkpoint.get(self._names[index])
        return self._held[1]
