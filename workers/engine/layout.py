"""Which tensors of a checkpoint make up which parameter of transformers' model. Imports transformers."""

from copy import deepcopy
from typing import Any

from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

from .checkpoint import Checkpoint


class Layout:
    """Checkpoints keep the names under which a model was published; transformers renames and joins some of them."""

    def __init__(self, checkpoint: Checkpoint, model: Any) -> None:
        """`model` is whole, all layers in it; its parameters may be on the meta device."""
        self._checkpoint = checkpoint
        self._model = model
        mapping = get_model_conversion_mapping(model)
        renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        self._converters = {pattern: entry for entry in converters for pattern in entry.source_patterns}
        # Of each parameter the stored names, and for each of them which pattern of a converter has matched.
        self._sources: dict[str, list[tuple[str, str | None]]] = {}
        known, prefix = model.state_dict(), model.base_model_prefix
        for stored in sorted(checkpoint.names(), key=dot_natural_key):
            name, pattern = rename_source_key(stored, renamings, converters, prefix, known)
            if name not in known:
                name, pattern = rename_source_key(stored, [], [], prefix, known)
            self._sources.setdefault(name, []).append((stored, pattern))

    def __contains__(self, name: str) -> bool:
        return name in self._sources

    def read(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """The parameter `name` of the whole model; CheckpointError where a tensor is missing or shaped otherwise."""
        sources = self._sources.get(name, [(name, None)])
        stored, pattern = sources[0]
        if pattern is None:
            return self._checkpoint.get(stored, shape)
        converter = deepcopy(self._converters[pattern])
        for stored, matched in sources:
            converter.add_tensor(name, stored, matched, self._checkpoint.get(stored))
        found = converter.convert(name, model=self._model, config=self._model.config).get(name)
        tensor = found[0] if isinstance(found, list) else found
        if tensor is None or tuple(tensor.shape) != shape:
            # Some of what is joined is missing: the checkpoint names what.
            self._checkpoint.entry(name)
        assert isinstance(tensor, Tensor)
        return tensor
