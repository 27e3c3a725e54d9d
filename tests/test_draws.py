"""The keyed generators against numpy's own way to key them."""

from __future__ import annotations

import hashlib

import numpy as np

from everydream.draws import generator


def test_a_generator_is_philox_keyed_by_the_digest_of_its_name() -> None:
    for keys in ((), (0, "a.png", 1), ("0", "a.png", 1)):
        digest = hashlib.blake2b(repr((7, "noise", *keys)).encode(), digest_size=16).digest()
        plain = np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))
        assert np.array_equal(generator(7, "noise", *keys).standard_normal(100), plain.standard_normal(100)), keys
