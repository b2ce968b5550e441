"""The losses that a run minimises. This file has next-token prediction.

A TrainStep calls three methods of an `Objective`, which is a model with its loss on top:

    count(batch) -> int          number of targets that count; a step's loss is the mean over these targets
    select(batch) -> tensors     the inputs of `forward`, still on the CPU
    forward(*tensors) -> Tensor  the summed loss, a tensor without dimensions

An evaluation calls `evaluate`. To save memory, the cross-entropy is computed in pieces, so that only a part
of the logits is in memory.

On CUDA, lm_head's matrix is padded with rows of zeros for the product. The reason: a GPU multiplies faster if
each row of the logits begins at a multiple of 16 bytes, but a vocabulary of 50,257 is odd. The logits of the
added rows are cut off before the softmax, so loss, gradient and the saved model do not change. Padding costs
little, because autocast copies the weights anyway.

Letters in shapes: B rows, T tokens, C channels, P positions that count, V entries of the vocabulary.
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from minigpt.data.batches import Batch
from minigpt.evaluation.loss import Report, evaluate_loss
from minigpt.families.registry import LanguageModel

__all__ = [
    "Finish", "LossBatch", "NextTokenLoss", "Objective",
    "logits_limit", "summed_cross_entropy", "token_cross_entropy", "vocabulary_multiple",
]  # fmt: skip

_AT_ONCE = 2**23  # largest number of logits in a piece of _LinearCrossEntropy (32 MiB in float32)
# a function that replaces the sums in a report by the sums over all processes
Finish: TypeAlias = Callable[[Report], None]


class LossBatch(NamedTuple):
    """The tensors of a batch that the loss needs."""

    input_ids: Tensor  # (B, T) int64
    targets: Tensor  # (P,) int64: the targets that the loss counts
    positions: Tensor | None  # (P,) int64: indices of the targets in the flat B * T tokens; None: all count


class Objective(nn.Module):
    """A model with its loss on top. DDP and FSDP wrap this module, because they hook into `forward`.

    `forward` takes the result of `select`, on the model's device, and returns the summed loss, a tensor ().
    """

    model: LanguageModel
    is_sampled = False  # True: `sample` adds sampled answers, so batch sizes can differ between processes
    num_iterations = 1  # number of consecutive steps that use the same batches
    longest_sample = 0  # largest number of tokens in an answer that `sample` adds to a row
    other_bytes = 0  # bytes of other models that stay in memory, such as a teacher
    step_sums_names: tuple[str, ...] = ()  # names of the numbers that `step_sums` returns

    def sample(self, step: int, batches: Sequence[Any]) -> list[Any]:
        """Return the batches on which a step trains. A subclass may add answers of the model.

        Args:
            step: counted from 0.
            batches: this process's batches.
        """
        return [*batches]

    def sampled_together(self, all_reduce: Callable[[list[float]], list[float]]) -> list[Any]:
        """Return the batches that `sample` made.

        A subclass may scale values in the batches by numbers that are sums over all processes.

        Args:
            all_reduce: a function that sums each number of a list over the processes.
        """
        raise NotImplementedError

    def sampled_shape(self, rows: Sequence[int]) -> tuple[int, int]:
        """Return the largest possible size of a batch with sampled answers: (number of rows, tokens per row).

        rows: numbers of the training examples to which `sample` adds answers.
        """
        raise NotImplementedError

    def step_sums(self) -> Tensor:
        """Return this process's sums for the metrics of the last step. `step_sums_names` has their names."""
        return torch.zeros(0, dtype=torch.float64)

    def step_metrics(self, sums: Sequence[float]) -> dict[str, float]:
        """Return the metrics of one or more steps as a dictionary: name -> value.

        sums: results of `step_sums`, added up over these steps and over the processes.
        """
        return {}

    def state(self) -> dict[str, Tensor]:
        """Return the tensors of this process that a checkpoint must hold besides the weights."""
        return {}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Load what the method `state` of this process returned when the checkpoint was saved.

        {}: the checkpoint holds nothing for this process, because the run had fewer processes then.
        """

    def count(self, batch: Any) -> int:
        """Return a batch's part of the divisor: a step divides its summed loss by the sum of these parts.

        It is the number of losses that `forward` adds up, unless a subclass says otherwise (GrpoLoss).
        """
        raise NotImplementedError

    def select(self, batch: Any) -> tuple[Tensor | None, ...]:
        """Return the arguments of `forward` for a batch: a NamedTuple of tensors on the CPU."""
        raise NotImplementedError

    def example(self, device: torch.device) -> tuple[Tensor | None, ...]:
        """Return arguments of `forward` for a batch of the smallest possible size, on `device`.

        With DDP, one backward pass of this batch is done before the first step (see parallel.py).
        """
        raise NotImplementedError

    def evaluate(
        self,
        model: LanguageModel,
        batches: Iterable[Any],
        device: torch.device,
        finish: Finish | None = None,
    ) -> Report:
        """Measure the model on some batches.

        Args:
            model: the model of this objective; for a sharded model, an object that gathers its weights.
            finish: a function that is called with the report of this process. It replaces the report's sums
                by the sums over all processes. None: there is only one process.
        """
        raise NotImplementedError

    def conclude(self, data: Any, best: Path) -> dict[str, Any]:
        """Print further results of the best checkpoint at the end of a run, and return them for `--json`.

        Args:
            data: the data of the run.
            best: the checkpoint's folder.
        """
        return {}


class NextTokenLoss(Objective):
    """The loss of next-token prediction: cross-entropy.

    Args:
        model: its parameters that require gradients are trained.
        loss_on: "answer" counts the targets in answers; "all" counts every target that is not padding.
        device: decides how many logits are in memory at a time, and the padding of lm_head.
    """

    def __init__(self, model: LanguageModel, loss_on: Literal["answer", "all"], device: torch.device) -> None:
        super().__init__()
        self.model = model
        self.loss_on = loss_on
        self._limit, self._multiple = logits_limit(device), vocabulary_multiple(device)

    def _mask(self, batch: Batch) -> Tensor:
        """Return a mask (B, T), True for the targets that the loss counts.

        Attention needs no mask for padding: it is causal, and padding is on the right.
        """
        return batch.answer_mask if self.loss_on == "answer" else batch.token_mask

    def count(self, batch: Batch) -> int:
        """Return the number of targets in a batch that the loss counts."""
        return int(self._mask(batch).sum())

    def select(self, batch: Batch) -> LossBatch:
        """Return the tensors that `forward` needs: ids, the targets that count, and their positions.

        The positions are computed on the CPU. If they were computed on a GPU, the CPU would have to wait for
        their number.
        """
        mask, targets = self._mask(batch), batch.targets.flatten()  # (B, T), (B * T,)
        positions = None if bool(mask.all()) else mask.flatten().nonzero().flatten()  # (P,)
        return LossBatch(batch.input_ids, targets if positions is None else targets[positions], positions)

    def example(self, device: torch.device) -> LossBatch:
        """Return a batch of the smallest possible size: one token."""
        ids = torch.zeros((1, 1), dtype=torch.int64, device=device)
        return LossBatch(ids, ids[0], None)

    def evaluate(
        self,
        model: LanguageModel,
        batches: Iterable[Batch],
        device: torch.device,
        finish: Finish | None = None,
    ) -> Report:
        """Measure the loss over all tokens, and over the tokens of answers."""
        return evaluate_loss(model, batches, device, finish, self.loss_on)

    def forward(
        self, input_ids: Tensor, targets: Tensor | None = None, positions: Tensor | None = None
    ) -> Tensor:
        """Return the summed cross-entropy of `targets` (P,). Without targets, return hidden states (B, T, C).

        lm_head is the largest product of a small model, so it is computed only at the `positions` that count.
        """
        hidden: Tensor = self.model.base_model(input_ids)  # (B, T, C)
        if targets is None:
            return hidden
        hidden = hidden.flatten(0, 1)  # (B * T, C)
        if positions is not None:
            hidden = hidden.index_select(0, positions)  # (P, C)
        return summed_cross_entropy(self.model.lm_head, hidden, targets, self._limit, self._multiple)


def logits_limit(device: torch.device) -> int:
    """Return the largest number of logits that the loss may hold in memory.

    On a CPU the number is 2**26 (256 MiB in float32). On CUDA it is the number of logits that fit into a
    quarter of the memory; a logit with its gradient takes 14 bytes. If a batch has more logits, CUDA computes
    each logit twice (see `summed_cross_entropy`), so a smaller limit would cost time.
    """
    if device.type != "cuda":
        return 2**26
    return max(2**26, int(torch.cuda.get_device_properties(device).total_memory) // (4 * 14))


def vocabulary_multiple(device: torch.device) -> int:
    """Return m: in training, lm_head gets rows of zeros until its number of rows is a multiple of m."""
    return 64 if device.type == "cuda" else 1


def summed_cross_entropy(
    lm_head: Callable[[Tensor], Tensor],
    hidden: Tensor,
    targets: Tensor,
    limit: int = 2**26,
    multiple: int = 1,
) -> Tensor:
    """Return the sum of -log p(target) over all positions, in float32 for any dtype of the logits.

    If there are more than `limit` logits, they are computed in pieces, each for some of the positions. On a
    CPU, the gradient of a piece is computed together with its loss: see `_LinearCrossEntropy`. On other
    devices, the logits of a piece are freed after its loss, and the backward pass computes them again. This
    costs one more product with lm_head.

    Args:
        lm_head: a linear layer, hidden (P, C) -> logits (P, V).
        hidden: hidden states, (P, C).
        targets: id of the correct token for each hidden state, (P,) int64.
        limit: largest number of logits in memory.
        multiple: V is padded to a multiple of this number for the product. 1: no padding.
    """
    weight: Tensor = lm_head.weight  # type: ignore[attr-defined]
    if _is_fused(lm_head, weight, len(hidden), limit):
        rows = max(1, min(limit, _AT_ONCE) // len(weight))
        total: Tensor = _LinearCrossEntropy.apply(hidden, weight, targets, rows)  # type: ignore[no-untyped-call]
        return total
    pieces = _cross_entropies(lm_head, hidden, targets, limit, multiple, "sum")
    return pieces[0] if len(pieces) == 1 else torch.stack(pieces).sum()


def _is_fused(lm_head: object, weight: Tensor, positions: int, limit: int) -> bool:
    """Return True if `_LinearCrossEntropy` shall compute the loss, together with its gradient.

    The following conditions must hold:

    - lm_head is a linear layer on a CPU, without bias, adapter or shards.
    - Gradients are needed, and torch.compile is not running.
    - Autocast does not compute in float16: small gradients would become 0 before the loss scale is applied.
    - There are more than `limit` logits, or the layer is frozen. With fewer logits, autograd is as good. But
      if the layer is frozen, `_LinearCrossEntropy` always needs less memory than autograd, because it keeps
      only the gradient of the hidden states.
    """
    if type(lm_head) is not nn.Linear or lm_head.bias is not None or weight.device.type != "cpu":
        return False
    if not torch.is_grad_enabled() or torch.compiler.is_compiling() or hasattr(weight, "to_local"):
        return False
    if torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.float16:
        return False
    return not weight.requires_grad or positions * weight.shape[0] > limit


class _LinearCrossEntropy(torch.autograd.Function):
    """The summed cross-entropy of a linear layer's outputs, computed in pieces together with its gradient.

    The gradient of logits is softmax minus one-hot. The gradients of hidden states and weights are products
    with this gradient. So memory holds the logits of one piece only, and no logit is computed twice.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, rows: int) -> Tensor:
        """Return the sum of -log p(target). hidden (P, C), weight (V, C), targets (P,).

        The positions are computed in pieces of p = `rows` positions; the last piece may be smaller.
        """
        if torch.is_autocast_enabled("cpu"):
            dtype = torch.get_autocast_dtype("cpu")
            hidden_, weight_ = hidden.to(dtype), weight.to(dtype)
        else:
            hidden_, weight_ = hidden, weight
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        of_hidden = torch.empty_like(hidden) if needs_hidden else None
        of_weight = torch.zeros_like(weight) if needs_weight else None
        total = torch.zeros((), device=hidden.device, dtype=torch.promote_types(hidden_.dtype, torch.float32))
        for first in range(0, len(hidden), rows):
            some = slice(first, first + rows)
            logits = F.linear(hidden_[some], weight_).to(total.dtype)  # (p, V)
            norms = logits.logsumexp(1, keepdim=True)  # (p, 1)
            goal = targets[some, None]  # (p, 1)
            total += (norms - logits.gather(1, goal)).sum()
            if not (needs_hidden or needs_weight):
                continue
            gradient = logits.sub_(norms).exp_()
            gradient.scatter_add_(1, goal, torch.full_like(norms, -1.0))
            gradient = gradient.to(weight_.dtype)
            if of_hidden is not None:
                of_hidden[some] = gradient @ weight_
            if of_weight is not None:
                of_weight += gradient.T @ hidden_[some]
        ctx.save_for_backward(of_hidden, of_weight)
        return total

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        """Multiply the saved gradients in place by `outer`, the gradient of the sum. Works only once."""
        found = [None if one is None else one.mul_(outer[0]) for one in ctx.saved_tensors]
        return found[0], found[1], None, None


def token_cross_entropy(
    lm_head: Callable[[Tensor], Tensor],
    hidden: Tensor,
    targets: Tensor,
    limit: int = 2**26,
    multiple: int = 1,
) -> Tensor:
    """Return -log p(target) of each position, (P,). The arguments are those of `summed_cross_entropy`."""
    return torch.cat(_cross_entropies(lm_head, hidden, targets, limit, multiple, "none"))


def _cross_entropies(
    lm_head: Callable[[Tensor], Tensor],
    hidden: Tensor,
    targets: Tensor,
    limit: int,
    multiple: int,
    reduction: str,
) -> list[Tensor]:
    weight: Tensor = lm_head.weight  # type: ignore[attr-defined]
    vocab_size = weight.shape[0]
    # pad a plain nn.Linear only: an lm_head with an adapter must call its own forward
    if vocab_size % multiple and type(lm_head) is nn.Linear:
        padded = F.pad(weight, (0, 0, 0, -vocab_size % multiple))  # (padded V, C), used by all pieces
        lm_head = functools.partial(_cut_product, padded, vocab_size)
    rows = max(1, limit // vocab_size)
    if len(hidden) <= rows:
        return [_cross_entropy(lm_head, hidden, targets, reduction)]
    pieces = zip(torch.split(hidden, rows), torch.split(targets, rows))
    # The backward pass calls `_cross_entropy` again. It has no dropout, so random states are not restored.
    again: Any = {"use_reentrant": False, "preserve_rng_state": False}
    return [checkpoint(_cross_entropy, lm_head, some, goal, reduction, **again) for some, goal in pieces]


def _cut_product(padded: Tensor, vocab_size: int, hidden: Tensor) -> Tensor:
    return F.linear(hidden, padded)[:, :vocab_size]  # (rows, padded V) -> (rows, V)


def _cross_entropy(
    lm_head: Callable[[Tensor], Tensor], hidden: Tensor, targets: Tensor, reduction: str
) -> Tensor:
    return F.cross_entropy(lm_head(hidden).float(), targets, reduction=reduction)
