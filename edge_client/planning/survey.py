"""Everything that is measured for predictions, in one go: the cloud's offer, both devices, the link."""

from dataclasses import dataclass
from typing import Any

import torch

from edge_client import part_settings, parts
from edge_client.config import EdgeConfig
from edge_client.connection import Connection, Timeouts
from edge_client.credentials import Credentials
from edge_client.offer import CloudOffer, OfferError
from edge_client.planning.candidates import candidates
from edge_client.planning.measure_cloud import measure_cloud
from edge_client.planning.measure_edge import measure_edge
from edge_client.planning.model_shape import ModelShape
from edge_client.planning.network import LinkFacts
from edge_client.planning.predict import Setting
from edge_client.planning.speeds import CloudSpeed, EdgeSpeed
from shared import wire
from shared.plan import Plan
from shared.wire_dtypes import WireDtypes


@dataclass(frozen=True)
class Survey:
    """What was measured, and what was asked for: ``dtypes`` on the wire, ``edge_bytes`` an element here."""

    cloud_address: str
    offered: tuple[Plan, ...]
    possible: tuple[Plan, ...]
    shape: ModelShape
    edge: EdgeSpeed
    cloud: CloudSpeed
    link: LinkFacts
    dtypes: WireDtypes
    edge_bytes: int

    @classmethod
    def take(cls, settings: EdgeConfig) -> "Survey":
        """Measure the cloud that ``settings`` names, and this side.

        Raises
        ------
        OfferError, EdgePartsError, SessionError, CloudConnectionError
            Each says what was wrong. Nothing private has been sent.
        """
        if settings.threads is not None:
            torch.set_num_threads(settings.threads)
        device = settings.device
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:  # the latter from a build without the device
            reason = str(error).partition("\n")[0]
            raise ValueError(f"cannot compute on device {device!r}: {reason}") from None
        timeouts = Timeouts(settings.connect_timeout_s, settings.step_timeout_s)
        connection = Connection(settings.cloud, timeouts, Credentials.of(settings))
        try:
            described = connection.describe()
            offer = CloudOffer.check(connection.target, described)
            folder = parts.fetch_config(connection, offer.parts, settings.cache_dir)
            config, sizes = part_settings.read_config(folder)
            offered = tuple(plan for plan, _ in offer.plans.values())
            if (sizes.num_layers, sizes.hidden_size) != (offered[0].num_layers, offered[0].hidden_size):
                raise OfferError(f"{settings.cloud}: config.json and the plans describe different models")
            dtype = _dtype(settings.dtype, offer.compute_dtype)
            preferred = wire.WIRE_DTYPES[offer.compute_dtype]
            dtypes = WireDtypes.named(
                settings.wire_dtype or preferred,
                settings.hidden_wire_dtype,
                settings.codes_wire_dtype,
                settings.residual_codes_wire_dtype,
            )
            cloud, link = measure_cloud(connection, offer, preferred)
        finally:
            connection.close()
        shape = ModelShape.from_config(config)
        possible = tuple(candidates(offered, shape))
        adapted = next((plan for plan in (*offered, *possible) if plan.adapted_layers), offered[0])
        edge = measure_edge(config, adapted, device, dtype)
        return cls(settings.cloud, offered, possible, shape, edge, cloud, link, dtypes, dtype.itemsize)

    def setting(self, link: LinkFacts | None = None, **options: Any) -> Setting:
        """Return what predictions need, over the measured link or another one; as `Setting` takes it."""
        return Setting(
            shape=self.shape,
            edge=self.edge,
            cloud=self.cloud,
            link=link or self.link,
            wire=self.dtypes,
            edge_bytes=self.edge_bytes,
            **options,
        )


def _dtype(name: str | None, default: torch.dtype) -> torch.dtype:
    return default if name is None else wire.TORCH_DTYPES[wire.DTYPE_NAMES[name]]
