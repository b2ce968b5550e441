"""Characters per second of Tokenizer.encode_array, compared with a loop of dictionary look-ups.

    python benchmarks/tokenizer_speed.py

It uses one thread. The text is repeated up to --characters. The best of --repeats runs counts. The last line
is JSON.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

from minigpt.tokenizer import Tokenizer, build_vocabulary  # noqa: E402

TEXT = (
    "问：四川省的省会是哪里？答：四川省的省会是成都，GPT-2 也知道。Mixed 中英文 text，𠮷 and 😊 included。\n"
)


def encode_loop(tokenizer: Tokenizer, text: str) -> list[int]:
    """Encode with a loop, as a simple tokenizer does."""
    word2id, unknown = tokenizer.word2id, tokenizer.unk_token_id
    return [word2id.get(character, unknown) for character in text]


def measure(characters: int, repeats: int) -> dict[str, float]:
    """Return characters per second of both, and their ratio."""
    text = (TEXT * (characters // len(TEXT) + 1))[:characters]
    tokenizer = Tokenizer.from_word2id(build_vocabulary([TEXT]))
    assert tokenizer.encode_array(text).tolist() == encode_loop(tokenizer, text)
    vectorised = _best(lambda: tokenizer.encode_array(text), repeats)
    loop = _best(lambda: encode_loop(tokenizer, text), repeats)
    return {
        "characters": characters,
        "vectorised_per_second": characters / vectorised,
        "loop_per_second": characters / loop,
        "ratio": loop / vectorised,
    }


def _best(function: Callable[[], object], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--characters", type=int, default=10_000_000)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    result = measure(options.characters, options.repeats)
    print(f"encode_array: {result['vectorised_per_second'] / 1e6:8.1f} million characters a second")
    print(f"a loop:       {result['loop_per_second'] / 1e6:8.1f} million characters a second")
    print(f"ratio:        {result['ratio']:8.1f}")
    print(json.dumps(result))
