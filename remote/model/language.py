"""A language model whose layers are on workers: logits, generation, gradients, adapters. Knows proxies, no message."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

import torch

from ...schema.errors import Refused
from ..hints import CHAINED, hinted
from ..proxy import RemoteModule, Several
from ..tensor import RemoteTensor
from . import lora
from .placing import Place
from .prompts import check_count, checked
from .sampling import check, choose

IGNORED: Final = -100  # a label that counts nothing
TOKENIZER: Final = "tokenizer.json"  # of a model's directory
ROWS: Final = 64 << 20  # bytes of a head's rows that travel as one


@dataclass(slots=True)
class Output:
    """What a forward gave; everything is a remote tensor, on the worker that made it.

    Attributes:
        logits: [b, n, vocab].
        loss: the mean cross entropy of the labels, where there were some.
        hidden_states: the embeddings, what each layer gave, the last one behind the norm: [b, n, hidden] each.
        attentions: of each layer, [b, heads, n, past + n].
        past: keys and values of each span, for the next call.
    """

    logits: RemoteTensor
    loss: RemoteTensor | None = None
    hidden_states: tuple[RemoteTensor, ...] = ()
    attentions: tuple[RemoteTensor, ...] = ()
    past: tuple[RemoteTensor, ...] = ()


class RemoteLanguageModel(Several):
    """Spans of one model on workers, in order. Made by `from_pretrained`.

    Attributes:
        proxies: the spans, as a RemoteOptimizer or a Pipeline takes them.
        places: which layers are where.
        sent: bytes of weights that went from here to each worker that had no copy of the files.
        tokenizer: the file of its tokenizer, where the model's files are here.
    """

    alike = False

    def __init__(
        self, proxies: list[RemoteModule], made: list[dict[str, Any]], places: list[Place], config: dict[str, Any]
    ) -> None:
        self.proxies = proxies
        self.places = places
        self.config = config
        self.sent: dict[str, int] = {}
        self.tokenizer = TOKENIZER
        self.adapter: lora.Adapter | None = None
        self._whole: list[dict[str, str]] = [told["whole"] for told in made]
        self._tied = str(made[0]["tied"]) if len(proxies) > 1 else ""  # the embedding, where it is the head, too
        self._moved = False  # the embedding may have been trained, and the last worker's copy of it is an old one
        hinted(self, CHAINED)

    def __call__(self, input_ids: Any, **options: Any) -> Output:
        return self.forward(input_ids, **options)

    def forward(
        self,
        input_ids: Any,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        *,
        past: Sequence[RemoteTensor] = (),
        use_cache: bool = False,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        keep: int = 0,
    ) -> Output:
        """Logits of ids [b, n]; hidden states go from worker to worker, nothing comes here. Returns at once.

        Args:
            input_ids: a tensor, here or on any worker, or lists of ids.
            attention_mask: [b, past + n]: 1 for tokens, 0 for what pads.
            labels: [b, n]: the ids again; the loss is that of each next one, but for those that are -100.
            past: of the output of the tokens before, which were called with `use_cache`.
            keep: logits of so many last tokens alone; of all for 0.

        Raises:
            TypeError, IndexError, Refused: ids that are here are no token ids; see `prompts.checked`.
        """
        return self._forward(
            input_ids if isinstance(input_ids, RemoteTensor) else self._checked(input_ids),
            self._given(attention_mask=attention_mask, position_ids=position_ids),
            self._given(
                use_cache=use_cache or bool(past),
                output_hidden_states=output_hidden_states,
                output_attentions=output_attentions,
            ),
            past,
            self._head(),
            keep,
            labels,
        )

    @torch.no_grad()
    def generate(
        self,
        input_ids: Any,
        max_new_tokens: int = 32,
        *,
        attention_mask: torch.Tensor | None = None,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
        eos_ids: Sequence[int] | None = None,
    ) -> torch.Tensor:
        """The ids [b, n] and what follows, [b, n + new], with a cache of keys and values on the workers.

        Tokens are chosen on the last worker and go from there to the first; they come here for the test of an end.

        Args:
            input_ids: [b, n], or [n] of a single row; of a worker, they come here first.
            attention_mask: of the same shape: 0 where a row is padded, on the left.
            temperature, top_k, top_p, seed: see `sampling.choose`; temperature 0 takes the most likely token.
            eos_ids: a row ends with one of these, and is filled up with the first of them; the model's own where not
                given. With () nothing ends before `max_new_tokens`.

        Raises:
            TypeError, IndexError: these are no token ids; see `prompts.checked`.
            Refused: a mask that pads on the right, or settings by which nothing can be chosen.
        """
        check_count(max_new_tokens)
        ids = self._checked(input_ids.to_here() if isinstance(input_ids, RemoteTensor) else input_ids, row=True)
        attention_mask = _mask(attention_mask, ids)
        check(temperature, top_k, top_p)
        top_k = min(top_k, int(self.config.get("vocab_size") or top_k))
        ends = torch.tensor(list(self.eos_ids if eos_ids is None else eos_ids), dtype=torch.long)
        generator = torch.Generator().manual_seed(seed)
        head = [piece.to_worker(self.proxies[-1].worker) for piece in self._head()]
        mask, x, found = attention_mask, ids, []
        past: Sequence[RemoteTensor] = ()
        done = torch.zeros(len(ids), dtype=torch.bool)
        for _ in range(max_new_tokens):
            told = self._given(attention_mask=mask)
            if mask is not None:
                told["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)[:, -x.shape[1] :]
                mask = torch.cat((mask, mask.new_ones(len(ids), 1)), 1)
            out = self._forward(x, told, {"use_cache": True}, past, head, 1)
            past = out.past
            draws = torch.rand(len(ids), 1, dtype=torch.float64, generator=generator)
            token: Any = choose(out.logits[:, -1], temperature=temperature, top_k=top_k, top_p=top_p, draws=draws)
            if len(ends):
                here = token.to_here()
                token = torch.where(done, ends[0], here)
                done = done | torch.isin(token, ends)
            found.append(token)
            if len(ends) and bool(done.all()):
                break
            x = token.unsqueeze(-1)
        new = [token if isinstance(token, torch.Tensor) else token.to_here() for token in found]
        return torch.cat((ids, torch.stack(new, 1)), 1) if new else ids

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """The ends of a text, of the model's config."""
        found = self.config.get("eos_token_id")
        return () if found is None else tuple(found) if isinstance(found, list) else (int(found),)

    def __repr__(self) -> str:
        parts = ", ".join(f"{place.first}:{place.last} on {place.worker}" for place in self.places)
        return f"RemoteLanguageModel({self.config.get('model_type')}, layers {parts})"

    # -- training

    def parameters(self) -> list[RemoteTensor]:
        return [parameter for _, parameter in self.named_parameters()]

    def named_parameters(self) -> Iterator[tuple[str, RemoteTensor]]:
        """Names in the whole model, and parameters, which stay where they are."""
        for proxy, whole in zip(self.proxies, self._whole, strict=True):
            for name, parameter in proxy.named_parameters():
                yield whole[name], parameter

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The whole model's own weights, here, without adapters, under the names that its files have."""
        found: dict[str, torch.Tensor] = {}
        for number, (proxy, whole) in enumerate(zip(self.proxies, self._whole, strict=True)):
            wanted = [name for name in whole if not lora.is_adapter(name)]
            if self._tied and number == len(self.proxies) - 1:
                wanted = [name for name in wanted if whole[name] != "lm_head.weight"]
            state = proxy.state_dict(wanted)
            found |= {whole[name].replace(".base_layer.", "."): tensor for name, tensor in state.items()}
        return found

    # -- adapters

    def add_adapter(
        self,
        r: int = 8,
        lora_alpha: float = 8,
        target_modules: Sequence[str] | str | None = None,
        lora_dropout: float = 0.0,
        seed: int = 0,
    ) -> Self:
        """Freezes the model and puts LoRA adapters on its linear layers; their parameters alone train from then on.

        Args:
            target_modules: as in peft: ends of names (q_proj), a regular expression for the whole of them, or
                "all-linear"; those of attention that peft takes for this family where not given.
            seed: of the first values, which do not depend on how the model is split.

        Raises:
            Refused: there are adapters already, or no layer has such a name.
        """
        if self.adapter is not None:
            raise Refused("this model has adapters already: load it anew for others")
        self.adapter = lora.add(self, r, lora_alpha, target_modules, lora_dropout, seed)
        return self

    def adapted(self, number: int, made: dict[str, Any]) -> None:
        """The worker of a span gave it adapters."""
        self._whole[number] = made["whole"]
        self.proxies[number].changed(made["parameters"])

    def adapter_names(self, number: int) -> dict[str, str]:
        """Of a span's adapters the names there and in the whole model."""
        return {name: whole for name, whole in self._whole[number].items() if lora.is_adapter(name)}

    def save_adapter(self, folder: str | Path) -> None:
        """Writes adapter_model.safetensors and adapter_config.json, as peft reads them."""
        lora.save(self, Path(folder))

    def load_adapter(self, folder: str | Path) -> Self:
        """Puts on adapters that peft, or `save_adapter`, wrote.

        Raises:
            Refused: adapters of another kind, or of other layers.
        """
        lora.load(self, Path(folder))
        return self

    # -- inside

    def _checked(self, input_ids: Any, row: bool = False) -> torch.Tensor:
        """Token ids [b, n]; with `row` those [n] of a single one, too."""
        ids = checked(input_ids, int(self.config.get("vocab_size") or 0), self.tokenizer)
        ids = ids[None] if row and ids.ndim == 1 else ids
        if ids.ndim != 2:
            raise Refused(f"token ids are [rows, tokens], not {list(ids.shape)}: give a list of rows")
        return ids

    @staticmethod
    def _given(**options: Any) -> dict[str, Any]:
        return {name: value for name, value in options.items() if value is not None and value is not False}

    def _forward(
        self,
        x: Any,
        told: dict[str, Any],
        wanted: dict[str, Any],
        past: Sequence[RemoteTensor],
        head: Sequence[RemoteTensor],
        keep: int,
        labels: torch.Tensor | None = None,
    ) -> Output:
        hidden: list[RemoteTensor] = []
        attentions: list[RemoteTensor] = []
        cached: list[RemoteTensor] = []
        for number, (proxy, place) in enumerate(zip(self.proxies, self.places, strict=True)):
            last = number == len(self.proxies) - 1
            own = {**told, **wanted}
            if past:
                own["past"] = past[number]
            if last:
                own |= self._given(head=tuple(head) or None, keep=keep or None)
            result = proxy(x, **own)
            x = result["x"] if wanted else result
            layers = place.last - place.first
            if "output_hidden_states" in wanted:
                hidden += [result["hidden"][layer] for layer in range(layers + last)]
            if "output_attentions" in wanted:
                attentions += [result["attentions"][layer] for layer in range(layers)]
            if "use_cache" in wanted:
                cached.append(result["past"])
        loss = None if labels is None else _loss(x, labels)
        return Output(x, loss, tuple(hidden), tuple(attentions), tuple(cached))

    def _head(self) -> list[RemoteTensor]:
        """Rows of the embedding for the last span, where it is the head as well and trains, so that it is one weight
        with one gradient; nothing where the last worker's copy does."""
        if not self._tied:
            return []
        trains = self.proxies[0].flags[self._tied]
        self._moved = self._moved or (trains and torch.is_grad_enabled())
        if not self._moved:
            return []
        weight = self.proxies[0].get_parameter(self._tied)
        rows, width = weight.shape
        step = max(1, ROWS // (width * weight.dtype.itemsize))
        return [weight[begin : begin + step] for begin in range(0, rows, step)]


def _mask(mask: Any, ids: torch.Tensor) -> torch.Tensor | None:
    if mask is None:
        return None
    found = torch.as_tensor(mask).long()
    found = found[None] if found.ndim == 1 else found
    if found.shape != ids.shape:
        raise Refused(f"attention_mask is {list(found.shape)} for ids of {list(ids.shape)}: give it the same shape")
    if not bool(found[:, -1:].all()):
        raise Refused(
            "attention_mask: a row is padded on the right, where its next token would follow: pad on the left"
        )
    return found


def _loss(logits: RemoteTensor, labels: torch.Tensor) -> RemoteTensor:
    given: Any = logits[:, :-1].flatten(0, 1).float()
    found: Any = torch.nn.functional.cross_entropy(given, labels[:, 1:].flatten(), ignore_index=IGNORED)
    return found  # type: ignore[no-any-return]
