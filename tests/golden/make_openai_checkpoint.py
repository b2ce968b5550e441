"""Makes openai_gpt2_tiny/ with TensorFlow itself: a tiny GPT-2 in the files of OpenAI's release.

    python -m venv tf && tf/bin/pip install tensorflow-cpu==2.20.0 safetensors
    tf/bin/python tests/golden/make_openai_checkpoint.py  # rewrites the folder; imports nothing of minigpt

Weights come from a seeded numpy generator, the files from TensorFlow's own Saver. The same folder has the
expected results in other formats: `expected.safetensors` (each variable of TensorFlow under its own name, and
logits that TensorFlow computed in double precision) and `expected.json` (a prompt, its ids, and the most
likely next ids). `sharded.ckpt` is the same checkpoint in two data files. The vocabulary has the 256 bytes, a
few merges and <|endoftext|>.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

FOLDER = Path(__file__).parent / "openai_gpt2_tiny"
C, H, LAYERS, CONTEXT = 8, 2, 2, 48
MERGES = ["Ġ t", "Ġ a", "h e", "i n", "r e", "o n", "Ġt he", "e r", "Ġ s", "a t", "Ġ w", "n d", "Ġ c", "in g"]
PROMPT = "Alan Turing was there."
NEW_TOKENS = 20


def byte_symbols() -> list[str]:
    """Return the symbols that stand for the 256 bytes, in the published order: printable ones first."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + index) for index in range(len(others))]


def vocabulary() -> dict[str, int]:
    words = [*byte_symbols(), *(merge.replace(" ", "") for merge in MERGES), "<|endoftext|>"]
    return {word: index for index, word in enumerate(words)}


def encode(text: str) -> list[int]:
    """Encode an ASCII text without special tokens. The split into words is only correct for the prompt."""
    ids, known = [], vocabulary()
    for number, word in enumerate(text.replace(".", " .").split(" ")):
        parts = list(word if number == 0 or word == "." else "Ġ" + word)
        for merge in MERGES:
            left, right = merge.split(" ")
            index = 0
            while index < len(parts) - 1:
                if (parts[index], parts[index + 1]) == (left, right):
                    parts[index : index + 2] = [left + right]
                index += 1
        ids += [known[part] for part in parts]
    return ids


def weights(vocab_size: int) -> dict[str, Any]:
    """Return OpenAI's variables with seeded values. A convolution of width 1 has the shape (1, in, out)."""
    shapes: dict[str, tuple[int, ...]] = {"model/wpe": (CONTEXT, C), "model/wte": (vocab_size, C)}
    for layer in range(LAYERS):
        for norm in ("ln_1", "ln_2"):
            shapes |= {f"model/h{layer}/{norm}/g": (C,), f"model/h{layer}/{norm}/b": (C,)}
        convolutions = [("attn/c_attn", C, 3 * C), ("attn/c_proj", C, C)]
        convolutions += [("mlp/c_fc", C, 4 * C), ("mlp/c_proj", 4 * C, C)]
        for name, inside, outside in convolutions:
            shapes[f"model/h{layer}/{name}/w"] = (1, inside, outside)
            shapes[f"model/h{layer}/{name}/b"] = (outside,)
    shapes |= {"model/ln_f/g": (C,), "model/ln_f/b": (C,)}
    rng = np.random.default_rng(1234)
    return {
        name: (rng.normal(0.0, 0.8, shape) + name.endswith("/g")).astype(np.float32)
        for name, shape in shapes.items()
    }


def logits_of(values: dict[str, Any], ids: list[int]) -> Any:
    """Compute GPT-2 in TensorFlow, in double precision: ids (T,) -> logits (T, V)."""
    import tensorflow as tf

    w = {name: tf.constant(value, tf.float64) for name, value in values.items()}
    T = len(ids)

    def norm(x: Any, name: str) -> Any:
        mean, variance = tf.nn.moments(x, axes=[-1], keepdims=True)
        return (x - mean) / tf.sqrt(variance + 1e-5) * w[f"{name}/g"] + w[f"{name}/b"]

    def linear(x: Any, name: str) -> Any:
        return x @ w[f"{name}/w"][0] + w[f"{name}/b"]

    x = tf.gather(w["model/wte"], ids) + w["model/wpe"][:T]  # (T, C)
    future = tf.constant(np.triu(np.full((T, T), -np.inf), 1))  # (T, T)
    for layer in range(LAYERS):
        block = f"model/h{layer}"
        qkv = linear(norm(x, f"{block}/ln_1"), f"{block}/attn/c_attn")  # (T, 3C)
        heads = tf.transpose(tf.reshape(qkv, (T, 3, H, C // H)), (1, 2, 0, 3))  # (3, H, T, D)
        q, k, v = tf.unstack(heads)
        scores = q @ tf.transpose(k, (0, 2, 1)) / np.sqrt(C // H) + future  # (H, T, T)
        mixed = tf.reshape(tf.transpose(tf.nn.softmax(scores) @ v, (1, 0, 2)), (T, C))
        x = x + linear(mixed, f"{block}/attn/c_proj")
        inner = tf.nn.gelu(linear(norm(x, f"{block}/ln_2"), f"{block}/mlp/c_fc"), approximate=True)
        x = x + linear(inner, f"{block}/mlp/c_proj")
    return (norm(x, "model/ln_f") @ tf.transpose(w["model/wte"])).numpy()


def save_checkpoint(values: dict[str, Any], name: str, devices: int) -> dict[str, Any]:
    """Let TensorFlow write NAME.index and its data files. Returns TensorFlow's variables."""
    import tensorflow as tf

    v1 = tf.compat.v1
    config = v1.ConfigProto(device_count={"CPU": devices})
    with tf.Graph().as_default(), v1.Session(config=config) as session:
        variables = []
        for number, (variable, value) in enumerate(values.items()):
            with tf.device(f"/cpu:{number % devices}"):
                variables.append(v1.get_variable(variable, initializer=value, use_resource=False))
        session.run(v1.global_variables_initializer())
        saver = v1.train.Saver(variables, sharded=devices > 1, save_relative_paths=True)
        saver.save(session, str(FOLDER / name), write_meta_graph=False, write_state=devices == 1)
        return dict(zip(values, session.run(variables)))


def write_text(name: str, content: str) -> None:
    (FOLDER / name).write_text(content, encoding="utf-8")


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    known = vocabulary()
    values = weights(len(known))
    save_checkpoint(values, "sharded.ckpt", devices=2)
    held = save_checkpoint(values, "model.ckpt", devices=1)

    prompt = encode(PROMPT)
    logits = logits_of(held, prompt)
    ids = list(prompt)
    for _ in range(NEW_TOKENS):
        last = np.sort(logits_of(held, ids)[-1])
        assert last[-1] - last[-2] > 1e-3, "two tokens so close that rounding decides: choose another seed"
        ids.append(int(logits_of(held, ids)[-1].argmax()))

    sizes = {"n_vocab": len(known), "n_ctx": CONTEXT, "n_embd": C, "n_head": H, "n_layer": LAYERS}
    write_text("hparams.json", json.dumps(sizes, indent=2) + "\n")
    write_text("encoder.json", json.dumps(known) + "\n")
    write_text("vocab.bpe", "#version: 0.2\n" + "".join(f"{merge}\n" for merge in MERGES))
    expected = {"prompt": PROMPT, "prompt_ids": prompt, "next_ids": ids[len(prompt) :]}
    write_text("expected.json", json.dumps(expected, indent=1) + "\n")
    (FOLDER / "expected.safetensors").write_bytes(save({**held, "logits": logits}))
    for path in sorted(FOLDER.iterdir()):
        print(f"{path.stat().st_size:7,} {path.name}")
    print(expected)
