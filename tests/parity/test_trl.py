"""GRPO, DPO and SFT compared with TRL on the same batches: advantages, masks, losses, gradients.

    pip install trl

It brings datasets and pandas; without it these tests are skipped.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from minigpt.data.batches import encode_conversations
from minigpt.data.chat_encoding import encode_chat_conversation
from minigpt.data.conversation import Conversation, Turn
from minigpt.data.preferences import encode_preferences, preference_of
from minigpt.families.qwen3.model import Qwen3Config, Qwen3ForCausalLM
from minigpt.families.registry import LanguageModel, family_of
from minigpt.finetuning.grpo import LEAST_STD, GrpoLossType, GrpoOptions, ScaleRewards, group_advantages
from minigpt.finetuning.preferences import LossType
from minigpt.generation.options import GenerationOptions
from minigpt.tokenization.bpe import BpeTokenizer
from minigpt.training.grpo_loss import GrpoLoss, Rollout, Sampling
from minigpt.training.loss import NextTokenLoss
from minigpt.training.preference_loss import PreferenceLoss, PreferenceOptions
from minigpt.training.rewards import make_rewards
from minigpt.weights.pretrained import load_model, load_tokenizer, save_pretrained

transformers = pytest.importorskip("transformers")
datasets = pytest.importorskip("datasets", reason="needs `pip install trl`, which brings datasets")
trl = pytest.importorskip("trl", reason="needs `pip install trl`")

pytestmark = pytest.mark.filterwarnings("ignore")  # of three libraries that warn of each other

CPU = torch.device("cpu")
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<|im_start|>assistant\n"
    "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}\n"
    "{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make the folder of a tiny Qwen3 with a chat template."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    folder = tmp_path_factory.mktemp("trl")
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = BpeTokenizer.train(["one two three four five six"], 300, special_tokens=special)
    tokenizer = tokenizer.with_chat_template(TEMPLATE)
    torch.manual_seed(1)
    model = Qwen3ForCausalLM(Qwen3Config(tokenizer.get_vocab_size(), 32, 48, 2, 4, 2, 8, 256))
    with torch.no_grad():
        for parameter in model.parameters():  # so that answers are neither certain nor equally likely
            parameter.add_(0.1 * torch.randn_like(parameter))
    save_pretrained(model, folder / "model", tokenizer)
    return folder


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """Restore the number of threads, which TRL's trainers change."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def common(folder: Path, **values: Any) -> dict[str, Any]:
    return {
        "output_dir": str(folder / "out"), "use_cpu": True, "bf16": False, "report_to": "none", "seed": 1,
        "gradient_checkpointing": False, "disable_tqdm": True, **values,
    }  # fmt: skip


def loaded(folder: Path) -> tuple[Any, Any]:
    """Load model and tokenizer with transformers."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    # a tokenizer of ours reads no special token from a text; that of a chat template is one text
    options = {"split_special_tokens": False}
    return model, transformers.AutoTokenizer.from_pretrained(folder / "model", **options)


def moved(model: torch.nn.Module, seed: int = 5) -> None:
    """Change all weights a little. The change depends on the name, so two models change equally."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))


def same_gradients(ours: LanguageModel, theirs: torch.nn.Module) -> None:
    family = family_of(ours.config)
    found = family.to_hugging_face(ours)
    names = {id(parameter): name for name, parameter in ours.named_parameters()}
    assert names
    gradients = {}
    for parameter in ours.parameters():
        assert parameter.grad is not None
        with torch.no_grad():
            parameter.copy_(parameter.grad)
    found = family.to_hugging_face(ours)
    for name, parameter in theirs.named_parameters():
        assert parameter.grad is not None
        gradients[name] = parameter.grad
        scale = max(1.0, float(parameter.grad.abs().max()))
        # float32, and two orders of summing
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-5 * scale, msg=name)
    assert max(float(one.abs().max()) for one in gradients.values()) > 1e-3


# -- GRPO --------------------------------------------------------------------------------------------------


def reward(completions: list[str], **_: Any) -> list[float]:
    return [float(len(text) % 4) for text in completions]


@pytest.mark.parametrize("iterations", [1, 2])
@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "dr_grpo", "bnpo"])
def test_grpo(folder: Path, loss_type: GrpoLossType, iterations: int) -> None:
    model, tokenizer = loaded(folder)
    scale: ScaleRewards = "batch" if loss_type == "bnpo" else "group"
    args = trl.GRPOConfig(
        **common(folder), per_device_train_batch_size=8, num_generations=4, max_completion_length=6, beta=0.3,
        temperature=0.7, loss_type=loss_type, num_iterations=iterations, epsilon=0.1, epsilon_high=0.2,
        scale_rewards=scale,
    )  # fmt: skip
    prompts = ["one two", "three four five"]
    dataset = datasets.Dataset.from_list([{"prompt": prompt} for prompt in prompts])
    trainer = trl.GRPOTrainer(model, reward, args, train_dataset=dataset, processing_class=tokenizer)
    trainer.ref_model = trainer.ref_model or None
    trainer.model.train()
    rows = [{"prompt": prompt} for prompt in prompts for _ in range(4)]
    batch = trainer._generate_and_score_completions(rows)

    # the same tokens as one of our batches
    asked, said = (
        [[int(i) for i, m in zip(ids, mask) if m] for ids, mask in zip(batch[f"{n}_ids"], batch[f"{n}_mask"])]
        for n in ("prompt", "completion")
    )
    texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in said]
    rewards = torch.tensor(reward(texts))
    advantages = group_advantages(rewards.view(2, 4), scale).flatten()
    if scale == "batch":
        advantages = advantages / (rewards.std() + LEAST_STD)
    torch.testing.assert_close(advantages, batch["advantages"].cpu(), rtol=1e-5, atol=1e-6)
    assert advantages.abs().max() > 0.1
    width = max(len(a) + len(b) for a, b in zip(asked, said))
    ids, mask = torch.zeros((8, width), dtype=torch.int64), torch.zeros((8, width), dtype=torch.bool)
    for row, (a, b) in enumerate(zip(asked, said)):
        ids[row, : len(a) + len(b)] = torch.tensor([*a, *b])
        mask[row, len(a) : len(a) + len(b)] = True
    is_said = batch["completion_mask"].bool()

    def flat(name: str) -> Tensor | None:
        return None if batch.get(name) is None else batch[name][is_said].detach().float()

    rollout = Rollout(
        ids[:, :-1], ids[:, 1:], mask[:, 1:], mask[:, 1:], advantages,
        flat("old_per_token_logps"), flat("ref_per_token_logps"),
    )  # fmt: skip
    assert (rollout.old is None) == (iterations == 1)
    ours = load_model(folder / "model").train()
    options = GrpoOptions(0.3, 0.1, 0.2, loss_type, max_completion_length=6)
    loss = objective(ours, folder, options)
    for found, expected in ((loss._logps(ours, rollout), rollout.reference), (None, rollout.old)):
        if expected is not None and found is not None:
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    moved(trainer.model)
    trained = {name: p.detach() for name, p in trainer.model.named_parameters()}
    load_hugging_face(ours, trained)
    trainer.current_gradient_accumulation_steps = 1
    theirs = trainer._compute_loss(trainer.model, batch)
    theirs.backward()
    mine = loss(*loss.select(rollout)) / loss.count(rollout)
    mine.backward()
    assert mine.item() == pytest.approx(theirs.item(), rel=1e-4, abs=1e-6)
    numbers = dict(zip(loss.step_sums_names, loss.step_sums().tolist()))
    logged = trainer._metrics["train"]
    assert numbers["kl"] / numbers["tokens"] == pytest.approx(logged["kl"][-1], rel=1e-3)
    assert numbers["is_low"] / numbers["tokens"] == pytest.approx(logged["clip_ratio/low_mean"][-1])
    same_gradients(ours, trainer.model)


def load_hugging_face(model: LanguageModel, weights: dict[str, Tensor]) -> None:
    family = family_of(model.config)
    own = family.from_hugging_face({k: v.clone() for k, v in weights.items()}, model.config, torch.float32)
    model.load_state_dict(own, strict=False)


def objective(model: LanguageModel, folder: Path, options: GrpoOptions) -> GrpoLoss:
    from minigpt.data.prompts import encode_prompts

    tokenizer = load_tokenizer(folder / "model")
    talk = Conversation((Turn("user", "one"), Turn("assistant", "two")), 1)
    data = encode_prompts([talk], tokenizer, 200, encode_chat_conversation)
    sampling = Sampling(4, GenerationOptions(do_sample=True, temperature=0.7, max_new_tokens=6))
    return GrpoLoss(model, tokenizer, options, sampling, make_rewards(["exact"]), data, data, CPU)


# -- SFT ---------------------------------------------------------------------------------------------------

TALKS = [
    [("system", "four"), ("user", "one"), ("assistant", "two three"), ("user", "five"), ("assistant", "six")],
    [("user", "one two three"), ("assistant", "four five")],
]
# TRL counts all that follows the prompt, and minigpt ends with the token that ends a turn: here they agree
ENDS_WITH_TURN = (
    "{% for m in messages %}{{ m.role }}:{{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def with_template(folder: Path, template: str) -> Path:
    """Copy the model's folder with another chat template."""
    other = folder / "other"
    if not other.exists():
        tokenizer = load_tokenizer(folder / "model").with_chat_template(template)  # type: ignore[union-attr]
        save_pretrained(load_model(folder / "model"), other / "model", tokenizer)
    return other


@pytest.mark.parametrize("kind", ["assistant_only", "completion_only"])
def test_sft(folder: Path, kind: str) -> None:
    if kind == "assistant_only":
        talks = [[{"role": role, "content": text} for role, text in talk] for talk in TALKS]
        rows: list[dict[str, Any]] = [{"messages": talk} for talk in talks]
    else:
        folder = with_template(folder, ENDS_WITH_TURN)
        talks = [
            [{"role": role, "content": text} for role, text in talk] for talk in (TALKS[0][:3], TALKS[1])
        ]
        rows = [{"prompt": talk[:-1], "completion": talk[-1:]} for talk in talks]
    model, tokenizer = loaded(folder)
    args = trl.SFTConfig(
        **common(folder), per_device_train_batch_size=2, max_length=200,
        assistant_only_loss=kind == "assistant_only",
    )  # fmt: skip
    dataset = datasets.Dataset.from_list(rows)
    trainer = trl.SFTTrainer(model, args, train_dataset=dataset, processing_class=tokenizer)
    batch = trainer.data_collator([trainer.train_dataset[number] for number in range(2)])
    ours = load_model(folder / "model").train()
    conversations = [
        Conversation(tuple(Turn(one["role"], one["content"]) for one in talk), line)  # type: ignore[arg-type]
        for line, talk in enumerate(talks, 1)
    ]
    own = load_tokenizer(folder / "model")
    mine = encode_conversations(conversations, own, 200, encode_chat_conversation).batch(np.arange(2))
    real = batch["attention_mask"].bool()
    for row in range(2):  # the same tokens, and the same of them count
        ids = batch["input_ids"][row][real[row]]
        assert torch.equal(ids[1:], mine.targets[row][mine.token_mask[row]])
        assert torch.equal(
            batch["labels"][row][real[row]][1:] != -100, mine.answer_mask[row][mine.token_mask[row]]
        )
    loss = NextTokenLoss(ours, "answer", CPU)
    found = loss(*loss.select(mine)) / loss.count(mine)
    found.backward()
    trainer.model.train()
    theirs = trainer.compute_loss(trainer.model, dict(batch))
    theirs.backward()
    assert found.item() == pytest.approx(theirs.item(), rel=1e-5)
    same_gradients(ours, trainer.model)


# -- DPO ---------------------------------------------------------------------------------------------------

PAIRS = [("one two", "three four five", "six"), ("six five", "four", "one two three")]


@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo"])
def test_dpo(folder: Path, loss_type: LossType) -> None:
    folder = with_template(folder, ENDS_WITH_TURN)
    model, tokenizer = loaded(folder)
    records: list[dict[str, Any]] = [
        {
            "prompt": [{"role": "user", "content": prompt}],
            "chosen": [{"role": "assistant", "content": chosen}],
            "rejected": [{"role": "assistant", "content": rejected}],
        }
        for prompt, chosen, rejected in PAIRS
    ]
    args = trl.DPOConfig(
        **common(folder), per_device_train_batch_size=2, max_length=200, beta=0.3, loss_type=loss_type,
    )  # fmt: skip
    dataset = datasets.Dataset.from_list(records)
    trainer = trl.DPOTrainer(model, args=args, train_dataset=dataset, processing_class=tokenizer)
    batch = trainer.data_collator([trainer.train_dataset[number] for number in range(2)])
    pairs = [preference_of(record, line=number) for number, record in enumerate(records, 1)]
    own = load_tokenizer(folder / "model")
    data = encode_preferences(pairs, own, 200, encode_chat_conversation)
    mine, real = data.batch(np.arange(2)), batch["attention_mask"].bool()
    for row in range(4):  # the same tokens, and the same of them count
        assert torch.equal(batch["input_ids"][row][real[row]][1:], mine.targets[row][mine.token_mask[row]])
        said = batch["completion_mask"][row].bool()[real[row]][1:]
        assert torch.equal(said, mine.answer_mask[row][mine.token_mask[row]])
    ours = load_model(folder / "model").train()
    loss = PreferenceLoss(ours, PreferenceOptions(0.3, 0.0, loss_type), data, data, CPU)
    moved(trainer.model)
    load_hugging_face(ours, {name: p.detach() for name, p in trainer.model.named_parameters()})
    found = loss(*loss.select(mine)) / loss.count(mine)
    found.backward()
    trainer.model.train()
    theirs = trainer.compute_loss(trainer.model, dict(batch))
    theirs.backward()
    assert found.item() == pytest.approx(theirs.item(), rel=1e-4)
    same_gradients(ours, trainer.model)
