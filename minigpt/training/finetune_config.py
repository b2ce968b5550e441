"""Options of `minigpt finetune`: the options of a training run, plus start model, task and method."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeAlias

from minigpt.data.records import ProblemType
from minigpt.errors import InputError
from minigpt.training.config import TrainConfig

__all__ = ["GRPO_DEFAULTS", "METHOD_RATES", "TASK_RATES", "TASK_RECIPES", "FinetuneConfig", "Method", "Task"]

Task: TypeAlias = Literal["sft", "classification", "dpo", "grpo", "mlm"]
Method: TypeAlias = Literal["full", "freeze", "lora", "adapter", "ia3"]
# Method of fine-tuning -> its learning rate (after the warm-up), if the user gives none.
METHOD_RATES: dict[str, float] = {"full": 1e-4, "freeze": 3e-4, "lora": 1e-3, "adapter": 3e-3, "ia3": 3e-2}
TASK_RECIPES: dict[str, str] = {
    **dict.fromkeys(("sft", "dpo", "mlm"), "finetune"),
    "classification": "classification",
    "grpo": "grpo",
}
# task -> factor by which the method's learning rate is multiplied; other tasks: 1
TASK_RATES: dict[str, float] = {"dpo": 0.1, "grpo": 0.1}
# Defaults of two options for --task grpo, as in TRL. (FinetuneConfig's fields hold the defaults for dpo.)
GRPO_DEFAULTS: dict[str, Any] = {"loss_type": "dapo", "beta": 0.0}
_LABELLED = ("label_field", "problem_type", "class_weights", "token_dropout", "pretraining_epochs")
# Method that adds an adapter -> the names of its options.
_ADAPTERS: dict[str, tuple[str, ...]] = {
    "lora": (
        *("r", "lora_alpha", "lora_dropout", "target_modules", "layers_to_transform"),
        *("use_rslora", "use_dora", "init_lora_weights", "modules_to_save"),
    ),
    "adapter": ("bottleneck_size", "layers_to_transform", "modules_to_save"),
    "ia3": ("target_modules", "modules_to_save"),
}
_PREFERENCES = ("label_smoothing", "simpo_gamma")
_REWARDS = (
    *("reward", "reward_weights", "reward_regex", "reward_length", "num_generations", "epsilon"),
    *("epsilon_high", "num_iterations", "scale_rewards", "max_completion_length", "top_p", "top_k"),
    *("mask_truncated_completions", "use_bias_correction_kl"),
)
_LOSS_TYPES = {"dpo": ("sigmoid", "ipo", "simpo", "orpo"), "grpo": ("dapo", "grpo", "bnpo", "dr_grpo")}


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(TrainConfig):
    """Continue to train a model on your own data: all weights, some of them, or an adapter beside them."""

    HIDDEN: ClassVar[frozenset[str]] = frozenset({"init_from"})  # has no flag: `--model` replaces it
    RANGES = {
        "pretraining_epochs": (1e-3, 1e6),
        "token_dropout": (0.0, 0.999),
        "r": (1, 10**5),
        "lora_alpha": (1e-6, 1e6),
        "lora_dropout": (0.0, 0.999),
        "bottleneck_size": (1, 10**5),
        "layers_to_transform": (0, 999),
        "mlm_probability": (0.001, 0.999),
        "beta": (0.0, 1e6),
        "label_smoothing": (0.0, 0.5),
        "simpo_gamma": (0.0, 1e6),
        "reward_weights": (-1e6, 1e6),
        "reward_length": (0, 10**6),
        "num_generations": (2, 10**5, "a group of one teaches nothing"),
        "max_completion_length": (1, 10**6),
        "top_p": (1e-6, 1.0),
        "top_k": (0, 10**6),
        "epsilon": (0.0, 1.0),
        "epsilon_high": (0.0, 1e6),
        "num_iterations": (1, 10**4),
    }

    recipe: str = ""
    """name or TOML file of a recipe; left out: classification or grpo for that --task, else finetune"""

    # The data
    val_data: Path = Path()
    """data to measure on, never learned from; left out: val_fraction of the training data"""
    label_field: str = ""
    """classification: name of the label's field or column; left out: the usual names are known"""
    problem_type: ProblemType = "single_label_classification"
    """one label a text, several, or a number"""
    class_weights: Literal["none", "balanced"] = "none"
    """classification: balanced: a rare label's texts count more, as if all labels were equally frequent"""
    token_dropout: float = 0.0
    """classification: share of the tokens that is hidden in training, so that no single word decides"""
    output: Path = Path("finetuned")
    """folder of the run: checkpoints (best, last), metrics.jsonl, tensorboard/"""

    # The model to begin with
    model: Path = Path("output/best")
    """folder of the model: one of your own runs, or any GPT-2 or Qwen3 folder of Hugging Face's libraries"""
    pretraining_epochs: float = 10.0
    """classification without --model: epochs in which a new model first learns to predict the texts"""
    task: Task = "sft"
    """sft: answer as in the data; classification: labels; dpo: preferences; grpo: rewards; mlm: fill gaps"""

    # Hidden tokens of a text
    mlm_probability: float = 0.15
    """mlm: share of the tokens that is hidden"""
    whole_words: Literal["none", "tokenizer", "jieba"] = "none"
    """mlm: hide whole words: those of the tokenizer, or Chinese ones by jieba (package rjieba)"""

    # Two answers to one prompt
    loss_type: Literal["sigmoid", "ipo", "simpo", "orpo", "dapo", "grpo", "bnpo", "dr_grpo"] = "sigmoid"
    """dpo: DPO (sigmoid), IPO, SimPO, ORPO; grpo: the mean over tokens (dapo, bnpo), or over answers"""
    beta: float = 0.1
    """dpo, grpo: how strongly the model stays what it was; simpo: the scale; orpo: the weight"""
    label_smoothing: float = 0.0
    """dpo: share of the pairs that may be the wrong way round (sigmoid, simpo)"""
    simpo_gamma: float = 0.5
    """dpo: the margin that simpo asks for"""

    # Rewards for sampled answers
    reward: tuple[str, ...] = ("exact",)
    """grpo: exact, regex, length, json or FILE.py:FUNCTION; of several, the sum counts"""
    reward_weights: tuple[float, ...] = ()
    """grpo: a factor for each reward; left out: 1"""
    reward_regex: str = ""
    """grpo: what the reward `regex` looks for: a regular expression for the whole answer"""
    reward_length: int = 0
    """grpo: the number of characters that the reward `length` favours"""
    num_generations: int = 8
    """grpo: number of answers that are sampled to each prompt, and compared with each other"""
    max_completion_length: int = 64
    """grpo: most tokens of a sampled answer"""
    top_p: float = 1.0
    """grpo: sample among the most likely tokens whose probabilities add up to this"""
    top_k: int = 0
    """grpo: sample among the k most likely tokens only; 0: among all"""
    epsilon: float = 0.2
    """grpo: a token's probability ratio is clipped at 1 - epsilon"""
    epsilon_high: float = 0.0
    """grpo: and at 1 + epsilon_high; 0: the same as epsilon"""
    num_iterations: int = 1
    """grpo: number of steps that learn from the same sampled answers"""
    scale_rewards: Literal["group", "batch", "none"] = "group"
    """grpo: divide advantages by the standard deviation of their group's rewards, of all rewards, or not"""
    mask_truncated_completions: bool = False
    """grpo: answers that max_completion_length cut off do not count in the loss"""
    use_bias_correction_kl: bool = True
    """grpo: multiply the KL estimate by the probability ratio, because the tokens were sampled earlier"""

    # What is trained
    method: Method = "full"
    """all weights (full), some (freeze, with --train_only), or modules beside them (lora, adapter, ia3)"""
    train_only: str = ""
    """freeze: head, attention, mlp, norms, embeddings, last:N blocks, or a regular expression for names"""
    r: int = 8
    """lora: rank of the adapters"""
    lora_alpha: float = 16
    """lora: what an adapter adds is multiplied by lora_alpha / r"""
    lora_dropout: float = 0.0
    """lora: share of an adapter's inputs that is zeroed in training"""
    target_modules: tuple[str, ...] = ("all-linear",)
    """lora, ia3: all-linear (all but lm_head), names such as c_attn, or one regular expression"""
    layers_to_transform: tuple[int, ...] = ()
    """lora, adapter: numbers of the blocks that get adapters; left out: all"""
    use_rslora: bool = False
    """lora: divide lora_alpha by the square root of r: larger ranks keep learning"""
    use_dora: bool = False
    """lora: learn the length of each row of a weight apart from its direction (DoRA)"""
    init_lora_weights: Literal["default", "gaussian"] = "default"
    """lora: how the first matrix is drawn: uniformly, as linear layers are, or from a normal distribution"""
    modules_to_save: tuple[str, ...] = ()
    """lora, adapter, ia3: names of modules that are trained whole beside the adapters, such as lm_head"""
    base_precision: Literal["float32", "int8", "int4"] = "float32"
    """adapters: how the frozen weights are kept in memory; a quantised folder stays as it is"""
    bottleneck_size: int = 64
    """adapter: channels in the middle of the modules behind attention and MLP"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.task != "classification":
            for name in _LABELLED:
                if getattr(self, name) != FinetuneConfig.__dataclass_fields__[name].default:
                    raise InputError(f"--{name} belongs to --task classification: got --task {self.task}")
        elif self.text is not None:
            raise InputError("--task classification learns from --train_data, not from --text")
        elif self.class_weights != "none" and self.problem_type != "single_label_classification":
            raise InputError(
                f"--class_weights needs one label a text: got --problem_type {self.problem_type}"
            )
        elif self.size:
            raise InputError("--size chooses a new model; a classifier begins with one: give --max_steps")
        elif self.parallel == "fsdp":
            raise InputError("parallel=fsdp does not go with task=classification: use parallel=ddp")
        if (self.method == "freeze") != bool(self.train_only):
            raise InputError(
                f"--method freeze needs --train_only, and only it has that: got --method {self.method} and "
                f"--train_only {self.train_only or '(none)'}"
            )
        if self.keyword_weight and self.task != "sft":
            raise InputError(f"--keyword_weight belongs to --task sft: got --task {self.task}")
        self._check_adapter()
        self._check_preferences()
        self._check_hidden_tokens()
        self._check_rewards()

    @classmethod
    def with_task_defaults(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Return a recipe's values, with the defaults of its task where the recipe gives none."""
        return {**GRPO_DEFAULTS, **values} if values.get("task") == "grpo" else values

    @property
    def has_adapter(self) -> bool:
        """Return True if the base model is frozen, and an adapter beside it is trained."""
        return self.method in _ADAPTERS

    def _check_adapter(self) -> None:
        plain, own = FinetuneConfig.__dataclass_fields__, _ADAPTERS.get(self.method, ())
        for name in dict.fromkeys(name for names in _ADAPTERS.values() for name in names):
            if name not in own and getattr(self, name) != plain[name].default:
                methods = " or ".join(method for method, names in _ADAPTERS.items() if name in names)
                raise InputError(f"--{name} belongs to --method {methods}: got --method {self.method}")
        if self.base_precision != "float32" and not self.has_adapter:
            raise InputError(
                f"--base_precision belongs to --method {', '.join(_ADAPTERS)}: got --method {self.method}"
            )
        if self.base_precision != "float32" and self.task == "classification":
            raise InputError("--base_precision does not go with --task classification")
        if self.add_tokens and self.has_adapter:
            raise InputError(
                "--add_tokens needs --method full or freeze: an adapter adds no rows to its base"
            )
        if self.has_adapter and self.parallel == "fsdp":
            raise InputError(
                f"parallel=fsdp does not go with method={self.method}: an adapter needs no sharding"
            )

    def _check_hidden_tokens(self) -> None:
        if self.task == "mlm" and self.text is None:
            raise InputError("--task mlm learns from a text: give --text FILE")
        if self.task == "mlm" and self.has_adapter:
            raise InputError(
                "--task mlm needs --method full or freeze: it adds a token, and an adapter adds no rows"
            )
        if self.task == "mlm" and self.parallel == "fsdp":
            raise InputError("--task mlm does not go with parallel=fsdp")
        if self.task != "mlm" and self.mlm_probability != 0.15:
            raise InputError(f"--mlm_probability belongs to --task mlm: got --task {self.task}")
        if self.task != "mlm" and self.whole_words != "none":
            raise InputError(f"--whole_words belongs to --task mlm: got --task {self.task}")

    def _check_rewards(self) -> None:
        plain = FinetuneConfig.__dataclass_fields__
        for name in _REWARDS:
            if self.task != "grpo" and getattr(self, name) != plain[name].default:
                raise InputError(f"--{name} belongs to --task grpo: got --task {self.task}")
        if self.task != "grpo":
            return
        if self.text is not None:
            raise InputError("--task grpo answers prompts: give --train_data instead of --text")
        for name, needs in (("regex", "reward_regex"), ("length", "reward_length")):
            if (name in self.reward) != bool(getattr(self, needs)):
                raise InputError(f"--reward {name} needs --{needs}, and only it has that")
        if self.parallel == "fsdp" or self.compile:
            got = "--compile" if self.compile else "parallel=fsdp"
            raise InputError(f"--task grpo samples from the model at every step and does not go with {got}")
        if self.loss_on != "answer":
            raise InputError("--task grpo learns from the model's own answers: leave --loss_on at answer")

    def _check_preferences(self) -> None:
        plain = FinetuneConfig.__dataclass_fields__
        for name in _PREFERENCES:
            if self.task != "dpo" and getattr(self, name) != plain[name].default:
                raise InputError(f"--{name} belongs to --task dpo: got --task {self.task}")
        for name in ("loss_type", "beta"):
            if self.task not in _LOSS_TYPES and getattr(self, name) != plain[name].default:
                raise InputError(f"--{name} belongs to --task dpo or grpo: got --task {self.task}")
        known = _LOSS_TYPES.get(self.task, (self.loss_type,))
        if self.loss_type not in known:
            raise InputError(
                f"--task {self.task} has the loss types {', '.join(known)}: got {self.loss_type}"
            )
        if self.task == "dpo" and not self.beta:
            raise InputError("--task dpo needs a --beta above 0")
        if self.task == "dpo" and self.text is not None:
            raise InputError("--task dpo learns from pairs of answers: give --train_data instead of --text")
        if self.task == "dpo" and self.loss_on != "answer":
            raise InputError("--task dpo compares answers: leave --loss_on at answer")
        if self.label_smoothing and self.loss_type not in ("sigmoid", "simpo"):
            raise InputError(
                f"--label_smoothing belongs to --loss_type sigmoid or simpo: got {self.loss_type}"
            )
        if self.loss_type != "simpo" and self.simpo_gamma != plain["simpo_gamma"].default:
            raise InputError(f"--simpo_gamma belongs to --loss_type simpo: got {self.loss_type}")

    @property
    def starts_from(self) -> Path:
        """Return the folder of the weights with which training begins."""
        return self.model

    def adapter_options(self) -> dict[str, Any]:
        """Return the arguments for the configuration class of the method (for lora: LoraConfig)."""
        options = {name: getattr(self, name) for name in _ADAPTERS[self.method]}
        target = options.get("target_modules")
        if target is not None:
            is_one_text = len(target) == 1 and not target[0].isidentifier()
            options["target_modules"] = target[0] if is_one_text else target
        if self.method == "ia3" and self.target_modules == ("all-linear",):
            options["target_modules"] = ()  # an empty tuple selects the default layers of the model family
        return options
