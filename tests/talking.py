"""A model that has memorised answers, and a program on a pseudo-terminal."""

import os
import select
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

import minigpt
from minigpt.data.batches import encode_conversations
from minigpt.data.conversation import conversation_of_pair
from minigpt.model import GPTConfig, GPTLMHeadModel
from minigpt.tokenizer import Tokenizer, build_vocabulary
from tests.prepared import Program

ROOT = Path(__file__).resolve().parents[1]


def learn_by_heart(answers: Mapping[str, str], folder: Path, block_size: int = 20) -> Path:
    """Train a tiny model on some questions and answers until it knows them, and save it."""
    pairs = [conversation_of_pair(q, a, 0, "") for q, a in answers.items()]
    tokenizer = Tokenizer.from_word2id(build_vocabulary(q + a for q, a in answers.items()))
    torch.manual_seed(0)
    size = tokenizer.get_vocab_size()
    net = GPTLMHeadModel(
        GPTConfig(n_embd=32, n_head=2, n_layer=2, block_size=block_size, vocab_size=size, dropout=0.0)
    )
    batch = encode_conversations(pairs, tokenizer, block_size).batch(np.arange(len(pairs)))
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    for _ in range(100):
        loss = F.cross_entropy(net(batch.input_ids)[batch.answer_mask], batch.targets[batch.answer_mask])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    minigpt.save_pretrained(net, folder, tokenizer)
    return folder


class Talk:
    """A process on a pseudo-terminal."""

    def __init__(self, script: str, *arguments: str) -> None:
        import pty

        self.terminal, inner = pty.openpty()
        path = f"./minigpt/{script}"
        run = [path] if (ROOT / path).exists() else ["-m", "minigpt", script.removesuffix(".py")]
        environment = {**os.environ, "TERM": "dumb", "PYTHONUTF8": "1"}
        self.process = Program([*run, *arguments], (inner, inner, inner), env=environment, terminal=True)
        os.close(inner)
        self.shown = b""  # output that `until` has not returned yet
        self.all = b""

    def until(self, text: str) -> str:
        """Wait for `text`, and return the output up to its end."""
        while text.encode() not in self.shown:
            assert self.read(), f"it ended, or waits, without {text!r}: {self.all.decode(errors='replace')}"
        before, found, self.shown = self.shown.partition(text.encode())
        return (before + found).decode()

    def read(self, patience: float = 60.0) -> bool:
        """Read the next output. Return False if the process has ended or is silent for `patience` seconds."""
        if not select.select([self.terminal], [], [], patience)[0]:
            return False
        try:
            piece = os.read(self.terminal, 4096)
        except OSError:  # Linux raises this when the process has closed the other end
            piece = b""
        self.shown += piece
        self.all += piece
        return bool(piece)

    def say(self, text: str) -> "Talk":
        self.press(text + "\n")
        self.until("\n")  # the terminal's echo
        return self

    def press(self, keys: str) -> None:
        os.write(self.terminal, keys.encode())

    def interrupt(self) -> None:
        """Send Ctrl-C at the prompt, and again if it was lost, which happens right before input() waits."""
        for _ in range(12):
            self.press("\x03")
            if self.read(5) or self.process.poll() is not None:
                return

    def exit_code(self) -> int:
        return self.process.wait(timeout=60)

    def close(self) -> str:
        """Wait for the end, and return the rest of the output."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        while self.read():
            pass
        os.close(self.terminal)
        return self.all.decode(errors="replace")
