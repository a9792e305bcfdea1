"""Detokenizing and stop strings piece by piece, against the whole text at once."""

import itertools
import json
import random

import pytest
from ralmq.errors import Refused
from ralmq.workers.generator.text import LONGEST, Detokenizer, Stops, Text
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

TEXT = "the naïve fox 你好 🎉 and e\u0301 это 👩‍👩‍👧 sleeps. "


def parts_of(tokenizer: Tokenizer, prompt: list[int], tokens: list[int]) -> list[str]:
    stream = Detokenizer(tokenizer, prompt)
    return [*[stream.push(token) for token in tokens], stream.flush()]


def behind(before: str, whole: str) -> str:
    """What is left of a text without the beginning that it shares with another."""
    same = 0
    while same < min(len(before), len(whole)) and before[same] == whole[same]:
        same += 1
    return whole[same:]


def test_characters_of_several_tokens_come_with_their_last_one(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(TEXT * 3).ids
    parts = parts_of(tokenizer, [], ids)
    assert "".join(parts) == TEXT * 3 and parts[-1] == ""
    assert not any("\N{REPLACEMENT CHARACTER}" in part for part in parts)
    assert parts.count("") > 12, "a token in the middle of a character gives nothing"
    single = tokenizer.encode("🎉").ids
    assert len(single) > 2 and parts_of(tokenizer, ids, single) == [""] * (len(single) - 1) + ["🎉", ""]


@pytest.mark.parametrize("cut", range(60))
def test_a_prompt_may_end_anywhere(cut: int, tokenizer: Tokenizer) -> None:
    """Within a character, too: it is then given whole, since the prompt's text does not show it."""
    ids = tokenizer.encode(TEXT).ids
    before = tokenizer.decode(ids[:cut]).rstrip("\N{REPLACEMENT CHARACTER}")
    assert before + "".join(parts_of(tokenizer, ids[:cut], ids[cut:])) == TEXT


def test_any_tokens_give_the_text_of_the_whole(tokenizer: Tokenizer) -> None:
    """What a random model makes: broken characters, special tokens, ids that the tokenizer does not have."""
    chance = random.Random(0)
    size = tokenizer.get_vocab_size()
    for number in range(1500):
        most = size + 20 * (number % 3 == 0)
        prompt = [chance.randrange(most) for _ in range(chance.randrange(12))]
        tokens = [chance.randrange(most) for _ in range(chance.randrange(3 * LONGEST))]
        before, whole = tokenizer.decode(prompt), tokenizer.decode(prompt + tokens)
        assert "".join(parts_of(tokenizer, prompt, tokens)) == behind(before, whole)


def test_broken_bytes_do_not_hold_the_text_back(tokenizer: Tokenizer) -> None:
    """At most three bytes can still become a character: whatever is before them is given."""
    first = tokenizer.encode("é").ids[0]
    stream = Detokenizer(tokenizer, [])
    given = "".join(stream.push(first) for _ in range(500))
    assert len(given) >= 497 and given + stream.flush() == "\N{REPLACEMENT CHARACTER}" * 500
    assert len(stream._ids) <= 2 * LONGEST


def test_special_tokens_are_not_text(tokenizer: Tokenizer) -> None:
    end = tokenizer.token_to_id("</s>")
    fox = tokenizer.encode("fox").ids
    assert "".join(parts_of(tokenizer, [end], [end, *fox, end, end, *fox, end])) == "foxfox"


def test_a_tokenizer_whose_words_begin_with_a_space() -> None:
    """As Llama's: the first word of a text loses its space, one that follows a prompt must not."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    bytes_of = ["<unk>", *[f"<0x{byte:02X}>" for byte in range(256)]]
    trained.train_from_iterator(
        ["the quick brown fox jumps over the dog"] * 3,
        trainers.BpeTrainer(vocab_size=340, special_tokens=bytes_of, show_progress=False),
    )
    model = json.loads(trained.to_str())["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    made = Tokenizer(models.BPE(model["vocab"], merges, byte_fallback=True, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(), decoders.Fuse()])
    prompt, tokens = made.encode("the quick").ids, made.encode("brown fox jumps over the dog").ids
    assert "".join(parts_of(made, prompt, tokens)) == " brown fox jumps over the dog"
    assert "".join(parts_of(made, prompt, tokens * 5)) == " brown fox jumps over the dog" * 5
    # A token for each byte; while a character is open the decoder shows all bytes of a run as broken.
    chance = random.Random(2)
    for _ in range(300):
        text = " " + "".join(chance.choice("你好世界éß🎉👩 fox") for _ in range(chance.randrange(1, 60))).strip() + "."
        ids = made.encode("the quick" + text).ids
        cut = chance.randrange(len(ids))
        before, parts = made.decode(ids[:cut]), parts_of(made, ids[:cut], ids[cut:])
        if "\N{REPLACEMENT CHARACTER}" not in before:
            assert before + "".join(parts) == "the quick" + text
            assert not any("\N{REPLACEMENT CHARACTER}" in part for part in parts)


def ended(text: str, stops: list[str]) -> str | None:
    """The text before the stop string that is complete first, the longest of those; None for no end."""
    places = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    return text[: min(places)[1]] if places else None


def test_stop_strings_wherever_the_pieces_end() -> None:
    """Overlapping ones, in any cut of the text; nothing is given that a stop string takes back."""
    chance = random.Random(1)
    found = 0
    for _ in range(5000):
        text = "".join(chance.choice("ab ") for _ in range(chance.randrange(1, 30)))
        stops = ["".join(chance.choice("ab ") for _ in range(chance.randrange(1, 6))) for _ in range(3)]
        finder, given, rest = Stops(stops), "", text
        while rest and not finder.found:
            size = chance.randrange(1, 5)
            given += finder.push(rest[:size])
            rest = rest[size:]
            whole = ended(text, stops)
            assert text.startswith(given) and (whole is None or len(given) <= len(whole))
        wanted = ended(text, stops)
        assert finder.found == (wanted is not None)
        assert given + finder.flush() == (text if wanted is None else wanted)
        assert finder.push("more") == "" or not finder.found
        found += finder.found
    assert 1000 < found < 4500


def test_stop_strings_by_example() -> None:
    finder = Stops(["\n\n", "END"])
    assert [finder.push(piece) for piece in ("one\n", "two E", "NE", "N", "D and")] == ["one", "\ntwo ", "EN", "", ""]
    assert finder.found and finder.flush() == ""
    held = Stops(["END"])
    assert held.push("the EN") == "the " and not held.found and held.flush() == "EN"
    assert Stops([]).push("END") == "END"


def test_a_stop_string_may_begin_where_none_may_end() -> None:
    """Within the first min_tokens tokens: what is held back there is given, or taken back, as anywhere else."""
    finder = Stops(["END", "xy"])
    assert [finder.push(piece, free=True) for piece in ("END ", "E", "Nx")] == ["END ", "", "EN"]
    assert finder.push("yz") == "" and finder.found
    chance = random.Random(4)
    found = 0
    for _ in range(3000):
        text = "".join(chance.choice("ab ") for _ in range(chance.randrange(1, 30)))
        stops = ["".join(chance.choice("ab ") for _ in range(chance.randrange(1, 6))) for _ in range(2)]
        free, cut = chance.randrange(len(text) + 1), chance.randrange(len(text) + 1)
        ends = [
            (end, end - len(stop))
            for stop in stops
            for end in range(free + 1, len(text) + 1)
            if text[:end].endswith(stop)
        ]
        finder, given = Stops(stops), ""
        for begin, end in itertools.pairwise(sorted({0, free, cut, len(text)})):
            given += finder.push(text[begin:end], free=end <= free)
        assert given + finder.flush() == (text[: min(ends)[1]] if ends else text)
        found += finder.found
    assert 500 < found < 2800


def test_min_tokens_and_a_stop_string_across_its_end(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("one two three").ids
    for least in range(len(ids) + 1):
        text = Text(tokenizer, [], ["ne tw"], least)
        shown = "".join(text.push(token) for token in ids) + text.flush()
        early = "ne tw" in tokenizer.decode(ids[:least])
        assert (shown, text.stopped) == (("one two three", False) if early else ("o", True))


def test_text_of_a_generation(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("one 你好 two").ids
    text = Text(tokenizer, [], ["好 t"])
    assert "".join(text.push(token) for token in ids) == "one 你" and text.stopped and text.flush() == ""
    cut = Text(tokenizer, [], ["\N{REPLACEMENT CHARACTER}"])
    broken = tokenizer.encode("ab é").ids[:-1]
    assert "".join(cut.push(token) for token in broken) + cut.flush() == "ab " and cut.stopped
    nothing = Text(None, [1], [])
    assert nothing.push(3) == nothing.flush() == ""
    with pytest.raises(Refused, match=r"stop strings need the model's tokenizer.json"):
        Text(None, [1], ["x"])
