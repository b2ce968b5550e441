"""Makes the expected values of test_golden.py with `transformers`, without any code of minigpt.

    python tests/golden/make_golden.py  # rewrites gpt2_*.json and gpt2_*.safetensors in this folder

The model is a tiny GPT-2 in double precision. Weights and batches come from a seeded numpy generator, logits
and gradients from Hugging Face's GPT2LMHeadModel, and ten losses from training with torch's AdamW. There are
two variants: GPT-2 as published, and the tutorial's GPT, whose missing biases are zeros that are not trained.
The safetensors file holds the arrays (initial weights under Hugging Face's names, `batches`, `logits`). The
JSON file holds everything else.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor
from torch.nn import functional as F

FOLDER = Path(__file__).parent
SIZES = {"vocab_size": 19, "n_positions": 8, "n_embd": 8, "n_layer": 2, "n_head": 2}
VARIANTS = {
    "gpt2_bias_tanh": {"activation_function": "gelu_new", "minigpt_bias": True},
    "gpt2_nobias_exact": {"activation_function": "gelu", "minigpt_bias": False},
}
ADAMW: dict[str, Any] = {"lr": 0.01, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1}


def loss_of(logits: Tensor, ids: Tensor) -> Tensor:
    """Return the mean loss over all next tokens: logits (B, T, V), ids (B, T)."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def make(variant: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the arrays and the JSON contents of one variant."""
    from transformers import GPT2Config, GPT2LMHeadModel

    settings = {**SIZES, **VARIANTS[variant], "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    config = GPT2Config(**settings, attn_implementation="eager", bos_token_id=None, eos_token_id=None)
    model = GPT2LMHeadModel(config).double()

    rng = np.random.default_rng(1234)
    for name, parameter in model.named_parameters():
        absent = not settings["minigpt_bias"] and name.endswith(("c_proj.bias", "c_fc.bias"))
        values = np.zeros(parameter.shape) if absent else rng.normal(0.0, 0.4, parameter.shape)
        parameter.data.copy_(torch.from_numpy(values + (".ln_" in name and name.endswith("weight"))))
        parameter.requires_grad_(not absent)
    arrays = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    batches = torch.from_numpy(rng.integers(0, SIZES["vocab_size"], (2, 3, 8)))

    logits = model(batches[0]).logits
    loss_of(logits, batches[0]).backward()  # type: ignore[no-untyped-call]
    gradients = {n: p.grad.norm().item() for n, p in model.named_parameters() if p.grad is not None}

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, **ADAMW)
    losses = []
    for step in range(10):
        ids = batches[step % 2]
        optimizer.zero_grad()
        loss = loss_of(model(ids).logits, ids)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(loss.item())

    arrays |= {"batches": batches, "logits": logits.detach().contiguous()}
    return arrays, {
        "config": {"model_type": "gpt2", **settings},
        "adamw": ADAMW,
        "gradient_norms": gradients,
        "losses": losses,
    }


if __name__ == "__main__":
    for variant in VARIANTS:
        arrays, contents = make(variant)
        (FOLDER / f"{variant}.safetensors").write_bytes(save(arrays))
        (FOLDER / f"{variant}.json").write_text(json.dumps(contents, indent=1) + "\n", encoding="utf-8")
        print(variant, "losses", *(f"{loss:.3f}" for loss in contents["losses"]))
