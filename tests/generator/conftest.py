"""A byte-level tokenizer trained on the spot, and a tiny model of its vocabulary."""

from pathlib import Path

import pytest
from checkpoints import tiny
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

TEXT = (
    "the quick brown fox jumps over the lazy dog, and then it sleeps. ",
    "naïve café, Zürich, señor; ",
    "это проверка токенов ",
    "你好世界这是一个测试。",
    "🎉🚀 e\u0301 👩‍👩‍👧 ",
)


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """312 tokens, all bytes among them, so that any text is many tokens and most characters are several."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=312,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<unk>", "<s>", "</s>"],
        show_progress=False,
    )
    made.train_from_iterator(TEXT * 3, trainer)
    return made


@pytest.fixture(scope="session")
def model(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tiny("llama", tmp_path_factory.mktemp("model") / "llama", vocab_size=tokenizer.get_vocab_size())
    tokenizer.save(str(path / "tokenizer.json"))
    return path
