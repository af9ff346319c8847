"""From an address to a model ready to use: describe, compare, fetch, verify, build."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from edge_client import chunking, part_settings, part_tensors, parts, trust
from edge_client.connection import Connection, Timeouts
from edge_client.credentials import Credentials
from edge_client.first_codes import FirstCodes
from edge_client.model import PrivateLoraForCausalLM
from edge_client.offer import CloudOffer, OfferError, fingerprint_message
from edge_client.personal import PersonalWeights
from edge_client.pool import SessionLike
from edge_client.recovery import Recovery
from edge_client.resident import Resident
from edge_client.resident_session import ResidentSession
from edge_client.session import Resumed, Session
from edge_client.shell import build_shell
from edge_client.tokenizer import load_tokenizer
from shared import wire
from shared.adapter import Adapter
from shared.edge_parts import codes_file
from shared.wire_dtypes import WireDtypes


def open_model(
    target: str,
    adapter: str | Path | Adapter | None = None,
    plan: str | None = None,
    wire_dtype: str | None = None,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype | None = None,
    *,
    hidden_wire_dtype: str | None = None,
    codes_wire_dtype: str | None = None,
    residual_codes_wire_dtype: str | None = None,
    prefill_chunk_tokens: int | None = None,
    fingerprint: str | None = None,
    accept_new_fingerprint: bool = False,
    cache_dir: Path | None = None,
    config_dir: Path | None = None,
    timeouts: Timeouts | None = None,
    credentials: Credentials | None = None,
    allow_redirect: Sequence[str] = (),
    say: Callable[[str], object] | None = None,
    progress: bool = False,
) -> PrivateLoraForCausalLM:
    """Connect and build; `PrivateLoraForCausalLM.from_cloud` says what the first parameters mean.

    Parameters
    ----------
    hidden_wire_dtype, codes_wire_dtype, residual_codes_wire_dtype
        What hidden states (both ways), codes and residual codes travel as; None is ``wire_dtype``.
    prefill_chunk_tokens
        Most positions of a prompt in one step (count); None is `edge_client.chunking`'s.
    fingerprint
        Root of the expected fingerprint in hex, from a source you trust.
    accept_new_fingerprint
        Replace what is pinned for this address.
    cache_dir, config_dir
        Where parts and pins are kept; None is the user's own folders.
    timeouts
        Bounds on waiting.
    credentials
        TLS, client certificate and token; None is in clear.
    allow_redirect
        Names besides those in ``target`` that a cloud which drains may send this edge to.
    say
        Takes one line when the cloud is lost and tried again; None is the log.
    progress
        Whether to show progress on stderr.

    Raises
    ------
    OfferError, TrustError, EdgePartsError, TokenizerError, TemplateError, AdapterError, CloudConnectionError
        Each says what was wrong, what was expected and what to do. Nothing private has been sent.
    """
    kinds = (hidden_wire_dtype, codes_wire_dtype, residual_codes_wire_dtype)
    WireDtypes.named("float32" if wire_dtype is None else wire_dtype, *kinds)  # before the cloud is asked
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # the latter from a build of torch without the device
        reason = str(error).partition("\n")[0]
        raise ValueError(f"cannot compute on device {str(device)!r}: {reason}") from None
    connection = Connection(target, timeouts, credentials, allow_redirect)
    try:
        described = connection.describe()
        target = connection.target
        offer = CloudOffer.check(target, described)
        chosen = offer.adapter_for(offer.plan(plan)[0] if plan is not None else None, adapter)
        trust.check_known(
            offer,
            chosen.plan,
            chosen.fingerprint,
            expected=fingerprint,
            accept_new=accept_new_fingerprint,
            config_dir=config_dir,
        )
        folder = parts.fetch(connection, offer.parts, cache_dir, plan=chosen.plan, progress=progress)
        config, sizes = part_settings.read_config(folder)
        if (sizes.num_layers, sizes.hidden_size) != (chosen.plan.num_layers, chosen.plan.hidden_size):
            raise OfferError(f"{target}: config.json and plan {chosen.plan.name!r} describe different models")
        precision = _dtype(dtype) if dtype is not None else offer.compute_dtype
        shell = build_shell(config, part_tensors.read_tensors(folder, sizes), device, precision)
        on_wire = WireDtypes.named(wire_dtype or wire.WIRE_DTYPES[offer.compute_dtype], *kinds)

        resident = None
        if chosen.plan.resident_layers:
            resident = Resident.read(config, chosen.plan, folder, device, precision)

        first = None
        if chosen.plan.first_codes_on_edge and (folder / codes_file(chosen.plan)).is_file():
            first = FirstCodes.read(config, chosen.plan, folder)

        def open_session(personal: PersonalWeights) -> SessionLike:
            # Before anything is opened: an adapter may not fit what this side computes in.
            layers = None if resident is None else resident.with_factors(personal.factors)
            address = connection.target  # read once: another thread's recovery may move on at any time
            limits = offer.same_at(address, connection.described(address), personal.plan)
            message = fingerprint_message(offer.plans[personal.plan.name][1])
            chunk = prefill_chunk_tokens or chunking.prefill_chunk_tokens(personal.plan)
            session = connection.open_session(personal, message, on_wire, limits, address, chunk)
            return session if layers is None else ResidentSession(session, layers)

        def pick_up(session: SessionLike) -> Resumed:
            inner = session.session if isinstance(session, ResidentSession) else session
            assert isinstance(inner, Session)
            found = connection.resume(inner, fingerprint_message(offer.plans[inner.plan.name][1]))
            return session.resumed(found) if isinstance(session, ResidentSession) else found

        recovery = Recovery(connection, pick_up, connection.timeouts.recover_s, say)
        model = PrivateLoraForCausalLM(config, shell, offer.limits, chosen, open_session, first, recovery)
        model.generation_config = part_settings.read_generation_config(folder, config)
        model.tokenizer = load_tokenizer(folder, sizes.vocab_size, offer.limits.max_context_tokens)
        model.offer, model.connection, model.resident = offer, connection, resident
        model.wire_dtypes = on_wire
        return model
    except BaseException:
        connection.close()
        raise


def _dtype(name: str | torch.dtype) -> torch.dtype:
    if isinstance(name, torch.dtype):
        return name
    dtypes = {wire.dtype_name(number): dtype for number, dtype in wire.TORCH_DTYPES.items()}
    if name not in dtypes:
        raise ValueError(f"dtype {name!r} is not one of {', '.join(dtypes)}")
    return dtypes[name]
