"""A Hugging Face causal model whose decoder layers are elsewhere.

Embeddings, final norm and head run here, on token ids that never leave this process; a session runs
the layers. Everything that transformers can do with a causal model (`generate` with its samplers,
beams, streamers, stopping rules and prompt-lookup drafting; plain forwards for evaluation tools) is
reduced to `CloudCache.extend`: append these tokens to these rows, return hL of the last few.
"""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from edge_client import claims
from edge_client.claims import Claim
from edge_client.cloud_cache import CloudCache, ContextLengthError, expect_cloud_cache
from edge_client.connection import Connection
from edge_client.drafting import Draft
from edge_client.first_codes import FirstCodes
from edge_client.offer import CloudOffer, Limits
from edge_client.padding import assemble, check_ids, check_positions, new_columns, pick
from edge_client.personal import PersonalWeights
from edge_client.pool import SessionLike, SessionPool
from edge_client.recovery import Recovery
from edge_client.resident import Resident
from edge_client.shared_head import SharedHead
from edge_client.shell import Shell
from edge_client.streams import Traffic
from edge_client.tokenizer import EdgeTokenizer
from shared import hf_names
from shared.adapter import Adapter
from shared.pb.privatelora.v1.private_lora_pb2 import DTYPE_FLOAT32
from shared.wire_dtypes import WireDtypes

__all__ = ["CloudCache", "ContextLengthError", "PrivateLoraForCausalLM"]

OpenSession = Callable[[PersonalWeights], SessionLike]


class PrivateLoraForCausalLM(PreTrainedModel, GenerationMixin):  # type: ignore[no-untyped-call]
    """A causal language model split between this process and a cloud (arXiv 2311.14030).

    Use `from_cloud`. One model may be used from several threads: each call takes a session of its own.

    Parameters
    ----------
    config
        The base model's configuration.
    shell
        Embeddings, final norm and head of the base model.
    limits
        What the cloud allows.
    adapter
        The personal weights.
    open_session
        Opens a session for given personal weights.
    first_codes
        Makes the codes of the cloud's first layer here; None leaves them to the cloud.
    recovery
        What to do when the cloud is lost; None is to raise.
    """

    main_input_name = "input_ids"
    _is_stateful = False
    _supports_sdpa = True

    def __init__(
        self,
        config: PreTrainedConfig,
        shell: Shell,
        limits: Limits,
        adapter: Adapter,
        open_session: OpenSession,
        first_codes: FirstCodes | None = None,
        recovery: Recovery | None = None,
    ) -> None:
        super().__init__(config)
        self.embed_tokens, self.norm, self.lm_head = shell.embed_tokens, shell.norm, shell.lm_head
        self.softcap = shell.softcap
        self._head = SharedHead(self.lm_head)
        self.limits = limits
        self.offer: CloudOffer | None = None
        self.tokenizer: EdgeTokenizer | None = None
        self._open_session = open_session
        self.connection: Connection | None = None
        self.recovery = recovery
        self.resident: Resident | None = None  # layers that run here
        self.wire_dtypes = WireDtypes.all(DTYPE_FLOAT32)
        self._thread = threading.local()
        self._first_codes = first_codes
        personal = PersonalWeights(adapter, first_codes)
        self._adapter = adapter
        self._pool = SessionPool(lambda: open_session(personal), recovery=recovery)
        self.requires_grad_(False)
        self.eval()  # type: ignore[no-untyped-call]

    @classmethod
    def from_cloud(
        cls,
        target: str,
        adapter: str | Path | Adapter | None = None,
        plan: str | None = None,
        wire_dtype: str | None = None,
        device: str | torch.device = "cpu",
        dtype: str | torch.dtype | None = None,
        **options: Any,
    ) -> "PrivateLoraForCausalLM":
        """Connect to a cloud, fetch and verify this side's parts, and return a model ready to use.

        Parameters
        ----------
        target
            ``host:port``, or several with commas: replicas of one cloud.
        adapter
            The personal weights: a file, or an adapter; None is M = 0, the base model.
        plan
            Name of the split to use; None is the adapter's, else the first that the cloud offers.
        wire_dtype
            ``float32``, ``bfloat16``, ``float16`` or ``int8`` (with a scale a row); None is the cloud's
            preference. The options ``hidden_wire_dtype``, ``codes_wire_dtype`` and
            ``residual_codes_wire_dtype`` choose another for one kind of tensor.
        device
            Where embeddings, norm and head run.
        dtype
            Their dtype; None is the dtype that the cloud computes in, as one process would.
        options
            See `edge_client.connect.open_model`: cache folder, fingerprint, timeouts and so on.
        """
        from edge_client.connect import open_model

        return open_model(target, adapter, plan, wire_dtype, device, dtype, **options)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Refuse: the decoder layers are not in any file on this machine."""
        raise TypeError(
            "this model has no layers of its own: use PrivateLoraForCausalLM.from_cloud(host:port)"
        )

    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse: what is this model's own is its adapter."""
        raise TypeError(
            "this model's layers are the cloud's: save what is yours with model.adapter.save(path), and use "
            "it again with from_cloud(host:port, adapter=path)"
        )

    # --- the forward pass ---------------------------------------------------------------------------

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: CloudCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        cache: CloudCache | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple[Tensor, ...]:
        """Run new tokens and return logits, as the base model's own forward does.

        Padding (columns whose mask is 0) is never sent: its logits are those of a zero vector. Rows are
        numbered from their first token on, wherever it stands.

        Parameters
        ----------
        input_ids
            ``(batch, columns)`` int64.
        attention_mask
            ``(batch, past + columns)`` or ``(batch, columns)``; None is no padding.
        position_ids
            Only checked: they must rise by one from token to token.
        past_key_values
            What an earlier forward returned, None to begin.
        labels
            ``(batch, columns)``, -100 is ignored; gives ``loss``.
        logits_to_keep
            Logits of the last n columns, 0 is all; or a tensor of columns.
        cache
            Another name of ``past_key_values``: transformers 5.24 renamed it.

        Raises
        ------
        ContextLengthError
            If a row would exceed the cloud's context.
        ValueError
            If ``input_ids`` are no batch of the vocabulary's ids, or the mask does not fit them.
        ClosedError
            If the model was closed.
        """
        if input_ids is None:
            raise ValueError("input_ids are required: h0 is made from token ids on this side")
        if output_attentions or output_hidden_states:
            raise ValueError("attentions and hidden states of the layers stay in the cloud")
        check_ids(input_ids, self.config.vocab_size)
        batch, width = input_ids.shape
        if cache is not None and past_key_values is not None:
            raise ValueError("cache and past_key_values are one argument under two names: give one of them")
        given = cache if cache is not None else past_key_values
        cache = self.new_cache() if given is None else expect_cloud_cache(given)
        columns = new_columns(attention_mask, batch, width, cache.get_seq_length())
        check_positions(position_ids, columns, width)

        if isinstance(logits_to_keep, int):
            first, picked = (width - logits_to_keep if 0 < logits_to_keep < width else 0), None
        else:
            first, picked = int(logits_to_keep.min()), logits_to_keep - logits_to_keep.min()
        ids = input_ids.tolist()
        new = [ids[i] if cols.count(1) == width else pick(ids[i], cols) for i, cols in enumerate(columns)]
        keep = [cols[first:].count(1) for cols in columns]
        with torch.no_grad():
            rows = cache.extend(new, columns, keep)
        hidden = assemble(rows, columns, first, self.lm_head.weight)  # (batch, width - first, hidden_size)
        logits = self._head(self.norm(hidden if picked is None else hidden[:, picked]))
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        loss = None
        if labels is not None:
            size = self.config.vocab_size
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=size, **kwargs)
        wants_cache = self.config.use_cache if use_cache is None else use_cache
        held: dict[str, Any] = {hf_names.CACHE: cache if wants_cache else None}
        output = CausalLMOutputWithPast(loss=loss, logits=logits, **held)
        return output if return_dict is not False else output.to_tuple()

    def _embed(self, tokens: list[int]) -> Tensor:
        """Return h0 ``(tokens, hidden_size)`` fp32 on the CPU, scaled as the family does."""
        ids = torch.tensor(tokens, device=self.device)
        return cast(Tensor, self.embed_tokens(ids)).to(device="cpu", dtype=torch.float32)

    # --- sessions and adapters ----------------------------------------------------------------------

    def new_cache(self) -> CloudCache:
        """Return an empty cache; it takes a session when it is first used."""
        return CloudCache(self._pool, self._embed, self.limits.max_context_tokens, self.limits.max_rows)

    @property
    def adapter(self) -> Adapter:
        """The personal weights in use."""
        return self._adapter

    def set_adapter(self, adapter: str | Path | Adapter | None) -> None:  # type: ignore[override]
        """Use other personal weights of the same plan; None is M = 0.

        Keys and values depend on M, so what sessions hold is forgotten. A generation that is running
        ends with the adapter that it began with.

        Raises
        ------
        AdapterError
            If the adapter belongs to another plan, backbone or A/B; the present one stays in use.
        """
        if self.offer is not None:
            chosen = self.offer.adapter_for(self._adapter.plan, adapter)
        elif isinstance(adapter, Adapter):
            chosen = adapter
        else:
            raise ValueError("this model was not made by from_cloud: give an Adapter")
        personal, open_session = PersonalWeights(chosen, self._first_codes), self._open_session
        self._adapter = chosen
        self._pool.renew(lambda: open_session(personal))

    def traffic(self) -> Traffic:
        """Return what all sessions have sent and received so far."""
        return self._pool.totals()[0]

    def positions(self) -> int:
        """Return how many positions the cloud has run for this model so far."""
        return self._pool.totals()[1]

    def close(self) -> None:
        """Close idle sessions and the connection."""
        self._pool.close()
        if self.connection is not None:
            self.connection.close()

    def __enter__(self) -> "PrivateLoraForCausalLM":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # --- hooks of transformers' generate --------------------------------------------------------------

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generate as any Hugging Face model does; see `GenerationMixin.generate`.

        ``drafter``, a `edge_client.drafting.Drafter`, guesses tokens that are then checked in one step.
        """
        if (ids := args[0] if args else kwargs.get("inputs", kwargs.get("input_ids"))) is not None:
            check_ids(ids, self.config.vocab_size)
        if (drafter := kwargs.pop("drafter", None)) is not None:
            kwargs |= drafter.options(kwargs.get("generation_config") or self.generation_config, kwargs)
        self._thread.drafter = drafter
        given = kwargs.get(hf_names.CACHE, kwargs.get(hf_names.OLD_CACHE))
        if isinstance(given, CloudCache) and given.is_stale:
            given.detach()  # made under another adapter: run its tokens again under this one
        hf: Any = super()  # typed for some of its own models only, and not alike in every version
        try:
            with claims.answering():
                return hf.generate(*args, **kwargs)
        except BaseException:
            # The traceback would keep the cache, and with it the session, for as long as it lives.
            cache = getattr(self._thread, "cache", None)
            if cache is not None:
                cache.detach()
            raise
        finally:
            self._thread.cache = self._thread.drafter = None

    def _assisted_decoding(self, *args: Any, inputs_tensor: Any = None, **kwargs: Any) -> Any:
        kwargs["inputs_tensor"] = inputs_tensor  # a parameter: transformers gives it to those that name it
        decode, drafter = super()._assisted_decoding, getattr(self._thread, "drafter", None)  # type: ignore[misc]
        if drafter is None:
            return decode(*args, **kwargs)
        return drafter.decode(decode, self.limits, *args, **kwargs)

    def _get_candidate_generator(self, *args: Any, **kwargs: Any) -> Any:
        given = kwargs.get("assistant_model")
        return given if isinstance(given, Draft) else super()._get_candidate_generator(*args, **kwargs)  # type: ignore[misc]

    def _prepare_cache_for_generation(  # type: ignore[override]
        self,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        rows = batch_size * max(generation_config.num_beams or 1, generation_config.num_return_sequences or 1)
        claims.state(Claim(rows, min(generation_config.max_length, self.limits.max_context_tokens)))
        given = model_kwargs.get(hf_names.CACHE)
        if given is not None:
            expect_cloud_cache(given)._is_user_defined = True  # type: ignore[attr-defined]
        elif generation_config.cache_implementation is not None:
            raise ValueError("cache_implementation cannot be chosen: the cache is in the cloud")
        elif generation_config.use_cache is not False:
            self._thread.cache = model_kwargs[hf_names.CACHE] = self.new_cache()
