"""Learning from rewards (GRPO): the model answers each prompt several times, and learns to prefer the best.

The answers of a step depend only on the weights, the seed, the step's number and the prompts' numbers. So a
resumed run samples the same answers. `num_iterations` consecutive steps use the same answers. If
num_iterations is above 1, a checkpoint holds these answers.

With beta above 0, the loss compares the model with a reference: the model before the first step. If the model
has an adapter, the reference is the model without the adapter; otherwise it is a copy of the model. A resumed
run makes the reference from the start model, too, and not from the checkpoint.

Letters in shapes: G answers to each prompt, B rows (all answers), T tokens, C channels, P tokens of answers.
"""

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from minigpt.data.batches import Batch
from minigpt.data.prompts import EncodedPrompts, Prompt
from minigpt.errors import Message
from minigpt.evaluation.answers import exact_match
from minigpt.families.registry import LanguageModel
from minigpt.finetuning.grpo import LEAST_STD, GrpoOptions, group_advantages, token_losses, token_weights
from minigpt.finetuning.layers import adapted_layers, disable_adapter
from minigpt.generation.api import ends_of_answer
from minigpt.generation.loop import decode, evaluating
from minigpt.generation.native import without_warning
from minigpt.generation.options import GenerationOptions
from minigpt.generation.sequence import Sequence as Answer
from minigpt.generation.sequence import check_request
from minigpt.training.loss import (
    Finish,
    Objective,
    logits_limit,
    token_cross_entropy,
    vocabulary_multiple,
)  # fmt: skip
from minigpt.training.rewards import RewardError, Rewards
from minigpt.weights.pretrained import AnyTokenizer

__all__ = ["GrpoLoss", "GrpoReport", "Rollout", "RolloutBatch", "Sampling"]

_AT_ONCE = 512  # largest number of answers that are generated in one batch


class Sampling(NamedTuple):
    """The options for sampling answers."""

    num_generations: int = 8
    options: GenerationOptions = GenerationOptions()
    seed: int = 42
    mask_truncated_completions: bool = False


class Rollout(NamedTuple):
    """Prompts with sampled answers, as a batch of B rows. P: sampled tokens that the loss counts."""

    input_ids: Tensor  # (B, T) int64: prompt and answer of each row, padded on the right
    targets: Tensor  # (B, T) int64: for each token, the next one
    token_mask: Tensor  # (B, T) bool: False where the target is padding
    answer_mask: Tensor  # (B, T) bool: True where the target was sampled and the loss counts it
    advantages: Tensor  # (B,): how much better an answer is than the other answers to its prompt
    old: Tensor | None  # (P,): log-probabilities at sampling; None: the weights have not changed since then
    reference: Tensor | None  # (P,): log-probabilities by the reference model; None: beta is 0


class RolloutBatch(NamedTuple):
    """The tensors of a batch that the loss needs. Only the P sampled tokens count."""

    input_ids: Tensor  # (B, T) int64: prompt and answer of each row
    targets: Tensor  # (P,) int64: tokens of the answers
    advantages: Tensor  # (P,): advantage of each token's answer
    weights: Tensor  # (P,): factor of each token in the summed loss
    old: Tensor | None  # (P,): log-probabilities at sampling; None: the weights have not changed since then
    reference: Tensor | None  # (P,): log-probabilities by the reference model; None: beta is 0
    positions: Tensor  # (P,) int64: positions of the targets in the flat B * T tokens


@dataclass
class GrpoReport:
    """The result of an evaluation, in which the model answers with its most likely tokens.

    The fields are sums over the validation prompts.
    """

    prompts: float = 0.0
    reward: float = 0.0
    exact: float = 0.0  # number of answers that equal the answers in the data file
    tokens: float = 0.0
    truncated: float = 0.0
    answered: float = 0.0  # number of prompts that have an answer in the data file
    failures: float = 0.0  # number of processes in which a reward function failed

    @property
    def loss(self) -> float:
        """Return minus the mean reward, because the checkpoint with the lowest loss counts as the best."""
        return 0.0 - self.reward / self.prompts  # `0.0 -` avoids -0.0

    def sums(self) -> list[float]:
        """Return the sums as a list, so that the processes can add them."""
        of_answers = (self.prompts, self.reward, self.exact, self.tokens, self.truncated)
        return [*of_answers, self.answered, self.failures]

    def set_sums(self, sums: Sequence[float]) -> None:
        """Replace the sums of this process by the sums over all processes."""
        self.prompts, self.reward, self.exact, self.tokens, self.truncated = sums[:5]
        self.answered, self.failures = sums[5:]

    def metrics(self) -> dict[str, float]:
        """Return the metrics as a dictionary: name of the metric -> value."""
        return {
            "val_loss": self.loss,
            "val_reward": self.reward / self.prompts,
            **({"val_exact_match": self.exact / self.answered} if self.answered else {}),
            "val_completion_length": self.tokens / self.prompts,
            "val_clipped_ratio": self.truncated / self.prompts,
        }

    def shown(self) -> str:
        """Return the most important numbers as text, for the line that is printed at an evaluation."""
        found = self.metrics()
        exact = Message("")
        if self.answered:
            exact = Message("  exact match {share:.1%}", share=found["val_exact_match"])
        return Message("reward {reward:.3f}{exact}", reward=found["val_reward"], exact=exact)


class GrpoLoss(Objective):
    """The loss of GRPO, computed on sampled answers with rewards.

    Args:
        model: the model on its device, with adapters, before the first step. The reference is made from it.
        tokenizer: turns sampled ids into the texts that rewards read.
        options: options of the loss.
        sampling: how answers are sampled.
        rewards: computes the reward of each answer.
        train: training prompts.
        val: validation prompts.
        device: device of the model.
        autocast: a function that returns the context manager for a forward pass in training.
        num_iterations: number of consecutive steps that use the same answers.
        dry: True if nothing will be trained, so no copy of the model is kept as the reference.
    """

    is_sampled = True
    step_sums_names = (
        *("tokens", "kl", "is_low", "is_high"),  # sums over the sampled tokens, computed in `forward`
        # These are sums over the sampled answers. answered: 1 if the data file has an answer to the prompt.
        # squares: the squared reward. Exceptions: `groups`, `std` and `equal` are sums over the prompts.
        # groups: 1 for each prompt. std: standard deviation of the rewards of the prompt's answers.
        # equal: 1 if these rewards are equal.
        *("completions", "reward", "exact", "length", "truncated", "groups", "std", "equal"),
        *("answered", "squares"),
    )

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: AnyTokenizer,
        options: GrpoOptions,
        sampling: Sampling,
        rewards: Rewards,
        train: EncodedPrompts,
        val: EncodedPrompts,
        device: torch.device,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
        num_iterations: int = 1,
        dry: bool = False,
    ) -> None:
        super().__init__()
        self.model, self.options, self.sampling, self.num_iterations = (
            model,
            options,
            sampling,
            num_iterations,
        )
        self._tokenizer, self._rewards, self._device, self._autocast = tokenizer, rewards, device, autocast
        self._train, self._val = train, val
        self.longest_sample = sampling.options.max_new_tokens or 0
        self._limit, self._multiple = logits_limit(device), vocabulary_multiple(device)
        # A sampled answer may also end with the token that ends all answers in the data: with a chat
        # template, this may be another token than the tokenizer's <sep> or eos.
        ends = train.last_tokens()
        self._ends = [*dict.fromkeys([*ends_of_answer(tokenizer), *(ends if len(ends) == 1 else ())])]
        self._has_adapter = any(True for _ in adapted_layers(model))
        needs_copy = bool(options.beta) and not self._has_adapter
        # The reference is in a tuple, because nn.Module would count the parameters of a plain attribute as
        # its own.
        self._reference = (
            (copy.deepcopy(model).eval().requires_grad_(False),) if needs_copy and not dry else ()
        )
        self.other_bytes = sum(one.nbytes for one in model.parameters()) if needs_copy else 0
        self._of_forward = torch.zeros(4)
        self._of_answers = torch.zeros(10, dtype=torch.float64)
        # (number of the current block, its answers). A block is `num_iterations` consecutive steps, which use
        # the same answers.
        self._kept: tuple[int, list[Rollout]] | None = None
        # With scale_rewards="batch", this is False from the sampling of answers until `sampled_together` has
        # divided their advantages by the standard deviation of all processes' rewards. Otherwise always True.
        self._is_scaled = True
        # call the rewards once now, so that a wrong reward function fails before anything else is done
        samples = train.prompts[:2]
        answers = [one.answer for one in samples]
        rewards(answers, [one.question for one in samples], answers, [one.fields for one in samples])

    # -- sampling --------------------------------------------------------------------------------------------

    def sample(self, step: int, batches: Sequence[Batch]) -> list[Rollout]:
        """Return sampled answers to the prompts of a step.

        The answers are new, unless the step is in the same block of num_iterations steps as the step before.

        Raises:
            RewardError: if a reward fails.
        """
        block = step // self.num_iterations
        self._of_forward = torch.zeros(4)  # `forward` adds to these sums; each step begins at 0
        if self._kept is None or self._kept[0] != block:
            self._of_answers = torch.zeros(10, dtype=torch.float64)
            self._kept = (block, [self._rollout(block, batch) for batch in batches])
            self._is_scaled = self.options.scale_rewards != "batch"
        return self._kept[1]

    def sampled_together(self, all_reduce: Callable[[list[float]], list[float]]) -> list[Rollout]:
        """Return this step's answers.

        With scale_rewards="batch", the advantages are divided by the standard deviation of the step's rewards
        in all processes. Every process must call this method at every step, even if it reuses the answers of
        an earlier step, because `all_reduce` waits for all processes.

        all_reduce: a function that sums each number of a list over the processes.
        """
        assert self._kept is not None
        block, rollouts = self._kept
        if self.options.scale_rewards == "batch":
            of = dict(zip(self.step_sums_names[4:], self._of_answers.tolist()))
            n, total, squares = all_reduce([of["completions"], of["reward"], of["squares"]])
            deviation = math.sqrt(max(0.0, squares - total**2 / max(1.0, n)) / max(1.0, n - 1))
            if not self._is_scaled:
                scaled = [
                    one._replace(advantages=one.advantages / (deviation + LEAST_STD)) for one in rollouts
                ]
                self._kept, self._is_scaled = (block, scaled), True
        return self._kept[1]

    def sampled_shape(self, rows: Sequence[int]) -> tuple[int, int]:
        """Return the largest possible size of a batch: (number of answers, tokens of prompt and answer).

        rows: numbers of the training prompts to which the batch has answers.
        """
        longest = max(len(self._train.prompts[row].ids) for row in rows)
        width = min(longest + self.longest_sample, self.model.config.max_position_embeddings + 1)
        return len(rows) * self.sampling.num_generations, width

    def answers(self, block: int, rows: Sequence[int]) -> list[Answer]:
        """Sample num_generations answers to each prompt. Equal weights and arguments give equal answers.

        block: number of the block of `num_iterations` steps that use these answers, from 0.
        rows: numbers of the training prompts.
        """
        return self._generate(
            [self._train.prompts[row] for row in rows for _ in range(self.sampling.num_generations)],
            self.sampling.options,
            [
                [self.sampling.seed, block, row, number]
                for row in rows
                for number in range(self.sampling.num_generations)
            ],
        )

    def _generate(
        self, prompts: Sequence[Prompt], options: GenerationOptions, seeds: Sequence[list[int] | None]
    ) -> list[Answer]:
        ids, context = [one.ids for one in prompts], self.model.config.max_position_embeddings
        request = check_request(self.model, ids, options, self._ends, self._tokenizer)
        found = [
            Answer(one, request, options.limit(len(one), context), seed) for one, seed in zip(ids, seeds)
        ]
        with torch.inference_mode(), without_warning():
            for _ in decode(self.model, sorted(found, key=lambda one: len(one.prompt)), _AT_ONCE):
                pass
        return found

    def _score(self, answers: Sequence[Answer], prompts: Sequence[Prompt]) -> tuple[list[float], int]:
        """Return the rewards of some answers, and the number of answers that equal those in the data file."""
        texts = [self._tokenizer.decode(one.ids) for one in answers]
        given = [one.answer for one in prompts]
        fields = [one.fields for one in prompts]
        rewards = self._rewards(texts, [one.question for one in prompts], given, fields)
        return rewards, sum(exact_match(*pair) for pair in zip(texts, given) if pair[1])

    def _rollout(self, block: int, batch: Batch) -> Rollout:
        G, rows = self.sampling.num_generations, [int(row) for row in batch.rows]
        if not rows:  # this process has no prompt
            return _padded([], torch.zeros(1), torch.zeros(0, dtype=torch.bool))
        answers = self.answers(block, rows)
        prompts = [self._train.prompts[row] for row in rows for _ in range(G)]
        rewards, exact = self._score(answers, prompts)
        # float64, because the standard deviation squares the rewards, and large squares overflow float32
        table = torch.tensor(rewards, dtype=torch.float64).view(len(rows), G)
        cut = torch.tensor([one.ending is None for one in answers], dtype=torch.bool)
        self._of_answers += torch.tensor(
            [
                *(len(answers), sum(rewards), exact, sum(len(one.chosen) for one in answers)),
                *(float(cut.sum()), len(rows), float(table.std(1).sum())),
                float((table == table[:, :1]).all(1).sum()),
                *(sum(bool(one.answer) for one in prompts), float(table.square().sum())),
            ],
            dtype=torch.float64,
        )
        kept = ~cut if self.sampling.mask_truncated_completions else cut | True
        advantages = group_advantages(table, self.options.scale_rewards).flatten().float()
        rollout = _padded(answers, advantages, kept)
        old = reference = None
        if self.num_iterations > 1:
            old = self._logps(self.model, rollout)
        if self.options.beta and self._has_adapter:
            with disable_adapter(self.model):
                reference = self._logps(self.model, rollout)
        elif self._reference:
            reference = self._logps(self._reference[0], rollout)
        return rollout._replace(old=old, reference=reference)

    @torch.no_grad()
    def _logps(self, model: LanguageModel, rollout: Rollout) -> Tensor:
        """Compute the log-probabilities of the sampled tokens, (P,) on the CPU."""
        targets, _, positions = _answer_tokens(rollout)
        with evaluating(model), self._autocast():
            hidden = model.base_model(rollout.input_ids.to(self._device))
            return self._at(model, hidden, targets.to(self._device), positions.to(self._device)).cpu()

    def _at(self, model: LanguageModel, hidden: Tensor, targets: Tensor, positions: Tensor) -> Tensor:
        """Return the log-probability of each target, (P,), with the temperature used for sampling."""
        hidden = hidden.flatten(0, 1).index_select(0, positions)  # (P, C)
        # Dividing the hidden states divides the logits, because lm_head has no bias.
        hidden = hidden / self.sampling.options.temperature
        return -token_cross_entropy(model.lm_head, hidden, targets, self._limit, self._multiple)

    # -- the loss --------------------------------------------------------------------------------------------

    def count(self, batch: Rollout) -> int:
        """Return a batch's part of the divisor: a step divides its summed loss by the sum of these parts.

        The part depends on loss_type. dapo: the number of sampled tokens that count. bnpo: 1, or 0 if no
        token of the batch counts. Other types: the number of answers with a token that counts.
        """
        mask = batch.answer_mask
        if self.options.loss_type == "bnpo":
            return int(mask.any())
        return int(mask.sum()) if self.options.loss_type == "dapo" else int(mask.any(1).sum())

    def select(self, batch: Rollout | Batch) -> RolloutBatch:
        """Select the sampled tokens of a batch.

        A run passes a Rollout. The estimate of time before a run passes a Batch with the data's answers.
        """
        if isinstance(batch, Batch):
            batch = Rollout(*batch[:4], torch.ones(len(batch.input_ids)), None, None)
        targets, rows, positions = _answer_tokens(batch)
        weights = token_weights(batch.answer_mask.sum(1), self.options)[rows]
        advantages = batch.advantages[rows]
        return RolloutBatch(
            batch.input_ids, targets, advantages, weights, batch.old, batch.reference, positions
        )

    def example(self, device: torch.device) -> RolloutBatch:
        """Return a batch of the smallest possible size: one answer of one token."""
        ids, one = torch.zeros((1, 1), dtype=torch.int64, device=device), torch.ones(1, device=device)
        return RolloutBatch(ids, ids[0], one, one, None, None, ids[0])

    def forward(
        self,
        input_ids: Tensor,
        targets: Tensor,
        advantages: Tensor,
        weights: Tensor,
        old: Tensor | None,
        reference: Tensor | None,
        positions: Tensor,
    ) -> Tensor:
        """Return the summed loss of a batch, a tensor without dimensions."""
        logps = self._at(self.model, self.model.base_model(input_ids), targets, positions)
        found = token_losses(logps, old, reference, advantages, self.options)
        sums = [part.detach().sum() for part in (found.kl, found.is_low, found.is_high)]
        counted = torch.stack([torch.full_like(logps.detach(), 1).sum(), *sums]).float()
        self._of_forward = self._of_forward.to(counted.device) + counted
        return (found.loss * weights).sum()

    def step_sums(self) -> Tensor:
        """Return the sums whose names are in step_sums_names, for the last step and this process."""
        return torch.cat([self._of_forward.cpu().double(), self._of_answers])

    def step_metrics(self, sums: Sequence[float]) -> dict[str, float]:
        """Return the metrics of steps as a dictionary: TRL's name of the metric -> value.

        Args:
            sums: results of `step_sums`, added over all processes, and over one or more steps.
        """
        of = dict(zip(self.step_sums_names, sums))
        n, tokens, groups = (max(of[name], 1.0) for name in ("completions", "tokens", "groups"))
        return {
            "reward": of["reward"] / n,
            "reward_std": of["std"] / groups,
            "frac_reward_zero_std": of["equal"] / groups,
            **({"exact_match": of["exact"] / of["answered"]} if of["answered"] else {}),
            "completions/mean_length": of["length"] / n,
            "completions/clipped_ratio": of["truncated"] / n,
            **({"kl": of["kl"] / tokens} if self.options.beta else {}),
            "clip_ratio/low_mean": of["is_low"] / tokens,
            "clip_ratio/high_mean": of["is_high"] / tokens,
            "clip_ratio/region_mean": (of["is_low"] + of["is_high"]) / tokens,
        }

    # -- what a checkpoint stores ----------------------------------------------------------------------------

    def state(self) -> dict[str, Tensor]:
        """Return the answers that later steps also use; empty if num_iterations is 1."""
        if self.num_iterations == 1 or self._kept is None:
            return {}
        block, rollouts = self._kept
        found = {"rollout.block": torch.tensor([block, len(rollouts)]), "rollout.sums": self._of_answers}
        for number, rollout in enumerate(rollouts):
            for name, tensor in rollout._asdict().items():
                if tensor is not None:
                    found[f"rollout.{number}.{name}"] = tensor.contiguous()
        return found

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Load the result of the method `state`. If it has no answers, the next step samples new ones."""
        self._kept = None
        if self.num_iterations == 1 or "rollout.block" not in state:
            return
        block, count = state["rollout.block"].tolist()
        rollouts = [
            Rollout(*(state.get(f"rollout.{number}.{name}") for name in Rollout._fields))  # type: ignore[arg-type]
            for number in range(count)
        ]
        self._kept, self._of_answers, self._is_scaled = (block, rollouts), state["rollout.sums"], True

    # -- evaluation ------------------------------------------------------------------------------------------

    def evaluate(
        self,
        model: LanguageModel,
        batches: Iterable[Batch],
        device: torch.device,
        finish: Finish | None = None,
    ) -> GrpoReport:
        """Answer each validation prompt with the most likely tokens, and measure the rewards.

        Raises:
            RewardError: in all processes, if a reward fails in one of them.
        """
        report, failure = GrpoReport(), ""
        options = GenerationOptions(max_new_tokens=self.sampling.options.max_new_tokens)
        for batch in batches:
            prompts = [self._val.prompts[int(row)] for row in batch.rows]
            if not prompts or failure:
                continue
            answers = self._generate(prompts, options, [None] * len(prompts))
            try:
                rewards, exact = self._score(answers, prompts)
            except RewardError as error:
                failure, report.failures = str(error), 1.0
                continue
            report.prompts += len(prompts)
            report.reward += sum(rewards)
            report.exact += exact
            report.tokens += sum(len(one.chosen) for one in answers)
            report.truncated += sum(one.ending is None for one in answers)
            report.answered += sum(bool(one.answer) for one in prompts)
        if finish is not None:
            finish(report)
        if report.failures:
            raise RewardError(failure or "a reward failed in another process")
        return report


def _padded(answers: Sequence[Answer], advantages: Tensor, kept: Tensor) -> Rollout:
    """Build a batch of prompts and answers, padded on the right.

    Args:
        kept: (B,) bool: False for an answer that the loss ignores.
    """
    # a process without a prompt gets a row that does not count
    rows = [[*one.prompt, *one.chosen] for one in answers] or [[0, 0]]
    width = max(map(len, rows))
    ids = np.zeros((len(rows), width), dtype=np.int64)
    real, said = np.zeros((2, len(rows), width), dtype=np.bool_)
    for number, row in enumerate(rows):
        ids[number, : len(row)] = row
        real[number, : len(row)] = bool(answers)
    for number, one in enumerate(answers):
        said[number, len(one.prompt) : len(rows[number])] = bool(kept[number])
    table = torch.from_numpy(ids)
    tokens, answer = (torch.from_numpy(mask[:, 1:].copy()) for mask in (real, said))
    return Rollout(
        table[:, :-1].contiguous(), table[:, 1:].contiguous(), tokens, answer, advantages, None, None
    )


def _answer_tokens(batch: Rollout) -> tuple[Tensor, Tensor, Tensor]:
    """Return the tokens of answers, their rows, and their positions in the flat B * T tokens, each (P,)."""
    positions = batch.answer_mask.flatten().nonzero().flatten()
    return batch.targets.flatten()[positions], positions // batch.input_ids.shape[1], positions
