"""Lets lm-evaluation-harness measure minigpt's models, under the name `minigpt`.

    python -m minigpt.evaluation.harness run --model minigpt --model_args pretrained=output/best --tasks copa

    import minigpt.evaluation.harness                            # in Python: this registers the name
    lm_eval.simple_evaluate(model="minigpt", model_args="pretrained=output/best", tasks=["arc_easy"])

The first line above is a shell command. It starts the harness's command line, with all of its flags. The
harness's own command, lm_eval, would not find the model `minigpt`. All this needs optional packages: pip
install 'minigpt[evaluate]'.

Model arguments: pretrained; precision (float32, float16, bfloat16, int8, int4); adapter; device; batch_size;
max_length; max_gen_toks; add_bos_token (as in the harness's model `hf`, which runs transformers).
"""

import functools
import importlib.util
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from minigpt.errors import InputError, printable
from minigpt.evaluation.prompts import Request
from minigpt.evaluation.scoring import ContinuationScorer
from minigpt.evaluation.task_command import load
from minigpt.evaluation.task_results import generate_texts, rolling_windows
from minigpt.finetuning.classification import SequenceClassifier
from minigpt.generation.options import GenerationOptions
from minigpt.tokenization.subword import SubwordTokenizer

IS_INSTALLED = importlib.util.find_spec("lm_eval") is not None

__all__ = ["IS_INSTALLED", "HarnessModel", "main", "register"]

_MAX_NEW_TOKENS = 256  # default of max_gen_toks, as in the harness's model `hf`


class HarnessModel:
    """A model with the functions that lm-evaluation-harness calls: log-likelihoods and generation.

    `register` combines this class with the harness's TemplateLM, which splits texts into context and
    continuation.
    """

    backend = "causal"
    cache_hook: Any  # set by the harness; results are given to this object, which stores them

    def __init__(
        self,
        pretrained: str,
        device: str | None = "auto",
        batch_size: int | str | None = 8,
        max_batch_size: int | None = None,
        precision: str | None = None,
        adapter: str | None = None,
        max_length: int | None = None,
        max_gen_toks: int = _MAX_NEW_TOKENS,
        add_bos_token: bool | None = None,
    ) -> None:
        super().__init__()
        # The harness may pass 16, "16", None or "auto" as batch_size. None and "auto" mean 8 here.
        rows = int(batch_size or 8) if str(batch_size or "").isdecimal() else 8
        folder = None if adapter is None else Path(adapter)
        if str(device).startswith("cuda") and not torch.cuda.is_available():
            device = None  # "cuda:0" is the harness's default, so without a GPU it is not an error
        self._loaded = load(Path(pretrained), device or "auto", precision, folder, max(1, rows))
        if isinstance(self._loaded.model, SequenceClassifier):
            raise InputError(f"{pretrained} holds a classifier: the harness measures language models")
        self._lm, self.tokenizer = self._loaded.model, self._loaded.tokenizer
        self.batch_size, self.max_gen_toks = max(1, rows), max_gen_toks
        self.max_length = max_length or self._lm.config.max_position_embeddings
        self._adds = add_bos_token
        self._device = next(self._lm.parameters()).device

    # -- tokens ---------------------------------------------------------------------------------------------

    @property
    def eot_token_id(self) -> int:
        """The id of the token that ends a text."""
        return int(self.tokenizer.eos_token_id)  # type: ignore[arg-type]

    @property
    def prefix_token_id(self) -> int:
        """The id of the token put before a text without context, so that the text's first token is scored."""
        start = getattr(self.tokenizer, "bos_token_id", None)
        return self.eot_token_id if start is None else int(start)

    @property
    def tokenizer_name(self) -> str:
        """The tokenizer's fingerprint, which is a key in the harness's cache of requests."""
        return self.tokenizer.fingerprint

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Return the ids of a text as AutoTokenizer of transformers does: by default, with special tokens.

        add_special_tokens: True: with special tokens, such as BOS. False: without. None: the model argument
            add_bos_token decides. If that is not given either, special tokens are added, except to a text
            that already begins with BOS.
        """
        adds = self._adds if add_special_tokens is None else add_special_tokens
        tokenizer = self.tokenizer
        if isinstance(tokenizer, SubwordTokenizer):
            splits = bool(tokenizer.definition.config.get("split_special_tokens"))
            ids = tokenizer.encode_text(string, add_special_tokens=False, allow_special=not splits)
            if adds is False or (adds is None and ids[:1] == [self.prefix_token_id]):
                return ids
            return [*tokenizer.before_text, *ids, *tokenizer.after_text]
        plain = tokenizer.encode_text(string)
        return plain if adds is False else [*plain, tokenizer.sep_token_id]

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Return a conversation as text, written by the model's chat template."""
        from minigpt.tokenization.chat_template import render_chat

        template = self.tokenizer.chat_template if isinstance(self.tokenizer, SubwordTokenizer) else None
        if template is None:
            raise InputError("this model's tokenizer has no chat template: leave out --apply_chat_template")
        named = self.tokenizer.named_tokens  # type: ignore[union-attr]
        return render_chat(
            template, chat_history, named_tokens=named, add_generation_prompt=add_generation_prompt
        )

    # -- functions that the harness calls -------------------------------------------------------------------

    @functools.cached_property
    def _scorer(self) -> ContinuationScorer:
        return ContinuationScorer(self._lm, self.max_length)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **more: Any
    ) -> list[tuple[float, bool]]:
        pairs: list[Request] = [(context, continuation) for _, context, continuation in requests]
        scored = self._scorer.score(pairs)
        answers = [(one.total, one.is_greedy) for one in scored]
        for (texts, _, _), answer in zip(requests, answers):
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, answer)
        return answers

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood of each whole text. Long texts are computed in pieces."""
        found = []
        for one in requests:
            (text,) = one.args
            windows = rolling_windows(self.tok_encode(text), self.prefix_token_id, self.max_length)
            scored = self._scorer.score(windows)
            found.append(sum(each.total for each in scored))
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), found[-1])
        return found

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Continue each text until a stop string, the end token, or the limit max_gen_toks."""
        groups: dict[str, list[int]] = {}
        for number, one in enumerate(requests):
            groups.setdefault(repr(sorted(one.args[1].items())), []).append(number)
        found = [""] * len(requests)
        for numbers in groups.values():
            asked = requests[numbers[0]].args[1]
            options, until = self._options(asked)
            kept = self.max_length - options.wanted
            if kept < 1:
                raise InputError(
                    f"max_gen_toks={options.wanted} leaves no room for a prompt: the model reads "
                    f"{self.max_length} tokens"
                )
            prompts = [self.tok_encode(requests[number].args[0])[-kept:] for number in numbers]
            texts, _ = generate_texts(self._loaded, prompts, options)
            for number, text in zip(numbers, texts):
                for stop in until:
                    text = text.split(stop)[0]
                found[number] = text
                self.cache_hook.add_partial("generate_until", requests[number].args, text)
        return found

    def _options(self, given: Mapping[str, Any]) -> tuple[GenerationOptions, list[str]]:
        values = dict(given)
        until = values.pop("until", None) or []
        until = [one for one in ([until] if isinstance(until, str) else until) if one]
        names = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
        limits = [values.pop(name) for name in names if name in values]
        temperature = float(values.pop("temperature", 0.0) or 0.0)
        samples = bool(values.pop("do_sample", temperature > 0)) and temperature > 0
        known: dict[str, Any] = {
            name: values.pop(name) for name in ("top_p", "top_k", "min_p") if name in values
        }
        more = {"temperature": temperature, **known} if samples else {}
        return GenerationOptions(
            max_new_tokens=int(limits[0]) if limits else self.max_gen_toks,
            do_sample=samples, seed=0 if samples else None, stop_strings=until, **more,
        ), until  # fmt: skip


def register() -> None:
    """Register the model with the harness, under the name `minigpt`."""
    import lm_eval.models  # noqa: F401 -- importing this registers the harness's own models
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import model_registry

    if "minigpt" not in model_registry:
        model_registry.register("minigpt", target=type("MinigptLM", (HarnessModel, TemplateLM), {}))


def main() -> None:
    """Run the harness's command line."""
    if not IS_INSTALLED:
        raise SystemExit("lm-evaluation-harness is not installed: pip install 'minigpt[evaluate]'")
    from lm_eval.__main__ import cli_evaluate

    try:
        cli_evaluate()
    except InputError as error:
        print(f"minigpt: error: {printable(str(error))}", file=sys.stderr)
        raise SystemExit(2) from None


if IS_INSTALLED:
    register()

if __name__ == "__main__":
    main()
