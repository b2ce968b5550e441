"""Classifiers compared with transformers and PEFT: logits, losses, folders in both directions."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from minigpt.data.labelled import LabelledText
from minigpt.data.records import ProblemType
from minigpt.families.qwen3.model import Qwen3Config
from minigpt.families.registry import ModelConfig
from minigpt.finetuning.adapters import adapter_tensors, save_adapter
from minigpt.finetuning.classification import Labels, SequenceClassifier, probabilities, summed_loss
from minigpt.finetuning.lora import LoraConfig, apply_lora
from minigpt.model import GPTConfig
from minigpt.tokenizer import Tokenizer, build_vocabulary
from minigpt.weights.classifiers import config_json, encode_texts, load_classifier, save_classifier
from minigpt.weights.pretrained import CONFIG, write_json

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.filterwarnings(  # of what PEFT asks transformers
    "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"
)

TOKENIZER = Tokenizer.from_word2id(build_vocabulary(["天地玄黄宇宙洪荒日月盈昃"]))
V = TOKENIZER.get_vocab_size()
CONFIGS: dict[str, ModelConfig] = {
    "gpt2": GPTConfig(24, 3, 2, 0.0, 16, V, bias=True, gelu="tanh"),
    "gpt": GPTConfig(24, 3, 2, 0.0, 16, V),
    "qwen3": Qwen3Config(V, 24, 40, 2, 4, 2, 8, 16),
    "qwen3-untied": Qwen3Config(V, 24, 40, 2, 4, 2, 8, 16, tie_word_embeddings=False),
}
KINDS: dict[ProblemType, Labels] = {
    "single_label_classification": Labels(("坏", "好", "不知道")),
    "multi_label_classification": Labels(("早餐", "房间", "交通"), "multi_label_classification"),
    "regression": Labels(("LABEL_0",), "regression"),
}
CLOSE = 1e-5  # float32: sums of some hundred products of values near 1


def classifier(name: str, kind: ProblemType = "single_label_classification") -> SequenceClassifier:
    torch.manual_seed(3)
    model = SequenceClassifier(CONFIGS[name], KINDS[kind], TOKENIZER.pad_token_id).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # large weights, so that every part has an effect
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def batch(side: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return rows of different lengths, their mask, and the positions of the last real tokens."""
    rows = [[5, 9, 4, 2], [7, 2], [3, 4, 5, 6, 7, 8, 2]]
    ids, mask = torch.zeros(3, 7, dtype=torch.int64), torch.zeros(3, 7, dtype=torch.int64)
    for i, row in enumerate(rows):
        place = slice(0, len(row)) if side == "right" else slice(7 - len(row), 7)
        ids[i, place], mask[i, place] = torch.tensor(row), 1
    return ids, mask, (mask.cumsum(1) - 1).clamp(min=0)


def theirs_of(folder: Path) -> Any:
    return transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("kind", KINDS)
def test_transformers_runs_our_folder_and_we_run_theirs(name: str, kind: ProblemType, tmp_path: Path) -> None:
    ours = classifier(name, kind)
    save_classifier(ours, tmp_path / "ours", TOKENIZER)
    theirs = theirs_of(tmp_path / "ours")
    labels = KINDS[kind]
    assert theirs.config.problem_type == kind
    assert theirs.config.num_labels == len(labels)
    assert theirs.config.id2label == dict(enumerate(labels.names))
    theirs.save_pretrained(tmp_path / "theirs")
    transformers.AutoTokenizer.from_pretrained(tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    again, _ = load_classifier(tmp_path / "theirs")
    assert again.labels == labels
    truth = {
        "single_label_classification": torch.tensor([2, 0, 1]),
        "multi_label_classification": torch.tensor([[1.0, 0, 1], [0, 0, 0], [0, 1, 1]]),
        "regression": torch.tensor([[0.5], [-2.0], [3.0]]),
    }[kind]
    for side in ("right", "left"):
        ids, mask, positions = batch(side)
        with torch.no_grad():
            expected = theirs(ids, attention_mask=mask, position_ids=positions, labels=truth)
            found = ours(ids, mask, positions)
            assert (found - expected.logits).abs().max() < CLOSE
            assert torch.equal(again(ids, mask, positions), found)
            bare = theirs(ids, attention_mask=mask).logits  # positions as transformers sets them
            assert (ours(ids, mask) - bare).abs().max() < CLOSE
        loss = summed_loss(found, truth, torch.ones(3), kind) / truth.numel()
        assert abs(float(loss) - float(expected.loss)) < CLOSE
        if side == "right":  # no token attends to padding on its right, so no mask is needed
            assert (ours(ids) - found).abs().max() < CLOSE


@pytest.mark.parametrize("sep_before_text", [False, True])
@pytest.mark.parametrize("name", ["gpt", "qwen3"])
def test_a_text_has_the_same_probabilities_in_their_pipeline(
    name: str, sep_before_text: bool, tmp_path: Path
) -> None:
    written = Tokenizer.from_word2id(TOKENIZER.word2id)
    written.sep_before_text = sep_before_text
    save_classifier(classifier(name), tmp_path, written)
    model, tokenizer = load_classifier(tmp_path)
    assert isinstance(tokenizer, Tokenizer)
    assert tokenizer.sep_before_text == sep_before_text
    texts = ["天地玄黄", "日", "<sep>宇宙洪荒"]
    encoded = encode_texts([LabelledText(t, None, 1) for t in texts], tokenizer, model.labels, 16, "here")
    sep = [tokenizer.sep_token_id]
    expected = [*(sep if sep_before_text else []), *tokenizer.encode_text("日"), *sep]
    assert encoded.ids[encoded.starts[1] : encoded.starts[2]].tolist() == expected
    one = encoded.batch(np.arange(3))
    with torch.no_grad():
        found = probabilities(model(one.input_ids, last=one.last), "single_label_classification")
    pipeline = transformers.pipeline("text-classification", model=str(tmp_path), top_k=None, device="cpu")
    for row, answer in zip(found.tolist(), pipeline(texts, batch_size=3)):
        scores = {each["label"]: each["score"] for each in answer}
        for label, value in zip(model.labels.names, row):
            assert abs(scores[label] - value) < CLOSE


@pytest.mark.parametrize("name", ["gpt2", "qwen3"])
def test_adapters_with_a_head_go_both_ways(name: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    base = classifier(name)
    save_classifier(base, tmp_path / "base", TOKENIZER)
    ours, _ = load_classifier(tmp_path / "base")
    config = LoraConfig(r=3, lora_alpha=7, modules_to_save=("score",))
    apply_lora(ours, config)  # type: ignore[arg-type]
    with torch.no_grad():
        for tensor in adapter_tensors(ours).values():  # type: ignore[arg-type]
            tensor.add_(torch.randn_like(tensor) * 0.1)
    folder = tmp_path / "adapter"
    save_adapter(ours, config, folder, str(tmp_path / "base"), task_type="SEQ_CLS")  # type: ignore[arg-type]
    write_json(folder / CONFIG, config_json(ours, TOKENIZER))
    (folder / "tokenizer.json").write_bytes((tmp_path / "base" / "tokenizer.json").read_bytes())
    theirs = peft.PeftModel.from_pretrained(theirs_of(tmp_path / "base"), folder).eval()
    assert theirs.active_peft_config.task_type == "SEQ_CLS"
    ids, mask, _ = batch("right")
    with torch.no_grad():
        found = ours(ids)
        assert (theirs(ids, attention_mask=mask).logits - found).abs().max() < CLOSE
        assert (found - base(ids)).abs().max() > 0.1
    theirs.save_pretrained(tmp_path / "theirs")  # which names heads that this model does not have, too
    for file in (CONFIG, "tokenizer.json"):
        (tmp_path / "theirs" / file).write_bytes((folder / file).read_bytes())
    again, _ = load_classifier(tmp_path / "theirs")
    with torch.no_grad():
        assert torch.equal(again(ids), found)
