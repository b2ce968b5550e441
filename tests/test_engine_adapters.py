"""An engine in which each request has its own adapter gives the same ids as alone. Errors are tested, too."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from minigpt.errors import InputError
from minigpt.families.qwen3.model import Qwen3Config, Qwen3ForCausalLM
from minigpt.families.registry import LanguageModel
from minigpt.finetuning.adapters import adapter_tensors
from minigpt.finetuning.bottleneck import BottleneckConfig
from minigpt.finetuning.ia3 import IA3Config
from minigpt.finetuning.layers import AdapterConfig, adapter_names, adapters_by_row, add_adapter, set_adapter
from minigpt.finetuning.lora import LoraConfig
from minigpt.generation.api import GenerationOptions, generate_ids
from minigpt.generation.engine import Engine
from minigpt.model import GPTConfig, GPTLMHeadModel

V = 40
MODELS: dict[str, Callable[[], LanguageModel]] = {
    "gpt": lambda: GPTLMHeadModel(GPTConfig(24, 3, 2, 0.0, 48, V, bias=True)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(V, 24, 40, 2, 4, 2, 8, 48)),
}
CONFIGS: dict[str, AdapterConfig] = {
    "lora": LoraConfig(r=3, lora_alpha=9),
    "other": LoraConfig(r=2, lora_alpha=8, target_modules="all-linear", layers_to_transform=(1,)),
    "dora": LoraConfig(r=2, use_dora=True),
    "whole": LoraConfig(r=2, modules_to_save=("lm_head",)),
    "bottleneck": BottleneckConfig(5),
    "ia3": IA3Config(),
}
CHOICES: list[Any] = [
    "lora",
    None,
    "dora",
    [],
    "whole",
    "bottleneck",
    "ia3",
    ["lora", "other"],
    "other",
    "lora",
]
PROMPTS = [[3 + number, 5, 7 + number % 3][: 1 + number % 3] for number in range(len(CHOICES))]


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> LanguageModel:
    """Make a model with all kinds of adapters. `other` is active."""
    model = MODELS[request.param]().eval()
    with torch.no_grad():
        for parameter in model.parameters():  # so that the most likely token is much more likely than others
            parameter.mul_(4)
        for name, config in CONFIGS.items():
            add_adapter(model, config, name)
            for tensor in adapter_tensors(model, name).values():
                tensor.add_(torch.randn(tensor.shape) * 0.3)
    set_adapter(model, "other")
    return model


def alone(model: LanguageModel, options: GenerationOptions) -> list[list[int]]:
    """Return the new ids of each prompt, with its own adapter active in the model."""
    found = []
    for prompt, choice in zip(PROMPTS, CHOICES):
        set_adapter(model, "other" if choice is None else choice)
        found.append(generate_ids(model, [prompt], options, None)[0].ids)
    set_adapter(model, "other")
    return found


@pytest.mark.parametrize("max_rows", [3, len(CHOICES)])
@pytest.mark.parametrize(
    "options",
    [
        GenerationOptions(max_new_tokens=10),
        GenerationOptions(max_new_tokens=10, do_sample=True, seed=5),
        GenerationOptions(max_new_tokens=10, prompt_lookup_num_tokens=2),
    ],
    ids=["greedy", "sampled", "guessed"],
)
def test_a_batch_of_different_adapters_gives_what_each_gives_alone(
    model: LanguageModel, options: GenerationOptions, max_rows: int
) -> None:
    expected = alone(model, options)
    assert len({*map(tuple, expected)}) > 6, "the adapters make a difference"
    engine = Engine(model, max_rows=max_rows)
    handles = [engine.submit(prompt, options, adapter=choice) for prompt, choice in zip(PROMPTS, CHOICES)]
    assert [handle.result().ids for handle in handles] == expected
    assert adapter_names(model) == {name: name == "other" for name in CONFIGS}


def test_with_cuda_graphs_the_host_decodes_such_requests(model: LanguageModel) -> None:
    """The graph's code also runs on a CPU. Requests without their own adapter join and leave meanwhile."""
    options = GenerationOptions(max_new_tokens=10)
    expected = alone(model, options)
    engine = Engine(model, max_rows=3, cuda_graph=True, burst=3)
    handles = [engine.submit(prompt, options, adapter=choice) for prompt, choice in zip(PROMPTS, CHOICES)]
    assert [handle.result().ids for handle in handles] == expected
    plain = [engine.submit(prompt, options) for prompt in PROMPTS[:3]]
    for prompt, handle in zip(PROMPTS, plain):
        assert handle.result().ids == generate_ids(model, [prompt], options, None)[0].ids


def test_prompts_share_their_beginning_only_with_the_same_adapter(model: LanguageModel) -> None:
    prompt, options = [*range(3, 23)], GenerationOptions(max_new_tokens=8)
    engine = Engine(model, max_rows=2, chunk=4, prefix_mib=1)
    found: dict[Any, list[int]] = {}
    for _ in range(2):
        for choice in ("lora", "bottleneck", None):
            ids = engine.submit(prompt, options, adapter=choice).result().ids
            assert found.setdefault(choice, ids) == ids
    # of 20 tokens 4 blocks of 4 are reused, as the last token is always read; by each adapter, in round two
    assert engine.statistics.tokens_reused == 3 * 16
    assert len({*map(tuple, found.values())}) > 1


def test_prompts_share_their_beginning_only_while_the_same_adapter_is_active(model: LanguageModel) -> None:
    prompt, options = [*range(3, 23)], GenerationOptions(max_new_tokens=8)
    engine = Engine(model, max_rows=2, chunk=4, prefix_mib=1)
    found = list[list[int]]()
    for name in ("other", "lora", "other"):
        set_adapter(model, name)
        found.append(engine.submit(prompt, options).result().ids)
    assert engine.statistics.tokens_reused == 16  # by the third request, of the first one
    assert engine.submit(prompt, options, adapter="lora").result().ids == found[1]
    assert engine.statistics.tokens_reused == 2 * 16
    assert found[0] == found[2]


def test_damaged_weights_of_one_adapter_do_not_touch_the_others(model: LanguageModel) -> None:
    options = GenerationOptions(max_new_tokens=6)
    expected = Engine(model).submit([3, 4], options, adapter="lora").result().ids
    with torch.no_grad():
        for tensor in adapter_tensors(model, "dora").values():
            tensor.fill_(torch.nan)
    engine = Engine(model)
    bad, good = (engine.submit([3, 4], options, adapter=name) for name in ("dora", "lora"))
    with pytest.raises(InputError, match="the model's scores are not finite numbers"):
        bad.result()
    assert good.result().ids == expected


def test_what_is_refused(model: LanguageModel) -> None:
    engine = Engine(model)
    with pytest.raises(InputError, match="unknown adapter 'lara'; did you mean 'lora'"):
        engine.submit([3], adapter="lara")
    with pytest.raises(InputError, match="adapters with use_dora cannot be added: take one of lora, dora"):
        engine.submit([3], adapter=["lora", "dora"])
    assert engine.is_idle
    with pytest.raises(InputError, match="unknown adapter 'x'"):
        Engine(MODELS["gpt"]()).submit([3], adapter="x")


@torch.no_grad()
def test_rows_that_share_an_adapter_are_one_product(model: LanguageModel) -> None:
    """In the model itself, each row of the logits is that of its adapter."""
    ids = torch.randint(3, V, (5, 6))
    names = [["lora"], ["whole"], [], ["lora"], ["ia3"]]
    with adapters_by_row(model, names):
        found = model(ids)
    for row, each in enumerate(names):
        set_adapter(model, each)
        torch.testing.assert_close(found[row], model(ids[row : row + 1])[0], rtol=1e-4, atol=1e-4)
