"""The gRPC face of the edge parts: public files in pieces, to so many edges at a time."""

import asyncio
import contextlib
import logging
from collections.abc import Sequence

import grpc

from cloud_server.allowance import Allowances
from cloud_server.caller import caller
from cloud_server.config.identity import IdentityLimits
from cloud_server.refusal import Refusal, invalid
from cloud_server.releases import Releases
from cloud_server.streams import Context, Traffic, abort, parse
from shared.complaint import TOO_MANY_OPEN, in_words
from shared.edge_parts import EdgePart
from shared.pb.privatelora.v1 import private_lora_pb2 as pb

log = logging.getLogger(__name__)

PIECE_BYTES = 1 << 20
MEND = "its operator has to start the cloud again"


class PartService:
    """Everything behind ``FetchEdgeParts``.

    Parameters
    ----------
    parts
        What is served.
    most
        Fetches under way at a time (count): each holds pieces in memory for an edge that may not read.
    patience_s
        How long an edge may take to read a piece (seconds).
    allowances
        What each identity may use; None is anything.
    """

    def __init__(
        self,
        parts: Sequence[EdgePart],
        most: int,
        patience_s: float,
        allowances: Allowances | None = None,
    ) -> None:
        self.parts, self.most, self.patience_s = parts, most, patience_s
        self.under_way, self.traffic = 0, Traffic()
        self.released = Releases()
        self.allowances = allowances or Allowances(IdentityLimits())

    async def fetch(self, raw: bytes, context: Context) -> None:
        """Stream one public file from an offset."""
        allowance = self.allowances.of(caller().name)
        try:
            part, offset = self._asked_for(raw)
            allowance.admit_fetch()
        except Refusal as refusal:
            await abort(context, refusal)
        self.under_way += 1
        allowance.fetches += 1
        try:
            while offset < part.size:
                piece = await asyncio.to_thread(_read_piece, part, offset)
                if not piece:
                    code = grpc.StatusCode.DATA_LOSS
                    raise Refusal(code, f"{part.name} has become shorter on the cloud's disk; {MEND}")
                offset += len(piece)
                await self._write(pb.FetchEdgePartsResponse(data=piece).SerializeToString(), context)
        except Refusal as refusal:
            with contextlib.suppress(asyncio.TimeoutError):  # who does not read hears nothing either
                await asyncio.wait_for(abort(context, refusal), self.patience_s)
            raise asyncio.CancelledError from None
        finally:
            self.under_way -= 1
            self.released.note()
            allowance.fetches -= 1

    def _asked_for(self, raw: bytes) -> tuple[EdgePart, int]:
        self.traffic.received(raw)
        request = parse(pb.FetchEdgePartsRequest, raw)
        if request.part_index >= len(self.parts):
            raise invalid(f"part {request.part_index} does not exist; there are {len(self.parts)}")
        part = self.parts[request.part_index]
        if request.offset_bytes > part.size:
            raise invalid(f"offset {request.offset_bytes} is beyond the {part.size} bytes of {part.name}")
        if self.under_way >= self.most:
            code = grpc.StatusCode.RESOURCE_EXHAUSTED
            message = f"{self.most} edges fetch parts already; try again later"
            raise Refusal(code, message, retry_after_s=self.released.hint_s(), reason="fetches")
        return part, request.offset_bytes

    async def _write(self, raw: bytes, context: Context) -> None:
        try:
            await asyncio.wait_for(context.write(raw), self.patience_s)
            self.traffic.sent(raw)
        except asyncio.TimeoutError:  # not the built-in one before Python 3.11
            message = f"the edge read nothing for {self.patience_s:g} seconds; fetch the rest anew"
            raise Refusal(grpc.StatusCode.DEADLINE_EXCEEDED, message, reason="slow") from None
        except Exception:  # gRPC has private errors for a stream that the edge has left
            raise asyncio.CancelledError from None


def _read_piece(part: EdgePart, offset: int) -> bytes:
    assert part.path is not None, "a part that is served lies in a file"
    try:
        with part.path.open("rb") as file:
            file.seek(offset)
            return file.read(PIECE_BYTES)
    except OSError as error:
        log.error("cannot serve a part of the model: %s", in_words(error))
        if error.errno in TOO_MANY_OPEN:
            message = "too many files and connections are open on the cloud; try again later"
            raise Refusal(
                grpc.StatusCode.RESOURCE_EXHAUSTED, message, retry_after_s=1.0, reason="fetches"
            ) from None
        # Where it lies on the cloud is nobody's business.
        message = f"{part.name} cannot be read on the cloud's disk; {MEND}"
        raise Refusal(grpc.StatusCode.DATA_LOSS, message) from None
