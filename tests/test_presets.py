"""The published sizes of GPT-2: the number of parameters by the formula and in the model itself."""

import pytest

from minigpt.errors import InputError
from minigpt.families.gpt2.family import FAMILY
from minigpt.families.gpt2.presets import PRESETS, preset
from minigpt.model import GPTConfig

# transformers' counts for openai-community/gpt2, -medium, -large and -xl.
PUBLISHED = {"124M": 124_439_808, "355M": 354_823_168, "774M": 774_030_080, "1558M": 1_557_611_200}
ALIASES = {"gpt2": "124M", "gpt2-medium": "355M", "gpt2-large": "774M", "gpt2-xl": "1558M"}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters(name: str) -> None:
    config = preset(name).sizes.config()
    assert config.parameter_count() == PUBLISHED[name]
    assert sum(parameter.numel() for parameter in FAMILY.on_meta(config).parameters()) == PUBLISHED[name]
    assert round(PUBLISHED[name] / 1e6) == int(name.removesuffix("M"))


def test_a_preset_is_gpt2() -> None:
    expected = GPTConfig(
        vocab_size=50257,
        block_size=1024,
        n_embd=768,
        n_head=12,
        n_layer=12,
        dropout=0.1,
        bias=True,
        gelu="tanh",
    )
    assert preset("124M").sizes.config() == expected
    # GPT-2's heads have 64 channels in every size
    assert {row.sizes.n_embd // row.sizes.n_head for row in PRESETS} == {64}


@pytest.mark.parametrize(("alias", "name"), ALIASES.items())
def test_aliases(alias: str, name: str) -> None:
    assert preset(alias) == preset(name)
    assert preset(alias).name == name
    assert preset(name).repository == f"openai-community/{alias}"


def test_an_unknown_name() -> None:
    with pytest.raises(InputError, match=r"unknown GPT-2 model '345M'; did you mean '355M'\?"):
        preset("345M")
    with pytest.raises(InputError, match=r"unknown GPT-2 model ''; known: 124M, 355M, 774M, 1558M, gpt2, "):
        preset("")


def test_impossible_sizes() -> None:
    from minigpt.families.gpt2.presets import Sizes

    with pytest.raises(ValueError, match="n_head must divide n_embd"):
        Sizes(n_embd=8, n_head=3, n_layer=1).config()
