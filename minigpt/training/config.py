"""All options of a training run, in one frozen dataclass. A recipe is a TOML file with the same keys.

The flags of `minigpt train` are the fields of TrainConfig. A field has the name that Hugging Face's
TrainingArguments or GPT2Config gives to the same option. This module only holds, checks and reads options.
"""

import dataclasses
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from minigpt.console.command_line import CommandOptions
from minigpt.data.field_names import DataOptions
from minigpt.data.sample_weights import parse_keyword_weights
from minigpt.errors import InputError, Message, shown, unknown_name
from minigpt.families.options import OPTIONS, FamilyName
from minigpt.storage.json_files import read_json, read_toml
from minigpt.training.sizing import parse_size

if TYPE_CHECKING:
    from minigpt.families.registry import ModelConfig

__all__ = ["FOREIGN_OPTIONS", "PER_CALL", "RECIPES", "RUN_FILE", "Precision", "TrainConfig"]
__all__ += ["checked_config", "read_recipe", "read_run"]

RECIPES = Path(__file__).parent / "recipes"
RUN_FILE = "run.json"  # file in the output folder that holds the resolved configuration
# Flags that --resume does not take from the earlier run. To use such a flag again, give it again.
PER_CALL = (
    "overwrite",
    "dry_run",
    "json",
    "language",
    "allow_changed_data",
)

# For each family: the options that it does not have, with the value that means "not given". Any other value
# of such an option is an error.
FOREIGN_OPTIONS = {name: family.UNSUPPORTED for name, family in OPTIONS.items()}
Precision: TypeAlias = Literal["auto", "float32", "bfloat16", "float16"]


@dataclass(frozen=True, kw_only=True)
class TrainConfig(DataOptions, CommandOptions):
    """Train a GPT on questions and answers, or with --text on plain text."""

    RANGES = {
        "val_fraction": (1e-6, 0.999999),
        "n_layer": (1, 1000),
        "n_embd": (1, 10**6),
        "n_head": (1, 10**4),
        "block_size": (1, 10**7),
        "dropout": (0.0, 0.999999),
        "num_key_value_heads": (0, 10**4),
        "head_dim": (0, 10**6),
        "intermediate_size": (0, 10**7),
        "rope_theta": (1e-6, 1e38),
        "max_length": (3, 10**6, "a character and two separators at least"),
        "batch_size": (1, 10**6),
        "tokens_per_batch": (0, 10**9),
        "gradient_accumulation_steps": (1, 10**6),
        "alpha": (1e-6, 1.0),
        "temperature": (1e-3, 1e3),
        "num_train_epochs": (0.0, 1e9),
        "max_steps": (0, 10**9),
        "learning_rate": (0.0, 1e38),
        "muon_learning_rate": (0.0, 1e38),
        "muon_weight_decay": (0.0, 1e38),
        "min_lr_ratio": (0.0, 1e38),
        "decay_ratio": (1e-6, 1.0),
        "warmup_steps": (0, 10**9),
        "weight_decay": (0.0, 1e38),
        "adam_beta1": (0.0, 0.999999),
        "adam_beta2": (0.0, 0.999999),
        "max_grad_norm": (0.0, 1e38),
        "eval_steps": (0, 10**9),
        "logging_steps": (0, 10**9),
        "save_total_limit": (1, 10**6),
        "keep_every": (0, 10**9),
        "max_bad_steps": (1, 10**6),
        "seed": (0, 2**63 - 1),
        "threads": (0, 1024),
        "workers": (0, 1024),
    }

    recipe: str = ""
    """name of a recipe, or path of a TOML file; empty: qa-gpu where there is a CUDA device, else qa-cpu"""

    size: str = ""
    """small, base, large, a time (10min) or 2e6GFLOP: replaces the recipe's shape and steps, but no flag"""

    # Input and output
    train_data: Path = Path("data/train.jsonl")
    """training data: questions and answers, or conversations, as JSON Lines, JSON, CSV, Excel or Parquet"""
    val_data: Path = Path("data/val.jsonl")
    """validation data, in the same formats; the model never learns from it"""
    vocab_path: Path = Path("data/vocab.json")
    """vocabulary file, made by `minigpt vocab`"""
    text: Path | None = None
    """text to learn from instead of train_data: a file or folder of plain text, or of records with a text"""
    val_text: Path | None = None
    """validation text; the model never learns from it; without it, the last val_fraction of --text"""
    val_fraction: float = 0.1
    """share of the data that is validation data where none is given; of --text: its end"""
    tokenizer: str = "char"
    """char (characters of --text, else --vocab_path), a vocab.json, or a folder with a tokenizer.json"""
    text_field: str = ""
    """with --text: field of a record that holds the text; empty: text or a similar name, or the longest"""
    document_separator: str = "auto"
    """with --text: the line between documents; blank: empty lines; none: no such line; auto: <|endoftext|>"""
    init_from: Path | None = None
    """start from the weights of this folder: one of your runs, or a Hugging Face model"""
    add_tokens: str = ""
    """with weights: new tokens from a file (one per line), or from-data: characters that the data has"""
    new_rows: Literal["mean", "zeros", "sampled"] = "mean"
    """initial embeddings of new tokens: the mean of the old ones, zeros, or drawn with their covariance"""
    shards: Path | None = None
    """folder for the encoded --text, reused while the text is the same; without it, OUTPUT/shards"""
    output: Path = Path("output")
    """folder of the run: checkpoints (with the links best and last), metrics.jsonl, tensorboard/"""
    resume: bool = False
    """continue from the newest complete checkpoint in the output folder; the result has the same bits"""
    allow_changed_data: bool = False
    """with --resume: continue even if the data has changed since the run began"""
    overwrite: bool = False
    """start a new run; the run in the output folder is moved to OUTPUT.previous and replaces an older one"""
    dry_run: bool = False
    """print the model's parts and the estimated memory and time, and do not train"""

    # Model
    family: FamilyName = "gpt"
    """architecture: the GPT of the documents, or Qwen3 (RMSNorm, RoPE, grouped queries, SwiGLU)"""
    n_layer: int = 6
    """number of transformer blocks"""
    n_embd: int = 768
    """width of the model: numbers in the vector of a token"""
    n_head: int = 8
    """number of attention heads; must divide n_embd, unless head_dim is given"""
    block_size: int = 256
    """longest sequence that the model can read, in tokens"""
    dropout: float = 0.1
    """gpt: share of activations that are set to zero in training"""
    bias: bool = False
    """gpt: biases in every linear layer, as in GPT-2; without it, only qkv_proj has biases"""
    gelu: Literal["exact", "tanh"] = "exact"
    """gpt: the exact GELU, or GPT-2's tanh approximation"""
    num_key_value_heads: int = 0
    """qwen3: number of key and value heads; must divide n_head; 0: as many as n_head"""
    head_dim: int = 0
    """qwen3: width of an attention head, an even number; 0: n_embd / n_head"""
    intermediate_size: int = 0
    """qwen3: width inside the MLP; 0: 8/3 n_embd, which gives as many weights as gpt's MLP"""
    rope_theta: float = 10_000.0
    """qwen3: base of RoPE; the paper's 10,000 is enough for some thousand tokens; published models use 1e6"""
    tie_word_embeddings: bool = True
    """qwen3: lm_head uses the weights of the token embedding; --no_tie_word_embeddings: it has its own"""
    zero_projections: bool = False
    """start with zeros in the last layer of attention and MLP and in an untied lm_head: blocks add nothing"""

    # Batches
    max_length: int = 128
    """most tokens of a pair (question, answer, two separators); longer pairs are cut"""
    batch_size: int = 32
    """most pairs in a batch; with --text: number of windows of block_size tokens"""
    tokens_per_batch: int = 0
    """most tokens in a batch, padding included; 0: no limit"""
    gradient_accumulation_steps: int = 1
    """number of batches whose gradients are summed for one step"""
    by_length: bool = True
    """put pairs of similar length into one batch, so that there is little padding"""
    pad_to_max_length: bool = False
    """pad every batch to max_length, instead of to its longest pair"""
    loss_on: Literal["answer", "all"] = "answer"
    """targets of the loss: the tokens of the answer, or all tokens"""
    keyword_weight: str = ""
    """samples with these keywords count more, such as plt:3,pd:2: 1 + 3 for each plt + 2 for each pd"""
    teacher: Path | None = None
    """learn from this model's probabilities, too (distillation): its folder; it has the same tokenizer"""
    alpha: float = 0.5
    """with teacher: weight of its probabilities in the loss; 1: they alone count, not the data's tokens"""
    temperature: float = 1.0
    """with teacher: above 1, unlikely tokens count more; --task grpo: the temperature of sampled answers"""

    # Steps and optimiser
    num_train_epochs: float = 15.0
    """number of passes over the training data"""
    max_steps: int = 0
    """number of steps; then num_train_epochs does not count; 0: as many as num_train_epochs needs"""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """AdamW for every parameter, or Muon for the matrices of the blocks and AdamW for the rest"""
    learning_rate: float = 1e-4
    """AdamW's highest learning rate"""
    muon_learning_rate: float = 0.02
    """Muon's highest learning rate"""
    muon_weight_decay: float = 0.01
    """Muon's decoupled weight decay"""
    lr_scheduler_type: Literal["cosine", "wsd", "constant"] = "cosine"
    """after the warm-up: cosine down to min_lr_ratio; wsd: constant, then linear to min_lr_ratio; constant"""
    min_lr_ratio: float = 0.1
    """last learning rate of cosine and wsd, as a share of the highest one"""
    decay_ratio: float = 0.2
    """wsd: share of the steps, at the end of the run, in which the learning rate falls"""
    warmup_steps: int = 0
    """number of steps in which the learning rate rises to its highest value"""
    weight_decay: float = 0.01
    """AdamW's decoupled weight decay; it applies to matrices only, not to biases and norms"""
    adam_beta1: float = 0.9
    """AdamW's beta1: decay rate of the mean of the gradient"""
    adam_beta2: float = 0.999
    """AdamW's beta2: decay rate of the mean of the squared gradient"""
    max_grad_norm: float = 0.0
    """norm to which a longer gradient is scaled down; 0: no clipping"""

    # Evaluation, logging, checkpoints
    eval_steps: int = 0
    """steps between evaluations on all of val_data; each also saves a checkpoint; 0: ten in a run"""
    eval_task: tuple[str, ...] = ()
    """files or folders of tasks to measure at each evaluation, 100 questions of each; see minigpt eval"""
    logging_steps: int = 0
    """steps between two lines of metrics.jsonl; 0: ten, or fewer in a short run, for a hundred lines"""
    save_total_limit: int = 2
    """number of newest checkpoints to keep; the best one is kept besides"""
    keep_every: int = 0
    """also evaluate after every so many steps, and keep these checkpoints (minigpt look --along); 0: none"""
    save_async: bool = False
    """write checkpoints in the background, while training continues"""
    on_save_error: Literal["continue", "stop"] = "continue"
    """if a checkpoint cannot be written (disk full, say): warn and try again at the next save, or stop"""
    max_bad_steps: int = 3
    """steps in a row with a NaN or infinite loss or gradient, after which the last checkpoint is reloaded"""
    report_to: Literal["none", "tensorboard", "wandb", "all"] = "tensorboard"
    """tools that also show the numbers of metrics.jsonl, if installed (wandb: WANDB_PROJECT, WANDB_MODE)"""

    # Machine
    seed: int = 42
    """seed of weights, data order and dropout; on a CPU: same seed, data and threads give the same bits"""
    device: str = "auto"
    """cpu, cuda, mps, or auto: the fastest one of this machine"""
    precision: Precision = "float32"
    """dtype of matrix products; auto: 16 bits on CUDA and on CPUs with AVX-512 BF16 or AMX, else float32"""
    compile: bool = False
    """compile the model with torch.compile: a minute at the start, then faster steps on a GPU"""
    gradient_checkpointing: bool = False
    """recompute activations in the backward pass instead of keeping them: less memory, a third more work"""
    threads: int = 0
    """number of CPU threads; 0: one per core"""
    workers: int = 0
    """number of processes that encode --text; 0: one per core; the number does not change the shards"""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """with several processes: each has the whole model (ddp), or a shard of it (fsdp: for large models)"""

    def __post_init__(self) -> None:
        if self.size:
            parse_size(self.size)
        super().__post_init__()
        if self.keyword_weight:
            parse_keyword_weights(self.keyword_weight)
        if not self.max_steps and not self.num_train_epochs:
            raise InputError("nothing to do: both max_steps and num_train_epochs are 0")
        if self.text is None and self.val_text:
            raise InputError("--val_text belongs to --text; for questions and answers: --val_data")
        output = self.output.absolute()
        if self.shards is not None and self.shards.absolute() == output:
            raise InputError(f"--shards {self.shards} is the output folder: each needs a folder of its own")
        for folder, what in ((self.starts_from, "where training starts"), (self.teacher, "the teacher")):
            if self.overwrite and folder and folder.absolute().is_relative_to(output):
                raise InputError(f"--overwrite would move {folder}, {what}: give another --output")
        if self.add_tokens and self.starts_from is None:
            raise InputError("--add_tokens needs a model that has tokens: give --init_from FOLDER, too")
        if self.starts_from is not None and self.tokenizer != "char":
            raise InputError(
                f"the tokenizer is that of the weights in {self.starts_from}: leave out --tokenizer; "
                "--add_tokens makes it larger"
            )
        if self.text is None and self.max_length - 1 > self.block_size:
            raise InputError(
                f"pairs of max_length={self.max_length} tokens do not fit into block_size={self.block_size}; "
                "raise --block_size or lower --max_length"
            )
        for name, nothing in FOREIGN_OPTIONS[self.family].items():
            if getattr(self, name) != nothing:
                got = f"{name}={getattr(self, name)}"
                raise InputError(f"family {self.family} has no {name}: got {got}; it must be {nothing} here")
        if self.parallel == "fsdp" and (self.optimizer == "muon" or self.save_async):
            got = "optimizer=muon (it needs whole matrices)" if self.optimizer == "muon" else "save_async"
            raise InputError(f"parallel=fsdp cuts the weights into pieces and does not go with {got}")
        if self.teacher is None and self.alpha != 0.5:
            raise InputError("--alpha belongs to --teacher FOLDER: without a teacher it has no meaning")
        task = getattr(self, "task", "sft")
        if self.temperature != 1.0 and self.teacher is None and task != "grpo":
            raise InputError(
                "--temperature belongs to --teacher FOLDER, or to `minigpt finetune --task grpo`"
            )
        if self.teacher is not None and task != "sft":
            raise InputError(f"--teacher goes with --task sft: got --task {task}")
        if self.teacher is not None and self.parallel == "fsdp":
            raise InputError("--teacher does not go with parallel=fsdp: use parallel=ddp")
        if self.resume and self.overwrite:
            raise InputError("--resume continues a run, --overwrite starts anew: give one of them")

    @classmethod
    def with_task_defaults(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Return a recipe's values without the key `task`, because `minigpt train` has no tasks.

        FinetuneConfig replaces this method: there, it adds the default values of the recipe's task.
        """
        return {name: value for name, value in values.items() if name != "task"}

    @property
    def starts_from(self) -> Path | None:
        """The folder of the weights with which training begins; None: a new model."""
        return self.init_from

    def model_config(self, vocab_size: int) -> "ModelConfig":
        """Build the model configuration of a new model with these options.

        Raises:
            InputError: if the sizes are impossible together (n_head must divide n_embd, ...).
        """
        config: ModelConfig = OPTIONS[self.family].model_config(self, vocab_size)
        return config

    def as_dict(self) -> dict[str, Any]:
        """Return the options as a dict that JSON can hold; paths are strings."""
        ready = {k: str(v) if isinstance(v, Path) else v for k, v in dataclasses.asdict(self).items()}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in ready.items()}


def read_recipe(recipe: str, kind: type[TrainConfig] = TrainConfig) -> TrainConfig:
    """Read a recipe by its name or by the path of a TOML file.

    A file may begin with `base = "qa-cpu"`. Options that the file leaves out then have that recipe's values,
    instead of the defaults of TrainConfig.

    Raises:
        InputError: for a recipe that does not exist, invalid TOML, an unknown key (the message suggests a
            similar key), or a value of the wrong type.
    """
    path = Path(recipe) if recipe.endswith(".toml") else RECIPES / f"{recipe}.toml"
    known = sorted(file.stem for file in RECIPES.glob("*.toml"))
    if not recipe.endswith(".toml") and recipe not in known:
        raise InputError(unknown_name("recipe", recipe, known))
    try:
        values = read_toml(path)
    except FileNotFoundError:
        raise InputError(f"recipe {path} does not exist; the built-in ones are {', '.join(known)}") from None
    except ValueError as error:
        raise InputError(f"recipe {path} is not valid TOML: {error}") from None
    except OSError as error:
        raise InputError(f"recipe {path} cannot be read: {error.strerror or error}") from None
    base = values.pop("base", "")
    if base and base not in known:
        raise InputError(f"recipe {path}: base = {base!r}: expected one of {', '.join(known)}")
    inherited = read_recipe(base, kind).as_dict() if base else {}
    values = kind.with_task_defaults({**inherited, **values})
    return checked_config({**values, "recipe": recipe}, f"recipe {path}", kind)


def read_run(output: Path, kind: type[TrainConfig] = TrainConfig) -> TrainConfig:
    """Read the configuration of an earlier run from its folder, to resume the run.

    Args:
        kind: the class of the run's options: TrainConfig, or FinetuneConfig.

    Raises:
        InputError: if the folder holds no run, or a run of another command, or its run.json is damaged.
    """
    path = output / RUN_FILE
    if not path.exists():
        raise InputError(
            Message("nothing to resume: {path} does not exist; start a run without --resume", path=path)
        )
    try:
        values = {**read_json(path)["config"]}
    except (ValueError, KeyError, TypeError):
        raise InputError(
            f"{path} is damaged: copy {output / 'last' / 'training_state.json'} over it, which holds the "
            "settings too, or start anew with --overwrite"
        ) from None
    if ("task" in values) != hasattr(kind, "task"):
        command = "finetune" if "task" in values else "train"
        raise InputError(f"{output} holds a run of `minigpt {command}`: continue it with that command")
    flags = {**dict.fromkeys(PER_CALL, False), "language": kind.language}
    return checked_config({**values, **flags, "output": str(output), "resume": True}, str(path), kind)


def checked_config(values: dict[str, Any], source: str, kind: type[TrainConfig] = TrainConfig) -> TrainConfig:
    """Build a configuration from values that JSON or TOML can hold, and check them.

    Args:
        values: option names with their values; a path may be a string.
        source: name of the file or the options, for error messages.
        kind: class of the configuration.

    Raises:
        InputError: for an unknown key (the message suggests a similar key), a wrong type, or a value out of
            range.
    """
    every = typing.get_type_hints(kind)
    hints = {one.name: every[one.name] for one in dataclasses.fields(kind)}  # without class variables
    for key, value in values.items():
        if key not in hints:
            raise InputError(f"{source}: {unknown_name('key', key, hints)}")
        values[key] = _typed(source, key, value, hints[key])
    return kind(**values)


def _typed(source: str, key: str, value: object, hint: Any) -> object:
    if isinstance(hint, types.UnionType):  # a hint such as `Path | None`
        if value is None:
            return value
        hint = next(one for one in typing.get_args(hint) if one is not types.NoneType)
    if typing.get_origin(hint) is Literal:
        fits = value in typing.get_args(hint)
    elif hint is float:
        fits = isinstance(value, int | float) and not isinstance(value, bool)
        # Convert via a string: `float(10**400)` raises OverflowError, but `float("1000...")` is infinity.
        value = float(str(value)) if fits else value
    elif typing.get_origin(hint) is tuple:
        inner = typing.get_args(hint)[0]
        fits = isinstance(value, list | tuple) and all(type(one) is inner for one in value)
        value = tuple(value) if isinstance(value, list | tuple) else value
    elif hint is Path:
        fits = isinstance(value, str | Path)
        value = Path(value) if isinstance(value, str | Path) else value
    else:
        fits = type(value) is hint
    if not fits:
        want = (
            "a path" if hint is Path else hint.__name__ if isinstance(hint, type) else typing.get_args(hint)
        )
        raise InputError(f"{source}: {key} = {shown(value)}: expected {want}")
    return value
