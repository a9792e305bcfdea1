"""Tiny checkpoints, each written once, and transformers' own model of them."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from checkpoints import tiny
from stage.table import Ways
from transformers import AutoModelForCausalLM, PreTrainedModel


@pytest.fixture(params=[False, True], ids=["host", "device"])
def both_ways(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sampling in the host's memory, and where the logits are."""
    monkeypatch.setattr(Ways, "ahead", request.param)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    @cache
    def made(family: str) -> Path:
        return tiny(family, tmp_path_factory.mktemp("checkpoint") / family)

    return made


@pytest.fixture(scope="session")
def oracle(checkpoint: Callable[[str], Path]) -> Callable[[str], PreTrainedModel]:
    @cache
    def loaded(family: str) -> PreTrainedModel:
        return AutoModelForCausalLM.from_pretrained(checkpoint(family)).float().eval()

    return loaded
