"""The policy: any causal language model of transformers, fully trained or through LoRA."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from lit_rlhf.checks import check_int
from lit_rlhf.distributed import rank, shard, whole
from lit_rlhf.errors import UserError
from lit_rlhf.functional import entropy_from_logits, selective_logprobs
from lit_rlhf.layers import compile_layers, state_size
from lit_rlhf.models.attention import use_fitting_attention
from lit_rlhf.models.guided import GUIDANCE_FILE, GuidedModel, load_guidance
from lit_rlhf.models.packed import decoding_layers, use_decoding_layers
from lit_rlhf.models.requirements import require_decoder
from lit_rlhf.models.sources import NO_CODE, not_loaded, resolve_model
from lit_rlhf.rollout.sampler import position_ids


class PolicyOutput(NamedTuple):
    """What one forward pass says about a batch of responses of T tokens.

    Attributes:
        logprobs: (B, T) log-probability of each response token at the given temperature, fp32, nats.
        entropy: (B, T) entropy of the distribution that each token was drawn from, fp32, nats, where it was asked for.
        hidden: (B, T + 1, d) last hidden states. Entry t is the state in which token t is chosen; the last one is the
            state after the last token.
        logits: (B, T, vocabulary) that the log-probabilities come from, where they were asked for.
    """

    logprobs: Tensor
    entropy: Tensor | None
    hidden: Tensor
    logits: Tensor | None


class Policy(nn.Module):
    """A causal language model with its tokenizer.

    Args:
        model: a causal LM of transformers.
        tokenizer: its tokenizer; padding side and a pad token that is missing or unknown to the model are set here.
        lora: keyword arguments of ``peft.LoraConfig`` (``r``, ``lora_alpha``, ``target_modules``, ...); None trains all
            weights. The adapter starts at zero, so the first policy equals the model.
        gradient_checkpointing: recompute activations in the backward pass: less memory, more time.
        compile: let torch.compile fuse what lies between the matrix products of a layer, in training and in stage 3,
            not in decoding; of the reference and a separate critic, too. Costs some tens of seconds at the start (with
            recurrent layers on a CPU, whose loops are unrolled, many minutes) and needs a C++ compiler.
    """

    def __init__(
        self,
        *,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        lora: dict[str, Any] | None = None,
        gradient_checkpointing: bool = False,
        compile: bool = False,
    ) -> None:
        super().__init__()
        tokenizer.padding_side = "left"
        known = model.config.get_text_config().vocab_size
        if tokenizer.pad_token_id is None or tokenizer.pad_token_id >= known:  # added, and the embeddings not resized
            tokenizer.pad_token = tokenizer.eos_token
        if tokenizer.pad_token_id is None:
            raise UserError("the policy's tokenizer has neither a pad nor an eos token; set one before training")
        self.tokenizer = tokenizer
        self.checkpointing = gradient_checkpointing
        if gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        if lora is not None:
            try:
                model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **lora))
            except (TypeError, ValueError) as error:
                raise UserError(f"policy.lora={lora} does not fit this model: {error}") from error
            _require_plain_lora(model, lora)
        self.model = model
        object.__setattr__(self, "_decoder", None)
        self.sharded = False
        require_decoder(self)
        self.compiled = compile
        if compile:
            compile_layers(self.base)

    @classmethod
    def from_pretrained(
        cls,
        *,
        path: str,
        lora: dict[str, Any] | None = None,
        attention: str | None = None,
        gradient_checkpointing: bool = False,
        compile: bool = False,
        trust_remote_code: bool = False,
    ) -> "Policy":
        """Loads a policy by hub name, by folder, or by a short name such as ``smollm2`` (see ``lit-rlhf fetch``).

        A folder with a peft adapter is loaded and merged into its base model, so that a new adapter starts on top and
        the reference is the model that the run starts from. A folder with Q heads (of ILQL or deep Q-learning) gives a
        policy whose logits they guide, see ``models/guided.py``. ``attention`` names one of transformers'
        implementations; None takes its choice, and where that is ``sdpa`` what fits, see ``models/attention.py``.
        ``trust_remote_code`` runs the Python code that comes with a model, which can do anything.

        Raises:
            UserError: nothing can be loaded from ``path``, or what is no causal language model.
        """
        folder = resolve_model(path)
        settings = {"dtype": torch.float32, "attn_implementation": attention, "trust_remote_code": trust_remote_code}
        try:
            if (Path(folder) / "adapter_config.json").exists():
                model = AutoPeftModelForCausalLM.from_pretrained(folder, **settings).merge_and_unload()
                missing = set()
            else:
                model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **settings)
                missing = report["missing_keys"]
        except Exception as error:  # of whatever is in the folder
            raise not_loaded("policy.path", path, "causal language model", error) from error
        require_language_model(path, model.config)
        if missing:  # which transformers makes at random
            raise UserError(
                f"policy.path={path} is no whole causal language model: it has no weights for {min(missing)}; name a "
                "folder that was saved with them"
            )
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
        except Exception as error:  # as above
            raise not_loaded("policy.path", path, "tokenizer", error) from error
        if attention is None:
            use_fitting_attention(model)
        model = load_guidance(folder, model)
        if isinstance(model, GuidedModel) and (lora is not None or gradient_checkpointing):
            raise UserError(
                f"policy.path={path} decodes with Q heads, which needs policy.lora=null and "
                "policy.gradient_checkpointing=false; to go on from its language model alone, copy the folder without "
                f"{GUIDANCE_FILE}"
            )
        settings = {"gradient_checkpointing": gradient_checkpointing, "compile": compile}
        return cls(model=model, tokenizer=tokenizer, lora=lora, **settings)

    @classmethod
    def from_config(
        cls,
        *,
        tokenizer: str,
        lora: dict[str, Any] | None = None,
        gradient_checkpointing: bool = False,
        compile: bool = False,
        model_type: str = "llama",
        **config: Any,
    ) -> "Policy":
        """A randomly initialised model: ``config`` goes to transformers' config class of ``model_type``.

        ``tokenizer`` is a path or hub name, or ``bytes``: one token a byte, made on the spot. ``vocab_size`` may be
        larger than its vocabulary.
        """
        made = byte_tokenizer() if tokenizer == "bytes" else _load_tokenizer(tokenizer)
        for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
            if name in config:
                check_int(f"policy.{name}", config[name], at_least=1)
        if "vocab_size" in config:
            check_int("policy.vocab_size", config["vocab_size"], at_least=len(made))
        special = {"bos_token_id": made.bos_token_id, "eos_token_id": made.eos_token_id}
        try:
            model_config = AutoConfig.for_model(
                model_type, pad_token_id=made.pad_token_id, **special, **{"vocab_size": len(made), **config}
            )
        except ValueError as error:
            raise UserError(f"policy.model_type={model_type}: {error}") from error
        # Transformers keeps whatever it is given, so a misspelt key would go unread.
        known = {**AutoConfig.for_model(model_type).to_dict(), **model_config.attribute_map}
        if unread := sorted(set(config) - set(known)):
            raise UserError(f"a model of policy.model_type={model_type} does not read {', '.join(unread)}")
        model = AutoModelForCausalLM.from_config(model_config)
        use_fitting_attention(model)
        settings = {"gradient_checkpointing": gradient_checkpointing, "compile": compile}
        return cls(model=model, tokenizer=made, lora=lora, **settings)

    @property
    def base(self) -> PreTrainedModel:
        """The transformers model, without peft's wrapper."""
        return self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model

    @property
    def hidden_size(self) -> int:
        """The width of the states in which tokens are chosen."""
        return state_size(self.base.config)

    @property
    def vocabulary(self) -> int:
        """The number of token ids that the model tells apart."""
        return self.base.config.get_text_config().vocab_size

    @property
    def context_length(self) -> int | None:
        """The longest sequence the model takes, in tokens; None where its config does not say."""
        return getattr(self.base.config.get_text_config(), "max_position_embeddings", None)

    @property
    def reads_more_than_text(self) -> bool:
        """Whether the model has parts, for images or sounds, whose weights no text reaches."""
        return self.base.config.get_text_config() is not self.base.config

    @property
    def stop_ids(self) -> list[int]:
        """The ids that end a completion: those of the generation config, and the tokenizer's end of sequence."""
        configured = self.base.generation_config.eos_token_id if self.base.generation_config else None
        ids = configured if isinstance(configured, list) else [configured]
        return sorted({i for i in [*ids, self.tokenizer.eos_token_id] if i is not None})

    def forward(
        self,
        prompt_ids: Tensor,
        prompt_mask: Tensor,
        response_ids: Tensor,
        response_mask: Tensor,
        *,
        temperature: float = 1.0,
        entropy: bool = False,
        entropy_grad: bool = False,
        entropy_top_k: int | None = None,
        keep_logits: bool = False,
    ) -> PolicyOutput:
        """Log-probabilities and entropies of responses (B, T) after prompts (B, P), padded left and right.

        The head runs at the response positions only. Positions count real tokens, so padding changes nothing.
        Log-softmax and entropy are in fp32 at every precision. The entropy is that of the likeliest ``entropy_top_k``
        tokens, or of all, and detached unless ``entropy_grad``.
        """
        start, steps = prompt_ids.shape[1] - 1, response_ids.shape[1]
        mask = torch.cat([prompt_mask, response_mask], dim=1)
        output = self.model(
            input_ids=torch.cat([prompt_ids, response_ids], dim=1),
            attention_mask=mask,
            position_ids=position_ids(mask),
            logits_to_keep=torch.arange(start, start + steps, device=mask.device),
            output_hidden_states=True,
            use_cache=False,
        )
        # At temperature 1 the logits stay as they are: the functions below work in fp32 without a whole fp32 copy.
        logits = output.logits if temperature == 1 else output.logits.float() / temperature
        entropies = None
        if entropy:
            with torch.set_grad_enabled(entropy_grad and torch.is_grad_enabled()):
                entropies = entropy_from_logits(logits, entropy_top_k)
        logprobs = selective_logprobs(logits, response_ids)
        return PolicyOutput(logprobs, entropies, output.hidden_states[-1][:, start:], logits if keep_logits else None)

    def decoder(self, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
        """The model to decode with: weights as they are now, LoRA merged, in ``dtype``. Called once per rollout phase.

        It is a copy where that pays (LoRA, or another dtype), of which only what trains is made again. Between rollout
        phases ``free_decoder`` gives up the memory of that part.
        """
        own = next(self.model.parameters())
        if dtype == own.dtype and not isinstance(self.model, PeftModel) and not self.sharded:
            return self.model
        # Lightning validates in inference mode, whose tensors could never be written to again in training.
        with torch.inference_mode(False), torch.no_grad():
            if self._decoder is None or (next(self._decoder.parameters()).device != own.device and not self.sharded):
                # Not a submodule: it must not enter the optimiser, the checkpoint or train().
                object.__setattr__(self, "_decoder", self._copy(dtype))
                use_decoding_layers(self._decoder)
            self._refresh(self._decoder.to(own.device))
        return self._decoder

    def _copy(self, dtype: torch.dtype) -> PreTrainedModel:
        clone = copy.deepcopy(self.model)
        clone = clone.unload() if isinstance(clone, PeftModel) else clone
        for parameter in clone.parameters():
            parameter.requires_grad_(False)
            parameter.data = parameter.data.to(dtype)
        return clone.eval()

    def _refresh(self, clone: PreTrainedModel) -> None:
        targets = dict(clone.named_parameters())
        layers = decoding_layers(clone)
        for name, weight in self._trained_weights():
            target = targets[name]
            if target.numel() == 0:  # freed
                target.data = torch.empty_like(weight, dtype=target.dtype)
            target.copy_(weight)
            for layer in layers.get(id(target), ()):
                layer.renew()

    def _trained_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Those weights of the model that training changes, adapters merged, each whole."""
        if not isinstance(self.model, PeftModel):
            yield from ((name, whole(parameter)) for name, parameter in self.model.named_parameters())
            return
        for name, module in self.base.named_modules():
            if isinstance(module, LoraLayer):
                delta = sum(module.get_delta_weight(adapter) for adapter in module.active_adapters)
                yield f"{name}.weight", whole(module.get_base_layer().weight) + whole(delta)

    def free_decoder(self) -> None:
        """Gives up the memory of what ``decoder`` makes again: the whole copy, but for adapters and sharded weights."""
        if self._decoder is None or self.sharded or isinstance(self.model, PeftModel):
            return
        with torch.inference_mode(False):  # as in ``decoder``
            for parameter in self._decoder.parameters():
                parameter.data = parameter.data.new_empty(0)
            for layers in decoding_layers(self._decoder).values():
                for layer in layers:
                    layer.renew()

    @torch.no_grad()
    def merged(self) -> PreTrainedModel:
        """A copy of the model with the adapter merged in, in full precision; every process must call it."""
        if self.sharded:
            clone = copy.deepcopy(self._decoder).float().cpu()
            targets = dict(clone.named_parameters())
            for name, parameter in self.base.named_parameters():
                if "lora_" not in name:
                    targets[name.replace(".base_layer.", ".")].copy_(whole(parameter))
            self._refresh(clone)
            return clone
        clone = copy.deepcopy(self.model)
        return clone.merge_and_unload() if isinstance(clone, PeftModel) else clone

    def shard(self, mesh: Any, dtype: torch.dtype) -> None:
        """Shards the weights over the processes of ``mesh`` (FSDP2); decoding keeps a whole copy of them in ``dtype``.

        A sharded model would have to be put together anew for every token.
        """
        if self.sharded:
            return
        object.__setattr__(self, "_decoder", self._copy(dtype))
        shard(self.base, mesh)
        self.sharded = True

    def save(self, folder: Path) -> None:
        """Writes the merged model and the tokenizer in Hugging Face's format (safetensors), in the first process."""
        merged = self.merged()
        if rank() == 0:
            if merged.generation_config is not None and (ids := self.stop_ids):  # `generate` stops where we do
                merged.generation_config.eos_token_id = ids if len(ids) > 1 else ids[0]
            merged.save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Policy":
        clone = Policy.__new__(Policy)
        nn.Module.__init__(clone)
        clone.model = copy.deepcopy(self.model, memo)
        clone.tokenizer = self.tokenizer
        clone._decoder = None
        clone.sharded = False
        clone.compiled = self.compiled
        clone.checkpointing = self.checkpointing
        if self.compiled:  # which a copy is not: the reference is to compute what the policy does, to the last bit
            compile_layers(clone.base)
        return clone


def require_language_model(path: str, config: PreTrainedConfig) -> None:
    """Raises UserError for the config of a classifier: transformers would give its trunk a random head for tokens."""
    kinds = config.architectures or []
    if any(kind.endswith("Classification") for kind in kinds):
        raise UserError(
            f"policy.path={path} is a {' or '.join(kinds)}, such as a reward model, and writes nothing; name a causal "
            "language model"
        )


def _load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    folder = resolve_model(name)
    try:
        return AutoTokenizer.from_pretrained(folder, **NO_CODE)
    except Exception as error:  # of whatever is in the folder
        raise not_loaded("policy.tokenizer", name, "tokenizer", error) from error


def _require_plain_lora(model: PeftModel, lora: dict[str, Any]) -> None:
    """Refuses what would make the reference (adapter off) or the decoding copy (weight + delta) another model."""
    config = next(iter(model.peft_config.values()))
    refused = {
        "modules_to_save": bool(config.modules_to_save),
        "use_dora": config.use_dora,
        "trainable_token_indices": config.trainable_token_indices is not None,
        "bias": config.bias != "none",
        "init_lora_weights": config.init_lora_weights not in (True, "gaussian"),
    }
    wrong = [name for name, found in refused.items() if found]
    base = model.get_base_model()
    layers = {name: layer for name, layer in base.named_modules() if isinstance(layer, LoraLayer)}
    head = base.get_output_embeddings()
    odd = {name for name, layer in layers.items() if type(layer).__name__ != "Linear" or layer is head}
    if odd and not wrong:  # one of each kind: layers differ by their number
        wrong = [f"target_modules ({', '.join(sorted({name.split('.', 3)[-1] for name in odd}))})"]
    if wrong:
        raise UserError(
            f"policy.lora={lora}: {', '.join(wrong)} is not supported. The reference is the model, adapter off, so "
            "the adapter must start at zero and be LoRA on linear layers inside the model, not on embeddings or head"
        )


def disable_dropout(module: nn.Module) -> None:
    """Sets every dropout probability to 0.

    Rollout and update must see the same distribution, or the first ratio is not 1. Some models keep probabilities as
    plain attributes (``attention_dropout``) and read them in their forward pass.
    """
    for part in module.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
        for name, value in vars(part).items():
            if "drop" in name and isinstance(value, float):
                setattr(part, name, 0.0)


def byte_tokenizer() -> PreTrainedTokenizerBase:
    """256 byte tokens and three special ones: for tiny models and tests, no download."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", padding_side="left"
    )
