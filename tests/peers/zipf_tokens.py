"""Tokens to time training with: zipf_tokens.py NAME [VOCABULARY [COUNT]] writes NAME.bin and NAME.idx (an indexed dataset of one document).

Rank r of the vocabulary, in random order, has weight 1 / (r + 10), about as words of a text have: routers of untrained models see varied
tokens, where the bytes of a text would be a hundred different ones. Always the same tokens for the same arguments. Needs numpy.
"""
import struct
import sys

import numpy as np

name = sys.argv[1]
vocabulary = int(sys.argv[2]) if len(sys.argv) > 2 else 150_000
count = int(sys.argv[3]) if len(sys.argv) > 3 else 2_000_000
random = np.random.default_rng(1)
weights = 1 / (np.arange(vocabulary) + 10.0)
ids = random.permutation(vocabulary).astype("<i4")
ids[random.choice(vocabulary, size=count, p=weights / weights.sum())].tofile(name + ".bin")
with open(name + ".idx", "wb") as index:
    index.write(b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 4, 1, 2))
    index.write(np.array([count], "<i4").tobytes() + np.array([0], "<i8").tobytes() + np.array([0, 1], "<i8").tobytes())
