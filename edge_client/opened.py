"""From a command's settings to a model ready to use. Imports torch: only for commands that need it."""

import sys
from pathlib import Path

import torch
import transformers

from edge_client.config import EdgeConfig
from edge_client.connection import Timeouts
from edge_client.credentials import Credentials
from edge_client.model import PrivateLoraForCausalLM
from edge_client.plain import one_line


def opened(settings: EdgeConfig, adapter: Path | None) -> PrivateLoraForCausalLM:
    """Connect as the settings say, with progress on stderr; ``adapter`` None is M = 0."""
    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    return PrivateLoraForCausalLM.from_cloud(
        settings.cloud,
        adapter,
        settings.plan,
        settings.wire_dtype,
        settings.device,
        settings.dtype,
        fingerprint=settings.fingerprint,
        accept_new_fingerprint=settings.accept_new_fingerprint,
        cache_dir=settings.cache_dir,
        timeouts=Timeouts(settings.connect_timeout_s, settings.step_timeout_s, settings.recover_timeout_s),
        credentials=Credentials.of(settings),
        allow_redirect=settings.allow_redirect,
        say=_say,
        hidden_wire_dtype=settings.hidden_wire_dtype,
        codes_wire_dtype=settings.codes_wire_dtype,
        residual_codes_wire_dtype=settings.residual_codes_wire_dtype,
        prefill_chunk_tokens=settings.prefill_chunk_tokens,
        progress=True,
    )


def _say(line: str) -> None:
    """Say on stderr what happens to the connection; the answer's text on stdout stays as it is."""
    print(f"\n[{one_line(line)}]", file=sys.stderr, flush=True)
