"""Every option of a training run, in one frozen dataclass; recipes are TOML files of the same keys.

The command line's flags are these fields. Names follow Hugging Face's TrainingArguments and GPT2Config where
those have one. This module holds no behaviour but validation and reading recipes.
"""

import dataclasses
import tomllib
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from minigpt.console.command_line import CommandOptions
from minigpt.data.records import DataOptions
from minigpt.errors import InputError, unknown_name
from minigpt.families.options import OPTIONS, FamilyName
from minigpt.storage.json_files import read_json
from minigpt.training.sizing import parse_size

if TYPE_CHECKING:
    from minigpt.families.registry import ModelConfig

__all__ = ["FOREIGN_OPTIONS", "PER_CALL", "RECIPES", "RUN_FILE", "Precision", "TrainConfig"]
__all__ += ["checked_config", "read_recipe", "read_run"]

RECIPES = Path(__file__).parent / "recipes"
RUN_FILE = "run.json"  # in the output folder: the resolved configuration
PER_CALL = ("overwrite", "dry_run", "json", "allow_changed_data")  # flags of one call, not of the run

# Flags that a family does not have, each with the value that asks for nothing. Another one is an error.
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
        "num_key_value_heads": (0, 10**4),
        "head_dim": (0, 10**6),
        "intermediate_size": (0, 10**7),
        "max_length": (3, 10**6, "a character and two separators at least"),
        "batch_size": (1, 10**6),
        "tokens_per_batch": (0, 10**9),
        "gradient_accumulation_steps": (1, 10**6),
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
        "logging_steps": (1, 10**9),
        "save_total_limit": (1, 10**6),
        "max_bad_steps": (1, 10**6),
        "seed": (0, 2**63 - 1),
        "threads": (0, 1024),
        "workers": (0, 1024),
    }

    recipe: str = ""
    """name of a recipe, or path of a TOML file; empty: qa-gpu where there is a CUDA device, else qa-cpu"""

    size: str = ""
    """small, base, large, a time (10min) or 2e6GFLOP: replaces the recipe's shape and steps, but no flag"""

    # Where from, where to
    train_data: Path = Path("data/train.jsonl")
    """questions and answers, or conversations, to learn from: JSON Lines, JSON, CSV, Excel or Parquet"""
    val_data: Path = Path("data/val.jsonl")
    """the same to measure on, never learned from"""
    vocab_path: Path = Path("data/vocab.json")
    """vocabulary, made by `minigpt vocab`"""
    text: Path | None = None
    """text to learn from instead of train_data: a file or a folder; plain text, or records with a text"""
    val_text: Path | None = None
    """text to measure on, never learned from; without it, the last val_fraction of --text"""
    val_fraction: float = 0.1
    """share of the data that is measured on where no validation data is given; of --text: its end"""
    tokenizer: str = "char"
    """char (of --text: its characters, else --vocab_path), or path of a vocab.json or a tokenizer's folder"""
    text_field: str = ""
    """of --text: name of the field that holds the text; left out: text and its like, or the longest"""
    document_separator: str = "auto"
    """of --text: a line that separates documents, or blank for empty lines, or none; auto: <|endoftext|>"""
    init_from: Path | None = None
    """begin with the weights of this folder instead of a new model: one of your runs, or Hugging Face's"""
    add_tokens: str = ""
    """with weights: more tokens, from a file (one a line), or from-data: characters that the data has"""
    new_rows: Literal["mean", "zeros", "sampled"] = "mean"
    """what the embeddings of more tokens begin as: the mean of the old ones, zeros, or drawn like them"""
    shards: Path | None = None
    """folder for the encoded --text, used again while that is the same; without it, shards in the output"""
    output: Path = Path("output")
    """folder of the run: checkpoints (best, last), metrics.jsonl, tensorboard/"""
    resume: bool = False
    """continue from the newest complete checkpoint in the output folder, to the same bits"""
    allow_changed_data: bool = False
    """with --resume: continue although the data is not the data that the run began with"""
    overwrite: bool = False
    """start anew in a folder that holds a run, which is moved to OUTPUT.previous, in place of an older one"""
    dry_run: bool = False
    """print the model's parts, the estimated memory and time, and start nothing"""

    # The model
    family: FamilyName = "gpt"
    """architecture: the GPT of the documents, or Qwen3 (RMSNorm, RoPE, grouped queries, SwiGLU)"""
    n_layer: int = 6
    """blocks"""
    n_embd: int = 768
    """channels of a token's vector"""
    n_head: int = 8
    """attention heads; must divide n_embd, unless head_dim is given"""
    block_size: int = 256
    """longest sequence that the model can read, in tokens"""
    dropout: float = 0.1
    """gpt: share of activations zeroed in training"""
    bias: bool = False
    """gpt: biases in every linear layer, as in GPT-2 (False: in qkv_proj alone)"""
    gelu: Literal["exact", "tanh"] = "exact"
    """gpt: GELU itself, or GPT-2's tanh approximation"""
    num_key_value_heads: int = 0
    """qwen3: heads of keys and values; must divide n_head; 0: n_head, nothing is shared"""
    head_dim: int = 0
    """qwen3: channels of a head, even; 0: n_embd / n_head"""
    intermediate_size: int = 0
    """qwen3: channels inside the MLP; 0: 8/3 n_embd, where its three matrices are as large as gpt's two"""
    rope_theta: float = 10_000.0
    """qwen3: RoPE's base (10,000, the paper's, does for some thousand tokens; published models have 1e6)"""
    tie_word_embeddings: bool = True
    """qwen3: one matrix reads and predicts tokens; --no_tie_word_embeddings: two"""
    zero_projections: bool = False
    """begin with blocks that add nothing: zeros in what ends attention and MLP, and in an untied lm_head"""

    # The batches
    max_length: int = 128
    """tokens of a pair (question, answer, two separators); longer ones are cut"""
    batch_size: int = 32
    """pairs of a batch, at most; of --text: windows of block_size tokens"""
    tokens_per_batch: int = 0
    """tokens of a batch including padding, at most; 0: no limit"""
    gradient_accumulation_steps: int = 1
    """batches whose gradients are added up before each step"""
    by_length: bool = True
    """batch pairs of like length together, so that little is padding"""
    pad_to_max_length: bool = False
    """pad every batch to max_length, as the textbook loop does, instead of to its own longest pair"""
    loss_on: Literal["answer", "all"] = "answer"
    """learn to predict the answer's tokens alone, or the question's too"""

    # The steps
    num_train_epochs: float = 15.0
    """how often the training data is seen"""
    max_steps: int = 0
    """number of steps; num_train_epochs does not count then; 0: as many as the epochs need"""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """AdamW for every parameter, or Muon for the matrices of the blocks and AdamW for the rest"""
    learning_rate: float = 1e-4
    """AdamW's highest learning rate"""
    muon_learning_rate: float = 0.02
    """Muon's highest learning rate"""
    muon_weight_decay: float = 0.01
    """Muon's decoupled decay"""
    lr_scheduler_type: Literal["cosine", "wsd", "constant"] = "cosine"
    """what follows the warm-up: fall along a cosine to min_lr_ratio; stay, then fall in a line; or stay"""
    min_lr_ratio: float = 0.1
    """where cosine and wsd end, as a share of the highest learning rate"""
    decay_ratio: float = 0.2
    """wsd: share of the steps, at the end, over which the learning rate falls"""
    warmup_steps: int = 0
    """steps over which the learning rate rises from 0"""
    weight_decay: float = 0.01
    """decoupled decay of matrices (vectors are never decayed)"""
    adam_beta1: float = 0.9
    """AdamW's memory of the gradient"""
    adam_beta2: float = 0.999
    """AdamW's memory of the squared gradient"""
    max_grad_norm: float = 0.0
    """longest gradient; longer ones are scaled down to it; 0: no limit"""

    # Looking on
    eval_steps: int = 0
    """steps between evaluations on all of val_data (each also saves a checkpoint); 0: ten in the run"""
    logging_steps: int = 10
    """steps between lines of metrics.jsonl"""
    save_total_limit: int = 2
    """newest checkpoints to keep, besides the best"""
    save_async: bool = False
    """write checkpoints in the background, while training continues"""
    on_save_error: Literal["continue", "stop"] = "continue"
    """a checkpoint cannot be written (disk full, ...): warn and try again at the next one, or stop"""
    max_bad_steps: int = 3
    """steps in a row without a finite loss and gradient, after which the last checkpoint is gone back to"""
    report_to: Literal["none", "tensorboard", "wandb", "all"] = "tensorboard"
    """what else shows the numbers of metrics.jsonl, if it is installed (wandb: WANDB_PROJECT, WANDB_MODE)"""

    # The machine
    seed: int = 42
    """decides initial weights, order of data, dropout: on a CPU, same seed, data and threads, same bits"""
    device: str = "auto"
    """cpu, cuda, mps, or auto: the best that is there"""
    precision: Precision = "float32"
    """matrix products; auto: in 16 bits on CUDA and on CPUs with AVX-512 BF16 or AMX, else float32"""
    compile: bool = False
    """let torch.compile write kernels for this model: a minute at the start, then faster steps on a GPU"""
    gradient_checkpointing: bool = False
    """keep less of each block for the gradient and compute it twice: less memory, a third more work"""
    threads: int = 0
    """CPU threads; 0: as many as there are cores"""
    workers: int = 0
    """processes that encode --text; 0: one a core; the shards are the same whatever their number"""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """of several processes: each has the whole model (ddp), or a piece (fsdp: for one that does not fit)"""

    def __post_init__(self) -> None:
        if self.size:
            parse_size(self.size)
        super().__post_init__()
        if not self.max_steps and not self.num_train_epochs:
            raise InputError("nothing to do: both max_steps and num_train_epochs are 0")
        if self.text is None and self.val_text:
            raise InputError("--val_text belongs to --text; for questions and answers: --val_data")
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
        if self.resume and self.overwrite:
            raise InputError("--resume continues a run, --overwrite starts anew: give one of them")

    @property
    def starts_from(self) -> Path | None:
        """The folder of the weights that training begins with; None: a new model."""
        return self.init_from

    def model_config(self, vocab_size: int) -> "ModelConfig":
        """The new model that these options describe.

        Raises:
            InputError: for sizes that make no model (n_head must divide n_embd, ...).
        """
        config: ModelConfig = OPTIONS[self.family].model_config(self, vocab_size)
        return config

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready values, paths as text."""
        return {k: str(v) if isinstance(v, Path) else v for k, v in dataclasses.asdict(self).items()}


def read_recipe(recipe: str, kind: type[TrainConfig] = TrainConfig) -> TrainConfig:
    """Read a recipe by its name or by the path of a TOML file.

    A file may begin with `base = "qa-cpu"`: what it does not say is then that recipe's, not this module's.

    Raises:
        InputError: for a recipe that does not exist, broken TOML, an unknown key (naming the nearest), or a
            value of the wrong type.
    """
    path = Path(recipe) if recipe.endswith(".toml") else RECIPES / f"{recipe}.toml"
    known = sorted(file.stem for file in RECIPES.glob("*.toml"))
    if not recipe.endswith(".toml") and recipe not in known:
        raise InputError(unknown_name("recipe", recipe, known))
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"recipe {path} does not exist; the built-in ones are {', '.join(known)}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"recipe {path} is no TOML: {error}") from None
    base = values.pop("base", "")
    if base and base not in known:
        raise InputError(f"recipe {path}: base = {base!r}: expected one of {', '.join(known)}")
    inherited = read_recipe(base, kind).as_dict() if base else {}
    return checked_config({**inherited, **values, "recipe": recipe}, f"recipe {path}", kind)


def read_run(output: Path, kind: type[TrainConfig] = TrainConfig) -> TrainConfig:
    """The configuration that a run was started with, from its folder, to resume it.

    Args:
        kind: the class of its options: TrainConfig, or that of `minigpt finetune`.

    Raises:
        InputError: if the folder holds no run, or one of another command.
    """
    path = output / RUN_FILE
    if not path.exists():
        raise InputError(f"nothing to resume: {path} does not exist; start a run without --resume")
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
    flags = dict.fromkeys(PER_CALL, False)
    return checked_config({**values, **flags, "output": str(output), "resume": True}, str(path), kind)


def checked_config(values: dict[str, Any], source: str, kind: type[TrainConfig] = TrainConfig) -> TrainConfig:
    """The configuration of some JSON-ready values.

    Args:
        source: what they come from, for messages.
        kind: the class of the options.

    Raises:
        InputError: for an unknown key, naming the nearest one; for a value of a wrong type or out of range.
    """
    hints = typing.get_type_hints(kind)
    for key, value in values.items():
        if key not in hints:
            raise InputError(f"{source}: {unknown_name('key', key, hints)}")
        values[key] = _typed(source, key, value, hints[key])
    return kind(**values)


def _typed(source: str, key: str, value: object, hint: Any) -> object:
    if isinstance(hint, types.UnionType):  # X | None
        if value is None:
            return value
        hint = next(one for one in typing.get_args(hint) if one is not types.NoneType)
    if typing.get_origin(hint) is Literal:
        fits = value in typing.get_args(hint)
    elif hint is float:
        fits = isinstance(value, int | float) and not isinstance(value, bool)
        value = float(str(value)) if fits else value  # of text: 10**400 is infinite, not an error
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
        raise InputError(f"{source}: {key} = {value!r}: expected {want}")
    return value
