"""The KV cache's slots and the pool of block ids."""

import pytest
import torch
from ralmq.workers.engine.kv import KVCache
from ralmq.workers.engine.pool import BLOCK, BlockPool, block_key


def test_what_is_written_to_slots_is_read_by_table() -> None:
    cache = KVCache(2, 5, 3, 8, torch.float32, "cpu")
    assert cache.bytes_per_block == 2 * BLOCK * 2 * 3 * 8 * 4
    kv = torch.randn(BLOCK + 4, 6, 8)
    slots = torch.tensor([4 * BLOCK + i for i in range(BLOCK)] + [1 * BLOCK + i for i in range(4)])
    cache.write(1, slots, kv)
    keys, values = cache.read(1, torch.tensor([4, 1, 1, 4]), 2)
    assert keys.shape == values.shape == (2, 3, 2 * BLOCK, 8)
    assert torch.equal(keys[0, :, : BLOCK + 4], kv[:, :3].transpose(0, 1))
    assert torch.equal(values[0, :, : BLOCK + 4], kv[:, 3:].transpose(0, 1))
    assert torch.equal(values[1, :, BLOCK:], kv[:BLOCK, 3:].transpose(0, 1))
    assert not keys[0, :, BLOCK + 4 :].any()
    assert not cache.read(0, torch.arange(5), 1)[0].any()


def test_of_each_table_the_slots_that_are_wanted() -> None:
    cache = KVCache(1, 5, 1, 2, torch.float32, "cpu")
    kv = torch.randn(5 * BLOCK, 2, 2)
    cache.write(0, torch.arange(5 * BLOCK), kv)
    keys, values = cache.read(0, torch.tensor([4, 1, 3]), 1, slice(3, 2 * BLOCK + 1))
    slots = torch.cat([torch.arange(block * BLOCK, (block + 1) * BLOCK) for block in (4, 1, 3)])[3 : 2 * BLOCK + 1]
    assert torch.equal(keys[0, 0], kv[slots, 0]) and torch.equal(values[0, 0], kv[slots, 1])


def test_what_is_read_lies_in_the_same_memory_each_time_and_not_in_the_cache() -> None:
    cache = KVCache(2, 9, 2, 4, torch.float32, "cpu")
    cache.write(0, torch.arange(32), torch.randn(32, 4, 4))
    first, _ = cache.read(0, torch.tensor([0, 1, 2]), 1)
    before = first.clone()
    first.zero_()
    again, _ = cache.read(0, torch.tensor([0, 1, 2]), 1)
    assert torch.equal(again, before) and before.any()
    for layer, table in ((1, [3]), (0, [2, 1]), (1, [8, 7, 6])):
        assert cache.read(layer, torch.tensor(table), 1)[0].data_ptr() == first.data_ptr()


def test_no_more_memory_is_kept_than_a_layer_has() -> None:
    """Rows padded to a whole context may name a block more often than there are blocks."""
    cache = KVCache(1, 4, 1, 2, torch.float32, "cpu")
    cache.write(0, torch.arange(64), torch.randn(64, 2, 2))
    few, _ = cache.read(0, torch.tensor([2]), 1)
    many, _ = cache.read(0, torch.tensor([2] * 40), 8)
    assert many.shape == (8, 1, 80, 2) and torch.equal(many[3, :, 16:32], few[0])
    assert cache._gathered.untyped_storage().nbytes() == BLOCK * 2 * 2 * 4


def test_it_is_read_within_a_step_and_without_one() -> None:
    cache = KVCache(1, 4, 1, 2, torch.float32, "cpu")
    with torch.inference_mode():
        cache.read(0, torch.tensor([1, 2]), 1)
    cache.read(0, torch.tensor([3]), 1)


def test_pool_gives_each_block_once() -> None:
    pool = BlockPool(5)
    assert pool.available == 5
    first = pool.take(2)
    assert first == [0, 1]
    assert pool.take(4) is None and pool.available == 3
    rest = pool.take(3)
    assert rest is not None and sorted([*first, *rest]) == list(range(5))
    assert pool.take(0) == [] and pool.take(1) is None
    pool.free([first[1], rest[0]])
    assert sorted(pool.take(2) or []) == sorted([first[1], rest[0]])


def test_named_blocks_are_found_until_they_are_taken_anew() -> None:
    """Freed blocks keep what they hold; those without a name go first, then the one freed longest ago."""
    pool = BlockPool(4)
    keys = [block_key(b"", [1] * BLOCK)]
    keys.append(block_key(keys[0], [2] * BLOCK))
    held = pool.take(3) or []
    for block, key in zip(held, keys, strict=False):
        pool.name(block, key)
    assert pool.find(keys) == held[:2] and pool.find([keys[1]]) == [held[1]] and pool.named == 2
    assert pool.find([b"x", *keys]) == []
    pool.share(held[:1])
    pool.free(held)
    assert pool.available == 3 and pool.find(keys) == held[:2], "freed, and still found"
    pool.free(held[:1])
    assert pool.available == 4
    assert sorted(pool.take(2) or []) == sorted({0, 1, 2, 3} - set(held[:2])), "those without a name first"
    pool.share(pool.find(keys[:1]))
    assert pool.take(2) is None and pool.take(1) == held[1:2] and pool.find(keys) == held[:1]
    pool.name(held[1], keys[0])  # it holds the same as another: that one is found
    assert pool.find(keys) == held[:1] and pool.named == 1


def test_keys_tell_what_lies_before() -> None:
    first, other = block_key(b"", [1] * BLOCK), block_key(b"", [2] * BLOCK)
    assert block_key(first, [3] * BLOCK) != block_key(other, [3] * BLOCK) != block_key(b"", [3] * BLOCK)
    assert block_key(first, [3] * BLOCK) == block_key(first, [3] * BLOCK)


def test_pool_refuses_what_is_not_taken() -> None:
    pool = BlockPool(3)
    pool.take(1)
    pool.free([0])
    for block in (0, 1, -1, 3):
        with pytest.raises(ValueError, match=f"block {block} is not taken"):
            pool.free([block])
    assert pool.available == 3
