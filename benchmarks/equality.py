"""Checks that the text is the same: streamed or whole, in a batch or alone, with guesses or without.

    python benchmarks/equality.py --output benchmarks/results/NAME.json
    python benchmarks/equality.py --streamed 20 --batched 20 --speculative 10    # in seconds

The models are tiny and random. The tokenizer is a byte-level vocabulary learned from data/data.jsonl, so most
Chinese characters are several tokens. Prompts are questions of the corpus, cut anywhere. The options vary:
greedy, sampling with all filters, penalties, stop strings.

The models are in float32, as for users. A prompt of several tokens is rounded differently in a batch than
alone, so two scores that agree in six digits may change places. Such a case would count as different.

The script prints a row for each comparison (trials, differences) and one JSON object. The exit code is 1 if
anything differs.
"""

import sys
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import dataclasses
import json
import random
from collections.abc import Iterator
from typing import Any

import torch

from benchmarks.turns import surroundings
from minigpt.data.reader import read_conversations
from minigpt.families.qwen3.model import Qwen3Config, Qwen3ForCausalLM
from minigpt.families.registry import LanguageModel
from minigpt.generation.api import (
    GenerationOptions,
    answer_questions,
    eos_of,
    generate_ids,
    prompt_ids,
    stream_ids,
)
from minigpt.generation.engine import Engine
from minigpt.generation.loop import decode
from minigpt.generation.sequence import Sequence, check_request, row_seed
from minigpt.generation.speculative_decoding import speculation
from minigpt.model import GPTConfig, GPTLMHeadModel
from minigpt.tokenization.bpe import BpeTokenizer

DATA = Path(__file__).resolve().parents[1] / "data" / "data.jsonl"
BLOCK = 128


def models(vocab_size: int, seed: int) -> list[LanguageModel]:
    """Make a model of each family, with weights that are large enough for varied texts."""
    torch.manual_seed(seed)
    made: list[LanguageModel] = [
        GPTLMHeadModel(GPTConfig(32, 2, 2, 0.0, BLOCK, vocab_size)),
        Qwen3ForCausalLM(Qwen3Config(vocab_size, 32, 48, 2, 4, 2, 8, BLOCK)),
    ]
    for model in made:
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.data.normal_(0, 0.25)
    return made


def mixed(draw: random.Random, stops: bool = True) -> GenerationOptions:
    """Draw the options of a request."""
    values: dict[str, Any] = {"max_new_tokens": draw.randint(1, 30)}
    if draw.random() < 0.6:
        values |= {"do_sample": True, "seed": draw.randrange(10**6), "temperature": draw.uniform(0.7, 1.5)}
        values |= draw.choice([{}, {"top_k": 20}, {"top_p": 0.9}, {"min_p": 0.02}, {"typical_p": 0.9}])
    values |= draw.choice([{}, {}, {"repetition_penalty": 1.2}, {"no_repeat_ngram_size": 3}])
    if stops:
        values |= draw.choice([{}, {"stop_strings": ["。", "的", "a", " "]}])
    return GenerationOptions(**values)


def texts(count: int, draw: random.Random) -> Iterator[str]:
    """Yield questions of the corpus, cut anywhere."""
    questions = [pair.question for pair in read_conversations(DATA)[0]]
    for _ in range(count):
        question = draw.choice(questions)
        yield question[: draw.randint(1, min(30, len(question)))]


def streamed(tokenizer: BpeTokenizer, count: int) -> dict[str, Any]:
    """Compare the joined pieces of a stream with the whole answer."""
    draw, different, multi_byte, pieces_seen = random.Random(1), 0, 0, 0
    both = models(tokenizer.get_vocab_size(), 1)
    for number, text in enumerate(texts(count, draw)):
        model, options = both[number % 2], mixed(draw)
        pieces = list(stream_ids(model, tokenizer, prompt_ids(tokenizer, text), options))
        whole = answer_questions(model, tokenizer, [text], options)[0].text
        different += "".join(pieces) != whole
        multi_byte += any(len(character.encode()) > 1 for character in whole)
        pieces_seen += len(pieces)
    row = {"compared": "streamed = whole", "trials": count, "different": different}
    return row | {"with_multi_byte_characters": multi_byte, "pieces": pieces_seen}


def batched(tokenizer: BpeTokenizer, count: int) -> list[dict[str, Any]]:
    """Compare answers in a padded batch, and in the engine's running batch, with answers alone."""
    draw, rows = random.Random(2), []
    both, eos = models(tokenizer.get_vocab_size(), 2), eos_of(tokenizer)
    in_batch = in_engine = n_engine = 0
    for model in both:
        prompts = [prompt_ids(tokenizer, text) for text in texts(count // 2, draw)]
        options = GenerationOptions(max_new_tokens=24, repetition_penalty=1.1)
        alone = [generate_ids(model, [prompt], options, eos)[0] for prompt in prompts]
        together = generate_ids(model, prompts, options, eos)
        in_batch += sum(one != other for one, other in zip(alone, together))
        own = [mixed(draw) for _ in prompts]
        alone = [
            generate_ids(model, [prompt], one, eos, tokenizer=tokenizer)[0]
            for prompt, one in zip(prompts, own)
        ]
        engine = Engine(model, max_rows=8, max_waiting=count, chunk=16, prefix_mib=1)
        handles = []
        for prompt, one in zip(prompts, own):
            handles.append(engine.submit(prompt, one, eos, tokenizer))
            for _ in range(draw.randint(0, 5)):
                engine.step()
        engine.run()
        in_engine += sum(one != handle.result() for one, handle in zip(alone, handles))
        n_engine += len(prompts)
    rows.append({"compared": "padded batch = alone", "trials": n_engine, "different": in_batch})
    rows.append({"compared": "running batch = alone", "trials": n_engine, "different": in_engine})
    return rows


def speculative(tokenizer: BpeTokenizer, count: int) -> list[dict[str, Any]]:
    """Compare answers with guesses, by n-grams and by another model, with answers without."""
    draw, rows = random.Random(3), []
    both, eos = models(tokenizer.get_vocab_size(), 3), eos_of(tokenizer)
    for name in ("n-grams", "a model"):
        different = drafted = accepted = 0
        for number, text in enumerate(texts(count, draw)):
            model = both[number % 2]
            # As an assistant, the other family's guesses are almost never right, and the model's own are
            # always right.
            assistant = both[(number + number // 2) % 2]
            options, guesses, prompt = mixed(draw), draw.randint(1, 7), prompt_ids(tokenizer, text)
            helper: LanguageModel | None = None
            if name == "a model":  # with these guesses, sampled ids differ, so only greedy ids are compared
                options = GenerationOptions(max_new_tokens=options.max_new_tokens)
                changed, helper = dataclasses.replace(options, num_assistant_tokens=guesses), assistant
            else:
                changed = dataclasses.replace(options, prompt_lookup_num_tokens=guesses)
            plain = generate_ids(model, [prompt], options, eos, tokenizer=tokenizer)[0]
            request = check_request(model, [prompt], changed, eos, tokenizer)
            seed = None if options.seed is None else row_seed(options.seed, 0, 0)
            sequence = Sequence(prompt, request, changed.limit(len(prompt), BLOCK), seed)
            sequence.speculation = guessing = speculation(changed, helper)
            for _ in decode(model, [sequence], 1):
                pass
            different += sequence.completion() != plain
            drafted, accepted = drafted + guessing.drafted, accepted + guessing.accepted
        row = {"compared": f"with guesses of {name} = without", "trials": count, "different": different}
        rows.append(row | {"drafted": drafted, "accepted": accepted})
    return rows


def main(arguments: argparse.Namespace) -> int:
    """Compare, print, write. Returns 1 if anything differs."""
    torch.set_num_threads(arguments.threads)
    lines = [pair.question + pair.answer for pair in read_conversations(DATA)[0]]
    tokenizer = BpeTokenizer.train(lines, vocab_size=arguments.vocab_size)
    rows = [streamed(tokenizer, arguments.streamed)]
    rows += batched(tokenizer, arguments.batched)
    rows += speculative(tokenizer, arguments.speculative)
    for row in rows:
        print(row, flush=True)
    result = surroundings("equality", DATA, arguments.threads) | {"rows": rows}
    if arguments.output:
        arguments.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result))
    return int(any(row["different"] for row in rows))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--streamed", type=int, default=1000, help="generations")
    parser.add_argument("--batched", type=int, default=1000, help="prompts")
    parser.add_argument("--speculative", type=int, default=500, help="prompts, for each kind of guess")
    parser.add_argument("--vocab_size", type=int, default=400)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path)
    sys.exit(main(parser.parse_args()))
