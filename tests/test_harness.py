"""lm-evaluation-harness: its hf model, minigpt's model and `--task` give the same numbers."""

import importlib.util
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import minigpt
from minigpt.evaluation.harness import IS_INSTALLED, HarnessModel, main
from minigpt.evaluation.options import TaskOptions
from minigpt.evaluation.task_results import LoadedModel, run_task
from minigpt.evaluation.tasks import read_tasks
from minigpt.families.qwen3.model import Qwen3Config, Qwen3ForCausalLM
from minigpt.families.registry import LanguageModel
from minigpt.model import GPTConfig, GPTLMHeadModel
from minigpt.tokenization.bpe import BpeTokenizer
from minigpt.tokenizer import Tokenizer, build_vocabulary
from minigpt.weights.pretrained import AnyTokenizer

ready = IS_INSTALLED and all(importlib.util.find_spec(name) for name in ("transformers", "accelerate"))
pytestmark = [
    pytest.mark.skipif(
        not ready, reason="lm-evaluation-harness is not installed: pip install 'minigpt[evaluate]'"
    ),
    pytest.mark.filterwarnings("ignore"),  # those of the harness and its libraries are not ours
]

WORDS = [
    "the",
    "cat",
    "dog",
    "sat",
    "ran",
    "on",
    "a",
    "mat",
    "hill",
    "red",
    "big",
    "12",
    "7",
    "of",
    "and",
    "Zoë",
    "naïve",
    "ёлка",
    "is",
    "was",
]


def sentence(generator: random.Random, least: int = 2, most: int = 9) -> str:
    return " ".join(generator.choices(WORDS, k=generator.randint(least, most)))


def records(count: int = 12) -> dict[str, list[dict[str, Any]]]:
    g = random.Random(5)

    def some(n: int) -> list[str]:
        found: list[str] = []
        while len(found) < n:  # distinct: a choice that is there twice is refused
            if (one := sentence(g)) not in found:
                found.append(one)
        return found

    rows = range(count)
    return {
        "arc": [
            {
                "question": sentence(g),
                "choices": {"text": some(4), "label": list("ABCD")},
                "answerKey": g.choice("ABCD"),
            }
            for _ in rows
        ],
        "listed": [
            {"question": sentence(g), **dict(zip("ABCD", some(4))), "answer": g.choice("ABCD")} for _ in rows
        ],
        "piqa": [dict(zip(("goal", "sol1", "sol2"), some(3))) | {"label": g.randint(0, 1)} for _ in rows],
        "copa": [
            dict(zip(("premise", "choice1", "choice2"), (one + "." for one in some(3))))
            | {"question": g.choice(["cause", "effect"]), "label": g.randint(0, 1)}
            for _ in rows
        ],
        "hellaswag": [
            {
                "activity_label": "Cats",
                "ctx_a": sentence(g),
                "ctx_b": sentence(g),
                "endings": some(4),
                "label": g.randint(0, 3),
            }
            for _ in rows
        ],
        "cloze": [{"context": sentence(g, 6, 20), "continuation": g.choice(WORDS)} for _ in rows],
        "sums": [{"question": sentence(g), "answer": f"so\n#### {g.randint(1, 99)}"} for _ in rows],
        "texts": [{"text": sentence(g, 30, 150)} for _ in rows],
    }


MC = "metric_list: [{metric: acc}, {metric: acc_norm}]\n"
YAML = {
    "arc": 'output_type: multiple_choice\ndoc_to_text: "Question: {{question}}\\nAnswer:"\n'
    'doc_to_target: "{{choices.label.index(answerKey)}}"\ndoc_to_choice: "{{choices.text}}"\n' + MC,
    "listed": "output_type: multiple_choice\nfewshot_config: {sampler: first_n}\nnum_fewshot: 3\n"
    'doc_to_text: "{{question}}\\nA. {{A}}\\nB. {{B}}\\nC. {{C}}\\nD. {{D}}\\nAnswer:"\n'
    "doc_to_choice: [A, B, C, D]\ndoc_to_target: \"{{['A', 'B', 'C', 'D'].index(answer)}}\"\n" + MC,
    "piqa": 'output_type: multiple_choice\ndoc_to_text: "Question: {{goal}}\\nAnswer:"\n'
    'doc_to_target: label\ndoc_to_choice: "{{[sol1, sol2]}}"\n' + MC,
    "copa": "output_type: multiple_choice\n"
    "doc_to_text: \"{{premise[:-1]}} {{'because' if question == 'cause' else 'therefore'}}\"\n"
    "doc_to_target: label\n"
    'doc_to_choice: "{{[choice1[0]|lower + choice1[1:], choice2[0]|lower + choice2[1:]]}}"\n' + MC,
    "hellaswag": "output_type: multiple_choice\n"
    'doc_to_text: "{{activity_label}}: {{ctx_a}} {{ctx_b.capitalize()}}"\n'
    'doc_to_target: label\ndoc_to_choice: "{{endings}}"\n' + MC,
    "cloze": 'output_type: loglikelihood\ndoc_to_text: "{{context}}"\n'
    "doc_to_target: \"{{' ' + continuation}}\"\n"
    "target_delimiter: ''\nmetric_list: [{metric: perplexity}, {metric: acc}]\n",
    "sums": "output_type: generate_until\nnum_fewshot: 2\nfewshot_config: {sampler: first_n}\n"
    'doc_to_text: "Question: {{question}}\\nAnswer:"\n'
    'doc_to_target: "{{answer}}"\n'
    'generation_kwargs: {until: ["\\n\\n", "Question:"], max_gen_toks: 12, do_sample: false}\n'
    "metric_list: [{metric: exact_match}]\n",
    "texts": 'output_type: loglikelihood_rolling\ndoc_to_text: ""\ndoc_to_target: "{{text}}"\n'
    "metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}, {metric: bits_per_byte}]\n",
}
SHOTS = {"listed": 3, "sums": 2}


def shaken(model: LanguageModel) -> LanguageModel:
    torch.manual_seed(2)
    with torch.no_grad():  # initial weights give nearly equal scores, which hide mistakes
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.08)
    return model.eval()


def folder_of(kind: str, folder: Path) -> Path:
    """Make a tiny model's folder in Hugging Face's format."""
    text = [sentence(random.Random(i), 5, 12) for i in range(200)]
    tokenizer: AnyTokenizer
    if kind == "characters":
        tokenizer = Tokenizer.from_word2id(build_vocabulary([*text, "Question: Answer:\nABCD.#"]))
    else:
        tokenizer = BpeTokenizer.train(text, 330)
    size = tokenizer.get_vocab_size()
    model: LanguageModel
    if kind == "qwen3":
        model = Qwen3ForCausalLM(
            Qwen3Config(
                vocab_size=size,
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                head_dim=8,
                max_position_embeddings=192,
            )
        )
    else:
        model = GPTLMHeadModel(
            GPTConfig(n_embd=32, n_head=2, n_layer=2, block_size=192, vocab_size=size, dropout=0.0)
        )
    minigpt.save_pretrained(shaken(model), folder, tokenizer)
    return folder


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Write eight tasks: as JSON Lines for minigpt, and the same with YAML files for the harness."""
    folder = tmp_path_factory.mktemp("tasks")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("HF_DATASETS_OFFLINE", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
            patch.setenv(name, "1")
        patch.setenv("HF_HOME", str(folder / "home"))
        for name, rows in records().items():
            (folder / name).mkdir()
            lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
            n_dev = 4 if name in SHOTS else 0
            (folder / name / "test.jsonl").write_text("".join(lines[n_dev:]), encoding="utf-8")
            files = f"test: {folder / name / 'test.jsonl'}"
            more = ""
            if n_dev:
                (folder / name / "dev.jsonl").write_text("".join(lines[:n_dev]), encoding="utf-8")
                files += f", dev: {folder / name / 'dev.jsonl'}"
                more = "fewshot_split: dev\n"
            (folder / f"local_{name}.yaml").write_text(
                f"task: local_{name}\ndataset_path: json\ndataset_kwargs: {{data_files: {{{files}}}, "
                f"cache_dir: {folder / 'cache'}}}\ntest_split: test\n{more}{YAML[name]}",
                encoding="utf-8",
            )
        yield folder


def harness(model: str, arguments: dict[str, Any], tasks: Path) -> dict[str, Any]:
    import lm_eval
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    found = lm_eval.simple_evaluate(
        model=model,
        model_args=arguments,
        tasks=[f"local_{name}" for name in YAML],
        task_manager=manager,
        batch_size=4,
        device="cpu",
        bootstrap_iters=0,
        log_samples=True,
    )
    assert found is not None
    return found  # type: ignore[no-any-return]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gpt2", "qwen3", "characters"])
def test_three_ways_to_the_same_numbers(kind: str, tasks: Path, tmp_path: Path) -> None:
    folder = folder_of(kind, tmp_path / kind)
    # AutoTokenizer appends <sep> to each text of a character model, also to a continuation
    plain = {"add_bos_token": False} if kind == "characters" else {}
    theirs = harness("hf", {"pretrained": str(folder), "dtype": "float32", **plain}, tasks)
    ours = harness("minigpt", {"pretrained": str(folder), **plain}, tasks)
    model, tokenizer = minigpt.load_model(folder), minigpt.load_tokenizer(folder)
    loaded = LoadedModel(model, tokenizer, folder, 4)
    compared = 0
    for name in YAML:
        task = f"local_{name}"
        for a, b in zip(theirs["samples"][task], ours["samples"][task], strict=True):
            assert a["doc_id"] == b["doc_id"]
            for x, y in zip(a["resps"], b["resps"], strict=True):
                if isinstance(x[0], str):
                    assert x == y, name
                elif isinstance(x[0], float):
                    assert y[0] == pytest.approx(x[0], rel=1e-6)  # float32's sum over hundreds of tokens
                else:
                    assert y[0][0] == pytest.approx(x[0][0], abs=1e-4)
                    assert y[0][1] == x[0][1]
                    compared += 1
        left = {k: v for k, v in theirs["results"][task].items() if k.endswith(",none") and "stderr" not in k}
        right = {k: v for k, v in ours["results"][task].items() if k in left}
        assert right == pytest.approx(left, rel=1e-4)
        options = TaskOptions(shots=SHOTS.get(name, 0), prompt_format="text")
        (own,) = read_tasks([tasks / name])
        if own.form == "generation":
            continue  # the answers are compared above; the metric is another one
        result = run_task(loaded, own, options)
        for key, value in left.items():
            metric = key.removesuffix(",none")
            assert result.metrics[metric].value == pytest.approx(value, rel=1e-4), (name, metric)
    assert compared > 150


def test_the_name_is_in_the_registry() -> None:
    from lm_eval.api.registry import get_model

    assert issubclass(get_model("minigpt"), HarnessModel)


def test_options_of_generation(tmp_path: Path) -> None:
    # cuda:0 is the default of the harness's command line
    model = HarnessModel(str(folder_of("gpt2", tmp_path / "m")), device="cuda:0")
    options, until = model._options({"until": "\n", "max_new_tokens": 3, "temperature": 0.7, "top_p": 0.9})
    assert (options.max_new_tokens, options.do_sample, options.temperature, options.top_p) == (
        3,
        True,
        0.7,
        0.9,
    )
    assert until == ["\n"]
    plain, _ = model._options({"until": [], "temperature": 0.0})
    assert (plain.max_new_tokens, plain.do_sample) == (256, False)


def test_the_command_line_says_what_is_wrong_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("lm_eval.__main__.cli_evaluate", lambda: HarnessModel(str(tmp_path / "none")))
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert "none does not exist" in said
    assert said.count("\n") == 1
