"""A small CLIP tokenizer whose vocabulary is made from a list of words, with nothing to download.

The layout is that of CLIP's own vocabulary: 256 byte symbols, the same 256 as word endings (`</w>`), one symbol for
every merge, then `<|startoftext|>` and `<|endoftext|>`. Any text can be written with it (unknown words fall apart into
bytes), and every word of `WORDS` is a single token.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from itertools import pairwise
from typing import Any

from transformers import CLIPTokenizer

WORD_END = "</w>"
BOS_TOKEN = "<|startoftext|>"
EOS_TOKEN = "<|endoftext|>"

_WORD_LIST = """
    a an the of on in at with and or to by from under over near behind beside between into no not very
    photo photograph picture image drawing painting sketch render illustration portrait close up view style art
    sks creature robot toy monster animal bird cat dog fish rabbit fox owl person face house tree flower car boat ball
    circle square triangle star ring cross heart diamond hexagon dot dots line lines stripe stripes
    red orange yellow green teal cyan blue purple violet pink magenta brown black white grey gray gold silver dark light
    striped spotted checkered plain bright pale colorful small tiny big large huge round tall short soft shiny
    left right top bottom middle center corner background foreground
    sky grass meadow sand beach sea water snow night sunset moon sun space wall floor room city forest mountain field
    one two three four five many some
    best quality detailed simple flat cartoon pixel
"""
WORDS = tuple(_WORD_LIST.split())


def build_tokenizer(words: Iterable[str] = WORDS, max_length: int = 77) -> CLIPTokenizer:
    """Return a `CLIPTokenizer` in which every one of `words` (lower case) is a single token.

    Padding uses `<|endoftext|>`, as in Stable Diffusion 1.x; prompts are cut or padded to `max_length` tokens.
    """
    alphabet = byte_alphabet()
    merges: Any = learn_merges(words)  # pairs; the annotation of transformers says text
    symbols = [*alphabet, *(byte + WORD_END for byte in alphabet), *map("".join, merges), BOS_TOKEN, EOS_TOKEN]
    vocab = {symbol: index for index, symbol in enumerate(symbols)}
    return CLIPTokenizer(
        vocab=vocab,
        merges=merges,
        bos_token=BOS_TOKEN,
        eos_token=EOS_TOKEN,
        unk_token=EOS_TOKEN,
        pad_token=EOS_TOKEN,
        model_max_length=max_length,
    )


def byte_alphabet() -> list[str]:
    """Return GPT-2's and CLIP's 256 printable stand-ins for the byte values, in the order of CLIP's vocabulary."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = 256 - len(printable)
    return [chr(code) for code in printable] + [chr(256 + index) for index in range(others)]


def learn_merges(words: Iterable[str]) -> list[tuple[str, str]]:
    """Learn byte-pair merges until each of `words` is one symbol.

    The most frequent adjacent pair is merged everywhere, then the next; of equally frequent pairs the first in
    alphabetical order goes first. Encoding applies merges in the same order, so every word ends up whole.

    Args:
        words: lower-case ASCII words without spaces; repeated words count once.

    Returns:
        Pairs of symbols in the order in which they are merged.
    """
    pieces = [[*word[:-1], word[-1] + WORD_END] for word in dict.fromkeys(words)]
    merges: list[tuple[str, str]] = []
    while pairs := Counter(pair for symbols in pieces for pair in pairwise(symbols)):
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        pieces = [_merge_pair(symbols, best) for symbols in pieces]
    return merges


def _merge_pair(symbols: list[str], pair: tuple[str, str]) -> list[str]:
    merged: list[str] = []
    index = 0
    while index < len(symbols):
        if tuple(symbols[index : index + 2]) == pair:
            merged.append("".join(pair))
            index += 2
        else:
            merged.append(symbols[index])
            index += 1
    return merged
