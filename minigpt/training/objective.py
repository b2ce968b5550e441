"""Builds the objective of a run (the model with its loss), and the object that writes the model's files."""

from pathlib import Path

import torch

from minigpt.console.command_line import show
from minigpt.console.terminal import warn
from minigpt.data.batches import EncodedExamples
from minigpt.data.preferences import EncodedPreferences
from minigpt.data.prompts import EncodedPrompts
from minigpt.data.windows import TextPart
from minigpt.data.words import WordFinder
from minigpt.errors import InputError
from minigpt.families.registry import LanguageModel, new_model
from minigpt.finetuning.embeddings import resize_token_embeddings
from minigpt.finetuning.freezing import train_only
from minigpt.finetuning.grpo import GrpoOptions
from minigpt.finetuning.layers import add_adapter
from minigpt.finetuning.masked_lm import mask_token_id
from minigpt.finetuning.preferences import LossType
from minigpt.generation.options import GenerationOptions
from minigpt.training.classification import ClassificationData, make_classifier
from minigpt.training.config import TrainConfig
from minigpt.training.distillation_loss import DistillationLoss, load_teacher
from minigpt.training.finetune_config import FinetuneConfig
from minigpt.training.grpo_loss import GrpoLoss, Sampling
from minigpt.training.loss import NextTokenLoss, Objective
from minigpt.training.masked_loss import MaskedTokenLoss
from minigpt.training.mixed_precision import MixedPrecision
from minigpt.training.model_files import (
    AdapterFiles,
    ModelFiles,
    adapter_config,
    require_trainable,
    weights_fingerprint,
)
from minigpt.training.preference_loss import PreferenceLoss, PreferenceOptions
from minigpt.training.rewards import make_rewards
from minigpt.training.run_data import AnyData
from minigpt.training.weighted_loss import KeywordWeights, WeightedTokenLoss, keyword_lines
from minigpt.weights.pretrained import load_model
from minigpt.weights.quantized import is_quantised, prepare_training, set_precision

__all__ = ["make_objective"]


def make_objective(config: TrainConfig, data: AnyData, device: torch.device) -> tuple[Objective, ModelFiles]:
    """Return the loss, which holds the model on its device, and the object that writes the model's files.

    Raises:
        InputError: if the model's sizes are not valid, if the weights cannot be read or belong to another
            vocabulary, or if an option names layers or parameters that the model does not have.
    """
    if isinstance(config, FinetuneConfig) and isinstance(data, ClassificationData):
        return make_classifier(config, data, device)
    vocab_size = data.tokenizer.get_vocab_size()
    if config.starts_from is None:
        model = new_model(config.model_config(vocab_size), zero_projections=config.zero_projections)
    else:
        model = _with_weights(config, config.starts_from).train()
        if model.config.vocab_size < vocab_size:
            resize_token_embeddings(model, vocab_size, config.new_rows)
    if isinstance(config, FinetuneConfig) and config.task == "dpo":
        return _preference_loss(model, config, data, device)
    if isinstance(config, FinetuneConfig) and config.task == "grpo":
        return _grpo_loss(model, config, data, device)
    files = _choose_parameters(model, config)
    if isinstance(config, FinetuneConfig) and config.task == "mlm":
        mask_id = mask_token_id(data.tokenizer)
        assert mask_id is not None
        words = None if config.whole_words == "none" else WordFinder(data.tokenizer, config.whole_words)
        share, seed = config.mlm_probability, config.seed
        return MaskedTokenLoss(model.to(device), mask_id, share, seed, device, words), files
    weights = data.train.weights if isinstance(data.train, EncodedExamples) else None
    if config.teacher is not None:
        if config.keyword_weight or weights is not None:
            raise InputError("samples have weights, which do not go with --teacher: give one of the two")
        return _distillation_loss(model.to(device), config.teacher, config, data, device, files), files
    if config.keyword_weight or weights is not None:
        keywords = None
        if config.keyword_weight:
            keywords = KeywordWeights(config.keyword_weight, data.tokenizer)
            assert isinstance(data.train, EncodedExamples | TextPart)
            line, warning = keyword_lines(keywords, data.train)
            show(line)
            if warning:
                warn(warning)
        return WeightedTokenLoss(model.to(device), config.loss_on, device, weights, keywords), files
    return NextTokenLoss(model.to(device), config.loss_on, device), files


def _with_weights(config: TrainConfig, folder: Path) -> LanguageModel:
    """Load the model with which training begins. It may be quantised only if the run trains an adapter."""
    model = load_model(folder)
    if isinstance(config, FinetuneConfig) and config.base_precision != "float32":
        set_precision(model, config.base_precision)
    require_trainable(model, config, folder)
    if is_quantised(model):
        prepare_training(model)
    return model


def _choose_parameters(model: LanguageModel, config: TrainConfig) -> ModelFiles:
    """Prepare the model for `--method`, in place: freeze some parameters, or add an adapter.

    Returns: the object that reads and writes the model's files.
    """
    if not isinstance(config, FinetuneConfig) or config.method == "full":
        return ModelFiles()
    if config.method == "freeze":
        train_only(model, config.train_only)
        return ModelFiles()
    adapter = adapter_config(config.method, config.adapter_options())
    add_adapter(model, adapter)
    return AdapterFiles(model, adapter, config.model)


def _distillation_loss(
    model: LanguageModel,
    folder: Path,
    config: TrainConfig,
    data: AnyData,
    device: torch.device,
    files: ModelFiles,
) -> DistillationLoss:
    """Load the teacher and build the loss.

    When a run is resumed, the teacher must have the weights that it had when the run began.
    """
    length = config.max_length - 1 if config.text is None else config.block_size
    teacher = load_teacher(folder, data.tokenizer, length).to(device)
    files.rests_on(teacher_fingerprint=weights_fingerprint(teacher))
    loss_on = config.loss_on if config.text is None else "all"
    return DistillationLoss(model, teacher, loss_on, device, config.alpha, config.temperature)


def _preference_loss(
    model: LanguageModel, config: FinetuneConfig, data: AnyData, device: torch.device
) -> tuple[Objective, ModelFiles]:
    """Build the loss for preference data, such as DPO.

    The reference is the model before the first step, which checkpoints do not hold. A resumed run loads it
    again, so --model must still name a folder with the weights with which the run began.
    """
    assert isinstance(data.train, EncodedPreferences)
    assert isinstance(data.val, EncodedPreferences)
    start = weights_fingerprint(model)
    files = _choose_parameters(model, config)
    files.rests_on(reference_fingerprint=start)
    kind: LossType = config.loss_type  # type: ignore[assignment]  # checked by the configuration
    options = PreferenceOptions(config.beta, config.label_smoothing, kind, config.simpo_gamma)
    autocast = MixedPrecision(config.precision, device).autocast
    loss = PreferenceLoss(
        model.to(device), options, data.train, data.val, device, autocast, dry=config.dry_run
    )
    return loss, files


def _grpo_loss(
    model: LanguageModel, config: FinetuneConfig, data: AnyData, device: torch.device
) -> tuple[Objective, ModelFiles]:
    """Build GRPO's loss, for answers that the model samples.

    If beta is not 0, there is a reference: the model before the first step, which checkpoints do not hold. A
    resumed run loads it again, so --model must still name a folder with the weights with which the run began.
    """
    assert isinstance(data.train, EncodedPrompts)
    assert isinstance(data.val, EncodedPrompts)
    c = config
    rewards = make_rewards(c.reward, c.reward_weights, c.reward_regex, c.reward_length, data.train.fields)
    start = weights_fingerprint(model)
    files = _choose_parameters(model, c)
    if c.beta:
        files.rests_on(reference_fingerprint=start)
    options = GrpoOptions(
        beta=c.beta,
        epsilon=c.epsilon,
        epsilon_high=c.epsilon_high or c.epsilon,
        loss_type=c.loss_type,  # type: ignore[arg-type]  # checked by the configuration
        scale_rewards=c.scale_rewards,
        use_bias_correction_kl=c.use_bias_correction_kl,
        max_completion_length=c.max_completion_length,
    )
    generation = GenerationOptions(
        max_new_tokens=min(c.max_completion_length, model.config.max_position_embeddings - 1),
        do_sample=True,
        temperature=c.temperature,
        top_p=c.top_p,
        top_k=c.top_k,
    )
    sampling = Sampling(c.num_generations, generation, c.seed, c.mask_truncated_completions)
    loss = GrpoLoss(
        *(model.to(device), data.tokenizer, options, sampling, rewards, data.train, data.val, device),
        autocast=MixedPrecision(c.precision, device).autocast,
        num_iterations=c.num_iterations,
        dry=c.dry_run,
    )
    return loss, files
